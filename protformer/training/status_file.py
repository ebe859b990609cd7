"""Keeps `status.json` of the run folder up to date, for `protformer describe` in another terminal."""

import time

import lightning.pytorch as pl

from protformer.run_status import RunStatus, write_status
from protformer.training.callbacks import Checkpointing, StepCallback
from protformer.training.masked_lm import MaskedLmTask
from protformer.training.metrics_log import MetricsLog
from protformer.training.run_folder import RunFolder

EVERY_SECONDS = 10.0


class StatusFile(StepCallback):
    """Writes at the start, every few seconds, and at the end; behind the checkpointing in the list."""

    def __init__(self, run: RunFolder, metrics: MetricsLog, checkpointing: Checkpointing, *, max_steps: int) -> None:
        self.run, self.metrics, self.checkpointing, self.max_steps = run, metrics, checkpointing, max_steps
        self._first_step, self._written = 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = trainer.global_step
        self.write(trainer)

    def after_step(self, trainer: pl.Trainer, task: MaskedLmTask, step: int) -> None:
        if time.monotonic() - self._written >= EVERY_SECONDS:
            self.write(trainer)

    def write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        self._written = time.monotonic()
        step, metrics = trainer.global_step, self.metrics
        steps_done = step - self._first_step
        write_status(
            self.run.root,
            RunStatus(
                step=step,
                max_steps=self.max_steps,
                residues_seen=metrics.residues_seen,
                residues_per_second=metrics.residues_per_second,
                train_loss=metrics.train_loss,
                skipped_steps=metrics.gradients.skipped_steps,
                seconds_left=(self.max_steps - step) / steps_done * metrics.sitting_seconds if steps_done else None,
                updated=time.time(),
                checkpoint_step=self.checkpointing.saved_step if self.checkpointing.saved_time else None,
                checkpoint_time=self.checkpointing.saved_time,
            ),
        )
