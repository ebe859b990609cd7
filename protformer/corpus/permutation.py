"""Keyed permutations of 0..n-1 and keyed random numbers, computed point by point: no list of n numbers anywhere.

In: indices, sizes and keys, as arrays. Out: the places that the indices are sent to. A generalized Feistel network
(Black and Rogaway 2002, section 5): an index below a b, with a and b near the square root of n and a b at least n, is
a pair (x, y), and rounds add a keyed hash of y to x modulo a and one of x to y modulo b in turns, a bijection for any
hash. What falls at n or above is sent through again until it falls below ("cycle walking"): one index in sqrt(n) / 2.
Time O(1) an index, memory O(1) whatever n. Each element may have a size and a key of its own.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_INCREMENT, _FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_SHIFT_A, _SHIFT_B, _ONE = np.uint64(30), np.uint64(27), np.uint64(1)


def permute(indices: NDArray[np.int64], sizes: int | NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each index goes in the permutation of 0..size-1 that belongs to its key.

    (index,) indices from 0 to below their sizes, which are at most 2 ** 62; sizes and keys are for each index, or one
    for all.
    """
    bounds = np.atleast_1d(np.asarray(sizes, dtype=np.uint64))
    values = _feistel(indices.astype(np.uint64), bounds, keys)
    outside = np.flatnonzero(values >= bounds)
    while len(outside):
        values[outside] = _feistel(values[outside], _of(bounds, outside), _of(keys, outside))
        outside = outside[values[outside] >= _of(bounds, outside)]
    return values.astype(np.int64)


def keyed_hash(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Random bits that are a function of these numbers and of their order; (1,) if all are single numbers."""
    bits = np.zeros(1, dtype=np.uint64)
    for part in parts:
        bits = _mix(bits + np.atleast_1d(np.asarray(part)).astype(np.uint64))
    return bits


def keyed_integers(bounds: NDArray[np.int64], *parts: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """For each bound b a number from 0 to b - 1 that is a function of `parts`; bounds are at least 1."""
    return (keyed_hash(*parts) % bounds.astype(np.uint64)).astype(np.int64)


def _feistel(values: NDArray[np.uint64], bounds: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # Rounding does no harm: the product is above the bound for any a.
    a = np.sqrt(bounds.astype(np.float64)).astype(np.uint64) + _ONE
    b = bounds // a + _ONE
    x, y = np.divmod(values, b)
    for number in range(0, ROUNDS, 2):
        x = (x + _mix(y ^ _mix(keys + np.uint64(number))) % a) % a
        y = (y + _mix(x ^ _mix(keys + np.uint64(number + 1))) % b) % b
    joined: NDArray[np.uint64] = x * b + y
    return joined


def _of(values: NDArray[np.uint64], chosen: NDArray[np.int64]) -> NDArray[np.uint64]:
    return values if len(values) == 1 else values[chosen]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread 64 bits over 64 bits (the finalizer of splitmix64, Steele et al. 2014, one round of it)."""
    values = values + _INCREMENT
    values = (values ^ (values >> _SHIFT_A)) * _FACTOR
    return values ^ (values >> _SHIFT_B)
