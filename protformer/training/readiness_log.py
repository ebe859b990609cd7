"""A line a layer at each validation: could random features estimate its attention, as the weights are now?

In: some proteins. Out: `readiness.csv` in the run folder, with the figures of `evaluation.readiness`.
"""

from collections.abc import Sequence

import lightning.pytorch as pl

from protformer.evaluation.model_readiness import model_readiness
from protformer.training.callbacks import StepCallback
from protformer.training.masked_lm import MaskedLmTask
from protformer.training.ranks import whole_windows
from protformer.training.run_folder import RunFolder, append_metrics, keep_metrics_until

FIELDS = (
    "step", "layer", "num_features", "squared_norm", "logit_spread", "logit_spread_max", "effective_features",
    "relative_error", "mean_pooling_error", "propagated_error",
)  # fmt: skip
MAX_PROTEINS, MAX_RESIDUES = 8, 1024
"""Exact attention is computed for comparison, on this many proteins of the held-out set, cut to this length."""


class ReadinessLog(StepCallback):
    """Measures every so many steps; changes nothing in the training."""

    def __init__(self, run: RunFolder, proteins: Sequence[Sequence[int]], *, every_steps: int) -> None:
        self.run, self.every_steps = run, every_steps
        self.proteins = [protein[:MAX_RESIDUES] for protein in proteins[:MAX_PROTEINS]]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            keep_metrics_until(self.run.readiness, trainer.global_step, FIELDS)

    def after_step(self, trainer: pl.Trainer, task: MaskedLmTask, step: int) -> None:
        if step % self.every_steps or not trainer.is_global_zero:
            return
        task.model.eval()
        with whole_windows(task.model), trainer.strategy.precision_plugin.forward_context():
            reports = model_readiness(task.model, self.proteins, num_features=None)
        task.model.train()
        append_metrics(self.run.readiness, [{"step": step, **report.as_json()} for report in reports], FIELDS)
