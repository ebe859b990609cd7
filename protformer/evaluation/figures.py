"""Figures as PNG: contact maps and training curves, from plain arrays.

Drawn without a display and without pyplot, whose global state would leak between figures; matplotlib is
imported only when a figure is drawn. Files are written under a temporary name and renamed.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 200
_MAX_PIXELS = 1000
_MAX_NAME_LETTERS = 28
_NUM_TICKS = 6
INK = "0.25"
_TRAIN, _VALIDATION = "#7f8c9b", "#1f5fa8"


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

    figure = Figure(figsize=(5.6, 5.0), layout="constrained")
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
    axes.set_title(_shortened(title), fontsize=10, color=INK)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("Contact score", color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_edgecolor(INK)
    save_figure(figure, path)


def plot_training_curves(
    *,
    train_steps: Sequence[float],
    train_loss: Sequence[float],
    val_steps: Sequence[float],
    val_loss: Sequence[float],
    val_perplexity: Sequence[float],
    val_accuracy: Sequence[float],
    unigram_perplexity: float | None,
    unigram_accuracy: float | None,
    path: Path,
) -> None:
    """Loss in nats, validation perplexity and validation accuracy in [0, 1] against the optimizer step.

    The dashed line is what predicting by residue frequencies alone would reach: a model above it has learnt
    nothing of the sequence. Without validation there is neither.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    loss, perplexity, accuracy = figure.subplots(1, 3)
    _draw_curve(loss, train_steps, train_loss, _TRAIN, "training")
    _draw_curve(loss, val_steps, val_loss, _VALIDATION, "validation")
    _draw_curve(perplexity, val_steps, val_perplexity, _VALIDATION, "validation")
    _draw_curve(accuracy, val_steps, val_accuracy, _VALIDATION, "validation")
    unigram_loss = None if unigram_perplexity is None else math.log(unigram_perplexity)
    baselines = (unigram_loss, unigram_perplexity, unigram_accuracy)
    names = ("Loss (nats per masked residue)", "Masked perplexity", "Masked accuracy")
    for axes, baseline, name in zip((loss, perplexity, accuracy), baselines, names, strict=True):
        if baseline is not None:
            axes.axhline(baseline, color=INK, linestyle="--", linewidth=1.0, label="unigram baseline")
        axes.set_xlabel("Optimizer step", color=INK)
        axes.set_title(name, fontsize=10, color=INK, loc="left")
        plain_frame(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    save_figure(figure, path)


def _mark_chains(axes: "Axes", chain_lengths: Sequence[int], chain_ids: Sequence[str]) -> None:
    """Residue numbers that start anew in each chain, lines between chains, names where there are several."""
    ticks, labels, start = [], [], 0
    num_ticks = max(2, _NUM_TICKS // len(chain_lengths))
    for length in chain_lengths:
        numbers = _tick_numbers(length, num_ticks)
        ticks += [start + number for number in numbers]
        labels += [str(number) for number in numbers]
        start += length
        if start < sum(chain_lengths):
            axes.axhline(start + 0.5, color=INK, linewidth=0.8)
            axes.axvline(start + 0.5, color=INK, linewidth=0.8)
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    several = len(chain_lengths) > 1
    name = "Residue (" + ", ".join(_shortened(chain_id) for chain_id in chain_ids) + ")" if several else "Residue"
    axes.set_xlabel(name, color=INK)
    axes.set_ylabel(name, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    for spine in axes.spines.values():
        spine.set_edgecolor(INK)


def _tick_numbers(length: int, num_ticks: int) -> list[int]:
    """1 and the multiples of a round step; none so near to the end that it meets the 1 of a next chain."""
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
    # A single point makes no line; few points should be seen as such.
    marker = "o" if len(steps) <= 30 else ""
    axes.plot(steps, values, color=color, linewidth=1.4, marker=marker, markersize=3, label=label)


def plain_frame(axes: "Axes") -> None:
    """Two axes in grey, horizontal lines behind the data: the frame of every figure of ours."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_edgecolor(INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME_LETTERS else name[: _MAX_NAME_LETTERS - 3] + "..."


def save_figure(figure: "Figure", path: Path) -> None:
    """Write PNG whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    partial = path.with_name(path.name + ".partial")
    FigureCanvasAgg(figure)
    figure.savefig(partial, format="png", dpi=_DPI)
    os.replace(partial, path)
