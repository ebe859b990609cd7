"""The token stores of a run: given, found in a cache, or built from FASTA.

In: what the user gave, and where stores may be kept: beside the run, or in a cache that runs share. Out: `StorePaths`.
In the cache a store lies under a name made from its files' sizes and the checksums of their ends, so that it is found
again whatever the files are called, and a changed file gets a store of its own. A run that finds another one building
waits for it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from protformer.alphabet import FINGERPRINT
from protformer.corpus.build_lock import exclusive_folder, remove_exclusive_folder
from protformer.corpus.build_workers import num_cores
from protformer.corpus.cluster_split import ClusterSplit, split_by_clusters
from protformer.corpus.split_manifest import SPLIT_FILE
from protformer.corpus.splits import HashSplit, build_split_stores
from protformer.corpus.store_manifest import FORMAT_VERSION, inspect_sources
from protformer.corpus.token_store import TokenStore, build_token_store
from protformer.errors import InputError
from protformer.training.run_folder import StorePaths

TRAIN, VALIDATION = "store", "validation"

Split = HashSplit | ClusterSplit


@runtime_checkable
class Console(Protocol):
    """How a command talks while it works."""

    def byte_progress(self, sources: Sequence[str]) -> AbstractContextManager[Callable[[int], None]]:
        """Gives a function that takes the number of bytes read since its last call."""

    def tell(self, line: str | None) -> None:
        """One line for the user, if there is one."""


def prepare_stores(
    fasta_by_store: Sequence[Sequence[str]],
    validation_sets: Mapping[str, str],
    *,
    beside: Path,
    cache: Path | None,
    fraction: float,
    clusters: str | None = None,
    console: Console,
) -> StorePaths:
    """The stores to train on, one for each list of FASTA files or for each prepared store, and to validate with.

    `validation_sets` are FASTA files or stores by the name of the set; without any, a `fraction` is held out: of the
    proteins, or of the clusters in the table `clusters`. `beside` is the folder to build in without a `cache`. Raises
    InputError, OutputError.
    """
    validation = tuple(
        _validation_store(given, beside / (VALIDATION + _suffix(number)), cache, console)
        for number, given in enumerate(validation_sets.values())
    )
    names = tuple(validation_sets)
    if Path(fasta_by_store[0][0]).is_dir():
        train = tuple(_prepared_store(Path(store)) for (store,) in fasta_by_store)
        if not validation:
            console.tell("nothing is held out: a prepared store is taken whole; give --val-fasta to validate")
        return StorePaths(train=train, validation=validation, validation_names=names)
    if validation:
        train = _build_all(fasta_by_store, beside, cache, console)
        return StorePaths(train=train, validation=validation, validation_names=names)
    return _split_all(fasta_by_store, beside, cache, fraction, clusters, console)


def _validation_store(given: str, without_cache: Path, cache: Path | None, console: Console) -> Path:
    if Path(given).is_dir():
        return _prepared_store(Path(given))
    with _place([given], cache, without_cache, None, console) as store:
        _build([given], store, console)
        return store


def _prepared_store(path: Path) -> Path:
    """Raise InputError unless this folder is a token store."""
    if (path / SPLIT_FILE).is_file():
        raise InputError(
            f"{path}: holds a split, not one token store; give --fasta {path / 'train'} "
            f"--val-fasta {path / 'validation'}"
        )
    TokenStore.open(path)
    return path.resolve()


def _build_all(
    fasta_by_store: Sequence[Sequence[str]], beside: Path, cache: Path | None, console: Console
) -> tuple[Path, ...]:
    stores = []
    for number, fasta in enumerate(fasta_by_store):
        with _place(fasta, cache, beside / (TRAIN + _suffix(number)), None, console) as store:
            _build(fasta, store, console)
            stores.append(store)
    return tuple(stores)


def _split_all(
    fasta_by_store: Sequence[Sequence[str]],
    beside: Path,
    cache: Path | None,
    fraction: float,
    clusters: str | None,
    console: Console,
) -> StorePaths:
    divide: Split = HashSplit(fraction=fraction)
    if clusters is not None:
        divide = split_by_clusters(clusters, fraction, beside / "clusters" / "held_out.npy")
    train, validation = [], []
    for number, fasta in enumerate(fasta_by_store):
        with _place(fasta, cache, beside / (TRAIN + _suffix(number)), divide, console) as store:
            split = store.with_name(VALIDATION + _suffix(number) if cache is None else VALIDATION)
            _split(fasta, store, split, divide, console)
            train.append(store)
            validation += [split] if split.exists() else []
    names = (VALIDATION,) * len(validation)
    return StorePaths(train=tuple(train), validation=tuple(validation), validation_names=names)


def _suffix(number: int) -> str:
    return f"-{number + 1}" if number else ""


@contextmanager
def _place(
    fasta: Sequence[str],
    cache: Path | None,
    without_cache: Path,
    divide: Split | None,
    console: Console,
) -> Iterator[Path]:
    """Where the store is to be, while no other process may build there."""
    key = None if cache is None else _key(fasta, divide)
    if cache is None or key is None:
        yield without_cache
        return
    store = cache.resolve() / f"{Path(fasta[0]).name.split('.')[0]}-{key}" / TRAIN
    lock = store.with_name(".in-use")
    wait = f"waiting for another run that builds {store}"
    with exclusive_folder(lock, store, wait=lambda: console.tell(wait)):
        try:
            yield store
        finally:
            remove_exclusive_folder(lock)


def _key(fasta: Sequence[str], divide: Split | None) -> str | None:
    """The same for the same content; None for what cannot be read twice."""
    sources = inspect_sources(fasta)
    if not all(source.head_sha256 for source in sources):
        return None
    if isinstance(divide, ClusterSplit):
        sources += (divide.table,)
    contents = [(source.num_bytes, source.head_sha256, source.tail_sha256) for source in sources]
    fraction = None if divide is None else divide.fraction
    return hashlib.sha256(json.dumps([FORMAT_VERSION, FINGERPRINT, fraction, contents]).encode()).hexdigest()[:16]


def _build(fasta: Sequence[str], store: Path, console: Console) -> None:
    if _is_there(store, fasta):
        console.tell(f"using the token store {store}")
        return
    with console.byte_progress(fasta) as progress:
        manifest = build_token_store(fasta, store, workers=num_cores(), progress=progress, tell=console.tell)
    console.tell(manifest.changes_summary())
    console.tell(manifest.nucleotide_note())


def _split(fasta: Sequence[str], train: Path, validation: Path, divide: Split, console: Console) -> None:
    if _is_there(train, fasta):
        console.tell(f"using the token stores in {train.parent}")
        return
    with console.byte_progress(fasta) as progress:
        held_out = build_split_stores(
            fasta,
            train=train,
            validation=validation,
            divide=divide,
            workers=num_cores(),
            progress=progress,
            tell=console.tell,
        )
    store = TokenStore.open(train)
    console.tell(store.manifest.changes_summary())
    console.tell(store.manifest.nucleotide_note())
    num_proteins = held_out + len(store)
    how = "by a hash of the sequence; homologs may be in training"
    if isinstance(divide, ClusterSplit):
        how = "whole clusters of the table; proteins that it does not list are in training"
    console.tell(f"held out for validation: {held_out:,} of the {num_proteins:,} proteins in {', '.join(fasta)}, {how}")


def _is_there(store: Path, fasta: Sequence[str]) -> bool:
    """Whether the store is whole and of these files; another one is replaced."""
    try:
        return TokenStore.open(store).difference_from(fasta) is None
    except InputError:
        return False
