"""Figures as PNG: contact maps and training curves, from plain arrays.

Drawn without a display and without pyplot, whose global state would leak between figures; matplotlib is
imported only when a figure is drawn. Files are written under a temporary name and renamed.
"""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 240
_MAX_PIXELS = 1000
"""A map is a little wider than this at `_DPI`; were it narrower, some rows would not be drawn at all."""
_MAX_TITLE_LETTERS = 44
_MAX_NAME_LETTERS = 20
_NUM_TICKS = 6
_TICK_ROOM = 0.05
"""Of the width of a map: nearer to each other, two numbers would overlap."""
INK = "0.25"
_TRAIN = "#a9b2bd"
_SETS = ("#1f5fa8", "#d9772b", "#2f8f5b", "#8a4fa3")
"""Colours of the validation sets, told apart by those who see no red or green too."""


def plot_contact_map(
    contacts: Float[np.ndarray, "residue residue"],
    *,
    chain_lengths: Sequence[int],
    chain_ids: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """A square map of scores in [0, 1]; residues count from 1 in each chain, lines separate the chains.

    Above 1,000 residues a pixel shows the highest score of the block of pairs it stands for: averaging, as
    image libraries do, would make single contacts fade.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.8, 5.0), layout="compressed")
    axes = figure.add_subplot()
    image = axes.imshow(
        _max_pool(contacts, math.ceil(len(contacts) / _MAX_PIXELS)),
        cmap="Blues",
        vmin=0.0,
        vmax=1.0,
        origin="upper",
        interpolation="nearest",
        extent=(0.5, len(contacts) + 0.5, len(contacts) + 0.5, 0.5),
    )
    _mark_chains(axes, chain_lengths, chain_ids)
    # Ids are no mathematics, whatever `$` they hold.
    lines = [title] if len(title) <= _MAX_TITLE_LETTERS else chain_ids  # a line for each of a pair
    title = "\n".join(_shortened(line, _MAX_TITLE_LETTERS) for line in lines)
    axes.set_title(title, fontsize=10, color=INK, parse_math=False)
    bar = figure.colorbar(image, cax=axes.inset_axes((1.03, 0.0, 0.046, 1.0)))
    bar.set_label("Contact score", color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_edgecolor(INK)
    save_figure(figure, path)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationCurve:
    """Figures of one set of held-out proteins at each validation, and what residue frequencies alone would reach."""

    steps: Sequence[float]
    loss: Sequence[float]
    """Nats a masked residue."""
    perplexity: Sequence[float]
    accuracy: Sequence[float]
    """From 0 to 1."""
    unigram_perplexity: float
    unigram_accuracy: float


def plot_training_curves(
    *,
    train_steps: Sequence[float],
    train_loss: Sequence[float],
    validation: Mapping[str, ValidationCurve],
    path: Path,
) -> None:
    """Loss, validation perplexity and validation accuracy against the optimizer step, a curve for each set.

    A dashed line is what predicting by residue frequencies alone would reach on the set: a model above it has learnt
    nothing of the sequence. Without validation the training loss stands alone.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    num_panels = 3 if validation else 1
    figure = Figure(figsize=(3.5 * max(num_panels, 1.5), 3.4), layout="constrained")
    row = figure.subplots(1, num_panels, sharex=True, squeeze=False)[0]
    titles = ("Loss (nats a masked residue)", "Masked perplexity", "Masked accuracy")
    _draw_curve(row[0], train_steps, train_loss, _TRAIN, "training")
    _draw_sets(row, validation)
    for axes, title in zip(row, titles, strict=False):
        axes.set_xlabel("Optimizer step", color=INK)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        plain_frame(axes)
    if validation:
        row[0].plot([], [], color=INK, linestyle="--", linewidth=1.0, label="unigram baseline")
        row[-1].yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, labels = row[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8, labelcolor=INK
        )
    save_figure(figure, path)


def _draw_sets(row: Sequence["Axes"], validation: Mapping[str, ValidationCurve]) -> None:
    """The curves of each set in its own colour: loss, perplexity, accuracy."""
    for number, (name, curve) in enumerate(validation.items()):
        color = _SETS[number % len(_SETS)]
        panels = (
            (curve.loss, math.log(curve.unigram_perplexity)),
            (curve.perplexity, curve.unigram_perplexity),
            (curve.accuracy, curve.unigram_accuracy),
        )
        for axes, (values, baseline) in zip(row, panels, strict=True):
            _draw_curve(axes, curve.steps, values, color, _shortened(name, _MAX_NAME_LETTERS))
            axes.axhline(baseline, color=color, linestyle="--", linewidth=1.0)


def _mark_chains(axes: "Axes", chain_lengths: Sequence[int], chain_ids: Sequence[str]) -> None:
    """Residue numbers that start anew in each chain, lines between chains, names where there are several."""
    ticks, labels, start = [], [], 0
    total = sum(chain_lengths)
    num_ticks = max(2, _NUM_TICKS // len(chain_lengths))
    for length in chain_lengths:
        room_at_end = 0.0 if start + length == total else _TICK_ROOM * total
        numbers = [
            number
            for number in _tick_numbers(length, num_ticks)
            if number == 1 or 1 + _TICK_ROOM * total < number <= length - room_at_end
        ]
        ticks += [start + number for number in numbers]
        labels += [str(number) for number in numbers]
        start += length
        if start < total:
            axes.axhline(start + 0.5, color=INK, linewidth=0.8)
            axes.axvline(start + 0.5, color=INK, linewidth=0.8)
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    names = ", ".join(_shortened(chain_id, _MAX_NAME_LETTERS) for chain_id in chain_ids)
    axes.set_xlabel(f"Residue ({names})" if len(chain_ids) > 1 else "Residue", color=INK, parse_math=False)
    axes.set_ylabel("Residue", color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    for spine in axes.spines.values():
        spine.set_edgecolor(INK)


def _tick_numbers(length: int, num_ticks: int) -> list[int]:
    """1 and the multiples of a round step."""
    wanted = length / num_ticks
    magnitude = 10 ** math.floor(math.log10(max(wanted, 1)))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= wanted)
    return [1, *range(max(step, 2), length + 1, step)]


def _max_pool(contacts: np.ndarray, block: int) -> np.ndarray:
    """The maximum of each block of `block` x `block` pairs; the last blocks may be smaller."""
    starts = np.arange(0, len(contacts), block)
    rows: np.ndarray = np.maximum.reduceat(contacts, starts, axis=0)
    pooled: np.ndarray = np.maximum.reduceat(rows, starts, axis=1)
    return pooled


def _draw_curve(axes: "Axes", steps: Sequence[float], values: Sequence[float], color: str, label: str) -> None:
    if not len(steps):
        return
    # A single point makes no line; few points should be seen as such.
    marker = "o" if len(steps) <= 30 else ""
    linewidth = 1.4 if len(steps) <= 100 else 0.8
    axes.plot(steps, values, color=color, linewidth=linewidth, marker=marker, markersize=3, label=label)


def plain_frame(axes: "Axes") -> None:
    """Two axes in grey, horizontal lines behind the data: the frame of every figure of ours."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_edgecolor(INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _shortened(name: str, max_letters: int) -> str:
    return name if len(name) <= max_letters else name[: max_letters - 3] + "..."


def save_figure(figure: "Figure", path: Path) -> None:
    """Write PNG whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    partial = path.with_name(path.name + ".partial")
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Letters of an id that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(partial, format="png", dpi=_DPI)
    os.replace(partial, path)
