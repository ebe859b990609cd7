"""The FASTA reader: every layout gives the same records, and every fault is one line that says where."""

import gzip
import io
import random
import re
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import RESIDUE_LETTERS, FastaText, fasta_texts, sequences

from protformer.corpus.fasta import FastaReport, SequenceRecord, read_batches, read_fasta
from protformer.corpus.letters import count_codes
from protformer.errors import InputError

zstandard = pytest.importorskip("zstandard")

DUPLICATE = "make the ids differ, or choose --on-duplicate suffix or first"
HEADER_LINE = "in the header; lines must end in LF or CRLF"
NO_START = "not FASTA: expected '>' at the start, found"
REPAIR = "complete the record or remove it"
CUT = "the end of the compressed data is missing; copy the file again"
ALLOWED = "is not allowed in a sequence; allowed are the letters A to Z in either case, '*', '-' and '.'"


def write(folder: Path, content: bytes, name: str = "proteins.fasta") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def read(path: str | Path, **options) -> list[tuple[str, str]]:
    return [(record.id, record.sequence) for record in read_fasta(path, **options)]


def fault(path: str | Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **options)
    return str(caught.value)


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def bgzip(content: bytes, *, piece_bytes: int = 40, end_mark: bool = True) -> bytes:
    """BGZF by the SAM specification, section 4.1: gzip members that carry their size, then an empty one."""
    pieces = [content[i : i + piece_bytes] for i in range(0, len(content), piece_bytes)] + [b""] * end_mark
    members = []
    for piece in pieces:
        compressor = zlib.compressobj(wbits=-15)
        data = compressor.compress(piece) + compressor.flush()
        size = struct.pack("<H", len(data) + 25)
        header = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0" + size
        members.append(header + data + struct.pack("<II", zlib.crc32(piece), len(piece)))
    return b"".join(members)


def zstd(content: bytes) -> bytes:
    """Two frames, as `cat a.zst b.zst` gives, behind a skippable one, as pzstd writes."""
    half = len(content) // 2
    frames = [zstandard.compress(content[:half]), zstandard.compress(content[half:])]
    return b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"size" + b"".join(frames)


COMPRESSIONS = {
    "plain.fasta": bytes,
    "one.gz": gzipped,
    "members.gz": lambda content: gzipped(content[:50]) + gzipped(content[50:]),
    "padded.gz": lambda content: gzipped(content) + bytes(512),
    "blocks.bgz": bgzip,
    "frames.zst": zstd,
    "plain_named.gz": bytes,
    "gzip_named.fa": gzipped,
}


@pytest.mark.parametrize("stdin", [False, True])
@pytest.mark.parametrize("lower_case", [False, True])
@pytest.mark.parametrize("width", [3, 1000])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_every_format_gives_the_same_records(tmp_path, monkeypatch, name, line_end, width, lower_case, stdin):
    text = ""
    for header, sequence in (("sp|P1|ONE first protein", "MKVLAA"), ("P2", RESIDUE_LETTERS)):
        letters = sequence.lower() if lower_case else sequence
        lines = [letters[i : i + width] for i in range(0, len(letters), width)]
        text += line_end.join([f">{header}", *lines, "", ""])
    path = write(tmp_path, COMPRESSIONS[name](text.encode()), name)
    if stdin:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    records = list(read_fasta("-" if stdin else path))
    assert [record.id for record in records] == ["sp|P1|ONE", "P2"]
    assert [record.header for record in records] == ["sp|P1|ONE first protein", "P2"]
    assert [record.sequence for record in records] == ["MKVLAA", RESIDUE_LETTERS]
    assert records[1].line == 1 + 1 + -(-6 // width) + 1
    assert len(records[0]) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file: no sequences in it"),
        (b"\n\r\n  \n", "empty file: no sequences in it"),
        (b"MKV\n", f"line 1, column 1: {NO_START} 'M'"),
        (b"\n>a\nMK\nM9\n", f"record 'a', line 4, column 2: '9' {ALLOWED}"),
        (b"\n\nMKV\n>a\nMK\n", f"line 3, column 1: {NO_START} 'M'"),
        (b" >a\nMK\n", f"line 1, column 1: {NO_START} a space"),
        (b";comment\n>a\nMK\n", f"line 1, column 1: {NO_START} ';'"),
        (b"\x89PNG\r\n\x1a\n\0\0", f"line 1, column 1: {NO_START} binary data (byte 0x89)"),
        (b">\nMK\n", "line 1, column 2: header without an id; the id must follow '>' at once"),
        (b">a\nMK\n> b\nMK\n", "line 3, column 2: header without an id; the id must follow '>' at once"),
        (b">a\nMK\n>", "line 3, column 2: header without an id; the id must follow '>' at once"),
        (b">a\n>b\nMK\n", f"record 'a', line 1: empty sequence; {REPAIR}"),
        (b">a\nMK\n>b", f"record 'b', line 3: empty sequence; {REPAIR}"),
        (
            b">a\n--..\n-*\n",
            f"record 'a', line 1: empty sequence, nothing is left without gaps and stop; {REPAIR}",
        ),
        (b">a\nMK\nM1K\n", f"record 'a', line 3, column 2: '1' {ALLOWED}"),
        (b">a\nMK\n\n  MK?\n", f"record 'a', line 4, column 5: '?' {ALLOWED}"),
        (b">a\r\nMK\r\nMK LA\r\n", f"record 'a', line 3, column 3: a space {ALLOWED}"),
        (b">a\nM\tK\n", f"record 'a', line 2, column 2: a tab {ALLOWED}"),
        (b">a\nMK>b\nMK\n", f"record 'a', line 2, column 3: '>' {ALLOWED}"),
        (b">a\nMK\n;comment\n", f"record 'a', line 3, column 1: ';' {ALLOWED}"),
        (b">a\nMK\xc3\xa9\n", f"record 'a', line 2, column 3: '\xe9' {ALLOWED}"),
        (b">a\nMK\xe9\n", f"record 'a', line 2, column 3: binary data (byte 0xe9) {ALLOWED}"),
        (b">a\nM\0K\n", f"record 'a', line 2, column 2: binary data (byte 0x00) {ALLOWED}"),
        (b">a\nM\x1bK\n", f"record 'a', line 2, column 2: binary data (byte 0x1b) {ALLOWED}"),
        (b">a b\0c\nMK\n", f"record 'a', line 1, column 5: binary data (byte 0x00) {HEADER_LINE}"),
        (b">a\rMK\r", f"record 'a', line 1, column 3: a carriage return {HEADER_LINE}"),
        (b">a\x1b[31m\nM1\n", f"record 'a\\x1b[31m', line 2, column 2: '1' {ALLOWED}"),
        (
            b">a\nMK\n\n>a\nML\n",
            f"record 'a', line 4: duplicate id, first on line 1; {DUPLICATE}",
        ),
        (b"BZh91AY", "is bzip2-compressed; give it plain, gzip or zstd"),
        (gzipped(b">a\n" + b"MK\n" * 50)[:-9], f"truncated gzip: {CUT}"),
        (
            bgzip(b">a\n" + b"MKVLAALEWK\n" * 10, end_mark=False),
            f"truncated gzip: {CUT}",
        ),
        (gzipped(b">a\nMK\n") + b"junk", "corrupt gzip: other data follow the compressed data"),
        (zstandard.compress(b">a\n" + b"MK\n" * 50)[:-2], f"truncated zstd: {CUT}"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line_that_says_where(tmp_path, content, message):
    path = write(tmp_path, content)
    assert fault(path) == f"{path}: {message}"


def test_corrupt_compressed_data_are_refused_in_one_line(tmp_path):
    packed = bytearray(gzipped(b">a\nMKVLA\n"))
    packed[12] ^= 0xFF
    assert fault(write(tmp_path, bytes(packed))).startswith(f"{tmp_path}/proteins.fasta: corrupt gzip: ")
    packed = bytearray(zstandard.compress(b">a\nMKVLA\n"))
    packed[5] ^= 0xFF
    assert fault(write(tmp_path, bytes(packed))).startswith(f"{tmp_path}/proteins.fasta: corrupt zstd: ")


@pytest.mark.parametrize("name", [name for name in COMPRESSIONS if "gz" in name])
def test_gzip_is_read_the_same_with_and_without_isal(tmp_path, monkeypatch, name):
    pytest.importorskip("isal")
    content = COMPRESSIONS[name]("".join(f">p{i}\n{'MKVLA' * i}\n" for i in range(1, 60)).encode())
    path = write(tmp_path, content, name)
    records, message = outcome(path)
    assert (len(records), message) == (59, None)
    for case in (content, content[:-1], content[:30], content + b"junk", content + bytes(70_000), content * 2):
        path.write_bytes(case)
        with_isal = outcome(path)
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "isal", None)
            assert outcome(path) == with_isal


@pytest.mark.parametrize("name", ["one.gz", "members.gz", "blocks.bgz"])
@pytest.mark.parametrize("library", ["isal", "zlib"])
def test_a_flipped_bit_in_gzip_is_refused_or_harms_nothing(tmp_path, monkeypatch, name, library):
    if library == "zlib":
        monkeypatch.setitem(sys.modules, "isal", None)
    else:
        pytest.importorskip("isal")
    content = COMPRESSIONS[name]("".join(f">p{i}\n{'MKVLA' * i}\n" for i in range(1, 60)).encode())
    path = write(tmp_path, content, name)
    whole = outcome(path)
    rng = random.Random(0)
    num_refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        records, message = outcome(path)
        num_refused += message is not None
        assert message is not None or records == whole[0]
    assert num_refused > 100


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert fault(tmp_path / "no.fasta") == f"{tmp_path}/no.fasta: no such file"
    assert fault(tmp_path) == f"{tmp_path}: is a folder; give a file"


def test_a_message_stays_on_one_line_whatever_the_name_of_the_file(tmp_path):
    message = fault(write(tmp_path, b"", "two\nlines.fasta"))
    assert message.endswith("two\\nlines.fasta': empty file: no sequences in it")
    assert "\n" not in message


def test_without_the_zstd_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path, zstandard.compress(b">a\nMK\n"), "a.zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert fault(path) == f"{path}: is zstd-compressed; pip install 'protformer[zstd]' to read it"


def test_records_before_a_fault_are_given_out(tmp_path):
    records = read_fasta(write(tmp_path, b">a\nMK\n>b\nML\n>c\nM1\n"))
    assert [next(records).id, next(records).id] == ["a", "b"]
    with pytest.raises(InputError, match="record 'c'"):
        next(records)


def test_letters_are_changed_as_promised_and_each_change_is_counted(tmp_path):
    path = write(tmp_path, b">a\nMJjK*\n>b\n-M.K*L--*\n>c\nUOBZX**\n>d\nm*\n-\n>e\nMK\n")
    report = FastaReport()
    assert read(path, report=report) == [
        ("a", "MXXK"),
        ("b", "MKXL"),
        ("c", "UOBZXX"),
        ("d", "M"),
        ("e", "MK"),
    ]
    assert report == FastaReport(
        records=5, residues=17, j_to_x=2, trailing_stop_dropped=4, inner_stop_to_x=2, gaps_removed=5
    )
    assert report.summary() == (
        "2 J read as X, 4 trailing * dropped, 2 inner * read as X, 5 gap characters removed (in 5 sequences read)"
    )


def test_nothing_is_reported_where_nothing_was_changed(tmp_path):
    report = FastaReport()
    read(write(tmp_path, b">a\nmkx\n"), report=report)
    assert report.summary() is None
    assert (report.records, report.residues) == (1, 3)


def test_reports_add_up():
    total = FastaReport(records=1, j_to_x=2)
    total.merge(FastaReport(records=3, gaps_removed=4))
    assert total == FastaReport(records=4, j_to_x=2, gaps_removed=4)


PIECES = [b">", b"\n", b"\r", b" ", b"a", b"MKL", b"*", b"-", b"J", b"\0", b"\xff", b";"]

DUPLICATES = b">A 1\nMK\n>A 2\nML\n>A_2 3\nMV\n>B 4\nMA\n>A 5\nMC\n"


def test_duplicates_get_suffixes_that_no_other_record_has(tmp_path):
    report = FastaReport()
    records = list(read_fasta(write(tmp_path, DUPLICATES), on_duplicate="suffix", report=report))
    assert [record.id for record in records] == ["A", "A_3", "A_2", "B", "A_4"]
    assert [record.header for record in records] == ["A 1", "A 2", "A_2 3", "B 4", "A 5"]
    assert (report.records, report.duplicates_renamed) == (5, 2)


def test_from_a_pipe_an_id_that_was_given_away_is_refused_not_given_to_another_protein(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(DUPLICATES)))
    assert fault("-", on_duplicate="suffix") == (
        "standard input: record 'A_2', line 5: the id was given to a duplicate further up; "
        "give a file instead of a pipe"
    )


def test_the_first_of_duplicates_can_be_kept(tmp_path):
    report = FastaReport()
    kept = read(write(tmp_path, DUPLICATES), on_duplicate="first", report=report)
    assert kept == [("A", "MK"), ("A_2", "MV"), ("B", "MA")]
    assert (report.records, report.residues, report.duplicates_dropped) == (3, 6, 2)


def test_duplicates_can_be_allowed(tmp_path):
    kept = read(write(tmp_path, DUPLICATES), on_duplicate="allow")
    assert [name for name, _ in kept] == ["A", "A", "A_2", "B", "A"]


def test_an_id_may_not_come_back_in_another_file(tmp_path):
    first, second = write(tmp_path, b">a\nMK\n>b\nMK\n", "1.fa"), write(tmp_path, b">c\nMK\n>b\nML\n", "2.fa")
    with pytest.raises(
        InputError,
        match=f"2.fa: record 'b', line 3: duplicate id, first on line 3 of {re.escape(str(first))}",
    ):  # noqa: E501
        list(read_batches([first, second]))


def test_headers_may_be_latin_1_and_stay_different(tmp_path):
    assert read(write(tmp_path, b">prot\xe9\nMK\n>prot\xe8\nML\n>prot\xc3\xaa\nMV\n")) == [
        ("prot\xe9", "MK"),
        ("prot\xe8", "ML"),
        ("prot\xea", "MV"),
    ]


def test_a_byte_order_mark_at_the_start_is_skipped(tmp_path):
    assert read(write(tmp_path, b"\xef\xbb\xbf>a\nMK\n")) == [("a", "MK")]


def test_white_space_around_sequence_lines_is_no_matter(tmp_path):
    assert read(write(tmp_path, b">a \n  MK \n\tL\r\r\n>b\nMK\r")) == [("a", "MKL"), ("b", "MK")]


@given(fasta_texts())
def test_biopython_reads_the_same_records(tmp_path_factory, fasta: FastaText):
    from Bio import SeqIO

    path = write(tmp_path_factory.getbasetemp(), fasta.content, "hypothesis.fasta")
    with warnings.catch_warnings(), open(path, encoding="utf-8") as handle:
        warnings.simplefilter("ignore")  # Biopython warns of blank lines at the start
        lines = handle.read().lstrip()
        theirs = [(record.id, str(record.seq).upper()) for record in SeqIO.parse(io.StringIO(lines), "fasta")]
    assert read(path) == theirs == list(zip(fasta.ids, fasta.sequences, strict=True))


@given(
    fasta=fasta_texts(),
    block_bytes=st.integers(1, 64),
    mutation=st.binary(max_size=3),
    place=st.integers(0, 500),
)
def test_the_size_of_the_blocks_changes_neither_records_nor_messages(
    tmp_path_factory, fasta: FastaText, block_bytes: int, mutation: bytes, place: int
):
    content = fasta.content[:place] + mutation + fasta.content[place:]
    path = write(tmp_path_factory.getbasetemp(), content, "hypothesis.fasta")
    assert outcome(path, _block_bytes=block_bytes) == outcome(path)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(st.sampled_from(PIECES)).map(b"".join),
        st.builds(lambda fasta, cut: gzipped(fasta.content)[:cut], fasta_texts(), st.integers(0, 300)),
        st.builds(lambda fasta, cut: zstandard.compress(fasta.content)[:cut], fasta_texts(), st.integers(0, 300)),
    )
)  # fmt: skip
def test_any_bytes_give_records_or_one_line(tmp_path_factory, content: bytes):
    path = write(tmp_path_factory.getbasetemp(), content, "hypothesis.fasta")
    records, message = outcome(path)
    assert records or message is not None
    for record in records:
        assert record.id
        assert record.id.split() == [record.id]
        assert record.header.startswith(record.id)
        assert set(record.sequence) <= set(RESIDUE_LETTERS)
        assert len(record) > 0
    if message is not None:
        assert message.startswith(f"{path}: ")
        assert message.isprintable()


@pytest.mark.parametrize("block_bytes", [1, 5, 1 << 18])
def test_of_two_faults_the_first_is_told_also_when_the_second_is_in_the_compression(tmp_path, block_bytes):
    """Found by fuzzing: the cut end of the stream hid a bad letter before it, but not with small blocks."""
    content = b">a\nM1\n>b\n" + random.Random(0).randbytes(300).hex().encode() + b"\n"
    path = write(tmp_path, gzipped(content)[:-30])
    assert fault(path, _block_bytes=block_bytes) == f"{path}: record 'a', line 2, column 2: '1' {ALLOWED}"


def test_a_file_of_half_a_byte_order_mark_is_not_called_empty(tmp_path):
    """Found by fuzzing: the reader waited for the rest of the mark and forgot what it had."""
    path = write(tmp_path, b"\xef\xbb")
    assert fault(path) == f"{path}: line 1, column 1: {NO_START} binary data (byte 0xef)"


@pytest.mark.parametrize("block_bytes", [1, 2, 1 << 18])
def test_a_character_that_a_block_cuts_in_two_is_described_as_a_whole(tmp_path, block_bytes):
    """Found by fuzzing: a letter of two bytes was called binary data when a block ended in it."""
    path = write(tmp_path, "\u0416>a\nMK\n".encode())
    assert fault(path, _block_bytes=block_bytes) == f"{path}: line 1, column 1: {NO_START} '\u0416'"


@given(st.lists(sequences(letters="MK*-.Jx", max_size=12), min_size=1, max_size=6), st.integers(1, 30))
def test_letters_are_changed_the_same_in_every_record(tmp_path_factory, raw: list[str], block_bytes: int):
    expected = []
    for sequence in raw:
        residues = sequence.replace("-", "").replace(".", "").upper().removesuffix("*")
        expected.append(residues.replace("*", "X").replace("J", "X"))
    kept = [(i, sequence) for i, sequence in enumerate(expected) if sequence]
    content = "".join(f">{i}\n{raw[i]}\n" for i, _ in kept)
    path = write(tmp_path_factory.getbasetemp(), content.encode(), "hypothesis.fasta")
    if kept:
        assert read(path, _block_bytes=block_bytes) == [(str(i), sequence) for i, sequence in kept]


def test_memory_does_not_grow_with_the_file(tmp_path):
    import tracemalloc

    residues = "".join(random.Random(0).choices(RESIDUE_LETTERS, k=300))
    peaks = []
    for count in (4_000, 16_000):
        content = "".join(f">protein{i}\n{residues}\n" for i in range(count)).encode()
        path = write(tmp_path, gzipped(content))
        del content
        tracemalloc.start()
        assert sum(1 for _ in read_fasta(path, on_duplicate="allow")) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def outcome(path: Path, **options) -> tuple[list[SequenceRecord], str | None]:
    """The records up to the end or the fault, and the message of the fault."""
    records: list[SequenceRecord] = []
    try:
        for record in read_fasta(path, **options):
            records.append(record)  # noqa: PERF402
    except InputError as error:
        return records, str(error)
    return records, None


@given(st.binary(max_size=400) | st.lists(st.integers(2, 28), max_size=400).map(bytes))
def test_count_codes_counts_every_byte_value(codes):
    assert count_codes(codes).tolist() == [codes.count(value) for value in range(256)]


@given(fasta_texts())
def test_batches_count_their_tokens(tmp_path_factory, fasta: FastaText):
    path = write(tmp_path_factory.getbasetemp(), fasta.content, "hypothesis.fasta")
    for batch in read_batches([path], on_duplicate="allow"):
        counts = [batch.tokens.count(value) for value in range(256)]
        assert batch.token_counts.tolist() == counts
        chosen = np.arange(len(batch)) % 2 == 0
        some = batch.select(chosen)
        assert some.token_counts.tolist() == [some.tokens.count(value) for value in range(256)]
