"""FASTA without repeated sequences: the first record of each stays.

In: FASTA files. Out: one FASTA file, plain or gzip, in their order, with the headers as they were. Two records are the
same if their residues are, after the changes that reading makes (upper case, no gaps, J as X: see `letters`).

Sequences are known again by 16 bytes of their BLAKE2b, kept in sorted runs, each at least twice as long as the next
(a log-structured merge): 16 bytes a sequence, up to three times that while two runs are merged, and one binary search
a run.
"""

import gzip
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import TOKEN_TO_LETTER_TABLE
from protformer.corpus.compression import Consumed, Source, describe_source, is_stdin
from protformer.corpus.fasta import FastaReport, RecordBatch, read_batches
from protformer.errors import InputError, OutputError

LINE_LETTERS = 60

_DIGEST_BYTES = 16
_RECENT_DIGESTS = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupReport:
    """What came of it."""

    records: int
    repeated: int
    residues: int
    """Of the records that stayed."""
    changes: str | None


class SeenDigests:
    """A set of digests that takes little more memory than they have bytes."""

    def __init__(self, *, recent: int = _RECENT_DIGESTS) -> None:
        self._max_recent = recent
        self._recent: set[bytes] = set()
        self._runs: list[NDArray[np.bytes_]] = []

    def add(self, digests: Sequence[bytes]) -> list[bool]:
        """Whether each is new, also among those before it in this call."""
        known = self._are_in_runs(digests)
        new = []
        for digest, is_known in zip(digests, known, strict=True):
            is_new = not is_known and digest not in self._recent
            if is_new:
                self._recent.add(digest)
            new.append(is_new)
        if len(self._recent) >= self._max_recent:
            self._store_recent()
        return new

    def _are_in_runs(self, digests: Sequence[bytes]) -> list[bool]:
        wanted = np.array(digests, dtype=f"S{_DIGEST_BYTES}")
        found = np.zeros(len(wanted), dtype=bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, wanted), len(run) - 1)
            found |= run[place] == wanted
        return [bool(is_found) for is_found in found]

    def _store_recent(self) -> None:
        run = np.sort(np.array(list(self._recent), dtype=f"S{_DIGEST_BYTES}"))
        self._recent = set()
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")
        self._runs.append(run)


def write_unique(sources: Sequence[Source], out: Path, *, consumed: Consumed | None = None) -> DedupReport:
    """Write the first record of each sequence to `out`, whole or not at all. Raises InputError and OutputError."""
    if out.suffix in (".zst", ".bz2", ".xz", ".zip"):
        raise OutputError(f"{out}: is written plain, or gzip-compressed if the name ends in .gz; choose such a name")
    if out.exists():
        raise OutputError(f"{out}: exists already; choose another --out, or delete it")
    for source in sources:
        if not is_stdin(source) and Path(source).is_dir():
            raise InputError(f"{describe_source(source)}: is a folder; give a file")
    report = FastaReport()
    seen = SeenDigests()
    repeated = residues = 0
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("wb") as raw, _compressing(raw, out) as file:
            for batch in read_batches(sources, on_duplicate="allow", report=report, consumed=consumed):
                new = seen.add([hashlib.blake2b(p, digest_size=_DIGEST_BYTES).digest() for p in batch.proteins])
                repeated += len(new) - sum(new)
                text, letters = _as_fasta(batch, new)
                residues += letters
                file.write(text)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(out)
    except OSError as error:
        raise OutputError(f"{describe_source(out)}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return DedupReport(records=report.records, repeated=repeated, residues=residues, changes=report.summary())


def _compressing(raw: BufferedWriter, out: Path) -> BufferedWriter | gzip.GzipFile:
    """`raw`, or what compresses into it, without name and time, so that the same input gives the same file."""
    if out.suffix != ".gz":
        return raw
    return gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0)


def _as_fasta(batch: RecordBatch, chosen: Sequence[bool]) -> tuple[bytes, int]:
    """The chosen records as text, and the number of their residues."""
    lines: list[bytes] = []
    num_residues = 0
    for header, protein, is_chosen in zip(batch.headers, batch.proteins, chosen, strict=True):
        if not is_chosen:
            continue
        num_residues += len(protein)
        letters = protein.translate(TOKEN_TO_LETTER_TABLE)
        lines.append(b">" + header.encode("utf-8"))
        lines += [letters[i : i + LINE_LETTERS] for i in range(0, len(letters), LINE_LETTERS)]
    return b"\n".join([*lines, b""]), num_residues
