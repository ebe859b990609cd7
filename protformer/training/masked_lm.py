"""The language model as a Lightning module: one loss, one optimizer.

In: `TrainingBatch`es. Out: the mean cross-entropy of the asked positions, in nats; its sums are kept for the log. The
task (masked or next residue) is decided by what the datamodule puts into the batch.
"""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from protformer.config import TrainingConfig
from protformer.evaluation.masked_lm import predict_targets
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.training.datamodule import TrainingBatch
from protformer.training.optimizer import build_optimizer, learning_rate_factor


class MaskedLmTask(pl.LightningModule):
    """Trains a `ProteinLanguageModel`."""

    def __init__(self, model: ProteinLanguageModel, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.last_loss_sum = torch.zeros(())
        """Sum of the cross-entropy over the asked positions of the last batch, in nats."""

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        logits, targets = predict_targets(self.model, batch.masked)
        loss_sum = F.cross_entropy(logits.float(), targets, reduction="sum")
        self.last_loss_sum = loss_sum.detach()
        return loss_sum / max(1, len(targets))

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config)
        scheduler = LambdaLR(optimizer, learning_rate_factor(self.config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def transfer_batch_to_device(
        self, batch: TrainingBatch, device: torch.device, dataloader_idx: int
    ) -> TrainingBatch:
        return batch.to(device)
