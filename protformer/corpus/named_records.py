"""A few proteins by name, from a FASTA file that may be very large.

In: a FASTA source, or a token store, and ids. Out: the `SequenceRecord`s with these ids, in the order of the file.
Beside a plain file an index as `samtools faidx` writes it (`FILE.fai`), not older than the file, is used: then only the
index and the named records are read, by pyfaidx, and nothing else of the file is checked. No index is made here:
reading the whole file once is faster than making one, and nobody's folder gets files that were not asked for. Only the
lines of the index that are wanted reach pyfaidx, which would hold 538 bytes for each record otherwise."""

import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from protformer.alphabet import INVALID
from protformer.corpus.compression import Source, describe_source, is_stdin, readable
from protformer.corpus.duplicates import OnDuplicate, quote
from protformer.corpus.fasta import FastaReport, SequenceRecord
from protformer.corpus.identifiers import short_id, short_name
from protformer.corpus.letters import ALLOWED, CLOSE, LETTER_CODES, change_letters, find_bad_letter
from protformer.corpus.stored_records import read_proteins
from protformer.corpus.tables import read_lines
from protformer.errors import InputError

WORTH_AN_INDEX_BYTES = 1_000_000_000
"""From this size on, the user is told how to make an index."""

_INDEX_COLUMNS = 5  # name, residues, offset of the first one, residues a line, bytes a line
_HEADER_BYTES = 1 << 12


def read_named(
    source: Source,
    names: Collection[str],
    *,
    on_duplicate: OnDuplicate,
    report: FastaReport,
    tell: Callable[[str], None],
) -> Iterator[SequenceRecord]:
    """The records with these ids, or whose accession (`short_id`) is one; others are left to the caller.

    A record that was found by an index has line 0. Raises InputError.
    """
    index = _usable_index(source, on_duplicate, tell)
    if index is not None:
        yield from _read_by_index(Path(source), index, _find_lines(index, names, on_duplicate, source), report)
        return
    for record in read_proteins(source, on_duplicate=on_duplicate, report=report):
        if record.id in names or short_id(record.id) in names:
            yield record


def _usable_index(source: Source, on_duplicate: OnDuplicate, tell: Callable[[str], None]) -> Path | None:
    path = Path(source)
    # Renaming duplicates needs all ids.
    if is_stdin(source) or not path.is_file() or on_duplicate == "suffix":
        return None
    with readable(source), path.open("rb") as file:
        if not file.read(1).startswith(b">"):  # compressed, or not what an index fits
            return None
    index = path.with_name(path.name + ".fai")
    if not index.is_file():
        if path.stat().st_size >= WORTH_AN_INDEX_BYTES:
            tell(f"reading all of {source}; an index beside it, by `samtools faidx {source}`, would make this quick")
        return None
    if index.stat().st_mtime_ns < path.stat().st_mtime_ns:
        tell(f"{index}: older than the FASTA file, so it is not used")
        return None
    return index


def _find_lines(index: Path, names: Collection[str], on_duplicate: OnDuplicate, source: Source) -> dict[str, bytes]:
    """The index's line of each name that it has, in the order of the index."""
    wanted = {name.encode("utf-8") for name in names}
    found: dict[str, bytes] = {}
    for _, lines in read_lines(index):
        for line in lines:
            identifier = line.partition(b"\t")[0]
            if identifier not in wanted and short_name(identifier) not in wanted:
                continue
            name = identifier.decode("utf-8")
            if name in found and on_duplicate == "error":
                raise InputError(
                    f"{describe_source(source)}: record {quote(name)}: duplicate id; make the ids differ, or choose "
                    "--on-duplicate suffix or first"
                )
            found.setdefault(name, line)
    for name, line in found.items():
        columns = line.split(b"\t")
        if len(columns) != _INDEX_COLUMNS or not all(column.isdigit() for column in columns[1:]):
            raise InputError(
                f"{describe_source(index)}: record {quote(name)}: not the line of a FASTA index; make it again"
            )
    return found


def _read_by_index(fasta: Path, index: Path, lines: dict[str, bytes], report: FastaReport) -> Iterator[SequenceRecord]:
    import pyfaidx

    if not lines:
        return
    with tempfile.TemporaryDirectory(prefix="protformer-") as folder:
        wanted = Path(folder) / "wanted.fai"
        wanted.write_bytes(b"".join(line + b"\n" for line in lines.values()))
        # Otherwise pyfaidx would make an index where it finds this one unfit.
        reader = pyfaidx.Faidx(str(fasta), indexname=str(wanted), as_raw=True, rebuild=False, build_index=False)
        with reader:
            for name, line in lines.items():
                num_letters, offset = (int(column) for column in line.split(b"\t")[1:3])
                header = _read_header(fasta, offset)
                letters = _fetch(reader, name, num_letters) if header.split(None, 1)[:1] == [name] else ""
                if len(letters) != num_letters or not letters:
                    raise InputError(
                        f"{describe_source(index)}: does not fit the FASTA file (record {quote(name)}); make it again"
                    )
                yield _as_record(fasta, name, header, letters, report)


def _read_header(fasta: Path, offset: int) -> str:
    """The header whose line ends just before `offset`; empty if there is none."""
    with fasta.open("rb") as file:
        num_bytes = min(_HEADER_BYTES, offset)
        while True:
            file.seek(offset - num_bytes)
            text = file.read(num_bytes).rstrip(b"\r\n")
            start = text.rfind(b"\n") + 1
            if start or num_bytes == offset:
                break
            num_bytes = min(2 * num_bytes, offset)
    header = text[start:]
    if not header.startswith(b">"):
        return ""
    try:
        return header[1:].decode("utf-8")
    except UnicodeDecodeError:
        return header[1:].decode("latin-1")


def _fetch(reader: object, name: str, num_letters: int) -> str:
    """The letters of a record, without line ends; empty where the index points to no text."""
    try:
        return str(reader.fetch(name, 1, num_letters))  # type: ignore[attr-defined]
    except (UnicodeDecodeError, ValueError):
        return ""


def _as_record(fasta: Path, name: str, header: str, letters: str, report: FastaReport) -> SequenceRecord:
    """Letters are changed and refused as everywhere (`letters`)."""
    body = letters.encode("utf-8")
    codes = body.translate(LETTER_CODES)
    where = f"{describe_source(fasta)}: record {quote(name)}"
    if INVALID in codes:
        _, column, letter = find_bad_letter(body)
        raise InputError(f"{where}, letter {column + 1}: {letter} is not allowed in a sequence; allowed are {ALLOWED}")
    tokens, changes = change_letters(codes + CLOSE)
    protein = tokens[:-1]
    if not protein:
        raise InputError(f"{where}: empty sequence, nothing is left without gaps and stop")
    report.add_changes(changes)
    report.records += 1
    report.residues += len(protein)
    return SequenceRecord(id=name, header=header, tokens=protein, line=0)
