"""Which item of which source each draw gives: an order without end that is computed and never stored.

In: the sizes of the sources (windows, proteins, clusters or pairs), perhaps weights, and a seed. Out: for any draw
numbers, the items. Draw 0, 1, 2, ... are shared out over the sources by nested Beatty sequences: of the first g draws
the first source has floor(g w_1 / W), of the rest the second has floor(g' w_2 / (W - w_1)), and so on; at any time
no source is off its share by more than the number of sources. The draws of one source go through its items
in a keyed permutation, a new one each time around. Time O(sources) a draw, memory O(1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.permutation import keyed_hash, permute

_WEIGHT_TOTAL = 1 << 30
"""Shares are kept as integers of about this sum, so that products with a remainder fit 64 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What draws gave; arrays (draw,) of int64."""

    source: NDArray[np.int64]
    item: NDArray[np.int64]
    """From 0 within its source."""
    lap: NDArray[np.int64]
    """How many times the source had been gone through before."""


class DrawOrder:
    """The endless order of draws for one seed."""

    def __init__(self, sizes: Sequence[int], *, seed: int, weights: Sequence[float] | None = None) -> None:
        """Each size is at least 1. Without weights each source has its share by size: every item once an epoch."""
        self.sizes, self.seed = tuple(sizes), seed
        total = sum(sizes)
        if weights is None and total <= 2 * _WEIGHT_TOTAL:
            self.shares = self.sizes
        else:
            exact = sizes if weights is None else weights
            self.shares = tuple(max(1, round(weight / sum(exact) * _WEIGHT_TOTAL)) for weight in exact)

    @property
    def draws_per_epoch(self) -> int:
        """As many as there are items; with weights, some come more than once meanwhile and others not at all."""
        return sum(self.sizes)

    def draw(self, numbers: NDArray[np.int64]) -> Draws:
        """The items of these draws, which count from 0 at the start of a run."""
        source, rank = self._share_out(numbers)
        sizes = np.asarray(self.sizes, dtype=np.int64)[source]
        lap, place = np.divmod(rank, sizes)
        item = permute(place, sizes, keyed_hash(self.seed, source, lap))
        return Draws(source=source, item=item, lap=lap)

    def _share_out(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each draw, and how many draws of that source come before it.

        Shares 2 1: of the draws 0 1 2 3 4 5 the first source has floor(2 g / 3) of the first g, so that 1 2 4 5 are its
        own and 0 3 are left to the second.
        """
        source = np.full(len(numbers), len(self.shares) - 1, dtype=np.int64)
        rank, left = numbers.copy(), np.arange(len(numbers))
        for number in range(len(self.shares) - 1):
            share, total = self.shares[number], sum(self.shares[number:])
            before = _scale(rank[left], share, total)
            is_own = _scale(rank[left] + 1, share, total) > before
            source[left[is_own]] = number
            rank[left[is_own]] = before[is_own]
            rank[left[~is_own]] -= before[~is_own]
            left = left[~is_own]
        return source, rank


def _scale(numbers: NDArray[np.int64], numerator: int, denominator: int) -> NDArray[np.int64]:
    """floor(number * numerator / denominator) without a product beyond 64 bits."""
    whole, rest = np.divmod(numbers, denominator)
    scaled: NDArray[np.int64] = whole * numerator + rest * numerator // denominator
    return scaled
