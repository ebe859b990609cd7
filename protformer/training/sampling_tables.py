"""What a run draws from besides its FASTA files: weights of sources, clusters, pairs.

In: `--clusters` and `--pairs` as the user gave them, and the data part of the configuration. Out: tables of indices in
the run folder, one line for the user on what they hold, and one line of error for what does not go together.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protformer.config import DataConfig
from protformer.corpus.cluster_members import build_cluster_members
from protformer.corpus.compression import is_stdin
from protformer.corpus.duplicates import refuse_repeated_sources
from protformer.corpus.interacting_pairs import PairReport, build_interacting_pairs
from protformer.corpus.pairs import read_pairs
from protformer.corpus.store_manifest import SourceFile, inspect_sources
from protformer.corpus.token_store import TokenStore
from protformer.errors import ConfigError, InputError
from protformer.training.run_folder import RunFolder, StorePaths

OFFSETS_AT_ONCE = 1 << 20


def check_sampling(fasta: Sequence[str], data: DataConfig, *, clusters: str | None, pairs: str | None) -> None:
    """Refuse, before data are read, what does not go together."""
    weights = data.source_weights
    if weights is None:
        refuse_repeated_sources(fasta)
    if weights is not None and len(weights) != len(fasta):
        raise ConfigError(
            f"data.source_weights: {len(weights)} weights for {len(fasta)} --fasta; give one for each, in their order"
        )
    if clusters is not None and pairs is not None:
        raise InputError("--clusters and --pairs: proteins are drawn by clusters or in pairs, not both; leave one out")
    num_stores = len(fasta_by_store(fasta, data))
    option = "--clusters" if clusters is not None else "--pairs" if pairs is not None else None
    if option is not None and num_stores > 1:
        raise InputError(
            f"{option}: goes with one token store, or with FASTA files without data.source_weights, not with"
            f" {num_stores} stores"
        )
    if pairs is not None and data.on_long == "windows":
        raise ConfigError("data.on_long: 'windows' would part the proteins of a pair; with --pairs it is crop or skip")
    for name, source in (("--clusters", clusters), ("--pairs", pairs)):
        if source is not None and is_stdin(source):
            raise InputError(f"{name}: must be a file, so that a resume can know it again")
    # Reading a large FASTA only to find a mistake in these afterwards would be a pity.
    inspect_sources([source for source in (clusters, pairs) if source is not None])
    if pairs is not None:
        read_pairs(pairs)


def fasta_by_store(fasta: Sequence[str], data: DataConfig) -> list[list[str]]:
    """What makes each token store: all FASTA files together, or each by itself if they have weights or are stores."""
    prepared = [Path(source).is_dir() for source in fasta]
    if any(prepared) and not all(prepared):
        raise InputError("--fasta: give token stores, or FASTA files, not both")
    if all(prepared) or data.source_weights is not None:
        return [[source] for source in fasta]
    return [list(fasta)]


def add_sampling_tables(
    paths: StorePaths,
    run: RunFolder,
    data: DataConfig,
    *,
    clusters: str | None,
    pairs: str | None,
    tell: Callable[[str], None],
) -> StorePaths:
    """Write the tables of indices; the paths with them."""
    stores = [TokenStore.open(path) for path in paths.train]
    if clusters is not None:
        (source,) = inspect_sources([clusters])
        folder = run.root / "clusters"
        folder.mkdir(exist_ok=True)
        tell(build_cluster_members(stores[0], clusters, folder).summary())
        paths = replace(paths, clusters=folder, clusters_source=source)
    if pairs is not None:
        (source,) = inspect_sources([pairs])
        held_out = TokenStore.open(paths.validation[0]) if paths.validation else None
        file = run.root / "pairs.npy"
        report = build_interacting_pairs(stores[0], held_out, pairs, file, max_residues=data.max_residues)
        _refuse_if_none_fit(report, pairs, data)
        tell(report.summary(data.max_residues, data.on_long == "crop"))
        paths = replace(paths, pairs=file, pairs_source=source)
    elif data.packing == "isolate":
        _tell_of_long_proteins(stores, data, tell)
    return paths


def check_tables_unchanged(paths: StorePaths, *, clusters: str | None, pairs: str | None) -> None:
    """Refuse to resume with other tables than the run began with; without the options, those are taken again."""
    for name, table, before in (
        ("--clusters", clusters, paths.clusters_source),
        ("--pairs", pairs, paths.pairs_source),
    ):
        if table is None:
            continue
        if before is None:
            raise InputError(f"--resume: the run began without {name}")
        (now,) = inspect_sources([table])
        if _content(now) != _content(before):
            raise InputError(f"--resume: {name} {table}: is not the table that the run began with ({before.path})")


def _content(source: SourceFile) -> tuple[int, str, str]:
    return source.num_bytes, source.head_sha256, source.tail_sha256


def _refuse_if_none_fit(report: PairReport, pairs: str, data: DataConfig) -> None:
    if data.on_long == "skip" and report.num_long == report.num_pairs:
        raise InputError(
            f"{pairs}: every pair is longer than data.max_residues ({data.max_residues}) and data.on_long is skip"
        )


def _tell_of_long_proteins(stores: Sequence[TokenStore], data: DataConfig, tell: Callable[[str], None]) -> None:
    num_long = sum(_count_longer(store.offsets.view(np.ndarray), data.max_residues) for store in stores)
    num_proteins = sum(len(store) for store in stores)
    fates = {"crop": "a random crop in each epoch", "windows": "consecutive windows", "skip": "left out"}
    if data.on_long == "skip" and num_long == num_proteins:
        raise InputError(
            f"every protein is longer than data.max_residues ({data.max_residues}) and data.on_long is skip"
        )
    if num_long:
        tell(
            f"{num_long:,} of {num_proteins:,} proteins are longer than a row of {data.max_residues:,} tokens:"
            f" {fates[data.on_long]} (data.on_long)"
        )


def _count_longer(offsets: NDArray[np.int64], max_residues: int) -> int:
    starts = range(0, len(offsets) - 1, OFFSETS_AT_ONCE)
    return sum(int((np.diff(offsets[i : i + OFFSETS_AT_ONCE + 1]) > max_residues).sum()) for i in starts)
