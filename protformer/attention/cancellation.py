"""Whether products with features of either sign have cancelled in a sum over keys, so that few of its digits are right.

In: denominators of maps with signed features (see `mirrored_maps`), and what is known of their terms. Out: which of
them can be trusted. Less than SMALLEST_TRUSTED_SHARE is left only where a query is opposed to nearly all keys that it
sees, with cosines of -0.9 in the mean; in causal attention the first queries of a segment see few.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from protformer.attention.block_work import Denominators, State
from protformer.attention.interface import Heads
from protformer.attention.pieces import Piece, norms

SMALLEST_TRUSTED_SHARE = 1 / 64
"""Of a denominator in its unsigned part, or in a bound of that: |q| times the sum of |k|."""


def with_unsigned_column(state: State, num_signed: int) -> Float[Tensor, "row feature channel_and_one"]:
    """With a further column: that of the denominators without their part in signed features, the last ones."""
    column = state[..., -1:].clone()
    column[:, -num_signed:] = 0
    return torch.cat((state, column), dim=-1)


def all_are_trusted(totals: Float[Tensor, "row place 2"]) -> bool:
    """From denominators, and the same without their signed part."""
    return bool((totals[..., 0] >= SMALLEST_TRUSTED_SHARE * totals[..., 1]).all())


def trusted_of_past(
    q: Heads, k: Heads, denominators: Denominators, piece: Piece
) -> Bool[Tensor, "segment head place 1"]:
    """For causal attention, query by query: from nothing but what the query itself sees."""
    stop, dtype = piece.num_residues, denominators.dtype
    of_q, of_k = (norms(piece, x, dtype) for x in (q, k))
    mask = piece.mask(0, stop)
    sums = (of_k if mask is None else of_k * mask).cumsum(dim=2)
    trusted: Tensor = piece.take(denominators, 0, stop) >= SMALLEST_TRUSTED_SHARE * of_q * sums
    return trusted
