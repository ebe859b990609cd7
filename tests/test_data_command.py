"""`data stats` and `data dedup` against counts made the slow way."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import fasta_texts

from protformer.cli import run
from protformer.corpus.fasta import read_fasta
from protformer.corpus.statistics import count_proteins
from protformer.corpus.unique_sequences import SeenDigests


def write_fasta(path, sequences):
    path.write_text("".join(f">p{i} some words\n{sequence}\n" for i, sequence in enumerate(sequences)))
    return path


@given(fasta_texts())
def test_statistics_are_what_counting_by_hand_gives(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("stats") / "a.fa"
    path.write_bytes(text.content)
    tree = count_proteins([path]).to_tree()
    lengths = sorted(len(sequence) for sequence in text.sequences)
    letters = Counter("".join(text.sequences))
    assert (tree["proteins"], tree["residues"]) == (len(lengths), sum(lengths))
    assert {letter: count for letter, count in tree["residue_counts"].items() if count} == letters
    assert sum(tree["residue_frequencies"].values()) == pytest.approx(1)
    length = tree["length"]
    assert (length["shortest"], length["longest"]) == (lengths[0], lengths[-1])
    assert length["mean"] == pytest.approx(np.mean(lengths))
    expected = np.quantile(lengths, [float(share) for share in length["quantiles"]], method="inverted_cdf")
    assert list(length["quantiles"].values()) == expected.tolist()
    edges = length["histogram"]["edges"]
    assert edges == sorted(set(edges))
    assert edges[0] <= lengths[0]
    assert edges[-1] > lengths[-1]
    assert length["histogram"]["proteins"] == np.histogram(lengths, edges)[0].tolist()


def test_a_store_and_its_fasta_have_the_same_statistics(tmp_path, capsys):
    fasta = write_fasta(tmp_path / "a.fa", ["MKVJ", "MKVLLX", "A" * 300])
    assert run(["prepare", "--fasta", str(fasta), "--out", str(tmp_path / "store"), "-q"]) == 0
    capsys.readouterr()
    plot = tmp_path / "a.png"
    assert run(["data", "stats", "--fasta", str(fasta), "--json", "--plot", str(plot)]) == 0
    captured = capsys.readouterr()
    assert run(["data", "stats", "--fasta", str(tmp_path / "store"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(captured.out)
    assert "1 J read as X" in captured.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run(["data", "stats", "--fasta", str(fasta), "-q"]) == 0
    table = capsys.readouterr().out
    assert "residues      310" in table
    assert "50% 6" in table


def test_a_store_beside_a_file_is_refused(tmp_path, capsys):
    fasta = write_fasta(tmp_path / "a.fa", ["MKV"])
    assert run(["prepare", "--fasta", str(fasta), "--out", str(tmp_path / "store"), "-q"]) == 0
    both = ["--fasta", str(tmp_path / "store"), "--fasta", str(fasta)]
    assert run(["data", "stats", *both]) == 1
    assert "one token store, or FASTA files, not both" in capsys.readouterr().err


def test_a_store_is_exported_as_fasta_and_taken_wherever_fasta_is(tmp_path, capsys):
    fasta = write_fasta(tmp_path / "a.fa", ["MKV" * 50, "AAA", "MKVJ", "AAA"])
    store, out, unique = tmp_path / "store", tmp_path / "out.fa.gz", tmp_path / "unique.fa"
    assert run(["prepare", "--fasta", str(fasta), "--out", str(store), "-q"]) == 0
    assert run(["data", "export", "--fasta", str(store), "--out", str(out)]) == 0
    assert f"{out}: 4 proteins, 160 residues" in capsys.readouterr().out
    expected = [(record.id, record.sequence) for record in read_fasta(fasta)]
    assert [(record.header, record.sequence) for record in read_fasta(out)] == expected
    assert run(["data", "dedup", "--fasta", str(store), "--out", str(unique)]) == 0
    assert [(record.header, record.sequence) for record in read_fasta(unique)] == expected[:3]


@pytest.mark.parametrize("command", ["data stats", "prepare --out {}/store", "train --out {}/run"])
def test_a_file_that_is_given_twice_is_refused(tmp_path, capsys, command):
    fasta = write_fasta(tmp_path / "a.fa", ["MKV"])
    (tmp_path / "same.fa").symlink_to(fasta)
    words = [*command.format(tmp_path).split(), "--fasta", str(fasta), "--fasta", str(tmp_path / "same.fa")]
    assert run(words) == 1
    assert capsys.readouterr().err == f"error: --fasta {tmp_path / 'same.fa'}: is given twice; leave one out\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fa", "same.fa"]


@pytest.mark.parametrize("command", ["data stats", "prepare --out {}/store"])
def test_dna_in_place_of_proteins_is_warned_of_once(tmp_path, capsys, command):
    for name, sequence in (("dna", "ACGTNACGTT" * 20), ("protein", "MKVLLAACDEFGHIKLNPQRSTVWY" * 20)):
        fasta = write_fasta(tmp_path / f"{name}.fa", [sequence])
        assert run([*command.format(tmp_path / name).split(), "--fasta", str(fasta)]) == 0
        told = capsys.readouterr().err
        assert told.count("100% of the letters are A, C, G, T, U or N: this looks like DNA") == (name == "dna")


@pytest.mark.parametrize("options", [[], ["--split", "hash"]])
def test_a_place_where_nothing_can_be_made_is_told_as_it_was_typed(tmp_path, capsys, options):
    fasta = write_fasta(tmp_path / "a.fa", ["MKV"])
    assert run(["prepare", "--fasta", str(fasta), "--out", "/proc/foo", "-q", *options]) == 1
    assert capsys.readouterr().err == "error: /proc/foo: cannot be written: No such file or directory\n"


@pytest.mark.parametrize("name", ["out.fa", "out.fa.gz"])
def test_dedup_keeps_the_first_of_each_sequence_with_its_header(tmp_path, capsys, name):
    first = write_fasta(tmp_path / "a.fa", ["MKV" * 50, "AAA", "MKV" * 50, "aaa"])
    second = tmp_path / "b.fa.gz"
    second.write_bytes(gzip.compress(b">q x | y\nA-AA*\n>p0\nGG\nJ\n"))
    out = tmp_path / name
    assert run(["data", "dedup", "--fasta", str(first), "--fasta", str(second), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "3 proteins, 156 residues; 3 repeated sequences dropped" in captured.out
    assert "1 J read as X" in captured.err
    kept = [(record.header, record.sequence) for record in read_fasta(out, on_duplicate="suffix")]
    assert kept == [("p0 some words", "MKV" * 50), ("p1 some words", "AAA"), ("p0", "GGX")]
    text = gzip.decompress(out.read_bytes()) if name.endswith(".gz") else out.read_bytes()
    assert max(map(len, text.split(b"\n"))) == 60
    again = tmp_path / f"again_{name}"
    assert run(["data", "dedup", "--fasta", str(first), "--fasta", str(second), "--out", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("out", "content", "message"),
    [
        ("a.fa", b">a\nMKV\n", "exists already"),
        ("out.zst", b">a\nMKV\n", "is written plain, or gzip-compressed"),
        ("out.fa", b">a\nMKV\n>b\nM1\n", "line 4, column 2"),
        ("no/out.fa", b">a\nMKV\n", "cannot be written"),
    ],
)
def test_a_failed_dedup_is_one_line_and_leaves_nothing(tmp_path, capsys, out, content, message):
    (tmp_path / "a.fa").write_bytes(content)
    assert run(["data", "dedup", "--fasta", str(tmp_path / "a.fa"), "--out", str(tmp_path / out), "-q"]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.fa"]


@given(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=40), max_size=30), st.integers(1, 20))
def test_digests_are_remembered_across_all_runs(batches, recent):
    seen, oracle = SeenDigests(recent=recent), set()
    for batch in batches:
        digests = [number.to_bytes(2, "big") + bytes(14) for number in batch]
        expected = []
        for digest in digests:
            expected.append(digest not in oracle)
            oracle.add(digest)
        assert seen.add(digests) == expected
