"""What happens around the training steps: randomness, figures, checkpoints, stopping, progress.

In: the trainer's hooks. Out: files of the run folder and lines on stderr. Every callback acts at the boundary of an
optimizer step, so that all state is that of a whole number of steps.
"""

import csv
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from protformer.device import peak_memory_gb
from protformer.errors import InputError
from protformer.evaluation.masked_lm import MaskedLmScores
from protformer.training.datamodule import ProteinDataModule, TrainingBatch
from protformer.training.masked_lm import MaskedLmTask
from protformer.training.run_folder import METRIC_FIELDS, RunFolder, keep_metrics_until, write_whole

PLAIN_LINE_SECONDS = 30.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StepCallback(pl.Callback):
    """A callback that acts after each optimizer step."""

    def after_step(self, trainer: pl.Trainer, task: MaskedLmTask, step: int) -> None:
        """`step` optimizer steps are done."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainingBatch,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, MaskedLmTask)
        self.after_step(trainer, pl_module, trainer.global_step)


class StepRandomness(pl.Callback):
    """Makes dropout and random features a function of (seed, step): nothing to save, the same on a resume."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TrainingBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MaskedLmTask)
        pl_module.model.encoder.redraw_features(trainer.global_step)
        torch.manual_seed(((self.seed << 32) ^ (batch.number << 8) ^ trainer.global_rank) & (2**63 - 1))


class ConsumedPosition(pl.Callback):
    """Tells the datamodule how far training has come. First in the list: those behind it may save a checkpoint."""

    def __init__(self, datamodule: ProteinDataModule) -> None:
        self.datamodule = datamodule

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainingBatch,
        batch_idx: int,
    ) -> None:
        self.datamodule.consumed(batch)


class MetricsLog(pl.Callback):
    """Collects sums, validates on schedule, and appends rows to `metrics.csv`."""

    def __init__(
        self,
        run: RunFolder,
        *,
        log_every_steps: int,
        validate_every_steps: int,
        validate: Callable[[pl.Trainer, MaskedLmTask], MaskedLmScores | None],
        redraw_curves: Callable[[Path], None],
    ) -> None:
        self.run, self.validate, self.redraw_curves = run, validate, redraw_curves
        self.log_every_steps, self.validate_every_steps = log_every_steps, validate_every_steps
        self.loss_sum = 0.0
        self.num_asked = 0
        self.tokens_seen = 0
        self.residues_seen = 0
        self.validated_step = -1
        self.latest: dict[str, Any] = {}
        """The last row, for the progress line."""
        self.scores: MaskedLmScores | None = None
        self._tokens_in_interval, self._interval_start = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        names = ("loss_sum", "num_asked", "tokens_seen", "residues_seen")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._interval_start = time.monotonic()
        if trainer.is_global_zero:
            keep_metrics_until(self.run.metrics, trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainingBatch,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, MaskedLmTask)
        loss_sum = float(pl_module.last_loss_sum)
        if not math.isfinite(loss_sum):
            raise _diverged(trainer, "the loss")
        self.loss_sum += loss_sum
        self.num_asked += batch.num_asked
        self.tokens_seen += batch.num_tokens * trainer.world_size
        self.residues_seen += batch.num_residues * trainer.world_size
        self._tokens_in_interval += batch.num_tokens * trainer.world_size
        step = trainer.global_step
        validates = step % self.validate_every_steps == 0
        if validates or step % self.log_every_steps == 0:
            self._write_row(trainer, pl_module, validates=validates)

    def finish(self, trainer: pl.Trainer, task: MaskedLmTask) -> None:
        """Validate at the very end, unless the last step did."""
        if self.validated_step != trainer.global_step:
            self._write_row(trainer, task, validates=True)

    def _write_row(self, trainer: pl.Trainer, task: MaskedLmTask, *, validates: bool) -> None:
        seconds = time.monotonic() - self._interval_start
        row: dict[str, Any] = {
            "step": trainer.global_step,
            "tokens": self.tokens_seen,
            "train_loss": self.loss_sum / self.num_asked if self.num_asked else "",
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": round(self._tokens_in_interval / seconds) if self._tokens_in_interval else "",
            "peak_memory_gb": round(peak_memory_gb(task.device), 3),
        }
        if validates:
            self.validated_step = trainer.global_step
            self.scores = self.validate(trainer, task) or self.scores
            row |= _validation_fields(self.scores)
        self.latest = self.latest | {name: value for name, value in row.items() if value != ""}
        if trainer.is_global_zero:
            with self.run.metrics.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, METRIC_FIELDS, restval="").writerow(row)
            if validates:
                self.redraw_curves(self.run.curves)
        self.loss_sum, self.num_asked, self._tokens_in_interval = 0.0, 0, 0
        self._interval_start = time.monotonic()


class Checkpointing(StepCallback):
    """Writes `last.ckpt`, whole or not at all, and the model folder beside it."""

    def __init__(self, run: RunFolder, *, every_steps: int, save_model: Callable[[MaskedLmTask, int], None]) -> None:
        self.run, self.every_steps, self.save_model = run, every_steps, save_model
        self.saved_step = -1

    def after_step(self, trainer: pl.Trainer, task: MaskedLmTask, step: int) -> None:
        if step % self.every_steps == 0:
            self.save(trainer, task)

    def save(self, trainer: pl.Trainer, task: MaskedLmTask) -> None:
        """Save now, unless this step is saved already."""
        if self.saved_step == trainer.global_step:
            return
        if not all(bool(parameter.isfinite().all()) for parameter in task.parameters()):
            raise _diverged(trainer, "a weight")
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            write_whole(self.run.checkpoint, trainer.save_checkpoint)
            self.save_model(task, trainer.global_step)
        else:
            trainer.save_checkpoint(self.run.checkpoint)  # meets the others at a barrier, and writes nothing


class StopRequest(StepCallback):
    """Stops after the current step when a signal came or the time is over; last in the list, behind the saving."""

    def __init__(self, checkpointing: Checkpointing, *, max_seconds: float | None) -> None:
        self.checkpointing = checkpointing
        self.deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.signal_name: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn SIGINT, SIGTERM and SIGUSR1 into a request while training runs; a second Ctrl-C stops at once."""
        before = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has put its own handler in front by now, which would leave with code 0 and save nothing."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._request)

    def after_step(self, trainer: pl.Trainer, task: MaskedLmTask, step: int) -> None:
        out_of_time = self.deadline is not None and time.monotonic() >= self.deadline
        if self.signal_name is not None or out_of_time:
            self.checkpointing.save(trainer, task)
            trainer.should_stop = True

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name == "SIGINT" and number == signal.SIGINT:
            print("error: interrupted twice; what came after the last checkpoint is lost", file=sys.stderr, flush=True)
            os._exit(130)
        self.signal_name = signal.Signals(number).name
        print(f"{self.signal_name}: stopping after this step, then saving", file=sys.stderr)


class Progress(StepCallback):
    """A bar on a terminal; elsewhere one plain line each 30 seconds."""

    def __init__(self, metrics: MetricsLog, *, max_steps: int) -> None:
        self.metrics, self.max_steps = metrics, max_steps
        self._bar: Any = None
        self._start = self._last_line = 0.0
        self._start_step = self._start_residues = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = self._last_line = time.monotonic()
        self._start_step, self._start_residues = trainer.global_step, self.metrics.residues_seen
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = _open_bar(self.max_steps, trainer.global_step)

    def after_step(self, trainer: pl.Trainer, task: MaskedLmTask, step: int) -> None:
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=self._figures(now))
        elif now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            left = (self.max_steps - step) * (now - self._start) / max(1, step - self._start_step)
            print(
                f"step {step}/{self.max_steps}  {self._figures(now)}  {left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self, now: float) -> str:
        rate = (self.metrics.residues_seen - self._start_residues) / max(1e-9, now - self._start)
        latest = self.metrics.latest
        parts = [f"{rate:,.0f} residues/s"]
        if self.metrics.num_asked:
            parts.append(f"loss {self.metrics.loss_sum / self.metrics.num_asked:.4f}")
        elif "train_loss" in latest:
            parts.append(f"loss {latest['train_loss']:.4f}")
        if "val_perplexity" in latest:
            parts.append(f"val perplexity {latest['val_perplexity']:.2f}, accuracy {latest['val_accuracy']:.1%}")
        return "  ".join(parts)


def _diverged(trainer: pl.Trainer, what: str) -> InputError:
    return InputError(
        f"step {trainer.global_step}: {what} is not finite, the run has diverged; the last checkpoint before is kept;"
        f" begin another run with a lower training.learning_rate"
    )


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


def _open_bar(max_steps: int, step: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task("training", total=max_steps, completed=step, figures="")
    bar.start()
    return bar
