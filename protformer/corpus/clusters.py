"""Which cluster each protein of a token store belongs to, from a table as MMseqs2 writes it.

In: TSV without a header, `representative<TAB>member`, plain or compressed, as in the `*_cluster.tsv` of `mmseqs
easy-cluster` and `easy-linclust`; and the store whose proteins it lists. Out: `Clusters`, in the order of the store.
A protein is looked up by its id, and where that is not listed by the name that MMseqs2 writes for it
(`identifiers.short_name`), so that `sp|P12345|NAME` is found as P12345.

The table is streamed and names are kept as hashes of 64 bits: memory grows with the store, not with the table.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.compression import Source, describe_source
from protformer.corpus.duplicates import quote
from protformer.corpus.identifiers import hash_ids, hash_names, short_name
from protformer.corpus.tables import read_lines
from protformer.corpus.token_store import TokenStore
from protformer.errors import InputError

Unlisted = Literal["error", "drop", "single"]
"""For a protein that the table does not list: refuse; give it no cluster; give it one of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """The clusters of a store's proteins."""

    of_protein: NDArray[np.int64]
    """(protein,) From 0, numbered in the order of their first protein in the store; -1 is no cluster."""
    keys: NDArray[np.uint64]
    """(cluster,) Hash of the representative's name: the same for the same cluster in any store."""
    num_unlisted: int
    """Proteins of the store that the table does not list."""
    num_absent: int
    """Lines of the table whose member is not in the store."""


def read_clusters(source: Source, store: TokenStore, *, unlisted: Unlisted = "error") -> Clusters:
    """The clusters of the proteins in `store`; proteins with one id share its cluster.

    A protein that the table does not list may have relatives anywhere: `single` takes it for unrelated to all
    others, which can leak between the parts of a split. Raises InputError.
    """
    if len(store) == 0:
        raise InputError(f"{describe_source(store.path)}: no proteins in this token store")
    ids = hash_ids(store, bytes)
    known, place = np.unique(np.concatenate([ids, hash_ids(store, short_name)]), return_inverse=True)
    representatives, is_listed, num_absent = _read_representatives(source, known)
    by_id, by_short_name = place[: len(store)], place[len(store) :]
    place = np.where(is_listed[by_id], by_id, by_short_name)
    listed = is_listed[place]
    if not listed.any():
        raise InputError(_describe_no_match(source, store))
    if unlisted == "error" and not listed.all():
        raise InputError(_describe_unlisted(source, store, listed))
    # An unlisted protein's own name takes the place of the representative's.
    key_of_protein = np.where(listed, representatives[place], ids)
    chosen = listed | (unlisted == "single")
    of_protein = np.full(len(store), -1, dtype=np.int64)
    of_protein[chosen], keys = _number(key_of_protein[chosen])
    return Clusters(of_protein=of_protein, keys=keys, num_unlisted=int((~listed).sum()), num_absent=num_absent)


def _read_representatives(
    source: Source, known: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_], int]:
    """For each known name (sorted) its representative's hash, and whether the table has it; lines of other names."""
    representatives = np.zeros(len(known), dtype=np.uint64)
    is_listed = np.zeros(len(known), dtype=bool)
    num_absent = 0
    for number, lines in read_lines(source):
        numbers = [number + i for i, line in enumerate(lines) if line]
        pairs = [table_columns(line, source, number + i) for i, line in enumerate(lines) if line]
        firsts = hash_names(representative for representative, _ in pairs)
        place, found = _look_up([member for _, member in pairs], known)
        num_absent += int((~found).sum())
        place, firsts = place[found], firsts[found]
        contradicts = is_listed[place] & (representatives[place] != firsts)
        representatives[place], is_listed[place] = firsts, True
        contradicts |= representatives[place] != firsts  # within these lines
        if contradicts.any():
            line = int(np.flatnonzero(found)[int(contradicts.argmax())])
            raise InputError(
                f"{describe_source(source)}: line {numbers[line]}: {_quoted(pairs[line][1])} is in two clusters; "
                "a protein must have one, and two proteins must differ in their ids"
            )
    return representatives, is_listed, num_absent


def _look_up(members: list[bytes], known: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where each member is among the known names, as it stands or else shortened, and whether it is there."""
    place, found = _find(hash_names(members), known)
    if not found.all():
        missing = np.flatnonzero(~found)
        place[missing], found[missing] = _find(hash_names(short_name(members[i]) for i in missing), known)
    return place, found


def _find(names: NDArray[np.uint64], known: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    place = np.minimum(np.searchsorted(known, names), len(known) - 1)
    return place, known[place] == names


def table_columns(line: bytes, source: Source, number: int) -> tuple[bytes, bytes]:
    """Representative and member in one line of the table. Raises InputError."""
    columns = line.split(b"\t")
    if len(columns) != 2 or not columns[0] or not columns[1]:
        raise InputError(
            f"{describe_source(source)}: line {number}: expected 2 columns separated by a tab (representative, "
            f"member), found {len(columns) if all(columns) else 'an empty one'}"
        )
    return columns[0], columns[1]


def _number(key_of_protein: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Numbers from 0 in the order of first occurrence, and the key of each."""
    keys, first, number = np.unique(key_of_protein, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[number], keys[order]


def _describe_unlisted(source: Source, store: TokenStore, listed: NDArray[np.bool_]) -> str:
    missing = np.flatnonzero(~listed)
    names = ", ".join(quote(store.id(int(i))) for i in missing[:3])
    return (
        f"{describe_source(source)}: does not list {len(missing):,} of {len(store):,} proteins ({names}"
        f"{', ...' if len(missing) > 3 else ''}); cluster all proteins, leave these out (drop), or take each for a "
        "cluster of its own (single), which hides relatives"
    )


def _describe_no_match(source: Source, store: TokenStore) -> str:
    first = next((line for _, lines in read_lines(source) for line in lines if line), None)
    if first is None:
        return f"{describe_source(source)}: empty file: no clusters in it"
    member = _quoted(first.split(b"\t")[1])
    return (
        f"{describe_source(source)}: lists none of the {len(store):,} proteins; its first member is {member}, "
        f"the first protein is {quote(store.id(0))}"
    )


def _quoted(name: bytes) -> str:
    return quote(name.decode("utf-8", "replace"))
