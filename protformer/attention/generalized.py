"""Generalized attention with a ReLU feature map: phi(x) = relu(W x) + epsilon.

Choromanski et al. 2021, eq. 5 and appendix A.4, with the conventions of the released JAX code: no factor
1/sqrt(m) and epsilon added to every feature, so that a query that no key matches attends to all keys alike.
With a projection, q and k are scaled by head_dim ** -0.25 each; without one (the released "deterministic"
features), relu sees the head vector as it is. Time and memory are linear in the residues. Sums are in
float32: in float16 the denominator overflows at a few thousand residues.
"""

import torch

from protformer.attention.feature_maps import PointwiseMap
from protformer.attention.linear_kind import LinearAttention
from protformer.attention.random_features import RandomFeatures
from protformer.config import GeneralizedConfig


class GeneralizedAttention(LinearAttention):
    """Linear attention with the features relu(W x) + epsilon."""

    def __init__(
        self, config: GeneralizedConfig, *, head_dim: int, num_heads: int, causal: bool, seed: int, layer: int
    ) -> None:
        super().__init__(causal=causal)
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

    def feature_map(self, head_dim: int, dtype: torch.dtype) -> PointwiseMap:
        weight = None
        if self.random_features is not None:
            weight = self.random_features.projection.to(dtype) * head_dim**-0.25
        return PointwiseMap(weight=weight, head_dim=head_dim, function="relu", epsilon=self.epsilon)
