"""Rotary position embedding (Su et al. 2021, eq. 34), in ESM-2's half-split convention.

Channels c and c + head_dim / 2 of a head are one pair, turned by position * 10000 ** (-2 c / head_dim). A turn keeps
norms and makes inner products depend on differences of positions only, so FAVOR+ features stay unbiased behind it.
Angles are computed on the fly in float32: no table, no longest position.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protformer.config import RotaryRounding

BASE = 10_000.0


def rotary_frequencies(head_dim: int, rounding: RotaryRounding) -> Float[Tensor, " pair"]:
    """Radians a position, for each channel pair; float32 numbers, of which ESM-2's are rounded to float16."""
    frequencies = 1.0 / BASE ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return frequencies.half().float() if rounding == "float16" else frequencies


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


def positions_in_segments(segments: Int[Tensor, "batch residue"]) -> Int[Tensor, "batch residue"]:
    """Position of each token within its own segment, counted from 0.

    With segments 1 1 1 2 2 0 the starts are at 0, 3 and 5, and the positions 0 1 2 0 1 0.
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_start = torch.ones_like(segments, dtype=torch.bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values
