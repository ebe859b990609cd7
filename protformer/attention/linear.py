"""What all attention kinds with a feature map share: numerators and denominators in linear time.

In: features phi(q) and phi(k), shape (..., residue, feature), and values. Out, for each query i,

    sum_j phi(q_i) . phi(k_j) [v_j, 1]

over the keys j that i sees, numerator and denominator in one array of head_dim + 1 channels (Choromanski et
al. 2021, eq. 4; the column of ones is their 1_L). Bidirectionally the sum over keys comes first and is one
(feature, channel) matrix a segment. Causally (their section 2.5.1) a loop over blocks of residues carries
that matrix from block to block and takes the pairs inside a block explicitly: O(residue) time, and no prefix
sums over residues are ever stored.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protformer.attention.interface import AttentionWeights, Heads, Segments
from protformer.attention.segments import Blocks, runs, visible_pairs

Features = Float[Tensor, "batch head residue feature"]
Values = Float[Tensor, "batch head residue value_dim"]
"""Like Heads, but as wide as one likes."""
Sums = Float[Tensor, "batch head residue channel"]
"""Numerator in all channels but the last, denominator in the last."""
State = Float[Tensor, "batch head feature channel"]
"""sum_j phi(k_j) [v_j, 1] over the keys of a segment so far."""

CAUSAL_BLOCK_RESIDUES = 128
"""A power of two. Larger blocks have more pairs a residue, smaller ones more steps, each of a fixed cost."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if any input is: features and sums never have fewer bits."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def with_ones(v: Values, mask: Bool[Tensor, "batch 1 residue 1"]) -> Sums:
    """[v_j, 1] for residues and zeros for padding, which so adds nothing to numerator nor denominator."""
    return F.pad(v, (0, 1), value=1.0).masked_fill(~mask, 0)


def divide(sums: Sums) -> Values:
    """Numerator by denominator; zero where no key is seen, as at padding."""
    numerator, denominator = sums[..., :-1], sums[..., -1:]
    return numerator / (denominator + (denominator == 0))


def bidirectional_sums(query_features: Features, key_features: Features, values: Sums, blocks: Blocks) -> Sums:
    """Every query sees all keys of its segment; all arguments are laid out as `blocks`."""
    state = blocks.total(key_features.transpose(-1, -2) @ values)
    return query_features @ state


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalBlock:
    """One block of consecutive residues of all rows: a step of the causal loop."""

    q: Heads
    k: Heads
    values: Sums
    segments: Segments
    mask: Bool[Tensor, "batch 1 residue 1"]
    """False at padding."""
    visible: Bool[Tensor, "batch 1 residue residue"]
    continues: Bool[Tensor, "batch 1 residue 1"]
    """The residue's segment was open at the end of the block before: it sees the carried state."""
    stays_open: Bool[Tensor, "batch 1 residue 1"]
    """The residue's segment is open at the end of this block: it goes into the carried state."""
    is_uniform: bool
    """No row holds residues of two segments here, nor padding before residues."""

    @property
    def passes_through(self) -> Bool[Tensor, "batch 1 1 1"]:
        """One segment spans the whole block, and the carried state goes on through it."""
        return self.continues[:, :, -1:]


def causal_blocks(q: Heads, k: Heads, v: Values, segments: Segments) -> Iterator[CausalBlock]:
    """Cut rows into blocks of a power of two of residues (padded at the end), in order."""
    length = segments.shape[1]
    size = min(CAUSAL_BLOCK_RESIDUES, 1 << (length - 1).bit_length())
    end = -length % size
    segments = F.pad(segments, (0, end))
    values = with_ones(F.pad(v, (0, 0, 0, end)), (segments > 0)[:, None, :, None])
    # split rather than slices: its backward is one concatenation instead of one full-length array a block.
    parts = [F.pad(x, (0, 0, 0, end)).split(size, dim=2) for x in (q, k)]
    by_block = segments.split(size, dim=1)
    open_segment = torch.zeros_like(segments[:, :1])
    for *qkv, ids, is_uniform in zip(*parts, values.split(size, dim=2), by_block, _uniform(by_block), strict=True):
        is_residue = ids > 0
        yield CausalBlock(
            q=qkv[0],
            k=qkv[1],
            values=qkv[2],
            segments=ids,
            mask=is_residue[:, None, :, None],
            visible=visible_pairs(ids, causal=True),
            continues=(is_residue & (ids == open_segment))[:, None, :, None],
            stays_open=(is_residue & (ids == ids[:, -1:]))[:, None, :, None],
            is_uniform=is_uniform,
        )
        open_segment = ids[:, -1:]


def causal_sums(query_features: Features, key_features: Features, block: CausalBlock, state: State) -> Sums:
    """Every query sees itself, the earlier keys of its segment in the block, and those in `state`."""
    pairs = (query_features @ key_features.transpose(-1, -2)).masked_fill(~block.visible, 0)
    return pairs @ block.values + (query_features @ state).masked_fill(~block.continues, 0)


def state_after(key_features: Features, block: CausalBlock, state: State) -> State:
    """The state of the segment that is open at the end of the block."""
    added = key_features.transpose(-1, -2) @ block.values.masked_fill(~block.stays_open, 0)
    return state.masked_fill(~block.passes_through, 0) + added


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


def _uniform(blocks: tuple[Segments, ...]) -> list[bool]:
    """For each block, whether every row is one segment in it from the first residue on, then perhaps padding."""
    ids = torch.stack(blocks)
    flags: list[bool] = ((ids == 0) | (ids == ids[:, :, :1])).flatten(1).all(dim=1).tolist()
    return flags
