"""Ids of proteins as tables by other programs write them, and ids by the hundred million as 64-bit hashes.

In: ids of FASTA records, or those of a token store. Out: the name that another table knows the protein by, and
hashes of names. Two of n names share a hash with a probability of n**2 / 2**65: 0.2 % at 250 million.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.compression import describe_source
from protformer.corpus.token_store import IDS_FILE, IDS_OFFSETS_FILE, TokenStore
from protformer.errors import InputError

_FIELD_OF_PREFIX = {
    b"sp": 1, b"tr": 1, b"gb": 1, b"ref": 1, b"pdb": 1, b"bbs": 1, b"lcl": 1, b"cl": 1,
    b"pir": 2, b"prf": 2, b"gnl": 2, b"pat": 2, b"gi": 3,
}  # fmt: skip
"""Which field between `|` MMseqs2 takes for the name; an id with another beginning stays whole."""

_UNIREF = re.compile(rb"UniRef(?:50|90|100)_(?!UPI)")
_UNIPROT = rb"[OPQ][0-9][A-Z0-9]{3}[0-9]|[A-NR-Z][0-9](?:[A-Z][A-Z0-9]{2}[0-9]){1,2}"
_OTHERS = rb"[ANWXY]P_[0-9]+|[A-Z]{3}[0-9]{5}(?:[0-9]{2})?"  # RefSeq and GenBank proteins
_VERSIONED = re.compile(rb"(%b|%b)(?:\.[0-9]+|-[0-9]+)" % (_UNIPROT, _OTHERS))

_IDS_AT_ONCE = 1 << 16


def short_name(identifier: bytes) -> bytes:
    """The name that MMseqs2 writes for a FASTA id: P12345 for sp|P12345|NAME, others as they are."""
    prefix, bar, _ = identifier.partition(b"|")
    if not bar or prefix not in _FIELD_OF_PREFIX:
        return identifier
    fields = identifier.split(b"|")
    place = _FIELD_OF_PREFIX[prefix]
    return fields[place] if place < len(fields) and fields[place] else identifier


def short_id(identifier: str) -> str:
    """As `short_name`."""
    return short_name(identifier.encode("utf-8")).decode("utf-8")


def accession(identifier: bytes) -> bytes:
    """The accession in a FASTA id, without the version or isoform where it is UniProt's, RefSeq's or GenBank's.

    P12345 for sp|P12345|NAME, UniRef50_P12345, P12345.2 and P12345-2; Tb927.2.5720, a locus, stays as it is.
    """
    name = _UNIREF.sub(b"", short_name(identifier), count=1)
    versioned = _VERSIONED.fullmatch(name)
    return versioned[1] if versioned else name


def hash_names(names: Iterable[bytes]) -> NDArray[np.uint64]:
    """(name,) 64 bits of each name's BLAKE2b, the same on every machine and in every run."""
    blake2b = hashlib.blake2b
    return np.frombuffer(b"".join([blake2b(name, digest_size=8).digest() for name in names]), dtype="<u8")


def hash_ids(store: TokenStore, name_of: Callable[[bytes], bytes]) -> NDArray[np.uint64]:
    """(protein,) The hash of the name of each protein in a store."""
    hashes = np.empty(len(store), dtype=np.uint64)
    start = 0
    for ids in stored_ids(store):
        hashes[start : start + len(ids)] = hash_names(map(name_of, ids))
        start += len(ids)
    return hashes


def stored_ids(store: TokenStore) -> Iterator[list[bytes]]:
    """The ids of a store in UTF-8, many at a time. Raises InputError if it was made without ids."""
    if not (store.path / IDS_FILE).exists():
        raise InputError(f"{describe_source(store.path)}: this token store was made without ids")
    offsets = np.load(store.path / IDS_OFFSETS_FILE, mmap_mode="r")
    with (store.path / IDS_FILE).open("rb") as file:
        for start in range(0, len(store), _IDS_AT_ONCE):
            ends = (offsets[start : start + _IDS_AT_ONCE + 1] - offsets[start]).tolist()
            text = file.read(ends[-1])
            yield [text[a:b] for a, b in pairwise(ends)]
