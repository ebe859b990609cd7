"""The rows of one rank, one after another without end, from any position on.

In: a `RowPacking` and a `SamplerPosition`. Out: `RowPlan`s, each with the position behind it, so that a run resumes
with the very next row. Planning copies no tokens: a loader process may plan all rows and assemble only its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from protformer.corpus.packing import RowPacking, RowPlan


@dataclass(frozen=True, slots=True)
class SamplerPosition:
    """Where a rank's stream of rows stands: the next row to come. With the seed, this is all of the sampler's state."""

    unit: int = 0
    """Units (windows or pools) that this rank has finished since the start of the run, over all epochs."""
    row: int = 0
    """Rows of the current pool already given; always 0 for windows."""


def row_plans(
    packing: RowPacking, start: SamplerPosition, *, rank: int = 0, num_ranks: int = 1
) -> Iterator[tuple[RowPlan, SamplerPosition]]:
    """Plans of rows from `start` on, each with the position behind it.

    Rank r of w takes the units r, r + w, r + 2 w, ...; all ranks together go through every epoch once.
    """
    unit, first_row = start.unit, start.row
    while True:
        ahead = np.arange(unit, unit + packing.units_at_once)
        for plans in packing.plan(ahead * num_ranks + rank):
            last = len(plans) - 1
            for number in range(first_row, len(plans)):
                after = SamplerPosition(unit + 1, 0) if number == last else SamplerPosition(unit, number + 1)
                yield plans[number], after
            unit, first_row = unit + 1, 0


def row_generator(seed: int, plan: RowPlan) -> np.random.Generator:
    """A generator that belongs to this row alone, whatever batch, worker or rank it falls to."""
    return np.random.default_rng((seed, plan.unit, plan.row))
