"""Figures of measurements as PNG: time and memory against length, errors against features and layers.

Both axes are logarithmic where numbers span decades, so that linear and quadratic growth are straight lines of
different slope.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from protformer.benchmark.analysis import series_of
from protformer.benchmark.approximation import Interval, LayerError, OutputError
from protformer.benchmark.cases import IDENTITY, PEER, Row
from protformer.evaluation.figures import INK, plain_frame, save_figure
from protformer.evaluation.model_readiness import LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND_COLORS = {"exact": "#b4532a", "favor": "#1f5fa8", "generalized": "#3a8a6e", IDENTITY: "#7f8c9b"}
OTHER_COLORS = ("#7a4fa3", "#c2952d", "#4fa3c7", "#a34f6d", "#5c7a29", "#8c6d5a", "#40507a", "#c76f4f")
MARKERS = {"fp32": "o", "bf16": "s"}


def plot_costs(rows: Sequence[Row], *, title: str, path: Path) -> None:
    """A column for each pass and direction: seconds above, peak memory (if measured) below, against length."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.case.passes, row.case.direction) for row in rows))
    measures: list[tuple[str, Callable[[Row], float | None]]] = [("Seconds", lambda row: row.seconds)]
    if any(row.peak_extra_mb is not None for row in rows):
        measures.append(("Peak memory beyond inputs (MB)", lambda row: row.peak_extra_mb))
    figure = Figure(figsize=(0.8 + 4.4 * len(panels), 1.0 + 3.2 * len(measures)), layout="constrained")
    grid = figure.subplots(len(measures), len(panels), squeeze=False, sharey="row", sharex=True)
    for axes_row, (name, value) in zip(grid, measures, strict=True):
        for axes, (passes, direction) in zip(axes_row, panels, strict=True):
            _draw_costs(axes, [r for r in rows if (r.case.passes, r.case.direction) == (passes, direction)], value)
            axes.set_title(f"{passes}, {direction}", fontsize=10, color=INK, loc="left")
        axes_row[0].set_ylabel(name, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("Residues", color=INK)
    handles = {label: line for axes in grid[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = max(1, round(1.5 * len(panels)))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    figure.suptitle(title, fontsize=10, color=INK)
    save_figure(figure, path)


def plot_errors(outputs: Sequence[OutputError], layers: Sequence[LayerError], *, title: str, path: Path) -> None:
    """Left: squared error of attention against the number of features; right: error of hidden states by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    colors = _colors([error.variant for error in outputs])
    for variant, color in colors.items():
        own = [error for error in outputs if error.variant == variant]
        _draw_interval(left, [e.num_features for e in own], [e.mean_squared for e in own], color, variant)
    counts = [error.num_features for error in layers]
    for num_features, color in _colors([str(count) for count in counts]).items():
        by_layer = [error for error in layers if error.num_features == int(num_features)]
        label = f"m = {num_features}"
        _draw_interval(right, [e.layer for e in by_layer], [e.relative for e in by_layer], color, label)
    left.set_xscale("log", base=2)
    left.set_xticks(sorted({error.num_features for error in outputs}))
    left.xaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    left.set_xlabel("Random features m", color=INK)
    right.set_xlabel("Layer", color=INK)
    left.set_title("Mean squared error of the attention output", fontsize=10, color=INK, loc="left")
    right.set_title("Relative error of the hidden states", fontsize=10, color=INK, loc="left")
    for axes in (left, right):
        plain_frame(axes)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    figure.suptitle(title, fontsize=10, color=INK)
    save_figure(figure, path)


def plot_readiness(reports: Sequence[LayerReport], *, title: str, path: Path) -> None:
    """Errors by layer, for each number of features, beside that of the mean of the values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = [str(report.readiness.num_features) for report in reports]
    for num_features, color in _colors(counts).items():
        own = [report for report in reports if str(report.readiness.num_features) == num_features]
        layers, label = [report.layer for report in own], f"FAVOR+, m = {num_features}"
        _draw_line(left, layers, [report.readiness.relative_error for report in own], color, label)
        _draw_line(right, layers, [report.propagated_error for report in own], color, label)
    first = [report for report in reports if str(report.readiness.num_features) == counts[0]]
    pooling = [report.readiness.mean_pooling_error for report in first]
    _draw_line(left, [report.layer for report in first], pooling, KIND_COLORS[IDENTITY], "mean of the values")
    left.set_title("Error of the attention output", fontsize=10, color=INK, loc="left")
    right.set_title("Error of the hidden states, all layers replaced", fontsize=10, color=INK, loc="left")
    for axes in (left, right):
        axes.set_xlabel("Layer", color=INK)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        plain_frame(axes)
    left.set_ylabel("Relative to exact attention", color=INK)
    figure.suptitle(title, fontsize=10, color=INK)
    save_figure(figure, path)


def _draw_costs(axes: "Axes", rows: Sequence[Row], value: Callable[[Row], float | None]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    colors = _colors([row.case.kind for row in rows])
    dtypes = {row.case.dtype for row in rows}
    for series in dict.fromkeys(series_of(row.case) for row in rows):
        implementation, kind, _, dtype, _ = series
        own = [row for row in rows if series_of(row.case) == series]
        points = [(row.case.length, number) for row in own if (number := value(row)) is not None and number > 0]
        if not points:
            continue
        axes.plot(
            *zip(*points, strict=True),
            color=colors[kind],
            linestyle="--" if implementation == PEER else "-",
            linewidth=1.4,
            marker=MARKERS[dtype],
            markersize=3.5,
            markerfacecolor="white" if dtype == "bf16" else colors[kind],
            label=kind + (f" {dtype}" if len(dtypes) > 1 else "") + (f" ({PEER})" if implementation == PEER else ""),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda number, _: f"{number:,g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda length, _: f"{length:,.0f}")
    axes.tick_params(axis="x", rotation=30)
    plain_frame(axes)


def _draw_interval(
    axes: "Axes", x: Sequence[float | int], intervals: Sequence[Interval], color: str, label: str
) -> None:
    _draw_line(axes, x, [interval.median for interval in intervals], color, label)
    low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _draw_line(axes: "Axes", x: Sequence[float | int], y: Sequence[float], color: str, label: str) -> None:
    axes.plot(x, y, color=color, linewidth=1.4, marker="o", markersize=3, label=label)


def _colors(names: Iterable[str]) -> dict[str, str]:
    """Each name's own colour, the same in every panel: kinds have theirs, others take the next."""
    unique = list(dict.fromkeys(names))
    others = [name for name in unique if name not in KIND_COLORS]
    spare = {name: OTHER_COLORS[i % len(OTHER_COLORS)] for i, name in enumerate(others)}
    return {name: KIND_COLORS.get(name) or spare[name] for name in unique}
