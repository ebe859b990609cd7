"""A causal block of exponential features whose keys exceed the references by more than an exponential can hold.

In: queries, keys and values of a block, S and the references before it. Out: the outputs of the queries that see such
a key, and S and the references after the block. In plain differentiable operations: log2(residues of a block) times the
exponentials of the usual way, but right for keys of any size, and letting nothing of the future in.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from protformer.attention.feature_maps import Block, ExponentialMap, Reference

BlockHeads = Float[Tensor, "row place head_dim"]
BlockValues = Float[Tensor, "row place channel"]
State = Float[Tensor, "row feature channel"]
RowMaximum = Float[Tensor, "row place 1"]

LARGEST_EXPONENT = 60.0
"""Up to here a key feature may exceed its reference. exp(60) leaves float32 room for sums over features, keys and
values, and a query feature that underflows (below exp(-87)) times such a key is below exp(-27) of the denominator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CarefulBlock:
    """What `careful_block` gives."""

    output: Float[Tensor, "row place value_dim"]
    """Right for all queries."""
    sees_exceeding: Bool[Tensor, "row place 1"]
    """Queries that see a key that exceeds its reference: those whose output cannot be had in the usual way."""
    row_exceeds: Bool[Tensor, "row 1 1"]
    """Whether any key of the row exceeds its reference: if not, the state is as usual and the reference as before."""
    state: State
    reference: Reference


def careful_block(
    q: BlockHeads,
    k: BlockHeads,
    values: BlockValues,
    state: State,
    reference: Reference,
    feature_map: ExponentialMap,
    *,
    is_first: bool,
) -> CarefulBlock:
    """Outputs of a block, and what is carried on."""
    log_q, log_k = feature_map.logarithms(q, is_key=False), feature_map.logarithms(k, is_key=True)
    relative = log_k - reference.unsqueeze(1)
    exceeds = relative.detach().amax(dim=-1, keepdim=True) > LARGEST_EXPONENT
    sees_exceeding = exceeds.cumsum(dim=1) > 0

    query_features, _ = _query_features(log_q, reference.unsqueeze(1))
    pairs = (query_features @ relative.clamp(max=LARGEST_EXPONENT).exp().transpose(1, 2)).tril()
    usual = pairs @ values + query_features @ state
    by_halves = _sums_by_halves(log_q, log_k, values, None if is_first else state, reference)
    row_exceeds = sees_exceeding[:, -1:]
    after = torch.where(row_exceeds[:, 0], torch.maximum(reference, log_k.detach().amax(dim=1)), reference)
    return CarefulBlock(
        output=torch.where(sees_exceeding, _divide(by_halves), _divide(usual)),
        sees_exceeding=sees_exceeding,
        row_exceeds=row_exceeds,
        state=state_after(log_k, values, state, reference, after),
        reference=after,
    )


def state_after(log_k: Block, values: BlockValues, state: State, before: Reference, after: Reference) -> State:
    """The state after a block, relative to the references after it."""
    key_features = (log_k - after.unsqueeze(1)).exp()
    return state * (before - after).exp().unsqueeze(-1) + key_features.transpose(1, 2) @ values


def _divide(sums: BlockValues) -> Float[Tensor, "row place value_dim"]:
    return sums[..., :-1] / sums[..., -1:]


def _query_features(log_q: Float[Tensor, "... feature"], reference: Tensor) -> tuple[Tensor, Tensor]:
    """exp(log phi(q_i)_r + c_r - M_i), and M_i, the largest log phi(q_i)_r + c_r."""
    relative = log_q + reference
    maximum = relative.detach().amax(dim=-1, keepdim=True)
    return (relative - maximum).exp(), maximum


def _sums_by_halves(
    log_q: Block, log_k: Block, values: BlockValues, state: State | None, reference: Reference
) -> BlockValues:
    """Numerators and denominators, each row with a factor of its own.

    The pairs of query i and key j <= i of a block of 8 are: each residue with itself; the right of each two
    neighbours with the left; 2 3 with 0 1, and 6 7 with 4 5; 4 5 6 7 with 0 1 2 3. In each of these sets all
    keys are past to all queries, so that the maximum over its keys is a reference that they do not exceed and
    that lets no future in. A block that is not a power of two is filled up at its end, which nobody sees.
    """
    length = log_q.shape[1]
    end = (1 << (length - 1).bit_length()) - length
    log_q, log_k, values = (torch.nn.functional.pad(x, (0, 0, 0, end)) for x in (log_q, log_k, values))
    own = log_q + log_k
    maximum = own.detach().amax(dim=-1, keepdim=True)
    sums = (own - maximum).exp().sum(dim=-1, keepdim=True) * values
    if state is not None:
        query_features, carried_maximum = _query_features(log_q, reference.unsqueeze(1))
        sums, maximum = _merge(sums, maximum, query_features @ state, carried_maximum)
    half = 1
    while half < log_q.shape[1]:
        sums, maximum = _merge(sums, maximum, *_across_halves(log_q, log_k, values, half))
        half *= 2
    return sums[:, :length]


def _merge(
    sums: BlockValues, maximum: RowMaximum, more: BlockValues, more_maximum: RowMaximum
) -> tuple[BlockValues, RowMaximum]:
    """Add up sums that are given times exp(-maximum); -inf in `more_maximum` leaves a row of `more` out."""
    largest = torch.maximum(maximum, more_maximum)
    return sums * (maximum - largest).exp() + more * (more_maximum - largest).exp(), largest


def _across_halves(log_q: Block, log_k: Block, values: BlockValues, half: int) -> tuple[BlockValues, RowMaximum]:
    """Queries of the right half of each 2 * half residues with keys of the left.

    Rows come back in their places, with a maximum of -inf where nothing was seen, as in every left half.
    """
    (_, right_q), (left_k, _), (left_values, _) = (
        x.unflatten(1, (-1, 2, half)).unbind(2) for x in (log_q, log_k, values)
    )
    reference = left_k.detach().amax(dim=2, keepdim=True)
    query_features, maximum = _query_features(right_q, reference)
    sums = query_features @ (left_k - reference).exp().transpose(-1, -2) @ left_values
    return (
        torch.stack((torch.zeros_like(sums), sums), dim=2).flatten(1, 3),
        torch.stack((torch.full_like(maximum, -torch.inf), maximum), dim=2).flatten(1, 3),
    )
