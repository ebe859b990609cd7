"""The language model as a Lightning module: one loss, one optimizer, one optimizer step a batch.

In: `TrainingBatch`es, each with this rank's rows of a whole step. Out: trained weights; the loss sum of the last step
is kept for the log. The task (masked or next residue) is decided by what the datamodule puts into the batch.
Optimization is "manual" in Lightning's sense, because `micro_batches` decides in how many parts a step is computed.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from protformer.config import TrainingConfig
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.training.datamodule import TrainingBatch
from protformer.training.micro_batches import MicroBatches, sums_over_rows
from protformer.training.optimizer import build_optimizer, learning_rate_factor
from protformer.training.ranks import spread_model


class MaskedLmTask(pl.LightningModule):
    """Trains a `ProteinLanguageModel`."""

    def __init__(self, model: ProteinLanguageModel, config: TrainingConfig, micro_batches: MicroBatches) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.config = config
        self.micro_batches = micro_batches
        self.last_loss_sum = torch.zeros(())
        """Sum of the cross-entropy over this rank's asked positions of the last step, in nats."""

    def configure_model(self) -> None:
        """The processes have met; a model that is to be split over them is split now."""
        strategy = self.trainer.strategy
        mesh = strategy.device_mesh["data_parallel"] if isinstance(strategy, ModelParallelStrategy) else None
        spread_model(self.model, self.config, mesh)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list)
        assert isinstance(scheduler, LambdaLR)
        optimizer.zero_grad()
        num_asked = self._over_ranks(batch.num_asked, "sum")
        with self._not_synchronized():
            self.last_loss_sum = self.micro_batches.backward(self.model, batch.masked, num_asked=num_asked)
        self._sum_over_ranks()
        optimizer.step()
        scheduler.step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), self.config.gradient_clip_norm)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config)
        return [optimizer], [LambdaLR(optimizer, learning_rate_factor(self.config))]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rows_at_once"] = self.micro_batches.rows

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.micro_batches.go_on_with(checkpoint["rows_at_once"])

    def transfer_batch_to_device(
        self, batch: TrainingBatch, device: torch.device, dataloader_idx: int
    ) -> TrainingBatch:
        return batch.to(device)

    def _not_synchronized(self) -> AbstractContextManager[Any]:
        """Parts of a step leave their gradients on their rank, so that each rank may have parts of its own."""
        wrapped = self.trainer.strategy.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def _sum_over_ranks(self) -> None:
        """Gradients are summed once a step, in one message; ranks also agree on the smallest parts."""
        if self.trainer.world_size == 1:
            return
        sums = sums_over_rows(self)
        if not sums:
            return
        flat = torch.cat([x.flatten() for x in sums])
        totals = self.trainer.strategy.reduce(flat, reduce_op="sum").split([x.numel() for x in sums])
        for own, total in zip(sums, totals, strict=True):
            own.copy_(total.view_as(own))
        self.micro_batches.rows = self._over_ranks(self.micro_batches.rows, "min")

    def _over_ranks(self, number: int, operation: str) -> int:
        if self.trainer.world_size == 1:
            return number
        return int(self.trainer.strategy.reduce(torch.tensor(number, device=self.device), reduce_op=operation))
