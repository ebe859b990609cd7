"""Pairs of proteins from a table, for contacts between two chains and for interactions.

In: TSV without a header, `a<TAB>b[<TAB>label]`, plain or compressed; a and b are ids of FASTA records, a
label is 1 (they interact) or 0. Out: `Pair`s in order. Faults are InputErrors naming file and line.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass

from protformer.corpus.compression import Source, describe_source, open_blocks
from protformer.corpus.duplicates import quote
from protformer.errors import InputError

_LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two proteins, and whether they interact where that is known."""

    a: str
    b: str
    label: int | None
    """1, 0, or None where the line has no label."""
    line: int
    """From 1."""


def read_pairs(source: Source, *, labelled: bool = False) -> list[Pair]:
    """The pairs in the order of the file, blank lines skipped; with `labelled` each must have a label."""
    name = describe_source(source)
    text = b"".join(open_blocks(source)).removeprefix(b"\xef\xbb\xbf")
    pairs = [
        _read_pair(line, f"{name}: line {number}", number)
        for number, line in enumerate(text.split(b"\n"), start=1)
        if line.strip()
    ]
    if not pairs:
        raise InputError(f"{name}: empty file: no pairs in it")
    for pair in pairs:
        if labelled and pair.label is None:
            raise InputError(f"{name}: line {pair.line}: no label; a third column must say 1 or 0")
    return pairs


def resolve_pairs(pairs: Iterable[Pair], known: Container[str], source: Source) -> None:
    """Raise InputError for the first id, in the order of the file, that no protein has."""
    for pair in pairs:
        for name in (pair.a, pair.b):
            if name not in known:
                raise InputError(
                    f"{describe_source(source)}: line {pair.line}: no protein {quote(name)} in the FASTA; "
                    "ids are headers up to the first white space"
                )


def _read_pair(line: bytes, where: str, number: int) -> Pair:
    try:
        columns = [column.strip() for column in line.decode("utf-8").split("\t")]
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not text in UTF-8") from error
    if len(columns) not in (2, 3):
        raise InputError(
            f"{where}: expected 2 or 3 columns separated by tabs (a, b, and a label), found {len(columns)}"
        )
    a, b, label = (*columns, "")[:3]
    if not a or not b:
        raise InputError(f"{where}: an id is empty; expected two ids, separated by a tab")
    if label and label not in _LABELS:
        raise InputError(f"{where}: label {quote(label)} is neither 1 nor 0 (the file must have no header)")
    return Pair(a=a, b=b, label=_LABELS.get(label), line=number)
