"""Generalized attention: phi(x) = f(W x) + epsilon, by default with f = relu.

Choromanski et al. 2021, eq. 5 and appendices A.4 and D.3, with the conventions of the released JAX code: no factor
1/sqrt(m) and epsilon added to every feature, so that a query that no key matches attends to all keys alike.
With a projection, q and k are scaled by head_dim ** -0.25 each; without one (the released "deterministic"
features), f sees the head vector as it is. Time and memory are linear in the residues. Sums are in
float32: in float16 the denominator overflows at a few thousand residues. f = exp needs no epsilon, and is
computed like the features of `favor`, so that it does not overflow.
"""

import torch

from protformer.attention.feature_maps import ExponentialMap, FeatureMap, PointwiseMap
from protformer.attention.linear_kind import LinearAttention
from protformer.attention.random_features import RandomFeatures
from protformer.config import GeneralizedConfig


class GeneralizedAttention(LinearAttention):
    """Linear attention with the features f(W x) + epsilon."""

    def __init__(
        self, config: GeneralizedConfig, *, head_dim: int, num_heads: int, causal: bool, seed: int, layer: int
    ) -> None:
        super().__init__(causal=causal)
        self.function = config.function
        self.epsilon = config.epsilon
        self.random_features: RandomFeatures | None = None
        if config.projection != "none":
            self.random_features = RandomFeatures(
                config.num_features,
                head_dim,
                orthogonal=config.projection == "orthogonal",
                row_norms="chi",
                redraw_every_steps=config.redraw_every_steps,
                seed=seed,
                layer=layer,
            )

    def feature_map(self, head_dim: int, dtype: torch.dtype) -> FeatureMap:
        weight = None
        if self.random_features is not None:
            weight = self.random_features.projection.to(dtype) * head_dim**-0.25
        if self.function != "exp":
            return PointwiseMap(weight=weight, head_dim=head_dim, function=self.function, epsilon=self.epsilon)
        if weight is None:
            device = next((buffer.device for buffer in self.buffers()), None)
            weight = torch.eye(head_dim, dtype=dtype, device=device)
        return ExponentialMap(weight=weight, bias=None, factor=0.0)
