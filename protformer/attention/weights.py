"""The attention matrix of a linear kind, for contact maps and tests: O(residue ** 2) memory."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from protformer.attention.block_work import Values, compute_dtype
from protformer.attention.interface import AttentionWeights, Heads, Segments
from protformer.attention.segments import runs


def weights_by_identity(
    attend: Callable[[Heads, Heads, Values, Segments], Values], q: Heads, k: Heads, segments: Segments
) -> AttentionWeights:
    """The attention matrix, recovered by attending over V = I (Choromanski et al. 2021, appendix C.4).

    Segment by segment, so that the identity is as wide as a segment and not as the row.
    """
    rows = [
        _weights_of_row(attend, row_q, row_k, row_segments)
        for row_q, row_k, row_segments in zip(q.split(1), k.split(1), segments, strict=True)
    ]
    return torch.cat(rows)


def _weights_of_row(
    attend: Callable[[Heads, Heads, Values, Segments], Values],
    q: Heads,
    k: Heads,
    segments: Int[Tensor, " residue"],
) -> AttentionWeights:
    num_heads, length = q.shape[1], q.shape[2]
    weights = q.new_zeros((1, num_heads, length, length), dtype=compute_dtype(q, k))
    start = 0
    for segment, num_residues in runs(segments):
        stop = start + num_residues
        if segment > 0:
            identity = torch.eye(num_residues, dtype=weights.dtype, device=q.device)
            values = identity.expand(1, num_heads, -1, -1)
            alone = torch.ones_like(segments[None, start:stop])
            block = attend(q[:, :, start:stop], k[:, :, start:stop], values, alone)
            weights = weights + F.pad(block, (start, length - stop, start, length - stop))
        start = stop
    return weights
