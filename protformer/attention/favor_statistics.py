"""What FAVOR+ learns about its queries and keys without gradients: their moments, averaged over training steps.

In: queries and keys of training batches. Out: mean and mean square of each channel, as they were in the steps before
the present one. Nothing of a batch acts on that batch: no query can learn of a later residue, and a forward pass that
activation checkpointing repeats sees what the first one saw. Moments are gathered in a forward pass and
taken over at the beginning of the next step, when the training loop calls `take_over`. The buffers are in the state
dict; torch's DistributedDataParallel copies those of the first rank to all, so that ranks agree.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from protformer.attention.interface import Heads, Segments

DECAY = 0.99
"""Share of the average that remains after a step."""


class Moments(nn.Module):
    """Exponential averages of q, k, q^2 and k^2, by head and channel."""

    average: Tensor
    gathered: Tensor
    num_gathered: Tensor
    num_steps: Tensor

    def __init__(self, *, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4, num_heads, head_dim))
        self.register_buffer("gathered", torch.zeros(4, num_heads, head_dim))
        self.register_buffer("num_gathered", torch.zeros(()))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def gather(self, q: Heads, k: Heads, segments: Segments) -> None:
        """Note the moments of a batch; noted twice, as when it is recomputed, it counts as much as before."""
        is_residue = (segments > 0)[:, None, :, None]
        count = is_residue.sum()
        moments = [(x.float().pow(power) * is_residue).sum(dim=(0, 2)) for power in (1, 2) for x in (q, k)]
        self.gathered += torch.stack(moments)
        self.num_gathered += count

    @torch.no_grad()
    def take_over(self) -> None:
        """Let what was gathered since the last call act from now on."""
        if float(self.num_gathered) == 0:
            return
        now = self.gathered / self.num_gathered
        self.average.copy_(now if int(self.num_steps) == 0 else self.average.lerp(now, 1 - DECAY))
        self.num_steps += 1
        self.gathered.zero_()
        self.num_gathered.zero_()

    def rescaling(self, dtype: torch.dtype) -> Float[Tensor, "head head_dim"]:
        """Psi of SADERF (Likhosherstov et al. 2023): (sum k^2 / sum q^2)^(1/4); ones before the first step."""
        _, _, q_square, k_square = self.average.to(dtype)
        ratio: Tensor = (k_square / q_square).pow(0.25)
        return torch.where((q_square > 0) & (k_square > 0), ratio, 1.0)

    def damping(self, dtype: torch.dtype, *, rescaled: bool) -> Float[Tensor, ""]:
        """A of FAVOR++ (Likhosherstov et al. 2022), with p the mean of |x + y|^2 / d over queries x and keys y.

        Both are scaled by d^-1/4, as the features are; 0, which is FAVOR+, before the first step.
        """
        q, k, q_square, k_square = self.average.to(dtype)
        psi = self.rescaling(dtype) if rescaled else torch.ones_like(q)
        p = (q_square * psi**2 + k_square / psi**2 + 2 * q * k).mean() * q.shape[-1] ** -0.5
        damping: Tensor = (1 - 2 * p - ((2 * p + 1).square() + 8 * p).sqrt()) / 16
        return damping
