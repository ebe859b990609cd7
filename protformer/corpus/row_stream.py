"""The rows of one rank, one after another without end, from any position on.

In: a `RowPacking` and a `SamplerPosition`. Out: `RowPlan`s, and the position behind any of them, so that a run resumes
with the very next row. Planning copies no tokens: a loader process may plan all rows and assemble only its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from protformer.corpus.packing import RowPacking, RowPlan


@dataclass(frozen=True, slots=True)
class SamplerPosition:
    """Where a rank's stream of rows stands: the next row to come. With the seed, this is all of the sampler's state."""

    unit: int = 0
    """Units (windows or pools) that this rank has finished since the start of the run, over all epochs."""
    row: int = 0
    """Rows of the current pool already given; always 0 for windows."""


def row_plans(packing: RowPacking, start: SamplerPosition, *, rank: int = 0, num_ranks: int = 1) -> Iterator[RowPlan]:
    """Plans of rows from `start` on.

    Rank r of w takes the units r, r + w, r + 2 w, ...; all ranks together go through every epoch once.
    """
    skipped = start.row
    for unit in count(start.unit, packing.units_at_once):
        units = np.arange(unit, unit + packing.units_at_once)
        yield from packing.plan(units * num_ranks + rank)[skipped:]
        skipped = 0


def position_behind(plan: RowPlan, *, num_ranks: int = 1) -> SamplerPosition:
    """Where the stream that gave this plan stands once its row is done."""
    unit = plan.unit // num_ranks
    return SamplerPosition(unit + 1, 0) if plan.is_last else SamplerPosition(unit, plan.row + 1)


def row_generator(seed: int, plan: RowPlan) -> np.random.Generator:
    """A generator that belongs to this row alone, whatever batch, worker or rank it falls to."""
    return np.random.default_rng((seed, plan.unit, plan.row))
