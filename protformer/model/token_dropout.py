"""Token dropout, ESM's way of embedding masked tokens.

A masked token has no embedding at all, and the embeddings of the visible ones are scaled by the share that was visible
in training over the share that is visible here, as dropout would have it. In training, 0.15 x 0.8 of the tokens of an
average row are masked, so a protein without a mask is scaled by 0.88.

Source: Lin et al. 2023 (ESM-2), `token_dropout` of the released code; ESM-1b (Rives et al. 2021) has it too.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protformer.alphabet import MASK
from protformer.model.rotary import positions_in_segments

VISIBLE_IN_TRAINING = 1 - 0.15 * 0.8


def scale_visible(
    x: Float[Tensor, "batch residue channel"],
    tokens: Int[Tensor, "batch residue"],
    segments: Int[Tensor, "batch residue"],
) -> Float[Tensor, "batch residue channel"]:
    """Embeddings of the tokens, scaled segment by segment; zero at masked ones."""
    visible = tokens != MASK
    # A segment is known by the column where it begins.
    start = torch.arange(tokens.shape[1], device=tokens.device) - positions_in_segments(segments)
    counts = torch.zeros(2, *tokens.shape, device=x.device)
    counts.scatter_add_(2, start.expand(2, -1, -1), torch.stack([torch.ones_like(visible), visible]).float())
    # Where all is masked there is nothing to scale, and nothing to divide by.
    scale = VISIBLE_IN_TRAINING * counts[0] / counts[1].clamp(min=1)
    return x * torch.where(visible, scale.gather(1, start), 0.0)[..., None].to(x.dtype)
