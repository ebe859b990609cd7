"""What a set of proteins looks like: how many, how long, of which residues.

In: FASTA files, or a token store. Out: `CorpusStatistics`. Lengths are counted, not listed, so that quantiles are exact
in memory that grows with the longest protein only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import FIRST_RESIDUE, NUM_TOKENS, RESIDUES
from protformer.corpus.compression import Consumed, Source, is_stdin
from protformer.corpus.duplicates import refuse_repeated_sources
from protformer.corpus.fasta import FastaReport, read_batches
from protformer.corpus.token_store import TokenStore
from protformer.errors import InputError

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

BINS_PER_DOUBLING = 4
_PROTEINS_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusStatistics:
    """Counts over all proteins."""

    length_counts: NDArray[np.int64]
    """(longest + 1,) Number of proteins with each length in residues."""
    residue_counts: dict[str, int]
    """Of each of the 25 residue letters."""
    changes: str | None
    """One line on letters that were changed in reading."""

    @property
    def num_proteins(self) -> int:
        return int(self.length_counts.sum())

    @property
    def num_residues(self) -> int:
        return sum(self.residue_counts.values())

    @property
    def mean_length(self) -> float:
        return self.num_residues / self.num_proteins

    def length_quantile(self, share: float) -> int:
        """The least length that this share of the proteins does not exceed; 0 gives the shortest."""
        rank = max(1, int(np.ceil(share * self.num_proteins)))
        return int(np.searchsorted(np.cumsum(self.length_counts), rank))

    def histogram(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(bin + 1,) edges, each bin with its lower edge, and (bin,) proteins in it; equal widths on a log scale."""
        shortest, longest = self.length_quantile(0.0), self.length_quantile(1.0)
        first = int(np.floor(np.log2(shortest) * BINS_PER_DOUBLING))
        last = int(np.floor(np.log2(longest) * BINS_PER_DOUBLING)) + 1
        edges = np.unique(np.ceil(2.0 ** (np.arange(first, last + 1) / BINS_PER_DOUBLING)).astype(np.int64))
        edges[-1] = max(edges[-1], longest + 1)
        counts = np.add.reduceat(np.append(self.length_counts, np.zeros(edges[-1] + 1, np.int64)), edges)[:-1]
        return edges, counts

    def to_tree(self) -> dict[str, object]:
        """For JSON."""
        edges, counts = self.histogram()
        return {
            "proteins": self.num_proteins,
            "residues": self.num_residues,
            "length": {
                "shortest": self.length_quantile(0.0),
                "mean": self.mean_length,
                "quantiles": {f"{share:g}": self.length_quantile(share) for share in QUANTILES},
                "longest": self.length_quantile(1.0),
                "histogram": {"edges": edges.tolist(), "proteins": counts.tolist()},
            },
            "residue_counts": self.residue_counts,
            "residue_frequencies": {letter: count / self.num_residues for letter, count in self.residue_counts.items()},
            "changes": self.changes,
        }


def count_proteins(sources: Sequence[Source], *, consumed: Consumed | None = None) -> CorpusStatistics:
    """The statistics of one token store, or of FASTA files together. Raises InputError."""
    refuse_repeated_sources(sources)
    if not is_stdin(sources[0]) and Path(sources[0]).is_dir():
        if len(sources) > 1:
            raise InputError("--fasta: give one token store, or FASTA files, not both")
        return _count_store(TokenStore.open(Path(sources[0])))
    report = FastaReport()
    lengths = np.zeros(1, dtype=np.int64)
    tokens = np.zeros(NUM_TOKENS, dtype=np.int64)
    for batch in read_batches(sources, on_duplicate="allow", report=report, consumed=consumed):
        lengths = _add(lengths, np.bincount(np.diff(batch.ends, prepend=0) - 1))
        tokens += np.bincount(np.frombuffer(batch.tokens, dtype=np.uint8), minlength=NUM_TOKENS)
    return _statistics(lengths, tokens, report.summary())


def _count_store(store: TokenStore) -> CorpusStatistics:
    if len(store) == 0:
        raise InputError(f"{store.path}: no proteins in this token store")
    lengths = np.zeros(1, dtype=np.int64)
    for start in range(0, len(store), _PROTEINS_AT_ONCE):
        lengths = _add(lengths, np.bincount(np.diff(store.offsets[start : start + _PROTEINS_AT_ONCE + 1]) - 1))
    return _statistics(lengths, np.array(store.manifest.residue_counts), store.manifest.changes_summary())


def _statistics(lengths: NDArray[np.int64], tokens: NDArray[np.int64], changes: str | None) -> CorpusStatistics:
    residues = tokens[FIRST_RESIDUE : FIRST_RESIDUE + len(RESIDUES)].tolist()
    return CorpusStatistics(
        length_counts=lengths, residue_counts=dict(zip(RESIDUES, residues, strict=True)), changes=changes
    )


def _add(counts: NDArray[np.int64], more: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of two arrays of counts; the shorter one counts as if zeros followed."""
    longer, shorter = (counts, more) if len(counts) >= len(more) else (more, counts)
    total = longer.copy()
    total[: len(shorter)] += shorter
    return total
