"""Generalized attention with a ReLU feature map: phi(x) = relu(W x) + epsilon.

Choromanski et al. 2021, eq. 5 and appendix A.4, with the conventions of the released JAX code: no factor
1/sqrt(m) and epsilon added to every feature, so that a query that no key matches attends to all keys alike.
With a projection, q and k are scaled by head_dim ** -0.25 each; without one (the released "deterministic"
features), relu sees the head vector as it is. Time and memory are linear in the residues. Sums are in
float32: in float16 the denominator overflows at a few thousand residues.
"""

import torch
import torch.nn.functional as F

from protformer.attention.interface import Attention, AttentionWeights, Heads, Segments
from protformer.attention.causal import Features, State, causal_blocks, causal_sums, divide, state_after
from protformer.attention.feature_maps import PointwiseMap
from protformer.attention.linear import Values, attend_to_all, compute_dtype
from protformer.attention.random_features import RandomFeatures
from protformer.attention.weights import weights_by_identity
from protformer.config import GeneralizedConfig


class GeneralizedAttention(Attention):
    """Linear attention with the features relu(W x) + epsilon."""

    def __init__(
        self, config: GeneralizedConfig, *, head_dim: int, num_heads: int, causal: bool, seed: int, layer: int
    ) -> None:
        super().__init__()
        self.causal = causal
        self.epsilon = config.epsilon
        self.random_features: RandomFeatures | None = None
        if config.projection == "orthogonal":
            self.random_features = RandomFeatures(
                config.num_features,
                head_dim,
                orthogonal=True,
                row_norms="chi",
                redraw_every_steps=config.redraw_every_steps,
                seed=seed,
                layer=layer,
            )

    def forward(self, q: Heads, k: Heads, v: Heads, segments: Segments) -> Heads:
        return self._attend(q, k, v, segments).to(v.dtype)

    def weights(self, q: Heads, k: Heads, segments: Segments) -> AttentionWeights:
        return weights_by_identity(self._attend, q, k, segments)

    def redraw(self, step: int) -> None:
        if self.random_features is not None:
            self.random_features.redraw(step)

    def _attend(self, q: Heads, k: Heads, v: Values, segments: Segments) -> Values:
        dtype = compute_dtype(q, k, v)
        if not self.causal:
            return attend_to_all(q, k, v, segments, self._feature_map(q.shape[-1], dtype))
        with torch.autocast(q.device.type, enabled=False):
            return self._attend_causally(q.to(dtype), k.to(dtype), v.to(dtype), segments)

    def _feature_map(self, head_dim: int, dtype: torch.dtype) -> PointwiseMap:
        weight = None
        if self.random_features is not None:
            weight = self.random_features.projection.to(dtype) * head_dim**-0.25
        return PointwiseMap(weight=weight, head_dim=head_dim, function="relu", epsilon=self.epsilon)

    def _attend_causally(self, q: Heads, k: Heads, v: Values, segments: Segments) -> Values:
        outputs: list[Values] = []
        state: State | None = None
        for block in causal_blocks(q, k, v, segments):
            query_features, key_features = self._features(block.q), self._features(block.k)
            if state is None:
                state = torch.zeros_like(key_features[:, :, :1].transpose(-1, -2) @ block.values[:, :, :1])
            sums = causal_sums(query_features, key_features, block, state)
            state = state_after(key_features, block, state)
            outputs.append(divide(sums).masked_fill(~block.mask, 0))
        return torch.cat(outputs, dim=2)[:, :, : q.shape[2]]

    def _features(self, x: Heads) -> Features:
        if self.random_features is not None:
            x = (x * x.shape[-1] ** -0.25) @ self.random_features.projection.to(x.dtype).T
        return F.relu(x) + self.epsilon
