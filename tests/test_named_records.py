"""Named proteins from an indexed FASTA file are those that reading it gives, and nothing else of it is read."""

import gzip
import os

import pyfaidx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import RESIDUE_LETTERS

from protformer.corpus.fasta import FastaReport, read_fasta
from protformer.corpus.named_records import read_named
from protformer.errors import InputError


def write_indexed(path, content):
    path.write_bytes(content)
    pyfaidx.Faidx(str(path)).close()
    return path


def named(path, names, on_duplicate="error", report=None, told=None):
    report = FastaReport() if report is None else report
    tell = (lambda line: None) if told is None else told.append
    return list(read_named(path, names, on_duplicate=on_duplicate, report=report, tell=tell))


def contents(records):
    return [(record.id, record.header, record.tokens) for record in records]


@given(
    st.lists(st.text(RESIDUE_LETTERS + "jJ-.*" + RESIDUE_LETTERS.lower(), max_size=90), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([7, 60]),
    st.data(),
)
def test_the_index_gives_what_reading_the_file_gives(tmp_path_factory, sequences, line_end, width, data):
    text = ""
    for i, body in enumerate(sequences):
        letters = "M" + body
        lines = [letters[j : j + width] for j in range(0, len(letters), width)]
        text += line_end.join([f">p{i} a > b é" + " word" * (1000 * (i == 1)), *lines]) + line_end
    path = write_indexed(tmp_path_factory.mktemp("named") / "a.fa", text.encode())
    names = data.draw(st.lists(st.sampled_from([f"p{i}" for i in range(7)]), unique=True))
    report, expected_report = FastaReport(), FastaReport()
    found = named(path, names, report=report)
    everything = list(read_fasta(path, report=expected_report))
    assert contents(found) == contents(record for record in everything if record.id in names)
    assert report.records == len(found)
    if len(found) == len(everything):
        assert report == expected_report


@pytest.mark.parametrize("is_indexed", [True, False])
def test_a_protein_is_found_by_its_accession_too(tmp_path, is_indexed):
    content = b">sp|P12345|A_B x\nMKV\n>tr|Q1|C\nML\n>P2\nMA\n"
    path = (write_indexed if is_indexed else _write)(tmp_path / "a.fa", content)
    assert [record.id for record in named(path, {"P12345", "tr|Q1|C", "A_B"})] == ["sp|P12345|A_B", "tr|Q1|C"]


def test_only_the_named_records_are_read(tmp_path):
    path = write_indexed(tmp_path / "a.fa", b">bad\nM1K\n>good x\nMKVLLA\nMK\n>worse too\n!!\n")
    assert contents(named(path, {"good", "not there"})) == contents(
        read_fasta(_write(tmp_path / "b.fa", b">good x\nMKVLLAMK\n"))
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.fa", "a.fa.fai", "b.fa"]
    with pytest.raises(InputError, match=r"a.fa: record 'bad', letter 2: '1' is not allowed in a sequence"):
        named(path, {"bad"})


def _write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_without_an_index_the_file_is_read_and_none_is_made(tmp_path, compress):
    path = _write(tmp_path / "a.fa", compress(b">a\nMKV\n>b\nMJ\n"))
    assert [record.sequence for record in named(path, ["b"])] == ["MX"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.fa"]


def test_an_index_older_than_its_file_is_not_used(tmp_path):
    path = write_indexed(tmp_path / "a.fa", b">a\nMKV\n>b\nMKKK\n")
    path.write_bytes(b">b\nGGGGGGGG\n>a\nAAAAAA\n")
    os.utime(tmp_path / "a.fa.fai", ns=(0, path.stat().st_mtime_ns - 1))
    told = []
    assert [record.sequence for record in named(path, ["a"], told=told)] == ["AAAAAA"]
    assert told == [f"{path}.fai: older than the FASTA file, so it is not used"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"b\t3\t100\t3\t4\n", "does not fit the FASTA file"),
        (b"b\t3\t3\t3\t4\n", "does not fit the FASTA file"),
        (b"b\t9\t10\t9\t10\n", "does not fit the FASTA file"),
        (b"b\tx\t10\t3\t4\n", "not the line of a FASTA index"),
        (b"b\n", "not the line of a FASTA index"),
    ],
)
def test_an_index_of_another_file_is_refused(tmp_path, index, message):
    path = _write(tmp_path / "a.fa", b">a\nMKV\n>b\nMKK\n")
    _write(tmp_path / "a.fa.fai", index)
    with pytest.raises(InputError, match=f"a.fa.fai: .*{message}"):
        named(path, ["b"])


def test_duplicates_among_the_named_are_refused_dropped_or_numbered(tmp_path):
    path = _write(tmp_path / "a.fa", b">a\nMKV\n>b\nMKK\n>a\nGGG\n")
    _write(tmp_path / "a.fa.fai", b"a\t3\t3\t3\t4\nb\t3\t10\t3\t4\na\t3\t17\t3\t4\n")
    with pytest.raises(InputError, match="record 'a': duplicate id"):
        named(path, ["a"])
    assert [record.sequence for record in named(path, ["a"], "first")] == ["MKV"]
    assert [record.sequence for record in named(path, ["a_2"], "suffix")] == ["GGG"]
    assert [record.sequence for record in named(path, ["b"])] == ["MKK"]


def test_an_empty_protein_is_refused(tmp_path):
    path = write_indexed(tmp_path / "a.fa", b">a\n-*\n")
    with pytest.raises(InputError, match="record 'a': empty sequence, nothing is left"):
        named(path, ["a"])
