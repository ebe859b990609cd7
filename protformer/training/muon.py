"""Muon for the hidden matrices, AdamW for everything else, as one optimizer.

In: an AdamW over all parameters but the hidden matrices, and those matrices. Out: an optimizer with one state and one
list of groups, so that schedules, clipping and checkpoints treat it as any other. A step moves a matrix of shape
(rows, columns) by

    0.2 sqrt(max(rows, columns)) NS(g + momentum (M - g)),      M an exponential average of its gradients g,

where NS makes all singular values about 1 by five Newton-Schulz iterations (Jordan 2024). The factor gives the step
the root mean square of a usual AdamW step (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that both halves share a
learning rate and a weight decay. `torch.optim.Muon` does the same, but in bfloat16 whatever the device, which takes
three times as long on a CPU without bf16 hardware, and takes queries, keys and values, one parameter here, for one
matrix. A step costs 10 rows^2 (rows + 2 columns) operations a matrix, rows <= columns, whatever the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW, Optimizer

from protformer.device import multiplies_bf16_in_hardware

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5; chosen by Jordan for the steepest rise at 0, so that singular values end between 0.7 and 1.2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenMatrices:
    """Parameters that are each `num_stacked` matrices of the same shape, one above the other."""

    parameters: Sequence[Tensor]
    num_stacked: int


class MuonWithAdamW(Optimizer):
    """Steps an AdamW, and the hidden matrices by Muon."""

    def __init__(self, adamw: AdamW, hidden: Sequence[HiddenMatrices], *, lr: float, weight_decay: float) -> None:
        groups = [
            {"params": list(matrices.parameters), "num_stacked": matrices.num_stacked, "weight_decay": weight_decay}
            for matrices in hidden
        ]
        self.adamw = adamw
        self._num_muon_groups = len(groups)
        super().__init__([*groups, *adamw.param_groups], {"lr": lr})
        self._share_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups[: self._num_muon_groups]:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        self.adamw.step()
        return loss

    def _share_state(self) -> None:
        """The AdamW works on the same objects, so that saving and loading this optimizer is all there is to do."""
        self.adamw.state = self.state
        self.adamw.param_groups = self.param_groups[self._num_muon_groups :]

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        update = gradient.lerp(average, MOMENTUM).unflatten(0, (group["num_stacked"], -1))
        scale = 0.2 * max(update.shape[1:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalized(update).flatten(0, 1), alpha=-group["lr"] * scale)


def orthogonalized(matrices: Float[Tensor, "stacked row column"]) -> Float[Tensor, "stacked row column"]:
    """Each matrix with its singular vectors and with singular values near 1; zero stays zero."""
    of_x, of_cube, of_fifth = COEFFICIENTS
    dtype = torch.bfloat16 if multiplies_bf16_in_hardware(matrices.device) else torch.float32
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.transpose(1, 2)
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(ITERATIONS):
            gram = torch.bmm(x, x.transpose(1, 2))
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=of_cube, alpha=of_fifth), x, beta=of_x)
    return (x if matrices.shape[1] <= matrices.shape[2] else x.transpose(1, 2)).to(matrices.dtype)
