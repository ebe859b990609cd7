"""Hypothesis strategies that several tests share: protein sequences, and FASTA text that holds them."""

from dataclasses import dataclass

from hypothesis import strategies as st

RESIDUE_LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"


@dataclass(frozen=True)
class FastaText:
    """Bytes of a valid FASTA file, and the ids and upper-case sequences that they stand for."""

    content: bytes
    ids: list[str]
    sequences: list[str]


def sequences(*, max_size: int = 200, letters: str = RESIDUE_LETTERS) -> st.SearchStrategy[str]:
    """Upper-case protein sequences of at least one residue."""
    return st.text(letters, min_size=1, max_size=max_size)


def record_ids() -> st.SearchStrategy[str]:
    """Ids as they occur in headers: printable, no white space, not only ASCII."""
    characters = st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp"))
    return st.text(characters, min_size=1, max_size=20)


@st.composite
def fasta_texts(draw: st.DrawFn, *, max_records: int = 8, ids: st.SearchStrategy[str] | None = None) -> FastaText:
    """Valid FASTA in every layout that is allowed: wrapped or not, LF or CRLF, blank lines, either case."""
    names = draw(st.lists(record_ids() if ids is None else ids, min_size=1, max_size=max_records, unique=True))
    line_end = draw(st.sampled_from(["\n", "\r\n"]))
    blank_lines = st.integers(0, 2).map(lambda count: line_end * count)
    residues = [draw(sequences()) for _ in names]
    text = draw(blank_lines)
    for name, sequence in zip(names, residues, strict=True):
        description = draw(st.sampled_from(["", " ", " a > b", "\tEscherichia coli K-12"]))
        letters = sequence.lower() if draw(st.booleans()) else sequence
        width = draw(st.sampled_from([1, 7, 60, 1000]))
        lines = [letters[i : i + width] for i in range(0, len(letters), width)]
        text += line_end.join([f">{name}{description}", *lines]) + line_end + draw(blank_lines)
    if draw(st.booleans()):
        text = text.rstrip("\r\n")
    return FastaText(content=text.encode("utf-8"), ids=names, sequences=residues)
