"""Training and held-out proteins, told apart by a hash of the sequence while the FASTA is read.

In: FASTA files and a fraction. Out: two token stores. Identical sequences always fall on the same side, in any file
and any order. Homologous proteins do not: this split does not measure generalisation to new families. For that, split
by clusters beforehand (`split_stores`).
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.build_part import Divide
from protformer.corpus.compression import Source
from protformer.corpus.records import RecordBatch
from protformer.corpus.store_build import build_stores


def build_split_stores(
    fasta: Sequence[Source],
    *,
    train: Path,
    validation: Path,
    divide: Divide,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> int:
    """Write both token stores, as `divide` says by 0 and 1; the number of proteins held out.

    Without any, there is no validation store.
    """
    _, held_out = build_stores(
        fasta,
        [train, validation],
        divide=divide,
        workers=workers,
        progress=progress,
        tell=tell,
    )
    return held_out.num_proteins if held_out is not None else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class HashSplit:
    """Sends a share of the sequences to the second of two stores."""

    fraction: float

    def __call__(self, batch: RecordBatch) -> NDArray[np.int64]:
        ends = batch.ends.tolist()
        view = memoryview(batch.tokens)
        spans = zip([0, *ends], ends, strict=False)
        hashes = np.array([zlib.crc32(view[start : end - 1]) for start, end in spans], dtype=np.int64)
        return (hashes < self.fraction * 2**32).astype(np.int64)
