"""Which residues of a batch see each other."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from protformer.attention.interface import Segments


def visible_pairs(segments: Segments, *, causal: bool) -> Bool[Tensor, "batch 1 residue residue"]:
    """Whether the residue of a row (query) sees the residue of a column (key); padding neither sees nor is seen."""
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    return (same.tril() if causal else same).unsqueeze(1)


def runs(row: Int[Tensor, " residue"]) -> list[tuple[int, int]]:
    """(segment id, number of positions) of each stretch of equal ids of one row, in order; padding has id 0."""
    ids, lengths = torch.unique_consecutive(row, return_counts=True)
    return list(zip(ids.tolist(), lengths.tolist(), strict=True))
