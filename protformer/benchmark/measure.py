"""Time and memory of many cases: the cases of one length are timed in turns, each one's memory in its own process.

In: `Case`s. Out: `Row`s, length by length. A case that needs more memory or time than allowed is left out, with all
longer ones of its series, and said.
"""

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from protformer.benchmark.cases import Case, Row
from protformer.benchmark.memory import TooMuchError, probe
from protformer.benchmark.timing import alternate, timed
from protformer.benchmark.workloads import Run, SharedInputs, prepare
from protformer.device import choose_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much is measured, and what no case may exceed."""

    repeats: int
    with_memory: bool
    max_seconds: float
    """Of one call."""
    max_gb: float
    """Of one process, inputs and libraries included; holds where memory is measured."""


def measure(
    cases: Sequence[Case], limits: Limits, *, tell: Callable[[str], None], advance: Callable[[int], None]
) -> Iterator[Row]:
    """Rows of all cases that stay within the limits, shortest lengths first; `advance` gets the cases done."""
    given_up: set[Case] = set()
    for _, group in itertools.groupby(sorted(cases, key=lambda case: case.length), key=lambda case: case.length):
        together = list(group)
        peaks: dict[Case, float | None] = {}
        runs: dict[Case, Run] = {}
        inputs: SharedInputs = {}
        for case in together:
            if _series(case) in given_up:
                continue
            try:
                peaks[case], runs[case] = _first_run(case, limits, inputs)
            except TooMuchError as error:
                given_up.add(_series(case))
                tell(f"left out from length {case.length:,} on: {_name(case)} {error}")
        device = choose_device(together[0].device)
        medians = alternate(list(runs.values()), device, repeats=limits.repeats)
        for case, seconds in zip(runs, medians, strict=True):
            yield Row(case=case, seconds=seconds, peak_extra_mb=peaks[case])
        advance(len(together))
        del runs, inputs
        gc.collect()


def _first_run(case: Case, limits: Limits, inputs: SharedInputs) -> tuple[float | None, Run]:
    """The peak, if asked for, and the prepared run; raises TooMuchError where a limit is met."""
    if limits.with_memory:
        found = probe(case, max_gb=limits.max_gb, max_seconds=limits.max_seconds)
        peak, seconds, run = found.peak_extra_mb, found.seconds, prepare(case, inputs)
    else:
        peak, run = None, prepare(case, inputs)
        seconds = timed(run, choose_device(case.device))
    if seconds > limits.max_seconds:
        raise TooMuchError(f"takes more than {limits.max_seconds:g} s")
    return peak, run


def _series(case: Case) -> Case:
    """What all lengths of a line in a figure have in common."""
    return replace(case, length=0)


def _name(case: Case) -> str:
    return f"{case.implementation} {case.kind}, {case.direction}, {case.dtype}, {case.passes}:"
