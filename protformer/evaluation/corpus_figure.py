"""A corpus as a figure: how long its proteins are, and of which residues.

In: `CorpusStatistics`. Out: a PNG.
"""

from pathlib import Path

import numpy as np

from protformer.corpus.statistics import CorpusStatistics
from protformer.evaluation.figures import INK, plain_frame, save_figure

_BAR = "#4477aa"
_MEDIAN = "#cc6677"


def draw_corpus(statistics: CorpusStatistics, path: Path) -> None:
    """Proteins against length on a log scale, the median marked; and the share of each residue."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges, counts = statistics.histogram()
    left.stairs(counts, edges, fill=True, color=_BAR)
    left.set_xscale("log")
    median = statistics.length_quantile(0.5)
    left.axvline(median, color=_MEDIAN, linewidth=1.2)
    left.set_title(f"median {median:,}, longest {statistics.length_quantile(1.0):,}", color=INK, fontsize=9)
    left.set_xlabel("Length (residues)", color=INK)
    left.set_ylabel("Proteins", color=INK)
    left.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    left.yaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    shown = sorted(((count, letter) for letter, count in statistics.residue_counts.items() if count), reverse=True)
    shares = np.array([count for count, _ in shown]) / statistics.num_residues
    right.bar([letter for _, letter in shown], 100 * shares, color=_BAR)
    right.set_title(
        f"{statistics.num_residues:,} residues of {statistics.num_proteins:,} proteins", color=INK, fontsize=9
    )
    right.set_xlabel("Residue", color=INK)
    right.set_ylabel("Share (%)", color=INK)
    for axes in (left, right):
        plain_frame(axes)
    save_figure(figure, path)
