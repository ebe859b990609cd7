"""Steps whose gradient is not finite: left out, counted, and after too many in a row explained.

In: the gradients of each optimizer step. Out: the same, or none at all, so that the optimizer changes neither weights
nor its own state; step count, schedule and data go on. Of a run of such steps, one line of error that names the first
layer that gave a number which is not finite, with the state from before saved.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from protformer.errors import InputError
from protformer.evaluation.masked_lm import MaskedBatch, predict_targets
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.training.callbacks import Checkpointing, StepCallback, weights_are_finite
from protformer.training.datamodule import TrainingBatch
from protformer.training.masked_lm import MaskedLmTask
from protformer.training.ranks import is_sharded, over_ranks, whole


class NonFiniteSteps(StepCallback):
    """Skips steps without a finite gradient, and ends a run that has too many in a row."""

    def __init__(self, checkpointing: Checkpointing, *, max_in_a_row: int) -> None:
        self.checkpointing, self.max_in_a_row = checkpointing, max_in_a_row
        self.skipped_steps = 0
        """Since the start of the run."""
        self.skipped_in_a_row = 0
        self.gradient_norm = math.nan
        """Of the last step, before clipping."""
        self._batches: list[MaskedBatch] = []
        self._num_asked = 0
        self._learning_rate = math.nan

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("skipped_steps", "skipped_in_a_row", "gradient_norm")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TrainingBatch, batch_idx: int
    ) -> None:
        self._batches.append(batch.masked)
        self._num_asked = batch.num_asked

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        assert isinstance(pl_module, MaskedLmTask)
        self._learning_rate = optimizer.param_groups[0]["lr"]
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.gradient_norm = float(whole(nn.utils.get_total_norm(gradients)))
        is_faulty = not (math.isfinite(self.gradient_norm) and math.isfinite(float(pl_module.last_loss_sum)))
        is_faulty = bool(over_ranks(trainer, [is_faulty], "max")[0])  # all ranks skip a step, or none
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_faulty else 0
        self.skipped_steps += is_faulty
        if is_faulty:
            # Optimizers leave a parameter without a gradient alone: no update, no decay, no moments.
            for parameter in pl_module.parameters():
                parameter.grad = None

    def after_step(self, trainer: pl.Trainer, task: MaskedLmTask, step: int) -> None:
        batches, self._batches = self._batches, []
        if self.skipped_in_a_row < self.max_in_a_row:
            return
        self.skipped_in_a_row = 0  # a resume may try as many again
        origin = find_nonfinite(task.model, batches, trainer.strategy.precision_plugin.forward_context)
        run = self.checkpointing.run
        if weights_are_finite(trainer, task):
            self.checkpointing.save(trainer, task)
            way_out = f"the weights from before are saved; begin another run from them with --init-from {run.root} and"
        else:
            way_out = "the last checkpoint before is kept; begin another run with"
        raise InputError(
            f"step {step}: {self.max_in_a_row} steps in a row (training.max_skipped_steps) had no finite gradient and"
            f" were left out: {origin}; loss {float(task.last_loss_sum) / max(1, self._num_asked):.4g}, gradient norm"
            f" {self.gradient_norm:.4g}, learning rate {self._learning_rate:.3g}; {way_out} a lower"
            f" training.learning_rate"
        )


def find_nonfinite(
    model: ProteinLanguageModel,
    batches: Iterable[MaskedBatch],
    context: Callable[[], AbstractContextManager[Any]],
) -> str:
    """Where a number first is not finite: in the weights, on the way forward, or on the way back; row by row.

    Leaves the model without gradients. Not of a model that ranks can only go through together: they have rows of their
    own here.
    """
    if is_sharded(model) or model.encoder.group is not None:
        return "where it began is not looked for, as the model or its rows are split over devices"
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the weights {name} are not finite"
    for batch in batches:
        for row in range(len(batch.inputs)):
            part = slice(row, row + 1)
            one = MaskedBatch(inputs=batch.inputs[part], targets=batch.targets[part], segments=batch.segments[part])
            if origin := _find_in_row(model, one, context):
                return origin
    return "every layer gave finite numbers when asked again, row by row"


def _find_in_row(
    model: ProteinLanguageModel, row: MaskedBatch, context: Callable[[], AbstractContextManager[Any]]
) -> str | None:
    found: list[str] = []
    hooks = [module.register_forward_hook(_note_output(name, found)) for name, module in model.named_modules()]
    model.zero_grad(set_to_none=True)
    try:
        with torch.enable_grad(), context():
            logits, targets = predict_targets(model, row)
            loss_sum = F.cross_entropy(logits.float(), targets, reduction="sum")
            loss_sum.backward()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    if found:
        return f"the first layer whose output is not finite is {found[0]}"
    if not bool(loss_sum.isfinite()):
        return "the logits are finite and the loss is not"
    # The way back begins at the last layer.
    for name in reversed(gradients):
        if not bool(gradients[name].isfinite().all()):
            return f"all outputs are finite, and the gradient is first not finite at {name}"
    return None


def _note_output(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not bool(output.isfinite().all()):
            found.append(name or "the model")

    return note
