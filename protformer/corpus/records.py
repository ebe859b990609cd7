"""What the FASTA reader gives out: proteins as tokens, many in a batch, and the counts of what was changed.

A batch holds its ids and headers as places in the text that they were read from, and makes strings of them only when
asked: who builds a token store needs the bytes of the ids and nothing else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import TOKEN_TO_LETTER_TABLE
from protformer.corpus.letters import CLOSE, LetterChanges, count_codes


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRecord:
    """One protein."""

    id: str
    """The header up to the first white space."""
    header: str
    """The whole header line without `>`."""
    tokens: bytes
    """uint8 (residue,): residues only, neither <cls> nor <eos>."""
    line: int
    """Line of the header, from 1."""

    @property
    def sequence(self) -> str:
        """Upper-case letters."""
        return self.tokens.translate(TOKEN_TO_LETTER_TABLE).decode("ascii")

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Words:
    """Pieces of one text."""

    text: bytes
    """UTF-8, at least where the pieces are."""
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    """(piece,) Where each begins and ends in `text`."""

    @classmethod
    def of(cls, strings: Sequence[str]) -> "Words":
        encoded = [string.encode("utf-8") for string in strings]
        ends = np.cumsum([len(piece) for piece in encoded], dtype=np.int64)
        starts = np.concatenate((np.zeros(1, np.int64), ends))[:-1]
        return cls(text=b"".join(encoded), starts=starts, ends=ends)

    def select(self, chosen: NDArray[np.bool_]) -> "Words":
        return Words(text=self.text, starts=self.starts[chosen], ends=self.ends[chosen])

    def strings(self) -> list[str]:
        text, spans = self.text, zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        return [text[start:end].decode("utf-8") for start, end in spans]

    def joined(self) -> tuple[bytes, NDArray[np.int64]]:
        """The pieces one after another, and (piece,) where each ends there; twice as fast as slicing short pieces."""
        lengths = self.ends - self.starts
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        places = np.arange(total) + np.repeat(self.starts - (ends - lengths), lengths)
        return np.frombuffer(self.text, np.uint8)[places].tobytes(), ends


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordBatch:
    """Consecutive proteins of one source, at least one."""

    id_words: Words
    header_words: Words
    tokens: bytes
    """uint8 (residue,): the residues of all proteins in order, every protein closed by <eos>."""
    token_counts: NDArray[np.int64]
    """(256,) How often each token occurs, <eos> included."""
    ends: NDArray[np.int64]
    """(protein,) Where each protein ends in `tokens`, its <eos> included."""
    lines: NDArray[np.int64]
    """(protein,) Line of each header, from 1."""

    def __len__(self) -> int:
        """Number of proteins."""
        return len(self.ends)

    @cached_property
    def ids(self) -> list[str]:
        return self.id_words.strings()

    @cached_property
    def headers(self) -> list[str]:
        """Whole header lines without `>`."""
        return self.header_words.strings()

    @property
    def proteins(self) -> list[bytes]:
        """The tokens of each protein, without <eos>."""
        return self.tokens[:-1].split(CLOSE)

    def records(self) -> Iterator[SequenceRecord]:
        """One by one."""
        rows = zip(self.ids, self.headers, self.proteins, self.lines.tolist(), strict=True)
        for name, header, tokens, line in rows:
            yield SequenceRecord(id=name, header=header, tokens=tokens, line=line)

    def select(self, chosen: NDArray[np.bool_]) -> "RecordBatch":
        """The proteins that are chosen, at least one, in order."""
        if chosen.all():
            return self
        tokens, ends = select_proteins(self.tokens, self.ends, chosen)
        return RecordBatch(
            id_words=self.id_words.select(chosen),
            header_words=self.header_words.select(chosen),
            tokens=tokens,
            token_counts=count_codes(tokens),
            ends=ends,
            lines=self.lines[chosen],
        )


def select_proteins(
    tokens: bytes, ends: NDArray[np.int64], chosen: NDArray[np.bool_]
) -> tuple[bytes, NDArray[np.int64]]:
    """Tokens and ends, as in a `RecordBatch`, of the proteins that are chosen."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    bounds = np.concatenate((np.zeros(1, np.int64), ends))[edges].tolist()
    runs = zip(bounds[::2], bounds[1::2], strict=True)
    return b"".join([tokens[start:end] for start, end in runs]), np.cumsum(np.diff(ends, prepend=0)[chosen])


@dataclass(kw_only=True, slots=True)
class FastaReport:
    """What reading met so far; give the same object to several reads to sum over them.

    `records` and `residues` count what was given out. Changes of letters are counted in dropped duplicates
    too. Lower case is no change.
    """

    records: int = 0
    residues: int = 0
    j_to_x: int = 0
    trailing_stop_dropped: int = 0
    inner_stop_to_x: int = 0
    gaps_removed: int = 0
    duplicates_renamed: int = 0
    duplicates_dropped: int = 0

    def merge(self, other: "FastaReport") -> None:
        """Add the counts of another report to this one's."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def add_changes(self, changes: LetterChanges) -> None:
        """Add the changes of some letters."""
        self.j_to_x += changes.j_to_x
        self.trailing_stop_dropped += changes.trailing_stop_dropped
        self.inner_stop_to_x += changes.inner_stop_to_x
        self.gaps_removed += changes.gaps_removed

    def summary(self) -> str | None:
        """One line on everything that was changed, or None."""
        words = {
            "j_to_x": "J read as X",
            "trailing_stop_dropped": "trailing * dropped",
            "inner_stop_to_x": "inner * read as X",
            "gaps_removed": "gap characters removed",
            "duplicates_renamed": "duplicate ids renamed",
            "duplicates_dropped": "records with duplicate ids dropped",
        }
        counts = asdict(self)
        changes = [f"{counts[name]:,} {text}" for name, text in words.items() if counts[name]]
        return f"{', '.join(changes)} (in {self.records:,} sequences read)" if changes else None
