"""FAVOR+: softmax attention in linear time by positive random features.

Choromanski et al. 2021, sections 2.2 to 2.4. In: queries, keys, values. Out: an estimate of softmax(q k^T /
sqrt(d)) v. The features are

    log phi(x) = W x - |x|^2 / 2 - log(m) / 2,     x = q d^-1/4 or k d^-1/4

(their lemma 1, SM+; our `num_features` is their m, our `head_dim` their d), for which E[phi(q) . phi(k)] is
the softmax kernel. They are kept as logarithms and only exponentiated relative to references that cancel in
the quotient, so that nothing can overflow, and underflows only what is negligible, at any size of q and k.
There is no additive epsilon: it would turn attention into the mean of the values wherever all features are
small.

Reference of a key feature r: c_r, the largest log phi(k_j)_r over keys. Reference of a query: M_i, the
largest log phi(q_i)_r + c_r over features. In

    sum_r exp(log phi(q_i)_r + c_r - M_i) sum_j exp(log phi(k_j)_r - c_r) [v_j, 1]

all exponents are at most 0, and at the feature where M_i is attained the denominator has a term of at least
1. References are constants to autograd, which is exact, as the quotient does not depend on them.

A causal query may not know a reference taken from later keys, not even in rounding. How references of the
past alone are had is told in `_attend_causally`.

Time and memory are linear in the residues. All of this is in float32 (float64 for float64 inputs) under
autocast too.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from protformer.attention.interface import Attention, AttentionWeights, Heads, Segments
from protformer.attention.causal import (
    CausalBlock,
    Features,
    State,
    Sums,
    causal_blocks,
    causal_sums,
    divide,
    state_after,
)
from protformer.attention.feature_maps import ExponentialMap
from protformer.attention.linear import Values, attend_to_all, compute_dtype
from protformer.attention.random_features import Projection, RandomFeatures
from protformer.attention.weights import weights_by_identity
from protformer.config import FavorConfig

Reference = Float[Tensor, "... feature"]
"""c of the module's docstring; -inf where there is no key."""
RowMaximum = Float[Tensor, "... 1"]
"""M of the module's docstring."""

LARGEST_EXPONENT = 60.0
"""Up to here a causal key feature may exceed its reference. exp(60) leaves float32 room for sums over
features, keys and values, and a query feature that underflows (below exp(-87)) times such a key is below
exp(-27) of the denominator."""


class FavorAttention(Attention):
    """Linear attention whose expected weights, before normalisation, are those of softmax attention."""

    def __init__(
        self, config: FavorConfig, *, head_dim: int, num_heads: int, causal: bool, seed: int, layer: int
    ) -> None:
        super().__init__()
        self.causal = causal
        self.random_features = RandomFeatures(
            config.num_features,
            head_dim,
            orthogonal=config.orthogonal,
            row_norms=config.row_norms,
            redraw_every_steps=config.redraw_every_steps,
            seed=seed,
            layer=layer,
        )

    def forward(self, q: Heads, k: Heads, v: Heads, segments: Segments) -> Heads:
        return self._attend(q, k, v, segments).to(v.dtype)

    def weights(self, q: Heads, k: Heads, segments: Segments) -> AttentionWeights:
        return weights_by_identity(self._attend, q, k, segments)

    def redraw(self, step: int) -> None:
        self.random_features.redraw(step)

    def _attend(self, q: Heads, k: Heads, v: Values, segments: Segments) -> Values:
        dtype = compute_dtype(q, k, v)
        projection = self.random_features.projection.to(dtype)
        if not self.causal:
            head_dim = q.shape[-1]
            weight, factor = projection * head_dim**-0.25, head_dim**-0.5 / 2
            return attend_to_all(q, k, v, segments, ExponentialMap(weight=weight, bias=None, factor=factor))
        with torch.autocast(q.device.type, enabled=False):
            return _attend_causally(q.to(dtype), k.to(dtype), v.to(dtype), segments, projection)


def log_features(x: Heads, projection: Projection, mask: Bool[Tensor, "batch 1 residue 1"] | None = None) -> Features:
    """log phi(x) of queries or keys, scaling by head_dim ** -0.25 included; -inf where `mask` is False."""
    num_features, head_dim = projection.shape
    x = x * head_dim**-0.25
    offset = x.square().sum(-1, keepdim=True) / 2 + math.log(num_features) / 2
    if mask is not None:
        offset = offset.masked_fill(~mask, torch.inf)
    return (x @ projection.T).sub_(offset)


def _query_features(
    log_q: Float[Tensor, "... feature"], reference: Reference
) -> tuple[Float[Tensor, "... feature"], RowMaximum]:
    """exp(log phi(q_i)_r + c_r - M_i), and M_i."""
    relative = log_q + reference
    maximum = relative.detach().amax(dim=-1, keepdim=True)
    return relative.sub_(maximum).exp_(), maximum


def _finite(reference: Reference) -> Reference:
    """Any finite number where there is no key: what is multiplied there is zero."""
    return reference.masked_fill(reference == -torch.inf, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Past:
    """The keys before a causal block, of the segment that was open there."""

    state: State
    """sum_j exp(log phi(k_j)_r - c_r) [v_j, 1]"""
    reference: Reference
    """c, one row; -inf before the first key."""


def _attend_causally(q: Heads, k: Heads, v: Values, segments: Segments, projection: Projection) -> Values:
    """Block by block; three ways of having references that only past keys decide.

    Across blocks, c is the maximum over all keys before the block. Inside a block, c is the maximum over
    those and the first key of the segment in the block, which every query there sees. A later key may exceed
    that c: usually by little, and all is well (`_block_sums`). The queries that see a key exceeding it by
    LARGEST_EXPONENT are computed again with a reference that no key exceeds (`_sums_by_halves`), at some
    times the cost; whether a query is one of them depends on what it sees alone.
    """
    past: _Past | None = None
    outputs: list[Values] = []
    for block in causal_blocks(q, k, v, segments):
        past = past or _no_past(block, projection)
        log_q, log_k = log_features(block.q, projection), log_features(block.k, projection, block.mask)
        sums = _block_sums(log_q, log_k, block, past)
        past = _past_after(log_k, block, past)
        outputs.append(divide(sums).masked_fill(~block.mask, 0))
    return torch.cat(outputs, dim=2)[:, :, : q.shape[2]]


def _no_past(block: CausalBlock, projection: Projection) -> _Past:
    batch, head, _, channel = block.values.shape
    num_features = projection.shape[0]
    return _Past(
        state=block.values.new_zeros(batch, head, num_features, channel),
        reference=block.values.new_full((batch, head, 1, num_features), -torch.inf),
    )


def _block_sums(log_q: Features, log_k: Features, block: CausalBlock, past: _Past) -> Sums:
    """Numerators and denominators of a block's queries, each row times its own exp(-M_i)."""
    # If the past goes on here, it does so at the block's first residue.
    carried = past.reference.masked_fill(~block.continues[:, :, :1], -torch.inf)
    reference = _first_key_reference(log_k.detach(), block, carried)
    relative = log_k - reference
    exceeds = relative.detach().amax(dim=-1) > LARGEST_EXPONENT
    any_exceeds = bool(exceeds.any())
    if any_exceeds:
        relative = relative.clamp(max=LARGEST_EXPONENT)  # finite, for the rows replaced below
    query_features, _ = _query_features(log_q, reference)
    state = past.state * (carried - reference[:, :, :1]).exp().transpose(-1, -2)
    sums = causal_sums(query_features, relative.exp(), block, state)
    if not any_exceeds:
        return sums
    sees_exceeding = (block.visible & exceeds.unsqueeze(-2)).any(dim=-1, keepdim=True)
    return torch.where(sees_exceeding, _sums_by_halves(log_q, log_k, block, past), sums)


def _first_key_reference(log_k: Features, block: CausalBlock, carried: Reference) -> Reference:
    """The maximum over past keys and the segment's first key in the block, for each residue or for all at once."""
    if block.is_uniform:
        return _finite(torch.maximum(carried, log_k[:, :, :1]))
    first_visible = block.visible.int().argmax(dim=-1).unsqueeze(-1)
    first_key = log_k.gather(2, first_visible.expand_as(log_k))
    return _finite(torch.where(block.continues, torch.maximum(carried, first_key), first_key))


def _past_after(log_k: Features, block: CausalBlock, past: _Past) -> _Past:
    kept = past.reference.masked_fill(~block.passes_through, -torch.inf)
    if not block.is_uniform:
        log_k = log_k.masked_fill(~block.stays_open, -torch.inf)
    reference = torch.maximum(kept, log_k.detach().amax(dim=2, keepdim=True))
    relative_to = _finite(reference)
    state = past.state * (kept - relative_to).exp().transpose(-1, -2)
    return _Past(state=state_after((log_k - relative_to).exp(), block, state), reference=reference)


def _sums_by_halves(log_q: Features, log_k: Features, block: CausalBlock, past: _Past) -> Sums:
    """What `_block_sums` gives, for keys of any size: log2(residues of a block) times the exponentials.

    The pairs of query i and key j <= i of a block of 8 are: each residue with itself; the right of each two
    neighbours with the left; 2 3 with 0 1, and 6 7 with 4 5; 4 5 6 7 with 0 1 2 3. In each of these sets all
    keys are past to all queries, so that the maximum over its keys is a reference that they do not exceed and
    that lets no future in.
    """
    own = log_q + log_k
    maximum = _finite(own.detach().amax(dim=-1, keepdim=True))
    sums = (own - maximum).exp().sum(dim=-1, keepdim=True) * block.values

    query_features, carried_maximum = _query_features(log_q, _finite(past.reference))
    carried_maximum = carried_maximum.masked_fill(~block.continues, -torch.inf)
    sums, maximum = _merge(sums, maximum, query_features @ past.state, carried_maximum)

    half = 1
    while half < log_q.shape[2]:
        sums, maximum = _merge(sums, maximum, *_across_halves(log_q, log_k, block, half))
        half *= 2
    return sums


def _merge(sums: Sums, maximum: RowMaximum, more: Sums, more_maximum: RowMaximum) -> tuple[Sums, RowMaximum]:
    """Add up sums that are given times exp(-maximum); -inf in `more_maximum` leaves a row of `more` out."""
    largest = torch.maximum(maximum, more_maximum)
    return sums * (maximum - largest).exp() + more * (more_maximum - largest).exp(), largest


def _across_halves(log_q: Features, log_k: Features, block: CausalBlock, half: int) -> tuple[Sums, RowMaximum]:
    """Queries of the right half of each 2 * half residues with keys of the left.

    Rows come back in their places, with a maximum of -inf where nothing was seen, as in every left half.
    """
    (left_ids, right_ids), (_, right_q), (left_k, _), (left_values, _) = (
        x.unflatten(dim, (-1, 2, half)).unbind(dim + 1)
        for x, dim in ((block.segments, 1), (log_q, 2), (log_k, 2), (block.values, 2))
    )
    # Segments are contiguous: only one can lie on both sides, that of the first residue on the right.
    shared = right_ids[:, :, :1]
    is_seen = (left_ids == shared) & (shared > 0)
    sees = (right_ids == shared) & is_seen.any(dim=-1, keepdim=True)
    left_k = left_k.masked_fill(~is_seen[:, None, :, :, None], -torch.inf)
    reference = _finite(left_k.detach().amax(dim=3, keepdim=True))
    query_features, maximum = _query_features(right_q, reference)
    pairs = query_features @ (left_k - reference).exp().transpose(-1, -2)
    sums = pairs @ left_values
    maximum = maximum.masked_fill(~sees[:, None, :, :, None], -torch.inf)
    return (
        torch.stack((torch.zeros_like(sums), sums), dim=3).flatten(2, 4),
        torch.stack((torch.full_like(maximum, -torch.inf), maximum), dim=3).flatten(2, 4),
    )
