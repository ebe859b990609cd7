"""Causal linear attention one residue at a time: what it remembers of those before, and the next output.

In: query, key and value of one residue, and the `Past`. Out: what `causal` gives for that residue, and the `Past` of
the next one, in constant time and memory.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from protformer.attention.block_work import Values, compute_dtype
from protformer.attention.feature_maps import ExponentialMap, FeatureMap
from protformer.attention.interface import Heads


@dataclass(frozen=True, slots=True)
class Past:
    """All that attention remembers of the residues so far; its size does not grow with them."""

    state: Float[Tensor, "batch head feature channel"]
    """S, relative to the references."""
    reference: Float[Tensor, "batch head feature"] | None
    """The largest log feature of a key so far, -inf before the first; None for maps that need no references."""


def no_past(q: Heads, v: Values, feature_map: FeatureMap) -> Past:
    """What is remembered before the first residue of a batch like this."""
    rows = (q.shape[0], q.shape[1], feature_map.num_features)
    dtype = compute_dtype(q, v)
    reference = q.new_full(rows, -torch.inf, dtype=dtype) if feature_map.has_references else None
    return Past(state=q.new_zeros((*rows, v.shape[3] + 1), dtype=dtype), reference=reference)


def attend_one_step(
    q: Float[Tensor, "batch head 1 head_dim"],
    k: Float[Tensor, "batch head 1 head_dim"],
    v: Float[Tensor, "batch head 1 value_dim"],
    past: Past,
    feature_map: FeatureMap,
) -> tuple[Float[Tensor, "batch head 1 value_dim"], Past]:
    """The output of one residue more, and the past of the next: decoding in constant time and memory a residue."""
    with torch.autocast(q.device.type, enabled=False):
        dtype = past.state.dtype
        state, reference = past.state.flatten(0, 1), past.reference
        if isinstance(feature_map, ExponentialMap):
            assert reference is not None
            before = reference.flatten(0, 1)
            log_q = feature_map.logarithms(q.to(dtype).flatten(0, 1), is_key=False)
            log_k = feature_map.logarithms(k.to(dtype).flatten(0, 1), is_key=True)
            now = torch.maximum(before, log_k.squeeze(1))
            state = state * (before - now).exp().unsqueeze(-1)
            key_features = (log_k - now.unsqueeze(1)).exp()
            query_features = (log_q + now.unsqueeze(1)).softmax(dim=-1)
            reference = now.view_as(reference)
        else:
            query_features, key_features = (_features(x.to(dtype), feature_map) for x in (q, k))
        values = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1).to(dtype).flatten(0, 1)
        state = state + key_features.transpose(1, 2) @ values
        sums = query_features @ state
        output = (sums[..., :-1] / sums[..., -1:]).view(v.shape)
        return output.to(v.dtype), Past(state=state.view_as(past.state), reference=reference)


def _features(x: Float[Tensor, "batch head 1 head_dim"], feature_map: FeatureMap) -> Float[Tensor, "row 1 feature"]:
    rows = x.flatten(0, 1)
    inputs = x.new_empty((len(rows), 1, x.shape[3] + feature_map.num_further_columns))
    feature_map.fill_further_columns(inputs)
    products = x.new_empty((len(rows), 1, feature_map.num_features))
    feature_map.products(x, inputs, feature_map.matrix(None, len(rows)), (products,), is_key=True)
    feature_map.activate((products,))
    return products
