"""Optimizers and learning-rate schedules.

In: a model and a `TrainingConfig`. Out: an optimizer whose weight decay spares biases, norms and embeddings, and a
factor of the learning rate for each step. Schedules have a length of their own (`schedule_steps`), so that stopping a
run early and going on later gives the same numbers as one sitting.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from protformer.config import TrainingConfig
from protformer.training.muon import HiddenMatrices, MuonWithAdamW

FINAL_FRACTION = 0.1
"""Learning rate at the end of a cosine, as a share of its peak."""


def build_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with decay on weight matrices only; or Muon for these, where asked for."""
    matrices = {
        id(module.weight): (name, module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in matrices]
    if config.optimizer == "adamw":
        decayed = {"params": [weight for _, weight in matrices.values()], "weight_decay": config.weight_decay}
        return _build_adamw([decayed, {"params": others, "weight_decay": 0.0}], config)
    three_in_one = [weight for name, weight in matrices.values() if name.endswith("query_key_value")]
    one_by_one = [weight for name, weight in matrices.values() if not name.endswith("query_key_value")]
    return MuonWithAdamW(
        _build_adamw([{"params": others, "weight_decay": 0.0}], config),
        [HiddenMatrices(parameters=three_in_one, num_stacked=3), HiddenMatrices(parameters=one_by_one, num_stacked=1)],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )


def learning_rate_factor(config: TrainingConfig) -> Callable[[int], float]:
    """Share of the peak learning rate for the step after `step` finished ones: a linear warm-up, then the schedule."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "wsd":
            return _decay(step, config)
        progress = (step - config.warmup_steps) / max(1, config.num_schedule_steps - config.warmup_steps)
        return FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def _build_adamw(groups: list[dict[str, Any]], config: TrainingConfig) -> AdamW:
    betas = (config.adam_beta1, config.adam_beta2)
    return AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def _decay(step: int, config: TrainingConfig) -> float:
    """1, and from 1 to 0 over the last part of the schedule."""
    num_steps = config.decay_fraction * config.num_schedule_steps
    progress = min(1.0, max(0.0, (step - config.num_schedule_steps + num_steps) / num_steps))
    return 1.0 - (progress if config.decay_shape == "linear" else math.sqrt(progress))
