"""Runs side by side: `python tests/benchmarks/learning_curves.py OUT.png NAME=RUN NAME=RUN...`.

RUNs are run folders of `protformer train` with the same validation proteins. Draws what each validation gave, in nats a
masked residue better than residue frequencies alone, against hours of training by the clock and against residues
trained on, and prints the last rows as a table. At most four runs. Hours are summed from the rates in `metrics.csv`:
validation and the time between a stop and its resumption do not count.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from protformer.evaluation.figures import INK, plain_frame, save_figure
from protformer.training.run_folder import RunFolder, read_metrics

COLORS = ("#1f5fa8", "#d9772b", "#2f8f5b", "#8a4fa3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What a validation gave."""

    step: int
    hours: float
    tokens: int
    nats: float
    """Better than residue frequencies, a masked residue."""
    perplexity: float
    accuracy: float
    memory_gb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    arguments = parser.parse_args()
    if len(arguments.runs) > len(COLORS):
        parser.error(f"at most {len(COLORS)} runs")
    learned = {name: read_run(Path(folder)) for name, folder in (run.split("=", 1) for run in arguments.runs)}
    draw(learned, arguments.picture)
    print("| attention | steps | million tokens | hours | nats over frequencies | perplexity | accuracy | peak GB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, rows in learned.items():
        last = rows[-1]
        print(
            f"| {name} | {last.step:,} | {last.tokens / 1e6:.1f} | {last.hours:.2f} | {last.nats:.4f} |"
            f" {last.perplexity:.2f} | {last.accuracy:.2%} | {last.memory_gb:.2f} |"
        )


def read_run(folder: Path) -> list[Learned]:
    learned, seconds, tokens = [], 0.0, 0
    for row in read_metrics(RunFolder(folder).metrics):
        if row["tokens_per_second"]:
            seconds += (int(row["tokens"]) - tokens) / float(row["tokens_per_second"])
            tokens = int(row["tokens"])
        if row["val_loss"]:
            learned.append(
                Learned(
                    step=int(row["step"]),
                    hours=seconds / 3600,
                    tokens=tokens,
                    nats=math.log(float(row["unigram_perplexity"])) - float(row["val_loss"]),
                    perplexity=float(row["val_perplexity"]),
                    accuracy=float(row["val_accuracy"]),
                    memory_gb=float(row["peak_memory_gb"]),
                )
            )
    if not learned:
        raise SystemExit(f"{folder}: no validation yet")
    return learned


def draw(learned: dict[str, list[Learned]], picture: Path) -> None:
    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    by_time, by_tokens = figure.subplots(1, 2, sharey=True)
    for (name, rows), color in zip(learned.items(), COLORS, strict=False):
        nats = [row.nats for row in rows]
        by_time.plot([row.hours for row in rows], nats, color=color, linewidth=1.5, label=name)
        by_tokens.plot([row.tokens / 1e6 for row in rows], nats, color=color, linewidth=1.5)
    by_time.set_title("Nats a masked residue over frequencies", fontsize=10, color=INK, loc="left")
    by_time.set_xlabel("Hours by the clock", color=INK)
    by_tokens.set_xlabel("Million tokens", color=INK)
    for axes in (by_time, by_tokens):
        axes.set_xlim(left=0)
        plain_frame(axes)
    by_time.legend(frameon=False, fontsize=8, labelcolor=INK)
    save_figure(figure, picture)


if __name__ == "__main__":
    main()
