"""FASTA in: a stream of records as tokens, with every change of a letter counted and every fault located.

In: FASTA text, plain, gzip, BGZF or zstd, from a file or standard input. Out: `SequenceRecord`s, or
`RecordBatch`es for whoever wants many at once. Lines end in LF or CRLF; sequences may be wrapped or not;
`letters` says which letters are changed. A fault is an InputError naming file, record, line and column.
Headers are UTF-8, or else Latin-1, which gives every byte a character: nothing is lost.

Blocks are cut before the last `>` that starts a line, and all sequences of a block are translated in one
call. Only where that shows something unusual are its records read one by one: records and messages are the
same either way, whatever the size of the blocks. Time is linear; memory is a few blocks and the longest
record, plus the ids unless duplicates are allowed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import EOS, INVALID, LAST_RESIDUE, TOKEN_TO_LETTER_TABLE
from protformer.corpus.compression import BLOCK_BYTES, Consumed, Source, describe_source, open_blocks
from protformer.corpus.duplicates import OnDuplicate, UniqueIds, quote, reads_twice
from protformer.corpus.letters import (
    ALLOWED,
    CLOSE,
    LETTER_CODES,
    LETTER_OR_CLOSE_CODES,
    LetterChanges,
    change_letters,
    describe_byte,
    find_bad_letter,
)
from protformer.errors import InputError

_BOM = b"\xef\xbb\xbf"
_LONGEST_CHARACTER_BYTES = 4


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


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordBatch:
    """Consecutive proteins of one source, at least one."""

    ids: list[str]
    headers: list[str]
    tokens: bytes
    """uint8 (residue,): the residues of all proteins in order, every protein closed by <eos>."""
    ends: NDArray[np.int64]
    """(protein,) Where each protein ends in `tokens`, its <eos> included."""
    lines: NDArray[np.int64]
    """(protein,) Line of each header, from 1."""

    @property
    def proteins(self) -> list[bytes]:
        """The tokens of each protein, without <eos>."""
        return self.tokens[:-1].split(CLOSE)


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
        rows = zip(batch.ids, batch.headers, batch.proteins, batch.lines.tolist(), strict=True)
        for name, header, tokens, line in rows:
            yield SequenceRecord(id=name, header=header, tokens=tokens, line=line)


def read_batches(
    sources: Sequence[Source],
    *,
    on_duplicate: OnDuplicate = "error",
    report: FastaReport | None = None,
    consumed: Consumed | None = None,
    _block_bytes: int = BLOCK_BYTES,
) -> Iterator[RecordBatch]:
    """The records of several sources, many at a time; an id may not come back in another source either.

    `consumed` is told how many bytes were read from the sources, each time some were. Raises InputError.
    """
    report = FastaReport() if report is None else report
    unique_ids = None
    if on_duplicate != "allow":
        all_ids = _all_ids(sources) if on_duplicate == "suffix" and reads_twice(sources) else None
        unique_ids = UniqueIds(on_duplicate, [describe_source(source) for source in sources], all_ids)
    for i, source in enumerate(sources):
        for batch in _parse(source, report, consumed, _block_bytes):
            kept = batch if unique_ids is None else _with_unique_ids(batch, i, unique_ids, report)
            report.records += len(kept.ids)
            report.residues += len(kept.tokens) - len(kept.ids)
            if kept.ids:
                yield kept


def _all_ids(sources: Sequence[Source]) -> set[str]:
    batches = (batch for source in sources for batch in _parse(source, FastaReport(), None, BLOCK_BYTES))
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
    return _batch(
        [name for name in names if name is not None],
        [batch.headers[i] for i in kept],
        [proteins[i] for i in kept],
        [lines[i] for i in kept],
    )


def _batch(ids: list[str], headers: list[str], proteins: list[bytes], lines: list[int]) -> RecordBatch:
    return RecordBatch(
        ids=ids,
        headers=headers,
        tokens=b"".join([protein + CLOSE for protein in proteins]),
        ends=np.cumsum([len(protein) + 1 for protein in proteins], dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
    )


def _parse(source: Source, report: FastaReport, consumed: Consumed | None, block_bytes: int) -> Iterator[RecordBatch]:
    name = describe_source(source)
    line, blocks = _skip_to_first_record(open_blocks(source, consumed=consumed, block_bytes=block_bytes), name)
    for text in _whole_records(blocks):
        chunks = _split_records(text.replace(b"\r\n", b"\n") if b"\r" in text else text)
        batch = _read_at_once(chunks, line, report)
        if batch is not None:
            yield batch
        else:
            yield from _read_one_by_one(chunks, line, name, report)
        line += text.count(b"\n")


def _skip_to_first_record(blocks: Iterator[bytes], name: str) -> tuple[int, Iterator[bytes]]:
    """The line of the first `>`, and the blocks from there on, behind a byte order mark and blank lines."""
    leading = b""
    for block in blocks:
        leading += block
        if len(leading.removeprefix(_BOM).lstrip()) >= _LONGEST_CHARACTER_BYTES:
            break
    text = leading.removeprefix(_BOM)
    rest = text.lstrip()
    if not rest:
        raise InputError(f"{name}: empty file: no sequences in it")
    blank = text[: len(text) - len(rest)]
    line = 1 + blank.count(b"\n")
    indent = blank[blank.rfind(b"\n") + 1 :]
    if indent or not rest.startswith(b">"):
        found = describe_byte(indent or rest[:_LONGEST_CHARACTER_BYTES])
        raise InputError(f"{name}: line {line}, column 1: not FASTA: expected '>' at the start, found {found}")
    return line, chain((rest,), blocks)


def _whole_records(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut the stream again, before a `>` that starts a line; each piece starts with `>`."""
    pending: list[bytes] = []
    for block in blocks:
        cut = block.rfind(b"\n>") + 1
        if cut or (pending and block.startswith(b">") and pending[-1].endswith(b"\n")):
            pending.append(block[:cut])
            yield b"".join(pending)
            pending = []
        pending.append(block[cut:])
    yield b"".join(pending)


def _split_records(text: bytes) -> list[bytes]:
    """Each record without its `>` but with the end of its last line, if it has one."""
    records = text.split(b">")[1:]
    if {record[-1:] for record in records[:-1]} <= {b"\n"}:
        return records
    # Some header holds a `>`. The search for two bytes is several times slower than that for one.
    records = text[1:].split(b"\n>")
    return [record + b"\n" for record in records[:-1]] + records[-1:]


def _read_at_once(chunks: list[bytes], line: int, report: FastaReport) -> RecordBatch | None:
    """All records, if none has a fault, white space around a line, or an unusual header; else None."""
    parts = [chunk.partition(b"\n") for chunk in chunks]
    bodies = b">".join([body for _, _, body in parts]) + b">"
    tokens = bodies.translate(LETTER_OR_CLOSE_CODES, b"\n")
    changes = LetterChanges()
    if np.frombuffer(tokens, np.uint8).max() > LAST_RESIDUE:
        if INVALID in tokens:
            return None
        tokens, changes = change_letters(tokens)
    ends = np.flatnonzero(np.frombuffer(tokens, np.uint8) == EOS) + 1
    if len(ends) != len(parts) or np.diff(ends, prepend=0).min() == 1:
        return None
    headers = _plain_headers(b"\n".join([header for header, _, _ in parts]))
    if headers is None:
        return None
    report.add_changes(changes)
    ids = [header.split(None, 1)[0] for header in headers]
    return RecordBatch(ids=ids, headers=headers, tokens=tokens, ends=ends, lines=_header_lines(bodies, line))


def _plain_headers(joined: bytes) -> list[str] | None:
    """The headers that LF joins, if all are UTF-8 on a line of their own and start with an id."""
    try:
        text = joined.decode("utf-8")
    except UnicodeDecodeError:
        return None
    headers = text.split("\n")
    first_characters = {header[:1] for header in headers}
    starts_with_id = "" not in first_characters and not any(map(str.isspace, first_characters))
    return headers if starts_with_id and "\r" not in text and "\0" not in text else None


def _header_lines(bodies: bytes, first: int) -> NDArray[np.int64]:
    """Line of each header, from the sequences as they stood in the file, each closed by `>`."""
    letters = np.frombuffer(bodies, np.uint8)
    closes = np.flatnonzero(letters == ord(">"))
    lines_of_sequence = np.searchsorted(np.flatnonzero(letters == ord("\n")), closes[:-1])
    return first + np.arange(len(closes)) + np.concatenate(([0], lines_of_sequence))


def _read_one_by_one(chunks: list[bytes], line: int, name: str, report: FastaReport) -> Iterator[RecordBatch]:
    """The records in one batch; with a fault in one of them, those before it, and then InputError."""
    headers: list[str] = []
    proteins: list[bytes] = []
    lines: list[int] = []
    fault = None
    for chunk in chunks:
        try:
            header, protein = _read_record(chunk, line, name, report)
        except InputError as error:
            fault = error
            break
        headers.append(header)
        proteins.append(protein)
        lines.append(line)
        line += chunk.count(b"\n")
    if headers:
        yield _batch([header.split(None, 1)[0] for header in headers], headers, proteins, lines)
    if fault is not None:
        raise fault


def _read_record(chunk: bytes, line: int, name: str, report: FastaReport) -> tuple[str, bytes]:
    head, _, body = chunk.partition(b"\n")
    header = _read_header(head.rstrip(b"\r"), line, name)
    codes = body.translate(LETTER_CODES, b"\n")
    if INVALID in codes:  # perhaps only white space around lines
        codes = b"".join([text.strip() for text in body.split(b"\n")]).translate(LETTER_CODES)
    where = f"{name}: record {quote(header.split(None, 1)[0])}, line"
    if INVALID in codes:
        lines_down, column, letter = find_bad_letter(body)
        raise InputError(
            f"{where} {line + 1 + lines_down}, column {column + 1}: {letter} is not allowed in a sequence; "
            f"allowed are {ALLOWED}"
        )
    tokens, changes = change_letters(codes + CLOSE)
    report.add_changes(changes)
    protein = tokens[:-1]
    if not protein:
        why = ", nothing is left without gaps and stop" if codes else ""
        raise InputError(f"{where} {line}: empty sequence{why}; complete the record or remove it")
    return header, protein


def _read_header(head: bytes, line: int, name: str) -> str:
    try:
        header = head.decode("utf-8")
    except UnicodeDecodeError:
        header = head.decode("latin-1")
    if not header or header[0].isspace():
        raise InputError(f"{name}: line {line}, column 2: header without an id; the id must follow '>' at once")
    for character, meaning in (("\0", "binary data (byte 0x00)"), ("\r", "a carriage return")):
        column = header.find(character) + 2
        if column > 1:
            record_id = quote(header.split(None, 1)[0])
            raise InputError(
                f"{name}: record {record_id}, line {line}, column {column}: {meaning} in the header; "
                "lines must end in LF or CRLF"
            )
    return header
