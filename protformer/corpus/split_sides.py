"""Which part of a split each protein goes to, and which proteins must be in none.

In: a 64-bit key for each protein (the same for all proteins of a cluster), pairs of related proteins, families held
out. Out: a `Side` for each protein. All functions are pure, on arrays in the order of a token store.

A key's share of 2**64, mixed with the seed, decides: whole clusters go to one side, and stay there when other data
are added. Where two sides hold relatives, one of the two proteins is dropped; sides keep theirs in the order
out-of-distribution, train, validation, test. Dropping makes no new relations, so one round is enough.
"""

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Side(IntEnum):
    """Where a protein goes."""

    DROPPED = -1
    TRAIN = 0
    VALIDATION = 1
    TEST = 2
    OOD = 3


STORE_NAMES = {Side.TRAIN: "train", Side.VALIDATION: "validation", Side.TEST: "test", Side.OOD: "ood"}
"""Side -> name of its token store in the folder of a split."""

PRECEDENCE = (Side.OOD, Side.TRAIN, Side.VALIDATION, Side.TEST)
"""Of two relatives on different sides, the one on the earlier side stays."""


def sides_by_share(
    keys: NDArray[np.uint64], *, seed: int, validation_fraction: float, test_fraction: float
) -> NDArray[np.int8]:
    """(protein,) TRAIN, VALIDATION or TEST; each key on one side, whatever other keys there are."""
    share = _mix(keys ^ _mix(np.full(1, seed, dtype=np.uint64))) / 2.0**64
    sides = np.full(len(keys), Side.TRAIN, dtype=np.int8)
    sides[share < validation_fraction + test_fraction] = Side.TEST
    sides[share < validation_fraction] = Side.VALIDATION
    return sides


def hold_out(
    sides: NDArray[np.int8], members: NDArray[np.bool_], groups: NDArray[np.int64] | None
) -> NDArray[np.bool_]:
    """Move the members of held-out families to OOD, in place; which others were dropped because of it.

    Dropped are those that share a group (cluster) with a member. A group of -1 is none.
    """
    sides[members] = Side.OOD
    if groups is None:
        return np.zeros(len(sides), dtype=bool)
    touched = np.isin(groups, np.unique(groups[members & (groups >= 0)]))
    dropped = touched & ~members & (sides != Side.DROPPED)
    sides[dropped] = Side.DROPPED
    return np.asarray(dropped)


def drop_copies(sides: NDArray[np.int8], sequences: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Drop proteins, in place, whose sequence (its hash) an earlier side has; which were dropped."""
    before = sides.copy()
    for earlier, later in _pairs_of_sides():
        copies = (sides == later) & np.isin(sequences, sequences[sides == earlier])
        sides[copies] = Side.DROPPED
    return np.asarray(before != sides)


def drop_relatives(sides: NDArray[np.int8], first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Drop proteins, in place, with a relative on an earlier side; which were dropped.

    `first` and `second` (pair,) are proteins that are related, each pair at least once in either order.
    """
    before = sides.copy()
    for earlier, later in _pairs_of_sides():
        for a, b in ((first, second), (second, first)):
            sides[b[(sides[a] == earlier) & (sides[b] == later)]] = Side.DROPPED
    return np.asarray(before != sides)


def _pairs_of_sides() -> Iterator[tuple[Side, Side]]:
    """An earlier side and a later one; every side is settled before it is an earlier one."""
    for i, earlier in enumerate(PRECEDENCE):
        for later in PRECEDENCE[i + 1 :]:
            yield earlier, later


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits that lets each bit reach all (splitmix64's finalizer, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
