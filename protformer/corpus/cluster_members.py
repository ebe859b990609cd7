"""Which proteins of a token store belong together, as arrays on disk: for sampling uniformly over clusters.

In: a token store with ids, and a table `representative<TAB>member`, plain or compressed, as `mmseqs createtsv` and
`easy-linclust` write it. Out: a folder with

- `starts.npy`: int64 (cluster + 1,), cluster c has members[starts[c]:starts[c + 1]];
- `members.npy`: int32 or int64 (protein,), indices of proteins in the store.

A protein that the table does not name is a cluster of its own; members that the store does not have (held out, filtered)
are passed over. Both are counted. Making it takes 40 bytes of memory a line; sampling maps the files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.compression import Source, describe_source, open_blocks
from protformer.corpus.duplicates import quote
from protformer.corpus.id_lookup import accession_bounds, hash_texts, id_blocks
from protformer.corpus.permutation import keyed_hash
from protformer.corpus.token_store import TokenStore
from protformer.errors import InputError

STARTS_FILE, MEMBERS_FILE = "starts.npy", "members.npy"
_NEWLINE, _TAB, _RETURN = b"\n"[0], b"\t"[0], b"\r"[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterReport:
    """What matching a table with a store gave."""

    num_clusters: int
    """Of the store, single proteins included."""
    num_unnamed: int
    """Proteins of the store that the table does not name."""
    num_absent: int
    """Lines whose member is not in the store."""

    def summary(self) -> str:
        """One line for the user."""
        return (
            f"{self.num_clusters:,} clusters; {self.num_unnamed:,} proteins that the table does not name are clusters"
            f" of their own; {self.num_absent:,} members of the table are not in the training store"
        )


class ClusterMembers:
    """The clusters of one store, open for reading."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts: NDArray[np.int64] = np.load(folder / STARTS_FILE, mmap_mode="r").view(np.ndarray)
        self.members: NDArray[np.int32] | NDArray[np.int64] = np.load(folder / MEMBERS_FILE, mmap_mode="r").view(
            np.ndarray
        )

    def __len__(self) -> int:
        """Number of clusters."""
        return len(self.starts) - 1

    def __reduce__(self) -> tuple[Callable[[Path], "ClusterMembers"], tuple[Path]]:
        """A worker process maps the files again instead of receiving a copy of them."""
        return ClusterMembers, (self.folder,)


def build_cluster_members(store: TokenStore, table: Source, folder: Path) -> ClusterReport:
    """Match the table with the store and write the arrays to this existing folder.

    Raises InputError for a table that is no such table, or that names no protein of the store.
    """
    members, representatives = _read_table(table)
    keys, is_named, num_matched = _cluster_of_proteins(store, members, representatives)
    if not is_named.any():
        raise InputError(
            f"{describe_source(table)}: none of its {len(members):,} members is a protein of the training FASTA"
            f" (whose first is {quote(store.id(0))}); ids are headers up to the first white space"
        )
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    np.save(folder / STARTS_FILE, np.append(starts, len(store)).astype(np.int64))
    np.save(folder / MEMBERS_FILE, order.astype(np.int32 if len(store) < 2**31 else np.int64))
    return ClusterReport(
        num_clusters=len(starts),
        num_unnamed=int((~is_named).sum()),
        num_absent=len(members) - num_matched,
    )


def _cluster_of_proteins(
    store: TokenStore, members: NDArray[np.uint64], representatives: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_], int]:
    """A number for each protein that those of one cluster share; whether the table names it; lines that were met."""
    order = np.argsort(members, kind="stable")
    members, representatives = members[order], representatives[order]
    keys = np.empty(len(store), dtype=np.uint64)
    is_named = np.zeros(len(store), dtype=bool)
    is_met = np.zeros(len(members), dtype=bool)
    for first, text, bounds in id_blocks(store):
        here = slice(first, first + len(bounds) - 1)
        alone = keyed_hash(1, np.arange(here.start, here.stop))
        keys[here] = alone
        for starts, ends in ((bounds[:-1], bounds[1:]), accession_bounds(text, bounds)):
            hashes = hash_texts(text, starts, ends)
            places = np.minimum(np.searchsorted(members, hashes), len(members) - 1)
            hit = (members[places] == hashes) & ~is_named[here]
            keys[here][hit] = representatives[places[hit]]
            is_named[here] |= hit
            is_met[places[hit]] = True
    return keys, is_named, int(is_met.sum())


def _read_table(table: Source) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hashes of the members and of their representatives, line by line."""
    members: list[NDArray[np.uint64]] = []
    representatives: list[NDArray[np.uint64]] = []
    num_lines = 0
    for block in _whole_lines(table):
        text = np.frombuffer(block, dtype=np.uint8)
        newlines, tabs = np.flatnonzero(text == _NEWLINE), np.flatnonzero(text == _TAB)
        starts = np.append(0, newlines[:-1] + 1)
        is_good = np.diff(np.searchsorted(tabs, np.append(starts, len(text)))) == 1
        if not is_good.all():
            line = int(np.flatnonzero(~is_good)[0])
            raise InputError(
                f"{describe_source(table)}: line {num_lines + line + 1}: expected representative and member,"
                " separated by one tab"
            )
        ends = newlines - (text[newlines - 1] == _RETURN)
        representatives.append(hash_texts(text, starts, tabs))
        members.append(hash_texts(text, tabs + 1, ends))
        num_lines += len(newlines)
    if not members:
        raise InputError(f"{describe_source(table)}: empty file: no clusters in it")
    return np.concatenate(members), np.concatenate(representatives)


def _whole_lines(table: Source) -> Iterator[bytes]:
    """The table in blocks that end with a line."""
    rest = b""
    for block in open_blocks(table):
        whole, newline, rest_of_block = block.rpartition(b"\n")
        if newline:
            yield rest + whole + newline
            rest = rest_of_block
        else:
            rest += block
    if rest:
        yield rest + b"\n"
