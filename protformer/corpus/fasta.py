"""FASTA in: a stream of records as tokens, with every change of a letter counted and every fault located.

In: FASTA text, plain, gzip, BGZF or zstd, from a file or standard input. Out: `SequenceRecord`s, or
`RecordBatch`es for whoever wants many at once. Lines end in LF or CRLF; sequences may be wrapped or not;
`letters` says which letters are changed. A fault is an InputError naming file, record, line and column.
Headers are UTF-8, or else Latin-1, which gives every byte a character: nothing is lost.

Blocks are cut before the last `>` that starts a line, and `record_text` reads all records of a block at once:
records and messages are the same whatever the size of the blocks. Time is linear; memory is a few blocks and
the longest record, plus the ids unless duplicates are allowed.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from protformer.corpus.byte_ranges import ByteRange, open_range
from protformer.corpus.compression import BLOCK_BYTES, Consumed, Source, describe_source, open_blocks
from protformer.corpus.duplicates import OnDuplicate, UniqueIds, reads_twice
from protformer.corpus.letters import describe_byte
from protformer.corpus.record_text import RecordParser, make_batch
from protformer.corpus.records import FastaReport, RecordBatch, SequenceRecord
from protformer.errors import InputError

__all__ = ["FastaReport", "RecordBatch", "SequenceRecord", "parse", "read_batches", "read_fasta", "read_range"]

Parse = Callable[[Source, FastaReport, Consumed | None, int], Iterator[RecordBatch]]
"""Gives the records of one source as they come, ids as they are: see `parse`."""

_BOM = b"\xef\xbb\xbf"
_LONGEST_CHARACTER_BYTES = 4


def read_fasta(
    source: Source,
    *,
    on_duplicate: OnDuplicate = "error",
    report: FastaReport | None = None,
    consumed: Consumed | None = None,
    _block_bytes: int = BLOCK_BYTES,
) -> Iterator[SequenceRecord]:
    """The records of one source in order.

    With `suffix` a file is read twice, so that a new id never takes the place of one further down. Raises
    InputError, after the records before the fault.
    """
    batches = read_batches(
        [source], on_duplicate=on_duplicate, report=report, consumed=consumed, _block_bytes=_block_bytes
    )
    for batch in batches:
        yield from batch.records()


def read_batches(
    sources: Sequence[Source],
    *,
    on_duplicate: OnDuplicate = "error",
    report: FastaReport | None = None,
    consumed: Consumed | None = None,
    parse_source: Parse | None = None,
    _block_bytes: int = BLOCK_BYTES,
) -> Iterator[RecordBatch]:
    """The records of several sources, many at a time; an id may not come back in another source either.

    `consumed` is told how many bytes were read from the sources, each time some were; `parse_source` reads what is no
    FASTA. Raises InputError.
    """
    report = FastaReport() if report is None else report
    parse_source = parse_source or parse
    unique_ids = None
    if on_duplicate != "allow":
        all_ids = _all_ids(sources, parse_source) if on_duplicate == "suffix" and reads_twice(sources) else None
        unique_ids = UniqueIds(on_duplicate, [describe_source(source) for source in sources], all_ids)
    for i, source in enumerate(sources):
        for batch in parse_source(source, report, consumed, _block_bytes):
            kept = batch if unique_ids is None else _with_unique_ids(batch, i, unique_ids, report)
            _count(report, kept)
            if len(kept):
                yield kept


def read_range(
    chosen: ByteRange,
    *,
    first_line: int,
    report: FastaReport,
    consumed: Consumed | None = None,
    _block_bytes: int = BLOCK_BYTES,
) -> Iterator[RecordBatch]:
    """The records of a range of a plain file, which starts on `first_line`; ids may come back. Raises InputError."""
    blocks = open_range(chosen, consumed=consumed, block_bytes=_block_bytes)
    for batch in _parse_blocks(blocks, first_line, describe_source(chosen.source), report):
        _count(report, batch)
        yield batch


def parse(source: Source, report: FastaReport, consumed: Consumed | None, block_bytes: int) -> Iterator[RecordBatch]:
    """The records of one FASTA source, many at a time. Raises InputError."""
    name = describe_source(source)
    line, blocks = _skip_to_first_record(open_blocks(source, consumed=consumed, block_bytes=block_bytes), name)
    yield from _parse_blocks(blocks, line, name, report)


def _count(report: FastaReport, batch: RecordBatch) -> None:
    report.records += len(batch)
    report.residues += len(batch.tokens) - len(batch)


def _all_ids(sources: Sequence[Source], parse_source: Parse) -> set[str]:
    batches = (batch for source in sources for batch in parse_source(source, FastaReport(), None, BLOCK_BYTES))
    return {name for batch in batches for name in batch.ids}


def _with_unique_ids(batch: RecordBatch, source: int, unique_ids: UniqueIds, report: FastaReport) -> RecordBatch:
    lines = batch.lines.tolist()
    names = [unique_ids.take(name, source, line) for name, line in zip(batch.ids, lines, strict=True)]
    if names == batch.ids:
        return batch
    kept = [i for i, name in enumerate(names) if name is not None]
    report.duplicates_dropped += len(names) - len(kept)
    report.duplicates_renamed += sum(names[i] != batch.ids[i] for i in kept)
    proteins = batch.proteins
    return make_batch(
        [name for name in names if name is not None],
        [batch.headers[i] for i in kept],
        [proteins[i] for i in kept],
        [lines[i] for i in kept],
    )


def _parse_blocks(blocks: Iterator[bytes], line: int, name: str, report: FastaReport) -> Iterator[RecordBatch]:
    """The records of text that starts with one on `line`."""
    parser = RecordParser(name, report, line)
    for text in _whole_records(blocks):
        yield from parser.parse(text)


def _skip_to_first_record(blocks: Iterator[bytes], name: str) -> tuple[int, Iterator[bytes]]:
    """The line of the first `>`, and the blocks from there on, behind a byte order mark and blank lines."""
    line, indent, rest = 1, b"", b""
    blocks = _without_byte_order_mark(blocks)
    for block in blocks:
        rest += block
        blank = rest[: len(rest) - len(rest.lstrip())]
        rest = rest[len(blank) :]
        line += blank.count(b"\n")
        _, line_end, after = blank.rpartition(b"\n")
        indent = (after if line_end else indent + after)[:1]
        if len(rest) >= _LONGEST_CHARACTER_BYTES:
            break
    if not rest:
        raise InputError(f"{name}: empty file: no sequences in it")
    if indent or not rest.startswith(b">"):
        found = describe_byte(indent or rest[:_LONGEST_CHARACTER_BYTES])
        raise InputError(f"{name}: line {line}, column 1: not FASTA: expected '>' at the start, found {found}")
    return line, chain((rest,), blocks)


def _without_byte_order_mark(blocks: Iterator[bytes]) -> Iterator[bytes]:
    head = b""
    for block in blocks:
        head += block
        if len(head) >= len(_BOM):
            break
    yield head.removeprefix(_BOM)
    yield from blocks


def _whole_records(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut the stream again, before a `>` that starts a line; each piece starts with `>`."""
    pending: list[bytes] = []
    for block in blocks:
        cut = block.rfind(b"\n>") + 1
        if cut or (pending and block.startswith(b">") and pending[-1].endswith(b"\n")):
            yield b"".join([*pending, memoryview(block)[:cut]])
            pending = []
        pending.append(block[cut:])
    yield b"".join(pending)
