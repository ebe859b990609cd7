"""The text of whole FASTA records to batches of proteins: all at once where nothing is unusual, else one by one.

In: text that starts with `>` and ends where a record ends. Out: `RecordBatch`es, and InputError with file, record,
line and column for a fault, behind the records before it. A scan for white space finds every line and the end of
every id; the sequences are joined and translated in one call, line ends falling out, the `>` of the next record
closing each. Only if that shows a fault, white space around a line or an unusual header are the records read one by
one: records and messages are the same either way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import EOS, INVALID, LAST_RESIDUE
from protformer.corpus.duplicates import quote
from protformer.corpus.letters import (
    ALLOWED,
    CLOSE,
    LETTER_CODES,
    LETTER_OR_CLOSE_CODES,
    LetterChanges,
    change_letters,
    count_codes,
    find_bad_letter,
)
from protformer.corpus.records import FastaReport, RecordBatch, Words
from protformer.errors import InputError

_SPACE, _LF, _GREATER = b" \n>"
_KEPT_BYTES = 30 << 20


class RecordParser:
    """Reads the text of one source, piece after piece; `line` is where the next piece starts, from 1."""

    def __init__(self, source_name: str, report: FastaReport, line: int) -> None:
        self.source_name, self.report, self.line = source_name, report, line
        _keep_freed_memory()

    def parse(self, text: bytes) -> Iterator[RecordBatch]:
        """The proteins of some whole records. Raises InputError behind those before the fault."""
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        layout = _find_lines(text if text.endswith(b"\n") else text + b"\n")
        batch = _read_at_once(layout, self.line, self.report)
        if batch is not None:
            yield batch
        else:
            yield from _read_one_by_one(text, self.line, self.source_name, self.report)
        self.line += layout.num_lines


def make_batch(ids: list[str], headers: list[str], proteins: list[bytes], lines: list[int]) -> RecordBatch:
    """A batch of single proteins, given without <eos>."""
    tokens = b"".join([protein + CLOSE for protein in proteins])
    return RecordBatch(
        id_words=Words.of(ids),
        header_words=Words.of(headers),
        tokens=tokens,
        token_counts=count_codes(tokens),
        ends=np.cumsum([len(protein) + 1 for protein in proteins], dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
    )


@cache
def _keep_freed_memory() -> None:
    """Let the C library keep what it frees between blocks, instead of asking the kernel for zeroed pages each time.

    When glibc frees a large piece that it had mapped by itself, it raises its thresholds for giving memory back to
    twice that size (mallopt(3), M_MMAP_THRESHOLD). The pages of this one are never touched. Reading takes 0.7 of the
    time; other C libraries are not affected.
    """
    bytes(_KEPT_BYTES)


def _read_at_once(layout: "_Layout", line: int, report: FastaReport) -> RecordBatch | None:
    """All records, if none has a fault, white space around a line, or an unusual header; else None."""
    text = layout.text
    words = _find_words(layout)
    if words is None:
        return None
    # Behind the header's line end, up to and with the `>` of the next header.
    view, starts = memoryview(text), layout.header_ends + 1
    stops = _shifted(layout.header_starts, len(text))
    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    sequences = b"".join([*[view[start:stop] for start, stop in spans], b">"])
    tokens = sequences.translate(LETTER_OR_CLOSE_CODES, b"\n")
    changes, counts = LetterChanges(), count_codes(tokens)
    if counts[INVALID] or counts[EOS] != len(starts):
        return None
    if counts[LAST_RESIDUE + 1 :].any():
        tokens, changes = change_letters(tokens)
        counts = count_codes(tokens)
        ends = np.flatnonzero(np.frombuffer(tokens, np.uint8) == EOS) + 1
    else:
        stops[-1] += 1  # the `>` that closes the last one
        num_lines = _shifted(layout.header_lines, layout.num_lines) - layout.header_lines - 1
        ends = np.cumsum(stops - starts - num_lines)
    if ends[0] == 1 or (ends[1:] - ends[:-1]).min(initial=2) == 1:
        return None
    report.add_changes(changes)
    ids, headers = words
    return RecordBatch(
        id_words=ids,
        header_words=headers,
        tokens=tokens,
        token_counts=counts,
        ends=ends,
        lines=line + layout.header_lines,
    )


def _shifted(array: NDArray[np.int64], last: int) -> NDArray[np.int64]:
    """What comes next after each element; `np.append` and `np.diff` take ten times as long for so few."""
    shifted = np.empty_like(array)
    shifted[:-1] = array[1:]
    shifted[-1] = last
    return shifted


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Where the lines of a text are, of which the last one is closed."""

    text: bytes
    num_lines: int
    space_kinds: NDArray[np.uint8]
    """Every byte that is a space or below it, line ends included, or not ASCII, which int8 puts below it as well."""
    first_spaces: NDArray[np.int64]
    """(protein,) Where the first of them is behind each header's start."""
    header_lines: NDArray[np.int64]
    """(protein,) Number of each header's line, from 0."""
    header_starts: NDArray[np.int64]
    header_ends: NDArray[np.int64]
    """(protein,) Behind the `>`, and at the line end."""


def _find_lines(text: bytes) -> _Layout:
    letters = np.frombuffer(text, np.uint8)
    spaces = np.flatnonzero(letters.view(np.int8) <= _SPACE)
    kinds = letters[spaces]
    line_ends = np.flatnonzero(kinds == _LF)
    ends = spaces[line_ends]
    later_headers = np.flatnonzero(letters[ends[:-1] + 1] == _GREATER) + 1
    header_lines = np.concatenate((np.zeros(1, np.int64), later_headers))
    header_starts = np.concatenate((np.ones(1, np.int64), ends[later_headers - 1] + 2))
    # The first space behind a header's start is the next one behind the line end before it.
    next_space = np.concatenate((np.zeros(1, np.int64), line_ends[later_headers - 1] + 1))
    return _Layout(
        text=text,
        num_lines=len(line_ends),
        space_kinds=kinds,
        first_spaces=spaces[next_space],
        header_lines=header_lines,
        header_starts=header_starts,
        header_ends=ends[header_lines],
    )


def _find_words(layout: _Layout) -> tuple[Words, Words] | None:
    """Ids and headers, if all headers are UTF-8 without control characters and start with an id."""
    text = layout.text
    headers = Words(text=text, starts=layout.header_starts, ends=layout.header_ends)
    if layout.space_kinds.tobytes().translate(None, b" \t\n"):
        ids = _first_words(headers)
        return None if ids is None else (Words.of(ids), headers)
    if (layout.first_spaces == layout.header_starts).any():
        return None
    return Words(text=text, starts=layout.header_starts, ends=layout.first_spaces), headers


def _first_words(headers: Words) -> list[str] | None:
    """The ids of headers in which any white space and any character may be."""
    try:
        strings = headers.strings()
    except UnicodeDecodeError:
        return None
    first_characters = {header[:1] for header in strings}
    if "" in first_characters or any(map(str.isspace, first_characters)):
        return None
    if any("\r" in header or "\0" in header for header in strings):
        return None
    return [header.split(None, 1)[0] for header in strings]


def _read_one_by_one(text: bytes, line: int, name: str, report: FastaReport) -> Iterator[RecordBatch]:
    """The records in one batch; with a fault in one of them, those before it, and then InputError."""
    headers: list[str] = []
    proteins: list[bytes] = []
    lines: list[int] = []
    fault = None
    for chunk in text[1:].split(b"\n>"):
        try:
            header, protein = _read_record(chunk, line, name, report)
        except InputError as error:
            fault = error
            break
        headers.append(header)
        proteins.append(protein)
        lines.append(line)
        line += chunk.count(b"\n") + 1
    if headers:
        yield make_batch([header.split(None, 1)[0] for header in headers], headers, proteins, lines)
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
