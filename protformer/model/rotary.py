"""Rotary position embedding (Su et al. 2021, eq. 34), in ESM-2's half-split convention.

Channels c and c + head_dim / 2 of a head are one pair, turned by position * 10000 ** (-2 c / head_dim). A turn keeps
norms and makes inner products depend on differences of positions only, so FAVOR+ features stay unbiased behind it.
Angles are computed on the fly in float32: no table, no longest position.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from protformer.config import RotaryRounding

BASE = 10_000.0


def rotary_frequencies(head_dim: int, rounding: RotaryRounding) -> Float[Tensor, " pair"]:
    """Radians a position, for each channel pair; float32 numbers, which may be rounded (ESM-2's are)."""
    frequencies = 1.0 / BASE ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return frequencies.to(getattr(torch, rounding)).float()


def rotary_angles(
    positions: Int[Tensor, "batch residue"], head_dim: int, rounding: RotaryRounding = "float32"
) -> tuple[Float[Tensor, "batch 1 residue pair"], Float[Tensor, "batch 1 residue pair"]]:
    """Cosine and sine of the angle of every position and channel pair, in float32."""
    frequencies = rotary_frequencies(head_dim, rounding).to(positions.device)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch head residue head_dim"],
    cosine: Float[Tensor, "batch 1 residue pair"],
    sine: Float[Tensor, "batch 1 residue pair"],
) -> Float[Tensor, "batch head residue head_dim"]:
    """Turn each channel pair of x by its angle; computed in float32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def split_and_rotate(
    projected: Float[Tensor, "batch residue 3 head head_dim"],
    cosine: Float[Tensor, "batch 1 residue pair"],
    sine: Float[Tensor, "batch 1 residue pair"],
) -> tuple[
    Float[Tensor, "batch head residue head_dim"],
    Float[Tensor, "batch head residue head_dim"],
    Float[Tensor, "batch head residue head_dim"],
]:
    """Queries and keys turned as by `rotate`, and values, each as one contiguous array.

    With autograd's own operations, a training step spent as much time on turning queries and keys as on GELU; this
    passes over each of them once in either direction.
    """
    q, k, v = _SplitAndRotate.apply(projected, cosine, sine)  # type: ignore[no-untyped-call]
    return q, k, v


def rotate_neighbours(
    x: Float[Tensor, "batch residue head head_dim"],
    cosine: Float[Tensor, "batch 1 residue pair"],
    sine: Float[Tensor, "batch 1 residue pair"],
) -> None:
    """Turn x in its place, of which channels 2 c and 2 c + 1 are a pair: one complex product, without a copy.

    For float32 without autograd; several times faster than turning halves where heads are small.
    """
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    pairs *= torch.complex(cosine, sine).transpose(1, 2)


def neighbours_of_halves(num_heads: int, head_dim: int) -> Int[Tensor, " channel"]:
    """Channels of heads in the order in which the two of a pair are neighbours: 0, head_dim / 2, 1, ..."""
    halves = torch.arange(num_heads * head_dim).view(num_heads, 2, head_dim // 2)
    return halves.transpose(1, 2).flatten()


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine)
        q, k, v = projected.permute(2, 0, 3, 1, 4)
        turned = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)]
        for x, into in zip((q, k), turned, strict=True):
            _turn(x, cosine, sine, into=into)
        return turned[0], turned[1], v.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        batch, head, residue, head_dim = gradients[0].shape
        of_projected = gradients[0].new_empty((batch, residue, 3, head, head_dim))
        q, k, v = of_projected.permute(2, 0, 3, 1, 4)
        for gradient, into in zip(gradients[:2], (q, k), strict=True):
            _turn(gradient, cosine, -sine, into=into)
        v.copy_(gradients[2])
        return of_projected, None, None


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, *, into: Tensor) -> None:
    """Write rotate(x) into an array of x's dtype; in float32 between."""
    computed = into if into.dtype == cosine.dtype else torch.empty_like(into, dtype=cosine.dtype)
    (first, second), (into_first, into_second) = x.to(cosine.dtype).chunk(2, dim=-1), computed.chunk(2, dim=-1)
    torch.mul(first, cosine, out=into_first).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=into_second).addcmul_(first, sine)
    if computed is not into:
        into.copy_(computed)


def positions_in_segments(segments: Int[Tensor, "batch residue"]) -> Int[Tensor, "batch residue"]:
    """Position of each token within its own segment, counted from 0.

    With segments 1 1 1 2 2 0 the starts are at 0, 3 and 5, and the positions 0 1 2 0 1 0.
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_start = torch.ones_like(segments, dtype=torch.bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values
