"""The gradient of one optimizer step, in as many parts as memory asks for.

In: the rows of a step on one rank, and the number of positions asked for in the whole step, over all ranks. Out: in the
parameters, the gradient of

    sum of the cross-entropy over the asked positions / number of asked positions,

first of this rank's share, then summed over ranks. Every position has the same weight whatever part or rank it
falls to, so parts change what is learned by rounding only, and by which units dropout drops. Where memory runs out, the
parts are halved and the same step is computed anew, as it would have been with such parts from the beginning.
"""

import sys
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from protformer.attention.favor_statistics import Moments
from protformer.device import is_out_of_memory, release_cached_memory
from protformer.errors import ConfigError
from protformer.evaluation.masked_lm import MaskedBatch, masked_lm_loss_sum
from protformer.model.masked_lm_head import ProteinLanguageModel

CPU_TOKENS_AT_ONCE = 16_384
"""Twice as many are 5 % faster on a CPU, in twice the memory; a GPU takes what fits."""


class MicroBatches:
    """Rows that go through the model at once."""

    def __init__(
        self,
        accumulate_batches: int | Literal["auto"],
        *,
        step_rows: int,
        row_tokens: int,
        device: torch.device,
        with_others: bool = False,
        loss_sum: Callable[[ProteinLanguageModel, MaskedBatch], Tensor] | None = None,
    ) -> None:
        """`step_rows` rows of `row_tokens` tokens make a step on this rank.

        `with_others`: ranks exchange numbers on the way through the model, so none can have other parts than the rest.
        `loss_sum` has a share for each asked position; if not given, it is their cross-entropy.
        """
        self.loss_sum = loss_sum
        self.step_rows, self.row_tokens = step_rows, row_tokens
        self.may_halve = accumulate_batches == "auto" and not with_others
        if accumulate_batches != "auto":
            self.rows = -(-step_rows // accumulate_batches)
        elif device.type == "cpu":
            self.rows = min(step_rows, max(1, CPU_TOKENS_AT_ONCE // row_tokens))
        else:
            self.rows = step_rows

    def go_on_with(self, rows: int) -> None:
        """Where parts are found by trying, begin with what a run had found before."""
        if self.may_halve:
            self.rows = min(rows, self.step_rows)

    def backward(self, model: ProteinLanguageModel, batch: MaskedBatch, *, num_asked: int) -> Tensor:
        """Leave the gradient of loss sum / num_asked in the parameters; give the loss sum of these rows, detached.

        Raises ConfigError if memory runs out and parts cannot be smaller.
        """
        seed = torch.initial_seed()
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        while True:
            try:
                return self._backward_in_parts(model, batch, num_asked)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Behind the except clause: the error held on to the tensors of the failed attempt.
            model.zero_grad(set_to_none=True)
            release_cached_memory(batch.inputs.device)
            self._halve()
            torch.manual_seed(seed)
            for buffer, before in buffers:
                buffer.copy_(before)

    def _backward_in_parts(self, model: ProteinLanguageModel, batch: MaskedBatch, num_asked: int) -> Tensor:
        loss_sum = torch.zeros((), device=batch.inputs.device)
        for part in batch.split(self.rows):
            part_sum = (self.loss_sum or masked_lm_loss_sum)(model, part)
            with torch.autocast(part_sum.device.type, enabled=False):
                (part_sum / max(1, num_asked)).backward()
            loss_sum += part_sum.detach()
        return loss_sum

    def _halve(self) -> None:
        remedies = (
            f"lower data.max_residues (now {self.row_tokens}), or add --set training.activation_checkpointing=true"
        )
        if not self.may_halve and self.rows > 1:
            remedies = f"raise training.accumulate_batches (on one device it may be auto), {remedies}"
        if not self.may_halve or self.rows == 1:
            rows = "one row" if self.rows == 1 else f"{self.rows} rows"
            raise ConfigError(f"out of memory with {rows} of {self.row_tokens} tokens at a time; {remedies}")
        before, self.rows = self.rows, -(-self.rows // 2)
        print(
            f"out of memory with {before} of a step's {self.step_rows} rows at a time; going on with {self.rows}",
            file=sys.stderr,
            flush=True,
        )


def sums_over_rows(module: nn.Module) -> list[Tensor]:
    """What a rank sums up over its rows of a step: gradients, and the moments that some kinds of attention gather.

    Gradients of sharded weights are summed over ranks already.
    """
    of_all = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    gradients = [gradient for gradient in of_all if not isinstance(gradient, DTensor)]
    moments = [part for part in module.modules() if isinstance(part, Moments)]
    return gradients + [x for part in moments for x in (part.gathered, part.num_gathered)]
