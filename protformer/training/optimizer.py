"""AdamW and the learning-rate schedules.

In: a model and a `TrainingConfig`. Out: an optimizer whose weight decay spares biases, norms and embeddings, and a
factor of the learning rate for each step. Schedules have a length of their own (`schedule_steps`), so that stopping a
run early and going on later gives the same numbers as one sitting.
"""

import math
from collections.abc import Callable

from torch import nn
from torch.optim import AdamW

from protformer.config import TrainingConfig

FINAL_FRACTION = 0.1
"""Learning rate at the end of a cosine, as a share of its peak."""


def build_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019) with decay on weight matrices only; fused kernels where torch has them."""
    matrices = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def learning_rate_factor(config: TrainingConfig) -> Callable[[int], float]:
    """Share of the peak learning rate for the step after `step` finished ones: a linear warm-up, then the schedule."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        progress = (step - config.warmup_steps) / max(1, config.num_schedule_steps - config.warmup_steps)
        return FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
