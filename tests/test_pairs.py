"""Tables of protein pairs: what is read, and how faults are told."""

import gzip
from pathlib import Path

import pytest

from protformer.corpus.pairs import Pair, read_pairs, resolve_pairs
from protformer.errors import InputError


def write(folder: Path, content: bytes, name: str = "pairs.tsv") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_pairs_come_in_order_with_their_lines(tmp_path, line_end, compress):
    lines = [b"P1\tP2\t1", b"", b"P2\tP3\t0.0", b"P3\tP3\t1.0", b"sp|A|B\tP1"]
    path = write(tmp_path, compress(line_end.join(lines)))
    assert read_pairs(path) == [
        Pair(a="P1", b="P2", label=1, line=1),
        Pair(a="P2", b="P3", label=0, line=3),
        Pair(a="P3", b="P3", label=1, line=4),
        Pair(a="sp|A|B", b="P1", label=None, line=5),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file: no pairs in it"),
        (b"\n \n", "empty file: no pairs in it"),
        (b"a\tb\n\na b\n", "line 3: expected 2 or 3 columns separated by tabs (a, b, and a label), found 1"),
        (b"a\tb\t1\tx\n", "line 1: expected 2 or 3 columns separated by tabs (a, b, and a label), found 4"),
        (b"a\t\t1\n", "line 1: an id is empty"),
        (b"\tb\n", "line 1: an id is empty"),
        (
            b"protein_a\tprotein_b\tlabel\n",
            "line 1: label 'label' is neither 1 nor 0 (the file must have no header)",
        ),
        (b"a\tb\t0.5\n", "line 1: label '0.5' is neither 1 nor 0"),
        (b"a\tb\t\xff\n", "line 1: not text in UTF-8"),
        (gzip.compress(b"a\tb\n", mtime=0)[:-4], "truncated gzip"),
    ],
)
def test_a_bad_table_is_refused_in_one_line_naming_file_and_line(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_label_is_refused_where_labels_are_needed(tmp_path):
    path = write(tmp_path, b"a\tb\t1\nb\tc\n")
    assert [pair.label for pair in read_pairs(path)] == [1, None]
    with pytest.raises(InputError, match="line 2: no label"):
        read_pairs(path, labelled=True)


def test_the_first_id_that_no_protein_has_is_named_with_its_line(tmp_path):
    path = write(tmp_path, b"a\tb\n\nb\tc d\nz\ta\n")
    pairs = read_pairs(path)
    resolve_pairs(pairs, {"a", "b", "c d", "z"}, path)
    with pytest.raises(InputError, match=r"pairs.tsv: line 3: no protein 'c d' in the FASTA"):
        resolve_pairs(pairs, {"a", "b"}, path)
