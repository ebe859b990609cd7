"""Ids of a token store found by hash, block by block: no dictionary of all ids in memory.

In: ids as bytes, one after another with their bounds. Out: 64-bit hashes, or the indices of named proteins. The hash
is a polynomial in an odd number B over random words for the bytes, modulo 2 ** 64: with prefix sums P_j = sum over i < j
of t_i B ** i, that of bytes s to e is (P_e - P_s) B ** -s, so a whole block is hashed by a few array operations. Two
of n different ids share a hash with odds of about n ** 2 / 2 ** 65 (0.2 % at 250 million); where that would matter, hits
are compared letter by letter.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.token_store import TokenStore

BLOCK_IDS = 1 << 16
_BASE = 0x9E3779B97F4A7C15 | 1
_WORDS = np.random.default_rng(20).integers(0, 2**64, 256, dtype=np.uint64)
_BAR = ord("|")


def hash_texts(text: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hash of each stretch of `text`; equal bytes give equal hashes wherever they stand. 32 bytes a byte."""
    # Whole sizes, so that blocks of similar size share their powers.
    count = 1 << len(text).bit_length()
    powers, inverses = _powers(_BASE, count), _powers(pow(_BASE, -1, 2**64), count)
    prefix = np.zeros(len(text) + 1, dtype=np.uint64)
    np.cumsum(_WORDS[text] * powers[: len(text)], out=prefix[1:])
    return (prefix[ends] - prefix[starts]) * inverses[starts] + (ends - starts).astype(np.uint64)


def id_blocks(store: TokenStore) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.int64]]]:
    """The ids in blocks: index of the first, their bytes one after another, and (id + 1,) where they begin and end."""
    text, offsets = store.id_table()
    for first in range(0, len(store), BLOCK_IDS):
        bounds = np.array(offsets[first : first + BLOCK_IDS + 1])
        yield first, np.asarray(text[bounds[0] : bounds[-1]]), bounds - bounds[0]


def accession_bounds(text: NDArray[np.uint8], bounds: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the accession of each id lies: P12345 of `sp|P12345|NAME`, as MMseqs2 shortens ids; else the whole id."""
    starts, ends = bounds[:-1].copy(), bounds[1:].copy()
    bars = np.append(np.flatnonzero(text == _BAR), [len(text), len(text)])
    first = np.searchsorted(bars, starts)
    has_two = (bars[first] == starts + 2) & (bars[first + 1 - (bars[first] == len(text))] < ends)
    chosen = np.flatnonzero(has_two)
    starts[chosen], ends[chosen] = bars[first[chosen]] + 1, bars[first[chosen] + 1]
    return starts, ends


def find_proteins(store: TokenStore, names: Sequence[str]) -> dict[str, list[int]]:
    """The indices of all proteins with one of these ids, in the order of the store; an id without any is left out."""
    encoded = [name.encode("utf-8") for name in names]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    wanted = np.sort(hash_texts(text, np.append(0, ends[:-1]).astype(np.int64), ends))
    known = set(names)
    found: dict[str, list[int]] = {}
    for first, block, bounds in id_blocks(store):
        hashes = hash_texts(block, bounds[:-1], bounds[1:])
        places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        for index in (first + np.flatnonzero(wanted[places] == hashes)).tolist():
            if (name := store.id(index)) in known:
                found.setdefault(name, []).append(index)
    return found


@lru_cache(maxsize=2)
def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """(count + 1,) base ** 0, 1, ..., count modulo 2 ** 64."""
    powers = np.full(count + 1, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers)
