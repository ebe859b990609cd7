"""FASTA without repeated sequences: the first record of each stays.

In: FASTA files, or token stores. Out: one FASTA file, plain or gzip, in their order, with the headers as they were. Two
records are the same if their residues are, after the changes that reading makes (upper case, no gaps, J as X: see
`letters`).

Sequences are known again by 16 bytes of their BLAKE2b, kept in sorted runs, each at least twice as long as the next
(a log-structured merge): 16 bytes a sequence, up to three times that while two runs are merged, and one binary search
a run.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.compression import Consumed, Source
from protformer.corpus.fasta import FastaReport, RecordBatch
from protformer.corpus.fasta_writing import write_fasta
from protformer.corpus.stored_records import read_protein_batches

_DIGEST_BYTES = 16
_RECENT_DIGESTS = 1 << 18


@dataclass(kw_only=True, slots=True)
class DedupReport:
    """What came of it."""

    kept: int = 0
    repeated: int = 0
    residues: int = 0
    """Of the records that stayed."""
    changes: str | None = None


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
    report, result = FastaReport(), DedupReport()

    def unique() -> Iterator[RecordBatch]:
        seen = SeenDigests()
        for batch in read_protein_batches(sources, on_duplicate="allow", report=report, consumed=consumed):
            new = np.array(seen.add([hashlib.blake2b(p, digest_size=_DIGEST_BYTES).digest() for p in batch.proteins]))
            if new.any():
                kept = batch.select(new)
                result.kept += len(kept)
                result.residues += len(kept.tokens) - len(kept)
                yield kept

    write_fasta(unique(), out)
    result.repeated, result.changes = report.records - result.kept, report.summary()
    return result
