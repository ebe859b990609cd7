"""Causal linear attention in blocks of residues.

A loop over blocks of residues carries sum_j phi(k_j) [v_j, 1] from block to block and takes the pairs inside a block
explicitly (Choromanski et al. 2021, section 2.5.1): O(residue) time, and no prefix sums over residues are ever stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from protformer.attention.interface import Heads, Segments
from protformer.attention.linear import Values
from protformer.attention.segments import visible_pairs

Features = Float[Tensor, "batch head residue feature"]
Sums = Float[Tensor, "batch head residue channel"]
"""Numerator in all channels but the last, denominator in the last."""
State = Float[Tensor, "batch head feature channel"]
"""sum_j phi(k_j) [v_j, 1] over the keys of a segment so far."""

CAUSAL_BLOCK_RESIDUES = 128
"""A power of two. Larger blocks have more pairs a residue, smaller ones more steps, each of a fixed cost."""


def with_ones(v: Values, mask: Bool[Tensor, "batch 1 residue 1"]) -> Sums:
    """[v_j, 1] for residues and zeros for padding, which so adds nothing to numerator nor denominator."""
    return F.pad(v, (0, 1), value=1.0).masked_fill(~mask, 0)


def divide(sums: Sums) -> Values:
    """Numerator by denominator; zero where no key is seen, as at padding."""
    numerator, denominator = sums[..., :-1], sums[..., -1:]
    return numerator / (denominator + (denominator == 0))


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


def _uniform(blocks: tuple[Segments, ...]) -> list[bool]:
    """For each block, whether every row is one segment in it from the first residue on, then perhaps padding."""
    ids = torch.stack(blocks)
    flags: list[bool] = ((ids == 0) | (ids == ids[:, :, :1])).flatten(1).all(dim=1).tolist()
    return flags
