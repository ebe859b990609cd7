"""Training and held-out proteins, told apart by a hash of the sequence while the FASTA is read.

In: FASTA files and a fraction. Out: two token stores. Identical sequences always fall on the same side, in any file
and any order. Homologous proteins do not: this split does not measure generalisation to new families. For that, split
by clusters beforehand (`split_stores`).
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.compression import Source
from protformer.corpus.fasta import FastaReport, read_batches
from protformer.corpus.store_manifest import inspect_sources
from protformer.corpus.token_store import TokenStoreWriter


def build_split_stores(
    fasta: Sequence[Source],
    *,
    train: Path,
    validation: Path,
    fraction: float,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write both token stores; the number of proteins held out (without any, there is no validation store)."""
    report = FastaReport()
    held_out_proteins = 0
    with TokenStoreWriter(train) as train_writer, TokenStoreWriter(validation) as validation_writer:
        sources = inspect_sources(fasta)
        for batch in read_batches(fasta, on_duplicate="allow", report=report, consumed=progress):
            held_out = np.array([is_held_out(protein, fraction) for protein in batch.proteins], dtype=bool)
            held_out_proteins += int(held_out.sum())
            append_chosen(train_writer, batch.ids, batch.tokens, batch.ends, ~held_out)
            append_chosen(validation_writer, batch.ids, batch.tokens, batch.ends, held_out)
        train_writer.finish(sources, report)
        if held_out_proteins:
            validation_writer.finish(sources, report)
    return held_out_proteins


def is_held_out(protein: bytes, fraction: float) -> bool:
    """Whether the protein with these tokens belongs to the held-out share."""
    return zlib.crc32(protein) < fraction * 2**32


def append_chosen(
    writer: TokenStoreWriter, ids: Sequence[str], tokens: bytes, ends: NDArray[np.int64], chosen: NDArray[np.bool_]
) -> None:
    """Add those of these proteins (see `RecordBatch`) that are chosen."""
    if not chosen.any():
        return
    lengths = np.diff(ends, prepend=0)
    kept = np.frombuffer(tokens, dtype=np.uint8)[np.repeat(chosen, lengths)]
    names = [name for name, is_chosen in zip(ids, chosen, strict=True) if is_chosen]
    writer.append(names, kept.tobytes(), np.cumsum(lengths[chosen]))
