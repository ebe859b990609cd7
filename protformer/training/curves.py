"""The picture of a run: `curves.png` from the rows of `metrics.csv` and `validation.csv`."""

from collections.abc import Sequence

from protformer.evaluation.figures import ValidationCurve, plot_training_curves
from protformer.training.run_folder import RunFolder, read_metrics


def draw_curves(run: RunFolder) -> None:
    """Draw all rows anew, with a curve for each set of held-out proteins."""
    trained = [row for row in read_metrics(run.metrics) if row["train_loss"]]
    validated = read_metrics(run.validation)
    names = dict.fromkeys(row["set"] for row in validated)
    plot_training_curves(
        train_steps=_column(trained, "step"),
        train_loss=_column(trained, "train_loss"),
        validation={name: _curve([row for row in validated if row["set"] == name]) for name in names},
        path=run.curves,
    )


def _curve(rows: Sequence[dict[str, str]]) -> ValidationCurve:
    return ValidationCurve(
        steps=_column(rows, "step"),
        loss=_column(rows, "loss"),
        perplexity=_column(rows, "perplexity"),
        accuracy=_column(rows, "accuracy"),
        unigram_perplexity=float(rows[-1]["unigram_perplexity"]),
        unigram_accuracy=float(rows[-1]["unigram_accuracy"]),
    )


def _column(rows: Sequence[dict[str, str]], name: str) -> list[float]:
    return [float(row[name] or "nan") for row in rows]
