"""Measurements as tables for people."""

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from protformer.benchmark.analysis import Crossover, advantages, crossovers, floors, scaling
from protformer.benchmark.approximation import Interval, LayerError, OutputError
from protformer.benchmark.cases import Row, implementation_name
from protformer.evaluation.attention_error import AttentionError
from protformer.evaluation.model_readiness import LayerReport


def cost_tables(rows: Sequence[Row], rates: Mapping[str, float], title: str) -> list[Table | str]:
    """Every row with its multiples, then what the series show."""
    faster = {advantage.row: advantage for advantage in advantages(rows)}
    multiples = {floor.row: floor.multiple for floor in floors(rows, rates)}
    table = _table(
        title, ("implementation", "kind", "direction", "dtype", "pass"),
        ("residues", "seconds", "peak MB", "x products", "x faster than peer", "memory of peer's"),
    )  # fmt: skip
    for row in rows:
        advantage = faster.get(row)
        table.add_row(
            implementation_name(row.case.implementation),
            row.case.kind,
            row.case.direction,
            row.case.dtype,
            row.case.passes,
            f"{row.case.length:,}",
            f"{row.seconds:.4g}",
            _number(row.peak_extra_mb, ",.0f"),
            _number(multiples.get(row), ".2f"),
            _number(advantage.times_faster if advantage else None, ".2f"),
            _number(advantage.memory_share if advantage else None, ".0%"),
        )
    found = [f"Matrix products: {', '.join(f'{rate / 1e9:,.0f} GFLOP/s in {dtype}' for dtype, rate in rates.items())}"]
    found += [_crossover_line(crossing) for crossing in crossovers(rows)]
    found += [
        f"{' '.join(series)}: time a residue grows {ratio:.2f}-fold from the shortest to the longest"
        for series, ratio in scaling(rows).items()
    ]
    return [table, *found]


def error_tables(outputs: Sequence[OutputError], layers: Sequence[LayerError]) -> list[Table | str]:
    """Error of attention by estimator and features; error of hidden states by layer and features."""
    counts = list(dict.fromkeys(error.num_features for error in outputs))
    first = _table(
        "Mean squared error of the attention output: median [95 % interval]",
        ("estimator",),
        [f"m = {c}" for c in counts],
    )
    for variant in dict.fromkeys(error.variant for error in outputs):
        own = {error.num_features: error for error in outputs if error.variant == variant}
        first.add_row(variant, *(_interval(own[count].mean_squared) for count in counts))
    layer_counts = list(dict.fromkeys(error.num_features for error in layers))
    second = _table(
        "Relative error of the hidden states: median [95 % interval]", ("layer",), [f"m = {c}" for c in layer_counts]
    )
    by_place = {(error.layer, error.num_features): error for error in layers}
    for layer in dict.fromkeys(error.layer for error in layers):
        second.add_row(str(layer), *(_interval(by_place[layer, count].relative) for count in layer_counts))
    return [first, second]


def exactness_table(errors: Iterable[AttentionError], sequences: str) -> list[Table | str]:
    """One line a layer."""
    table = _table(
        f"Distance from exact attention, on {sequences}",
        ("layer",),
        ("error of attention (squared, over variance)", "error of hidden states"),
    )
    for error in errors:
        table.add_row(str(error.layer), f"{error.relative_error:.3f}", f"{error.hidden_error:.3f}")
    return [table]


def readiness_table(reports: Iterable[LayerReport], sequences: str) -> list[Table | str]:
    """One line a layer and number of features."""
    table = _table(
        f"Readiness for FAVOR+, on {sequences}",
        ("layer", "m"),
        (
            "mean |x+y|^2", "logit spread", "largest", "effective features", "relative error", "error of mean(V)",
            "hidden states",
        ),
    )  # fmt: skip
    for report in reports:
        figures = report.readiness
        table.add_row(
            str(report.layer),
            str(figures.num_features),
            f"{figures.squared_norm:.2f}",
            f"{figures.logit_spread:.2f}",
            f"{figures.logit_spread_max:.2f}",
            f"{figures.effective_features:.1f}",
            f"{figures.relative_error:.3f}",
            f"{figures.mean_pooling_error:.3f}",
            f"{report.propagated_error:.3f}",
        )
    return [
        table,
        (
            "A large error near or above that of mean(V): random features do not follow this layer."
            " Both small: attention is nearly flat, there is little to follow."
        ),
    ]


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _crossover_line(crossing: Crossover) -> str:
    name = " ".join(crossing.series)
    length = f"{crossing.length:,.0f} residues"
    if crossing.relation == "above":
        return f"{name}: slower than exact attention up to {length}, the longest measured"
    if crossing.relation == "below":
        return f"{name}: faster than exact attention from {length} on, the shortest measured"
    return f"{name}: faster than exact attention from about {length} on"


def _interval(interval: Interval) -> str:
    return f"{interval.median:.2g} [{interval.low:.2g}, {interval.high:.2g}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
