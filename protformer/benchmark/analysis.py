"""What rows say together: where linear attention overtakes exact, how far from matrix products alone and from peers.

In: `Row`s. Out: small dataclasses for a table or JSON. Plain arithmetic, no torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from protformer.benchmark.cases import Case, Row

Series = tuple[str, str, str, str, str]
"""implementation, kind, direction, dtype, pass"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossover:
    """From which length on a kind is faster than exact attention of the same direction, dtype and pass."""

    series: Series
    relation: Literal["at", "below", "above"]
    """`below` the shortest length measured, `above` the longest, or `at` a length between two."""
    length: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """The time that matrix products alone would take at the rate measured for their dtype, and a row's multiple of it.

    A multiple below 1 is no error: where a machine multiplies bf16 slower than float32, kernels that convert win.
    """

    row: Row
    operations: int
    seconds: float

    @property
    def multiple(self) -> float:
        return self.row.seconds / self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantage:
    """One row of ours beside the same case of a peer."""

    row: Row
    peer: Row

    @property
    def times_faster(self) -> float:
        return self.peer.seconds / self.row.seconds

    @property
    def memory_share(self) -> float | None:
        """Our peak memory as a share of theirs."""
        if self.row.peak_extra_mb is None or not self.peer.peak_extra_mb:
            return None
        return self.row.peak_extra_mb / self.peer.peak_extra_mb


def series_of(case: Case) -> Series:
    return case.implementation, case.kind, case.direction, case.dtype, case.passes


def crossovers(rows: Iterable[Row]) -> list[Crossover]:
    """For each series with a counterpart in exact attention, in the order of the rows."""
    times: dict[Series, dict[int, float]] = {}
    for row in rows:
        times.setdefault(series_of(row.case), {})[row.case.length] = row.seconds
    found = []
    for series, seconds in times.items():
        exact = times.get(("protformer", "exact", *series[2:]))
        if exact is None or series[1] in ("exact", "identity"):
            continue
        lengths = sorted(seconds.keys() & exact.keys())
        if lengths:
            relation, length = crossover(lengths, [exact[n] / seconds[n] for n in lengths])
            found.append(Crossover(series=series, relation=relation, length=length))
    return found


def crossover(lengths: Sequence[int], speedups: Sequence[float]) -> tuple[Literal["at", "below", "above"], float]:
    """Where the speed-up over exact attention last rises through 1, on a line between logarithms of neighbours.

    With 0.5 at length 1000 and 2 at 4000 this is 2000. The last time counts: from there on it stays faster.
    """
    if speedups[-1] < 1:
        return "above", float(lengths[-1])
    slower = [i for i, speedup in enumerate(speedups) if speedup < 1]
    if not slower:
        return "below", float(lengths[0])
    left = slower[-1]
    low, high = math.log(speedups[left]), math.log(speedups[left + 1])
    share = -low / (high - low)
    return "at", math.exp((1 - share) * math.log(lengths[left]) + share * math.log(lengths[left + 1]))


def operations(case: Case) -> int:
    """Operations of the matrix products that a case of attention cannot do without (multiply-add counts as two).

    With features, forward: W q, W k, K'^T [V, 1] and Q' S, each length x features x about head_dim; backward: one
    product for each of the first two (W needs no gradient) and two for each of the others. Causal attention is given
    the same floor: what it does inside blocks depends on their size. Exact: two products over all pairs (half of them
    if causal), and four backward. Recomputation is not counted.
    """
    residues = case.batch * case.heads * case.length
    if case.num_features is None:
        pairs = residues * case.length // (2 if case.direction == "unidirectional" else 1)
        return 2 * pairs * case.head_dim * (2 if case.passes == "forward" else 6)
    features, sums = case.head_dim, case.head_dim + 1
    forward, backward = 2 * features + 2 * sums, 2 * features + 4 * sums
    return 2 * residues * case.num_features * (forward + (backward if case.passes == "forward+backward" else 0))


def floors(rows: Iterable[Row], rates: Mapping[str, float]) -> list[Floor]:
    """Of our rows; `rates` are the measured operations a second of each dtype."""
    return [
        Floor(row=row, operations=operations(row.case), seconds=operations(row.case) / rates[row.case.dtype])
        for row in rows
        if row.case.implementation == "protformer" and row.case.model is None
    ]


def advantages(rows: Sequence[Row]) -> list[Advantage]:
    """Our rows that a peer was measured beside."""
    by_case = {row.case: row for row in rows}
    ours = (row for row in rows if row.case.implementation == "protformer")
    pairs = ((row, by_case.get(replace(row.case, implementation="performer-pytorch"))) for row in ours)
    return [Advantage(row=row, peer=peer) for row, peer in pairs if peer is not None]


def scaling(rows: Sequence[Row]) -> dict[Series, float]:
    """Time a residue at the longest length over that at the shortest, of each series with two lengths or more."""
    shares = {}
    for series in dict.fromkeys(series_of(row.case) for row in rows):
        own = sorted((row for row in rows if series_of(row.case) == series), key=lambda row: row.case.length)
        if len(own) > 1:
            first, last = own[0], own[-1]
            shares[series] = (last.seconds / last.case.length) / (first.seconds / first.case.length)
    return shares


def report(rows: Sequence[Row], rates: Mapping[str, float]) -> dict[str, object]:
    """All of the above as JSON."""
    names = ("implementation", "kind", "direction", "dtype", "pass")
    ratios = [
        {"row": a.row.as_json(), "times_faster": a.times_faster, "memory_share": a.memory_share}
        for a in advantages(rows)
    ]
    return {
        "crossovers": [
            {**dict(zip(names, c.series, strict=True)), "relation": c.relation, "length": c.length}
            for c in crossovers(rows)
        ],
        "matrix_operations_per_second": dict(rates),
        "floors": [
            {**f.row.as_json(), "operations": f.operations, "floor_seconds": f.seconds, "multiple": f.multiple}
            for f in floors(rows, rates)
        ],
        "peers": ratios,
        "time_per_residue_longest_over_shortest": [
            {**dict(zip(names, series, strict=True)), "ratio": ratio} for series, ratio in scaling(rows).items()
        ],
    }
