"""FASTA to token stores for training, validation, test and out-of-distribution measurement, without relatives between.

In: a `SplitRequest` and a token store of all proteins. Out: a folder with the stores `train`, `validation`, `test` and
`ood` (those that have proteins), `split.json`, and `sides.tsv`, which tells of each protein in the order of the FASTA
where it went, or why it went nowhere; whole or not at all. In steps:

1. Whole clusters are dealt out by a keyed hash, from a table, from MMseqs2, or (no clusters) each sequence by itself.
2. Proteins of held-out families go to `ood`; other members of their clusters are dropped.
3. A sequence that two sides have stays on one of them.
4. Clustering leaves relatives apart, all the more if it takes linear time: a sensitive search of what is held out
   against everything finds them, and one of each two is dropped (`split_sides.PRECEDENCE` says which).

Memory is some 40 bytes a protein; the folder is worked in beside `out`, and takes twice the space of the result, with
MMseqs2 some seven times.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protformer import __version__
from protformer.corpus.build_lock import LOCK_FILE, exclusive_folder, remove_exclusive_folder
from protformer.corpus.clusters import Unlisted, read_clusters
from protformer.corpus.families import choose_families, read_families
from protformer.corpus.identifiers import hash_names, stored_ids
from protformer.corpus.letters import CLOSE
from protformer.corpus.mmseqs import MAX_SEARCH_EVALUE, SEARCH_MARGIN, SENSITIVITY, MMseqs
from protformer.corpus.records import select_proteins
from protformer.corpus.split_manifest import FORMAT_VERSION, SIDES_FILE, SPLIT_FILE, SplitManifest
from protformer.corpus.split_sides import STORE_NAMES, Side, drop_copies, drop_relatives, hold_out, sides_by_share
from protformer.corpus.store_build import building_folder, has_finished_parts
from protformer.corpus.store_manifest import StoreManifest
from protformer.corpus.token_store import TokenStore, TokenStoreWriter
from protformer.errors import InputError, InterruptedRunError, OutputError

SplitMethod = Literal["clusters", "mmseqs", "hash"]

UNLISTED = "not in the cluster table"
CLUSTERED_WITH_OOD = "in a cluster with a held-out family"
COPIES = "with the sequence of another side"
RELATIVES = "similar to another side's"

ALL = "all"
"""Where the store of all proteins is, in the folder that is worked in."""

_PROTEINS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRequest:
    """How to split."""

    method: SplitMethod
    clusters: Path | None = None
    """The table, for the method `clusters`."""
    unlisted: Unlisted = "error"
    linear: bool = True
    """For the method `mmseqs`: easy-linclust, not easy-cluster."""
    identity: float = 0.3
    coverage: float = 0.5
    families: Path | None = None
    family_column: str = "2"
    hold_out_families: str | None = None
    """Names, or a number."""
    validation_fraction: float = 0.02
    test_fraction: float = 0.02
    seed: int = 0
    search: bool = False
    """Look for relatives across the split, by MMseqs2."""
    threads: int = 1


@dataclass(kw_only=True, slots=True)
class _Division:
    """The sides so far, and the record of how they came about."""

    sides: NDArray[np.int8]
    sequences: NDArray[np.uint64]
    """(protein,) Hash of each protein's residues."""
    clusters: dict[str, str | int | float] | None = None
    families: dict[str, str | int | list[str]] | None = None
    search: dict[str, str | int | float] | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    reasons: NDArray[np.int8] = field(init=False)
    """(protein,) Index into the keys of `dropped` of the reason for which a protein is in no store."""

    def __post_init__(self) -> None:
        self.reasons = np.zeros(len(self.sides), dtype=np.int8)

    def note_dropped(self, reason: str, proteins: NDArray[np.bool_]) -> None:
        """Count these proteins, which have been dropped."""
        self.reasons[proteins] = len(self.dropped)
        self.dropped[reason] = int(proteins.sum())


def prepare_split(
    request: SplitRequest, out: Path, *, build: Callable[[Path], StoreManifest], tell: Callable[[str], None]
) -> SplitManifest:
    """Write the stores and the manifest to a new folder `out`.

    `build` makes a token store of all proteins at the path that it is given; `tell` is told what takes long. Raises
    InputError for tables, ConfigError without MMseqs2 where it is needed (both before anything is read, if possible),
    OutputError for `out`, InterruptedRunError if Ctrl-C left something to go on from.
    """
    with _work_folder(out) as folder:
        needs_mmseqs = request.search or request.method == "mmseqs"
        (folder / "work").mkdir()
        mmseqs = MMseqs.find(folder / "work", threads=request.threads) if needs_mmseqs else None
        build(folder / ALL)
        store = TokenStore.open(folder / ALL)
        division = _divide(store, request, mmseqs, tell)
        if not (division.sides == Side.TRAIN).any():
            raise InputError("no proteins are left to train on; hold out less")
        manifest = _write_stores(store, division, request, mmseqs, folder / "result")
        (folder / "result" / SPLIT_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _divide(store: TokenStore, request: SplitRequest, mmseqs: MMseqs | None, tell: Callable[[str], None]) -> _Division:
    division = _Division(sides=np.zeros(len(store), dtype=np.int8), sequences=_hash_sequences(store))
    groups = _deal_out(store, request, mmseqs, division, tell)
    _hold_out_families(store, request, groups, division)
    if groups is not None:
        division.note_dropped(UNLISTED, (groups < 0) & (division.sides == Side.DROPPED))
    division.note_dropped(COPIES, drop_copies(division.sides, division.sequences))
    if request.search and mmseqs is not None:
        _drop_similar(store, request, mmseqs, division, tell)
    return division


def _deal_out(
    store: TokenStore,
    request: SplitRequest,
    mmseqs: MMseqs | None,
    division: _Division,
    tell: Callable[[str], None],
) -> NDArray[np.int64] | None:
    """Set sides by share; the cluster of each protein, if there are clusters."""
    groups, keys = None, division.sequences
    if request.method == "clusters" and request.clusters is not None:
        table = read_clusters(request.clusters, store, unlisted=request.unlisted)
        groups, keys = table.of_protein, table.keys[table.of_protein]
        division.clusters = {"table": str(request.clusters), "absent": table.num_absent}
    elif request.method == "mmseqs" and mmseqs is not None:
        mode = "linclust" if request.linear else "cluster"
        tell(f"clustering {len(store):,} proteins by mmseqs easy-{mode}")
        groups = mmseqs.cluster(store, mode=mode, identity=request.identity, coverage=request.coverage)
        keys = division.sequences[groups]
        division.clusters = {"identity": request.identity, "coverage": request.coverage}
    division.sides = sides_by_share(
        keys,
        seed=request.seed,
        validation_fraction=request.validation_fraction,
        test_fraction=request.test_fraction,
    )
    if groups is not None and division.clusters is not None:
        division.sides[groups < 0] = Side.DROPPED
        sizes = np.unique(groups[groups >= 0], return_counts=True)[1]
        division.clusters |= {"clusters": len(sizes), "largest": int(sizes.max(initial=0))}
    return groups


def _hold_out_families(
    store: TokenStore, request: SplitRequest, groups: NDArray[np.int64] | None, division: _Division
) -> None:
    if request.families is None or request.hold_out_families is None:
        return
    table = read_families(request.families, store, column=request.family_column)
    names = choose_families(table, request.hold_out_families, seed=request.seed, source=request.families)
    members = table.are_members(names, len(store))
    division.note_dropped(CLUSTERED_WITH_OOD, hold_out(division.sides, members, groups))
    other_families = members[table.protein] & ~np.isin(table.names, names)[table.family]
    division.families = {
        "table": str(request.families),
        "column": request.family_column,
        "held_out": names,
        "members": int(members.sum()),
        "members_with_other_families_too": len(np.unique(table.protein[other_families])),
        "proteins_without_a_family": len(store) - table.num_annotated,
        "lines_without_a_protein": table.num_unmatched,
    }


def _drop_similar(
    store: TokenStore, request: SplitRequest, mmseqs: MMseqs, division: _Division, tell: Callable[[str], None]
) -> None:
    held_out = np.flatnonzero(division.sides > Side.TRAIN)
    kept = np.flatnonzero(division.sides != Side.DROPPED)
    tell(f"searching {len(kept):,} proteins for relatives of the {len(held_out):,} held out, by mmseqs easy-search")
    queries, targets = mmseqs.search(store, held_out, kept, identity=request.identity)
    division.note_dropped(RELATIVES, drop_relatives(division.sides, queries, targets))
    division.search = {
        "identity": request.identity,
        "margin": SEARCH_MARGIN,
        "max_evalue": MAX_SEARCH_EVALUE,
        "sensitivity": SENSITIVITY,
    }


def _write_stores(
    store: TokenStore, division: _Division, request: SplitRequest, mmseqs: MMseqs | None, folder: Path
) -> SplitManifest:
    written: dict[str, StoreManifest] = {}
    reasons = list(division.dropped)
    with ExitStack() as stack:
        present = [side for side in STORE_NAMES if (division.sides == side).any()]
        writers = {side: stack.enter_context(TokenStoreWriter(folder / STORE_NAMES[side])) for side in present}
        table = stack.enter_context((folder / SIDES_FILE).open("w", encoding="utf-8"))
        table.write("id\tside\treason\n")
        start = 0
        for ids in stored_ids(store):
            sides = division.sides[start : start + len(ids)]
            offsets = store.offsets[start : start + len(ids) + 1]
            tokens = store.tokens[int(offsets[0]) : int(offsets[-1])].tobytes()
            names = [name.decode("utf-8") for name in ids]
            for side, writer in writers.items():
                chosen = sides == side
                kept = list(compress(names, chosen))
                writer.append(kept, *select_proteins(tokens, offsets[1:] - offsets[0], chosen))
            table.writelines(_lines_of_sides(names, sides, division.reasons[start : start + len(ids)], reasons))
            start += len(ids)
        for side, writer in writers.items():
            written[STORE_NAMES[side]] = writer.finish(store.manifest.sources, store.manifest.report)
    return SplitManifest(
        format_version=FORMAT_VERSION,
        protformer_version=__version__,
        sources=[source.path for source in store.manifest.sources],
        method=request.method,
        seed=request.seed,
        validation_fraction=request.validation_fraction,
        test_fraction=request.test_fraction,
        clusters=division.clusters,
        families=division.families,
        search=division.search,
        tool=None if mmseqs is None else f"MMseqs2 {mmseqs.version}",
        commands=[] if mmseqs is None else mmseqs.commands,
        proteins={name: manifest.num_proteins for name, manifest in written.items()},
        residues={name: manifest.num_residues for name, manifest in written.items()},
        dropped=division.dropped,
    )


def _lines_of_sides(
    names: list[str], sides: NDArray[np.int8], reasons: NDArray[np.int8], words: list[str]
) -> Iterator[str]:
    for name, side, reason in zip(names, sides.tolist(), reasons.tolist(), strict=True):
        is_dropped = side == Side.DROPPED
        yield f"{name}\t{'dropped' if is_dropped else STORE_NAMES[side]}\t{words[reason] if is_dropped else ''}\n"


def _hash_sequences(store: TokenStore) -> NDArray[np.uint64]:
    """(protein,) Hash of the residues of each protein."""
    hashes = np.empty(len(store), dtype=np.uint64)
    for start in range(0, len(store), _PROTEINS_AT_ONCE):
        end = min(start + _PROTEINS_AT_ONCE, len(store))
        tokens = store.tokens[int(store.offsets[start]) : int(store.offsets[end])].tobytes()
        hashes[start:end] = hash_names(tokens[:-1].split(CLOSE))
    return hashes


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to work in, whose `result` takes the place of `out` at the end.

    If the block fails nothing is left of it. If the user or a kill stops it, a store of all proteins is left, whole or
    half built: the next one goes on with that.
    """
    final = Path(os.path.abspath(out))
    folder = final.with_name(f".{final.name}.splitting")
    with exclusive_folder(folder, out):
        try:
            for entry in folder.iterdir():
                if entry.name not in (LOCK_FILE, ALL, building_folder(folder / ALL).name):
                    shutil.rmtree(entry)
            (folder / "result").mkdir()
            yield folder
            if final.exists():
                final.rmdir()  # the caller has seen that it is empty
            (folder / "result").rename(final)
        except (InterruptedRunError, KeyboardInterrupt) as error:
            if not ((folder / ALL).exists() or has_finished_parts(building_folder(folder / ALL))):
                remove_exclusive_folder(folder)
                raise
            raise InterruptedRunError(
                f"interrupted; the same command goes on with the proteins read so far, else delete {folder}"
            ) from error
        except OSError as error:
            remove_exclusive_folder(folder)
            raise OutputError(f"{out}: cannot be written: {error.strerror or error}") from error
        except BaseException:
            remove_exclusive_folder(folder)
            raise
        remove_exclusive_folder(folder)
