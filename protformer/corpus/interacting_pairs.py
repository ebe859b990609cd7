"""Pairs of interacting proteins of a token store, as an array on disk.

In: a token store with ids, and a table of pairs (see `pairs`). Out: an `.npy` file of int64 (pair, 2), the indices of
both proteins. Pairs labelled 0 do not interact and are left out, and so are pairs of which a protein is held out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protformer.corpus.compression import Source, describe_source
from protformer.corpus.duplicates import quote
from protformer.corpus.identifiers import short_name, stored_ids
from protformer.corpus.pairs import read_pairs, resolve_pairs
from protformer.corpus.random_reads import ArrayFile
from protformer.corpus.token_store import TokenStore
from protformer.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class PairReport:
    """What became of the lines of a table."""

    num_pairs: int
    num_negative: int
    num_held_out: int
    num_long: int
    """Of the pairs that are kept: how many are longer than a row."""

    def summary(self, max_residues: int, is_cropped: bool) -> str:
        """One line for the user."""
        fate = "cropped to fit, anew each epoch" if is_cropped else "left out"
        return (
            f"{self.num_pairs:,} pairs; left out: {self.num_negative:,} labelled 0, {self.num_held_out:,} with a"
            f" held-out protein; {self.num_long:,} are longer than a row of {max_residues:,} tokens and are {fate}"
        )


class InteractingPairs:
    """Pairs of one store, open for reading."""

    def __init__(self, file: Path) -> None:
        self.proteins = ArrayFile(file)
        """(pair, 2) indices in the store."""

    def __len__(self) -> int:
        return self.proteins.shape[0]


def build_interacting_pairs(
    store: TokenStore, held_out: TokenStore | None, table: Source, file: Path, *, max_residues: int
) -> PairReport:
    """Find the proteins of the pairs and write the array.

    Raises InputError for an id that neither store has, one that several proteins share, or when no pair is left.
    """
    pairs = read_pairs(table)
    positive = [pair for pair in pairs if pair.label != 0]
    names = sorted({name for pair in positive for name in (pair.a, pair.b)})
    found = _find_proteins(store, names)
    absent = [name for name in names if name not in found]
    also_held_out = _find_proteins(held_out, absent) if held_out is not None and absent else {}
    resolve_pairs(positive, found.keys() | also_held_out.keys(), table)
    for name, indices in found.items():
        if len(indices) > 1:
            raise InputError(
                f"{describe_source(table)}: {quote(name)} is the id of {len(indices)} proteins in the FASTA"
            )
    kept = [(found[pair.a][0], found[pair.b][0]) for pair in positive if pair.a in found and pair.b in found]
    if not kept:
        raise InputError(f"{describe_source(table)}: no pair is left to train on")
    proteins = np.array(kept, dtype=np.int64)
    lengths = (store.offsets[proteins + 1] - store.offsets[proteins]).sum(axis=1)
    with file.open("wb") as out:
        np.save(out, proteins)
    return PairReport(
        num_pairs=len(kept),
        num_negative=len(pairs) - len(positive),
        num_held_out=len(positive) - len(kept),
        num_long=int((lengths > max_residues).sum()),
    )


def _find_proteins(store: TokenStore, names: Iterable[str]) -> dict[str, list[int]]:
    """The indices of all proteins with one of these ids or accessions; those without any are left out."""
    wanted = {name.encode("utf-8"): name for name in names}
    found: dict[str, list[int]] = {}
    first = 0
    for identifiers in stored_ids(store):
        for index, identifier in enumerate(identifiers, start=first):
            for each in {identifier, short_name(identifier)} & wanted.keys():
                found.setdefault(wanted[each], []).append(index)
        first += len(identifiers)
    return found
