"""Which residues of a batch see each other, and layouts in which whole segments can be summed.

In: segment ids of shape (batch, residue), 0 for padding, equal positive ids contiguous (see `interface`).
Out: `Blocks`, that is, ways to lay out the residues of a batch such that no block holds residues of two
segments, so that sums and maxima over a segment are sums and maxima over its blocks. Cost is linear in the
residues, whatever the number of segments.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protformer.attention.interface import Segments

MAX_BLOCK_RESIDUES = 64
"""Smaller blocks store more partial sums, larger ones leave more places empty in the last block of a segment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeRows:
    """Every row of the batch is one segment, perhaps with padding: the rows themselves are the blocks."""

    mask: Bool[Tensor, "block 1 place 1"]
    """False at padding."""

    def cut(self, x: Float[Tensor, "batch head residue channel"]) -> Float[Tensor, "block head place channel"]:
        return x

    def join(self, x: Float[Tensor, "block head place channel"]) -> Float[Tensor, "batch head residue channel"]:
        return x.masked_fill(~self.mask, 0)

    def total(self, x: Float[Tensor, "block head feature channel"]) -> Float[Tensor, "block head feature channel"]:
        return x

    def maximum(self, x: Float[Tensor, "block head 1 feature"]) -> Float[Tensor, "block head 1 feature"]:
        return x


@dataclass(frozen=True, kw_only=True, slots=True)
class CutSegments:
    """Every segment is cut into blocks of equally many residues, the last of them partly empty."""

    mask: Bool[Tensor, "block 1 place 1"]
    """False at the empty places of a block."""
    residue_of_slot: Int[Tensor, " slot"]
    """Where in the flattened batch the residue at each place of each block stands; 0 at empty places."""
    slot_of_residue: Int[Tensor, " batch_residue"]
    """The inverse, for each position of the flattened batch; 0 at padding."""
    is_padding: Bool[Tensor, "batch 1 residue 1"]
    segment_of_block: Int[Tensor, " block"]
    num_segments: int

    def cut(self, x: Float[Tensor, "batch head residue channel"]) -> Float[Tensor, "block head place channel"]:
        """Bring every residue to its place in its block; empty places hold some other residue."""
        taken = x.transpose(1, 2).flatten(0, 1).index_select(0, self.residue_of_slot)
        blocks: Tensor = taken.unflatten(0, (-1, self.mask.shape[2]))
        return blocks.transpose(1, 2)

    def join(self, x: Float[Tensor, "block head place channel"]) -> Float[Tensor, "batch head residue channel"]:
        """Bring every residue back to its position; padding becomes zero."""
        taken = x.transpose(1, 2).flatten(0, 1).index_select(0, self.slot_of_residue)
        rows: Tensor = taken.unflatten(0, (-1, self.is_padding.shape[2]))
        return rows.transpose(1, 2).masked_fill(self.is_padding, 0)

    def total(self, x: Float[Tensor, "block head feature channel"]) -> Float[Tensor, "block head feature channel"]:
        """For each block, the sum over all blocks of its segment."""
        sums = x.new_zeros((self.num_segments, *x.shape[1:])).index_add(0, self.segment_of_block, x)
        return sums.index_select(0, self.segment_of_block)

    def maximum(self, x: Float[Tensor, "block head 1 feature"]) -> Float[Tensor, "block head 1 feature"]:
        """For each block, the maximum over all blocks of its segment; not differentiable."""
        index = self.segment_of_block.view(-1, 1, 1, 1).expand_as(x)
        lowest = x.new_full((self.num_segments, *x.shape[1:]), -torch.inf)
        return lowest.scatter_reduce(0, index, x.detach(), "amax").index_select(0, self.segment_of_block)


Blocks: TypeAlias = WholeRows | CutSegments


def lay_out(segments: Segments) -> Blocks:
    """The cheapest layout of a batch in which no block holds residues of two segments."""
    largest = segments.amax(dim=1, keepdim=True)
    if bool(((segments == 0) | (segments == largest)).all()):
        return WholeRows(mask=(segments > 0)[:, None, :, None])
    return cut_segments(segments)


def cut_segments(segments: Segments) -> CutSegments:
    """Cut every segment of a batch into blocks; at least one position must not be padding.

    Blocks have MAX_BLOCK_RESIDUES, or about the mean of the segments if these are shorter. With blocks of 4 the row
    7 7 7 7 7 9 0 has the blocks {0 1 2 3}, {4}, {5} (of segments 0, 0, 1), and its residues stand in the slots
    0 1 2 3 4 8.
    """
    is_residue = segments > 0
    position = torch.arange(segments.shape[1], device=segments.device)
    is_start = is_residue & (segments != F.pad(segments, (1, 0))[:, :-1])
    num_segments = int(is_start.sum())
    mean_residues = -(-int(is_residue.sum()) // num_segments)
    block_residues = min(MAX_BLOCK_RESIDUES, 1 << (mean_residues - 1).bit_length())

    offset = position - torch.where(is_start, position, 0).cummax(dim=1).values
    opens_block = (is_residue & (offset % block_residues == 0)).flatten()
    segment_of_block = (is_start.flatten().cumsum(0) - 1)[opens_block]
    slot = (opens_block.cumsum(0) - 1) * block_residues + offset.flatten() % block_residues

    is_taken = is_residue.flatten()
    residue_of_slot = slot.new_zeros(len(segment_of_block) * block_residues)
    residue_of_slot[slot[is_taken]] = torch.arange(len(slot), device=slot.device)[is_taken]
    mask = torch.zeros_like(residue_of_slot, dtype=torch.bool)
    mask[slot[is_taken]] = True
    return CutSegments(
        mask=mask.view(-1, 1, block_residues, 1),
        residue_of_slot=residue_of_slot,
        slot_of_residue=slot.masked_fill(~is_taken, 0),
        is_padding=~is_residue[:, None, :, None],
        segment_of_block=segment_of_block,
        num_segments=num_segments,
    )


def visible_pairs(segments: Segments, *, causal: bool) -> Bool[Tensor, "batch 1 residue residue"]:
    """Whether the residue of a row (query) sees the residue of a column (key); padding neither sees nor is seen."""
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    return (same.tril() if causal else same).unsqueeze(1)


def runs(row: Int[Tensor, " residue"]) -> list[tuple[int, int]]:
    """(segment id, number of positions) of each stretch of equal ids of one row, in order; padding has id 0."""
    ids, lengths = torch.unique_consecutive(row, return_counts=True)
    return list(zip(ids.tolist(), lengths.tolist(), strict=True))
