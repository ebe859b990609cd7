"""Scores of the validation sets while a run goes on.

In: the held-out proteins of each set, spread over the ranks, and the model as it is. Out: scores of each set over all
ranks; a model that gives no finite loss ends the run with the place where numbers first went wrong.
"""

import math
from itertools import takewhile

import lightning.pytorch as pl
import torch

from protformer.errors import InputError
from protformer.evaluation.masked_lm import MaskedLmScores, score_units, summarize_units
from protformer.model_description import ModelDescription
from protformer.training.callbacks import StopRequest
from protformer.training.datamodule import ProteinDataModule
from protformer.training.masked_lm import MaskedLmTask
from protformer.training.nonfinite import find_nonfinite
from protformer.training.ranks import gather_over_ranks, whole_windows


def validate(
    datamodule: ProteinDataModule,
    description: ModelDescription,
    stop: StopRequest,
    trainer: pl.Trainer,
    task: MaskedLmTask,
    may_give_up: bool,
) -> dict[str, MaskedLmScores] | None:
    """Scores of each set; None if the run is to stop, which may not wait for minutes of validation.

    A model without a trained masked-LM head, as in distillation of weights that came without one, is not scored:
    what the head gives tells nothing, a loss that is not finite included.
    """
    scores: dict[str, MaskedLmScores] = {}
    if not description.has_lm_head:
        return scores
    frequencies = torch.tensor(description.unigram_frequencies, dtype=torch.float64)
    gives_up = may_give_up and trainer.world_size == 1
    task.model.eval()
    with whole_windows(task.model), trainer.strategy.precision_plugin.forward_context():
        for name in datamodule.validation_sets:
            batches = datamodule.validation_batches(name, rank=trainer.global_rank, num_ranks=trainer.world_size)
            unless_stopped = takewhile(lambda batch: not (gives_up and stop.signal_name), batches)
            on_device = (batch.to(task.device) for batch in unless_stopped)
            of_ranks = gather_over_ranks(score_units(task.model, on_device, frequencies))
            of_set = summarize_units(torch.cat(of_ranks))
            if of_set is not None:
                scores[name] = of_set
    task.model.train()
    if gives_up and stop.signal_name:
        return None
    for name, of_set in scores.items():
        if not math.isfinite(of_set.loss):
            batches = (batch.to(task.device) for batch in datamodule.validation_batches(name, rank=0, num_ranks=1))
            origin = find_nonfinite(task.model, batches, trainer.strategy.precision_plugin.forward_context)
            raise InputError(
                f"step {trainer.global_step}: validation gave a loss that is not finite, the run has diverged:"
                f" {origin}; the last checkpoint before is kept; begin another run with a lower training.learning_rate"
            )
    return scores
