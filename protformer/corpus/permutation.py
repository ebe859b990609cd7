"""Keyed permutations of 0..n-1 and keyed random numbers, computed point by point: no list of n numbers anywhere.

In: indices, sizes and keys, as arrays. Out: the places that the indices are sent to. A balanced Feistel network over
the next even number of bits is a bijection for any round function; values that fall at n or above are sent through
again until they fall below ("cycle walking", Black and Rogaway 2002), fewer than 4 rounds on average. Time O(1) an
index, memory O(1) whatever n. Each element may have a size and a key of its own.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 4
_INCREMENT, _FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_SHIFT_A, _SHIFT_B, _ONE = np.uint64(30), np.uint64(27), np.uint64(1)


def permute(indices: NDArray[np.int64], sizes: int | NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each index goes in the permutation of 0..size-1 that belongs to its key.

    (index,) indices from 0 to below their sizes, which are at most 2 ** 62; sizes and keys are for each index, or one
    for all.
    """
    bounds = np.atleast_1d(np.asarray(sizes, dtype=np.uint64))
    half_bits = _half_bits(bounds)
    values = _feistel(indices.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(values >= bounds)
    while len(outside):
        values[outside] = _feistel(values[outside], _of(half_bits, outside), _of(keys, outside))
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


def _feistel(values: NDArray[np.uint64], half_bits: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    half_mask = (_ONE << half_bits) - _ONE
    left, right = values >> half_bits, values & half_mask
    for number in range(ROUNDS):
        round_keys = _mix(keys + np.uint64(number))
        left, right = right, left ^ (_mix(right + round_keys) & half_mask)
    joined: NDArray[np.uint64] = left << half_bits | right
    return joined


def _half_bits(bounds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Half of the bits, rounded up, that the largest index takes; from 2 ** 53 on it may be one more than needed."""
    _, num_bits = np.frexp((bounds - _ONE).astype(np.float64))
    half_bits: NDArray[np.uint64] = np.maximum(1, (num_bits + 1) // 2).astype(np.uint64)
    return half_bits


def _of(values: NDArray[np.uint64], chosen: NDArray[np.int64]) -> NDArray[np.uint64]:
    return values if len(values) == 1 else values[chosen]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread 64 bits over 64 bits (the finalizer of splitmix64, Steele et al. 2014, one round of it)."""
    values = values + _INCREMENT
    values = (values ^ (values >> _SHIFT_A)) * _FACTOR
    return values ^ (values >> _SHIFT_B)
