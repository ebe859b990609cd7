"""What happens around the training steps: randomness, figures, checkpoints, stopping, progress.

In: the trainer's hooks. Out: files of the run folder and lines on stderr. Every callback acts at the boundary of an
optimizer step, so that all state is that of a whole number of steps.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from protformer.errors import InputError
from protformer.training.datamodule import ProteinDataModule, TrainingBatch
from protformer.training.masked_lm import MaskedLmTask
from protformer.training.metrics_log import MetricsLog
from protformer.training.ranks import local_part, over_ranks, whole_weights
from protformer.training.run_folder import RunFolder
from protformer.whole_file import write_whole

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


class Checkpointing(StepCallback):
    """Writes `last.ckpt`, whole or not at all, and the model folder beside it."""

    def __init__(
        self, run: RunFolder, *, every_steps: int, save_model: Callable[[MaskedLmTask, dict[str, Tensor], int], None]
    ) -> None:
        """`save_model` takes the state dict of the model beside it, and the step."""
        self.run, self.every_steps, self.save_model = run, every_steps, save_model
        self.saved_step = -1
        self.saved_time: float | None = None
        """Of the last checkpoint, in seconds since 1970."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.run.checkpoint.exists():
            self.saved_step, self.saved_time = trainer.global_step, self.run.checkpoint.stat().st_mtime

    def after_step(self, trainer: pl.Trainer, task: MaskedLmTask, step: int) -> None:
        if step % self.every_steps == 0:
            self.save(trainer, task)

    def save(self, trainer: pl.Trainer, task: MaskedLmTask) -> None:
        """Save now, unless this step is saved already."""
        if self.saved_step == trainer.global_step:
            return
        if not weights_are_finite(trainer, task):
            raise InputError(
                f"step {trainer.global_step}: a weight is not finite, the run has diverged; the last checkpoint before"
                f" is kept; begin another run with a lower training.learning_rate"
            )
        self.saved_step = trainer.global_step
        weights = whole_weights(task.model)
        if trainer.is_global_zero:
            write_whole(self.run.checkpoint, trainer.save_checkpoint)
            self.saved_time = time.time()
            self.save_model(task, weights, trainer.global_step)
        else:
            trainer.save_checkpoint(self.run.checkpoint)  # gives its part, and writes nothing


class StopRequest(StepCallback):
    """Stops after the current step when a signal came or the time is over; last in the list, behind the saving."""

    def __init__(self, checkpointing: Checkpointing, *, max_seconds: float | None) -> None:
        self.checkpointing = checkpointing
        self.deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.signal_name: str | None = None
        self.is_first_process = True

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
        trainer._signal_connector.received_sigterm = False  # one that came since then is noted here, too
        self.is_first_process = trainer.is_global_zero

    def after_step(self, trainer: pl.Trainer, task: MaskedLmTask, step: int) -> None:
        out_of_time = self.deadline is not None and time.monotonic() >= self.deadline
        number = 0 if self.signal_name is None else int(signal.Signals[self.signal_name])
        # A signal may have come to one process only, and clocks differ: what is true of one holds for all.
        latest, is_over = over_ranks(trainer, [number, out_of_time], "max")
        if latest:
            self.signal_name = signal.Signals(int(latest)).name
        if latest or is_over:
            self.checkpointing.save(trainer, task)
            trainer.should_stop = True

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name == "SIGINT" and number == signal.SIGINT:
            print("error: interrupted twice; what came after the last checkpoint is lost", file=sys.stderr, flush=True)
            os._exit(130)
        self.signal_name = signal.Signals(number).name
        if self.is_first_process:
            print(f"{self.signal_name}: stopping after this step, then saving", file=sys.stderr)


class Progress(StepCallback):
    """A bar on a terminal; elsewhere one plain line each 30 seconds."""

    def __init__(self, metrics: MetricsLog, *, max_steps: int) -> None:
        self.metrics, self.max_steps = metrics, max_steps
        self._bar: Any = None
        self._last_line = 0.0
        self._steps_done = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_line = time.monotonic()
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = _open_bar(self.max_steps, trainer.global_step)

    def after_step(self, trainer: pl.Trainer, task: MaskedLmTask, step: int) -> None:
        if not trainer.is_global_zero:
            return
        self._steps_done += 1
        left = (self.max_steps - step) / self._steps_done * self.metrics.sitting_seconds
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=self._figures(), left=_as_time(left))
        elif now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            line = f"step {step}/{self.max_steps}  {self._figures()}  {_as_time(left)} left"
            print(line, file=sys.stderr, flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self) -> str:
        loss, latest = self.metrics.train_loss, self.metrics.latest
        parts = [f"{self.metrics.residues_per_second:,.0f} residues/s"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if "val_perplexity" in latest:
            parts.append(f"val perplexity {latest['val_perplexity']:.2f}, accuracy {latest['val_accuracy']:.1%}")
        if skipped := self.metrics.gradients.skipped_steps:
            parts.append(f"{skipped} steps skipped")
        return "  ".join(parts)


def weights_are_finite(trainer: pl.Trainer, task: MaskedLmTask) -> bool:
    are_finite = all(bool(local_part(parameter).isfinite().all()) for parameter in task.parameters())
    return bool(over_ranks(trainer, [are_finite], "min")[0])


def _as_time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s"


def _open_bar(max_steps: int, step: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("{task.fields[left]} left"),
        console=Console(stderr=True),
    )
    bar.add_task("training", total=max_steps, completed=step, figures="", left="?")
    bar.start()
    return bar
