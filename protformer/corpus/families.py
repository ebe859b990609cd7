"""Families of proteins, and which of them are held out whole.

In: a TSV of accessions and families (Pfam, COG), plain or compressed, and the store whose proteins it annotates; then
the names of families, or how many to choose. Out: `Families`, and a mark for each protein that has one of those held
out. A protein may have several families, on several lines or in one cell between `;` or `,`. Ids and accessions are
compared by `identifiers.accession`: `sp|P12345|NAME`, P12345.2 and UniRef50_P12345 all are P12345.

The table is streamed; memory is 16 bytes a protein of the store, and 12 for each annotation of one of them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.compression import Source, describe_source
from protformer.corpus.duplicates import quote
from protformer.corpus.identifiers import accession, hash_ids, hash_names
from protformer.corpus.tables import read_lines
from protformer.corpus.token_store import TokenStore
from protformer.errors import InputError

LEAST_CHOSEN_PROTEINS = 10
"""Families are chosen by number among those with at least as many proteins: fewer measure nothing."""

_BETWEEN_FAMILIES = re.compile(rb"[;,\s]+")
_PFAM_VERSION = re.compile(rb"(PF[0-9]{5})\.[0-9]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Families:
    """The families of a store's proteins."""

    names: list[str]
    """Of the families that at least one protein has, in the order of the table."""
    protein: NDArray[np.int64]
    family: NDArray[np.int32]
    """(annotation,) Protein of the store and index into `names`, each pair once."""
    num_proteins: int
    """In the store."""
    num_annotated: int
    """Proteins of the store with at least one family."""
    num_unmatched: int
    """Lines of the table whose accession no protein of the store has."""

    def sizes(self) -> NDArray[np.int64]:
        """(family,) Number of proteins."""
        return np.bincount(self.family, minlength=len(self.names))

    def are_members(self, held_out: Sequence[str], num_proteins: int) -> NDArray[np.bool_]:
        """(protein,) Whether a protein of the store has one of these families."""
        chosen = np.isin(self.names, list(held_out))
        members = np.zeros(num_proteins, dtype=bool)
        members[self.protein[chosen[self.family]]] = True
        return members


def read_families(source: Source, store: TokenStore, *, column: str = "2") -> Families:
    """The families of the proteins in `store`: accession in column 1, family in `column` (a number or a name).

    A name is looked up in the first line. Lines that begin with `#` are comments. Raises InputError.
    """
    ids = hash_ids(store, accession)
    known, place = np.unique(ids, return_inverse=True)
    number_of: dict[bytes, int] = {}
    accessions, families, num_unmatched = _read_annotations(source, column, known, number_of)
    if not len(accessions):
        raise InputError(_describe_no_match(source, store))
    by_name = np.argsort(place, kind="stable")  # several proteins may have one accession
    first = np.searchsorted(place[by_name], np.arange(len(known) + 1))
    repeats = np.diff(first)[accessions]
    within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    pairs = np.stack([by_name[np.repeat(first[accessions], repeats) + within], np.repeat(families, repeats)])
    protein, family = np.unique(pairs, axis=1)
    return Families(
        names=[name.decode("utf-8", "replace") for name in number_of],
        protein=protein,
        family=family.astype(np.int32),
        num_proteins=len(store),
        num_annotated=len(np.unique(protein)),
        num_unmatched=num_unmatched,
    )


def choose_families(families: Families, wanted: str, *, seed: int, source: Source) -> list[str]:
    """The families to hold out: those named, separated by commas, or as many as the number says, by a keyed hash."""
    if wanted.strip().isdigit():
        return _choose_by_hash(families, int(wanted), seed, source)
    named = [_family_name(name.encode()).decode() for name in re.split(r"[,;\s]+", wanted) if name]
    if not named:
        raise InputError("--hold-out-families: names no family; give names with commas between them, or a number")
    known = set(families.names)
    for name in named:
        if name not in known:
            raise InputError(
                f"--hold-out-families {quote(name)}: no protein has this family in {describe_source(source)}"
            )
    return list(dict.fromkeys(named))


def _choose_by_hash(families: Families, count: int, seed: int, source: Source) -> list[str]:
    large = [families.names[i] for i in np.flatnonzero(families.sizes() >= LEAST_CHOSEN_PROTEINS)]
    if not 0 < count <= len(large):
        raise InputError(
            f"--hold-out-families {count}: a number chooses among families of at least {LEAST_CHOSEN_PROTEINS}"
            f" proteins, of which there are {len(large):,} here ({describe_source(source)} knows"
            f" {families.num_annotated:,} of the {families.num_proteins:,} proteins, number of families"
            f" {len(families.names):,}); " + (f"give 1 to {len(large)}, or names" if large else "give names instead")
        )
    keys = hash_names(f"{seed}:{name}".encode() for name in large)
    return sorted(large[i] for i in np.argsort(keys)[:count])


def _read_annotations(
    source: Source, column: str, known: NDArray[np.uint64], number_of: dict[bytes, int]
) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """Place among `known` and family of each annotation that matches, and the number of lines that do not."""
    places, families = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    num_unmatched = 0
    index = int(column) - 1 if column.isdigit() else -1
    for number, lines in read_lines(source):
        if number == 1 and index < 0:
            index = _index_of_column(lines[0], column, source)
            lines = [b"#", *lines[1:]]
        rows = [(i, line.split(b"\t")) for i, line in enumerate(lines) if line and not line.startswith(b"#")]
        for i, row in rows:
            if len(row) <= index:
                raise InputError(
                    f"{describe_source(source)}: line {number + i}: expected a family in column {index + 1}, found "
                    f"{len(row)} columns separated by tabs"
                )
        names = hash_names(accession(row[0]) for _, row in rows)
        place = np.minimum(np.searchsorted(known, names), len(known) - 1)
        found = known[place] == names
        num_unmatched += int((~found).sum())
        listed = [
            (place[i], number_of.setdefault(_family_name(name), len(number_of)))
            for i in np.flatnonzero(found).tolist()
            for name in _BETWEEN_FAMILIES.split(rows[i][1][index])
            if name
        ]
        if listed:
            places.append(np.array([at for at, _ in listed], dtype=np.int64))
            families.append(np.array([family for _, family in listed], dtype=np.int32))
    return np.concatenate(places), np.concatenate(families), num_unmatched


def _index_of_column(header: bytes, column: str, source: Source) -> int:
    names = header.removeprefix(b"#").decode("utf-8", "replace").split("\t")
    if column not in names:
        raise InputError(
            f"{describe_source(source)}: line 1: no column {quote(column)}; there are {', '.join(map(quote, names))}"
        )
    return names.index(column)


def _family_name(name: bytes) -> bytes:
    """PF00001 for PF00001.25; others as they are."""
    versioned = _PFAM_VERSION.fullmatch(name)
    return versioned[1] if versioned else name


def _describe_no_match(source: Source, store: TokenStore) -> str:
    return (
        f"{describe_source(source)}: gives no family to any of the {len(store):,} proteins; column 1 must hold "
        f"accessions as in the ids of the FASTA (the first id there is {quote(store.id(0)) if len(store) else 'none'})"
    )
