"""The figures of a run: collected at each step, joined by validation on schedule, written as rows.

In: the trainer's hooks. Out: rows of `metrics.csv` and `validation.csv`, and whatever else takes figures. Rows are on
the disk before the checkpoint of their step, and those behind the checkpoint that a run goes on from are dropped, so
that a row is there once whatever happened in between.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl

from protformer.device import peak_memory_gb
from protformer.evaluation.masked_lm import MaskedLmScores
from protformer.training.datamodule import TrainingBatch
from protformer.training.masked_lm import MaskedLmTask
from protformer.training.ranks import over_ranks
from protformer.training.run_folder import (
    VALIDATION_FIELDS,
    RunFolder,
    append_metrics,
    keep_metrics_until,
    read_metrics,
)

LOGGED_FIELDS = (
    "tokens", "train_loss", "learning_rate", "tokens_per_second", "peak_memory_gb", "gradient_norm", "skipped_steps",
)  # fmt: skip
"""Of a row, for the other places where figures go."""


@runtime_checkable
class StepGradients(Protocol):
    """What is known about the gradients of the steps so far."""

    skipped_steps: int
    gradient_norm: float


@runtime_checkable
class MetricsSink(Protocol):
    """Somewhere else that figures go, besides the files of the run folder."""

    def start(self, step: int) -> None:
        """Training begins behind `step`; what was written beyond it by a process that was killed does not count."""

    def write(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog(pl.Callback):
    """Collects sums, validates on schedule, and appends rows to `metrics.csv` and `validation.csv`."""

    def __init__(
        self,
        run: RunFolder,
        *,
        log_every_steps: int,
        validate_every_steps: int,
        gradients: StepGradients,
        validate: Callable[[pl.Trainer, MaskedLmTask, bool], dict[str, MaskedLmScores] | None],
        redraw_curves: Callable[[], None],
        sinks: Sequence[MetricsSink] = (),
    ) -> None:
        """`validate` gives scores by the name of the set, the first of them for `metrics.csv`; where its last argument
        allows, it may give up and return None when the run is to stop."""
        self.run, self.gradients, self.validate, self.redraw_curves = run, gradients, validate, redraw_curves
        self.sinks, self._sinks_are_started = sinks, False
        self.log_every_steps, self.validate_every_steps = log_every_steps, validate_every_steps
        self.loss_sum = 0.0
        self.num_asked = 0
        self.tokens_seen = 0
        self.residues_seen = 0
        self.seconds = 0.0
        """Of training, in all sittings up to the start of this one."""
        self.is_row_due = False
        """The run stopped while it validated: the next sitting begins with that."""
        self.validated_step = -1
        self.latest: dict[str, float] = {}
        """The last row, for the progress line."""
        self.scores: dict[str, MaskedLmScores] = {}
        self._tokens_in_interval, self._interval_start = 0, 0.0
        self._sitting_start, self._sitting_residues = time.monotonic(), 0

    @property
    def seconds_trained(self) -> float:
        return self.seconds + self.sitting_seconds

    @property
    def sitting_seconds(self) -> float:
        return time.monotonic() - self._sitting_start

    @property
    def residues_per_second(self) -> float:
        """In this sitting."""
        return self._sitting_residues / max(1e-9, self.sitting_seconds)

    @property
    def train_loss(self) -> float | None:
        """Since the last row, or in it."""
        return self.loss_sum / self.num_asked if self.num_asked else self.latest.get("train_loss")

    def state_dict(self) -> dict[str, Any]:
        names = ("loss_sum", "num_asked", "tokens_seen", "residues_seen", "is_row_due")
        return {name: getattr(self, name) for name in names} | {"seconds": self.seconds_trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MaskedLmTask)
        self._interval_start = self._sitting_start = time.monotonic()
        if trainer.is_global_zero:
            keep_metrics_until(self.run.metrics, trainer.global_step)
            keep_metrics_until(self.run.validation, trainer.global_step, VALIDATION_FIELDS)
            self._start_sinks(trainer.global_step)
        if self.is_row_due:
            self._write_row(trainer, pl_module, validates=True, may_give_up=False)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainingBatch,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, MaskedLmTask)
        own = [float(pl_module.last_loss_sum), batch.num_asked, batch.num_tokens, batch.num_residues]
        loss_sum, num_asked, num_tokens, num_residues = over_ranks(trainer, own, "sum")
        if math.isfinite(loss_sum):
            self.loss_sum += loss_sum
            self.num_asked += int(num_asked)
        self.tokens_seen += int(num_tokens)
        self.residues_seen += int(num_residues)
        self._sitting_residues += int(num_residues)
        self._tokens_in_interval += int(num_tokens)
        step = trainer.global_step
        validates = step % self.validate_every_steps == 0
        if validates or step % self.log_every_steps == 0:
            self._write_row(trainer, pl_module, validates=validates, may_give_up=True)

    def finish(self, trainer: pl.Trainer, task: MaskedLmTask) -> None:
        """Validate at the very end, unless the last step did; the row of that step gets the figures."""
        if self.validated_step == trainer.global_step:
            return
        step = trainer.global_step
        begun = next((row for row in read_metrics(self.run.metrics)[-1:] if int(row["step"]) == step), None)
        if begun and begun["val_loss"] and any(int(row["step"]) == step for row in read_metrics(self.run.validation)):
            self.scores = self.validate(trainer, task, True) or {}  # for the summary of a run that was finished before
            return
        self._write_row(trainer, task, validates=True, may_give_up=True, begun=begun)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def _write_row(
        self,
        trainer: pl.Trainer,
        task: MaskedLmTask,
        *,
        validates: bool,
        may_give_up: bool,
        begun: Mapping[str, object] | None = None,
    ) -> None:
        """`begun` is a row of this step that was written without validation."""
        row: dict[str, Any] = dict(begun) if begun else self._training_fields(trainer, task)
        scores: dict[str, MaskedLmScores] | None = {}
        if validates:
            scores = self.validate(trainer, task, may_give_up)
        self.is_row_due = scores is None
        if scores is None:
            return
        if validates:
            self.validated_step, self.scores = trainer.global_step, scores
            row |= _validation_fields(next(iter(scores.values()), None))
        self.latest = self.latest | {name: float(value) for name, value in row.items() if value != ""}
        if trainer.is_global_zero:
            self._record(row, scores, anew=begun is not None)
        self.loss_sum, self.num_asked, self._tokens_in_interval = 0.0, 0, 0
        self._interval_start = time.monotonic()

    def _training_fields(self, trainer: pl.Trainer, task: MaskedLmTask) -> dict[str, Any]:
        seconds = time.monotonic() - self._interval_start
        return {
            "step": trainer.global_step,
            "tokens": self.tokens_seen,
            "train_loss": self.loss_sum / self.num_asked if self.num_asked else "",
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": round(self._tokens_in_interval / seconds) if self._tokens_in_interval else "",
            "peak_memory_gb": round(peak_memory_gb(task.device), 3),
            "gradient_norm": self.gradients.gradient_norm,
            "skipped_steps": self.gradients.skipped_steps,
        }

    def _record(self, row: Mapping[str, Any], scores: Mapping[str, MaskedLmScores], *, anew: bool) -> None:
        step = int(row["step"])
        set_rows = [_set_row(step, *item) for item in scores.items()]
        if anew:
            keep_metrics_until(self.run.metrics, step - 1, then=[row])
            keep_metrics_until(self.run.validation, step - 1, VALIDATION_FIELDS, then=set_rows)
        else:
            append_metrics(self.run.metrics, [row])
            append_metrics(self.run.validation, set_rows, VALIDATION_FIELDS)
        if scores:
            self.redraw_curves()
        figures: dict[str, float] = {}
        if not anew:
            figures = {f"train/{name}": float(row[name]) for name in LOGGED_FIELDS if row.get(name, "") != ""}
        for name, of_set in scores.items():
            figures |= {f"{name}/loss": of_set.loss, f"{name}/perplexity": of_set.perplexity}
            figures |= {f"{name}/accuracy": of_set.accuracy}
        if not self._sinks_are_started:  # in a run that had made its last step before
            self._start_sinks(step - 1)
        for sink in self.sinks:
            sink.write(step, figures)

    def _start_sinks(self, step: int) -> None:
        self._sinks_are_started = True
        for sink in self.sinks:
            sink.start(step)


def _validation_fields(scores: MaskedLmScores | None) -> dict[str, float]:
    if scores is None:
        return {}
    return {
        "val_loss": scores.loss,
        "val_perplexity": scores.perplexity,
        "val_accuracy": scores.accuracy,
        "unigram_perplexity": scores.baseline_perplexity,
        "unigram_accuracy": scores.baseline_accuracy,
    }


def _set_row(step: int, name: str, scores: MaskedLmScores) -> dict[str, object]:
    return {
        "step": step,
        "set": name,
        "num_masked": scores.num_masked,
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "accuracy": scores.accuracy,
        "unigram_perplexity": scores.baseline_perplexity,
        "unigram_accuracy": scores.baseline_accuracy,
    }
