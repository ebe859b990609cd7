"""FASTA out: one file, plain or gzip, whole or not at all.

In: `RecordBatch`es. Out: their records with whole headers, sequences in upper case and lines of 60 letters. The same
records give the same bytes.
"""

import gzip
import os
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedWriter
from pathlib import Path

from protformer.alphabet import TOKEN_TO_LETTER_TABLE
from protformer.corpus.compression import Consumed, Source, describe_source
from protformer.corpus.fasta import FastaReport, RecordBatch
from protformer.corpus.stored_records import read_protein_batches
from protformer.errors import OutputError

LINE_LETTERS = 60


def export_fasta(sources: Sequence[Source], out: Path, *, consumed: Consumed | None = None) -> FastaReport:
    """Write the proteins of token stores, or of FASTA files as they are read everywhere. Raises as `write_fasta`."""
    report = FastaReport()
    write_fasta(read_protein_batches(sources, on_duplicate="allow", report=report, consumed=consumed), out)
    return report


def write_fasta(batches: Iterable[RecordBatch], out: Path) -> None:
    """Write records to `out`, gzip-compressed if it ends in .gz. Raises OutputError."""
    if out.suffix in (".zst", ".bz2", ".xz", ".zip"):
        raise OutputError(f"{out}: is written plain, or gzip-compressed if the name ends in .gz; choose such a name")
    if out.exists():
        raise OutputError(f"{out}: exists already; choose another --out, or delete it")
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("wb") as raw, _compressing(raw, out) as file:
            for batch in batches:
                file.write(b"".join(_lines(batch)))
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(out)
    except OSError as error:
        raise OutputError(f"{describe_source(out)}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _compressing(raw: BufferedWriter, out: Path) -> BufferedWriter | gzip.GzipFile:
    """`raw`, or what compresses into it, without name and time, so that the same input gives the same file."""
    if out.suffix != ".gz":
        return raw
    return gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0)


def _lines(batch: RecordBatch) -> Iterator[bytes]:
    for header, protein in zip(batch.headers, batch.proteins, strict=True):
        letters = protein.translate(TOKEN_TO_LETTER_TABLE)
        yield b">" + header.encode("utf-8") + b"\n"
        for i in range(0, len(letters), LINE_LETTERS):
            yield letters[i : i + LINE_LETTERS] + b"\n"
