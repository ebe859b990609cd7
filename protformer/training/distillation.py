"""Distillation of attention: each layer learns to give what exact attention with the first weights gives.

In: rows of tokens as for masked language modelling. Out: a loss, and `distillation.csv` in the run folder. The teacher
is the model that the run began from, with exact attention. Layer by layer, both get the teacher's hidden states (as in
Zhang et al. 2024, "The Hedgehog & the Porcupine", and LoLCATs), and the loss is the mean over layers of the squared
error of the attended values over their variance; no layer's error reaches another. What learns are the attention's own
parameters, and adapters of queries, keys and values where training.lora asks for them.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor

from protformer.config import RunConfig
from protformer.evaluation.attention_error import attention_errors
from protformer.evaluation.masked_lm import IGNORE, MaskedBatch
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.training.callbacks import StepCallback
from protformer.training.fine_tuning import InitialWeights, load_teacher
from protformer.training.masked_lm import MaskedLmTask
from protformer.training.ranks import over_ranks
from protformer.training.run_folder import RunFolder, append_metrics, keep_metrics_until

FIELDS = ("step", "layer", "relative_error")


class Distillation:
    """The loss; it is weighed by the number of asked positions, as that of masked language modelling is."""

    def __init__(self, teacher: ProteinLanguageModel) -> None:
        self.teacher = teacher
        self.num_layers = teacher.config.num_layers
        self.reset()

    def __call__(self, model: ProteinLanguageModel, batch: MaskedBatch) -> Tensor:
        """The mean of the layers' errors, times the asked positions."""
        self.teacher.to(batch.inputs.device)
        errors = attention_errors(model.encoder, self.teacher.encoder, batch.inputs, batch.segments)
        num_asked = (batch.targets != IGNORE).sum()
        self.sums += (errors.detach() * num_asked).cpu()
        self.num_asked += int(num_asked)
        return errors.mean() * num_asked

    def reset(self) -> None:
        self.sums, self.num_asked = torch.zeros(self.num_layers), 0


def build_distillation(config: RunConfig, initial: InitialWeights | None) -> Distillation | None:
    """What a run learns by in place of masked language modelling, if it is to."""
    if not config.training.distill:
        return None
    assert initial is not None, "refused by check_fine_tuning"
    return Distillation(load_teacher(config.model, initial))


class DistillationLog(StepCallback):
    """Writes each layer's error in a step, every so many steps and for the last one."""

    def __init__(self, run: RunFolder, distillation: Distillation, *, every_steps: int) -> None:
        self.run, self.distillation, self.every_steps = run, distillation, every_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            keep_metrics_until(self.run.distillation, trainer.global_step, FIELDS)

    def after_step(self, trainer: pl.Trainer, task: MaskedLmTask, step: int) -> None:
        figures = [*self.distillation.sums.tolist(), self.distillation.num_asked]
        self.distillation.reset()
        if step % self.every_steps and step != trainer.max_steps:
            return
        *sums, num_asked = over_ranks(trainer, figures, "sum")
        if trainer.is_global_zero:
            rows = [
                {"step": step, "layer": layer, "relative_error": total / max(1, num_asked)}
                for layer, total in enumerate(sums, start=1)
            ]
            append_metrics(self.run.distillation, rows, FIELDS)
