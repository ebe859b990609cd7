"""A FASTA corpus in parts that can be read by themselves: ranges of whole records, or files as a whole.

In: files. Out: `ByteRange`s, in order. A plain file is cut about every `RANGE_BYTES`, at the next `>` that starts a
line; a compressed one, standard input, a pipe, or a file without a record at its start is one range. Ranges depend on
the files alone, not on who reads them. Costs one small read a range.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from protformer.corpus.compression import (
    BLOCK_BYTES,
    Consumed,
    Source,
    is_plain,
    is_stdin,
    readable,
)

RANGE_BYTES = 1 << 26

_SEARCH_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteRange:
    """A part of a source that holds whole records."""

    source: str
    start: int
    """Where a record starts; 0 for a whole source, whatever is there."""
    end: int | None
    """Where the next record starts, or the size of the file; None for a whole source, however it is stored."""

    @property
    def is_whole(self) -> bool:
        """Whether this is a source that is read from beginning to end, decompressed if need be."""
        return self.end is None

    @property
    def num_bytes(self) -> int:
        """As stored; 0 if that is not known."""
        if self.end is not None:
            return self.end - self.start
        return Path(self.source).stat().st_size if Path(self.source).is_file() else 0


def plan_ranges(sources: Sequence[Source], range_bytes: int = RANGE_BYTES) -> list[ByteRange]:
    """The ranges of all sources in order. Raises InputError for one that cannot be read."""
    return [chosen for source in sources for chosen in _ranges_of(source, range_bytes)]


def open_range(
    chosen: ByteRange, *, consumed: Consumed | None = None, block_bytes: int = BLOCK_BYTES
) -> Iterator[bytes]:
    """Blocks of the bytes of a range of a plain file."""
    assert chosen.end is not None
    with readable(chosen.source), open(chosen.source, "rb", buffering=0) as file:
        file.seek(chosen.start)
        left = chosen.end - chosen.start
        while block := file.read(min(left, block_bytes)):
            left -= len(block)
            if consumed is not None:
                consumed(len(block))
            yield block


def count_lines_before(chosen: ByteRange) -> int:
    """How many lines of the source end before the range."""
    whole = ByteRange(source=chosen.source, start=0, end=chosen.start)
    return sum(block.count(b"\n") for block in open_range(whole))


def _ranges_of(source: Source, range_bytes: int) -> Iterator[ByteRange]:
    whole = ByteRange(source=str(source), start=0, end=None)
    if is_stdin(source) or not Path(source).is_file():
        yield whole
        return
    with readable(source), open(source, "rb") as file:
        size = file.seek(0, 2)
        start = _find_first_record(file) if is_plain(source) else None
        if start is None:
            yield whole
            return
        while start < size:
            end = _find_record(file, start + range_bytes)
            yield ByteRange(source=str(source), start=start, end=size if end is None else end)
            start = size if end is None else end


def _find_first_record(file: IO[bytes]) -> int | None:
    """Where the first record starts, if that is near the start of the file and nothing is wrong before it."""
    file.seek(0)
    head = file.read(_SEARCH_BYTES)
    text = head.removeprefix(_BOM)
    rest = text.lstrip()
    blank = text[: len(text) - len(rest)]
    is_record = rest.startswith(b">") and (not blank or blank.endswith(b"\n"))
    return len(head) - len(rest) if is_record else None


def _find_record(file: IO[bytes], position: int) -> int | None:
    """Where the first record at or behind `position` starts, not counting the first of the file."""
    file.seek(position - 1)
    before = b""
    offset = position - 1
    while block := file.read(_SEARCH_BYTES):
        found = (before + block).find(b"\n>")
        if found >= 0:
            return offset - len(before) + found + 1
        offset += len(block)
        before = block[-1:]
    return None
