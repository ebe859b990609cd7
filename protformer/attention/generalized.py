"""Generalized attention: phi(x) = f(W x) + epsilon, by default with f = relu.

Choromanski et al. 2021, eq. 5 and appendices A.4 and D.3, with the conventions of the released JAX code: no factor
1/sqrt(m) and epsilon added to every feature, so that a query that no key matches attends to all keys alike.
With a projection, q and k are scaled by head_dim ** -0.25 each; without one (the released "deterministic"
features), f sees the head vector as it is. Time and memory are linear in the residues. Sums are in
float32: in float16 the denominator overflows at a few thousand residues. f = exp needs no epsilon, and is
computed like the features of `favor`, so that it does not overflow.

A `mirrored` projection has half as many rows, each with both signs, in orthogonal blocks and of one length: ReLU's
error against the kernel that infinitely many rows would give is a fifth, in mean square. In float32 its features are
not computed as such (see `mirrored_maps`).
"""

import torch

from protformer.attention.feature_maps import ExponentialMap, FeatureMap, PointwiseMap
from protformer.attention.linear_kind import LinearAttention
from protformer.attention.mirrored_maps import MirroredReluMap
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
        self.is_mirrored = config.is_mirrored
        self.random_features: RandomFeatures | None = None
        if config.projection != "none":
            self.random_features = RandomFeatures(
                config.num_features // 2 if self.is_mirrored else config.num_features,
                head_dim,
                orthogonal=config.projection != "iid",
                row_norms="sqrt_d" if self.is_mirrored else "chi",
                redraw_every_steps=config.redraw_every_steps,
                seed=seed,
                layer=layer,
            )

    def feature_map(self, head_dim: int, dtype: torch.dtype) -> FeatureMap:
        weight = None
        if self.random_features is not None:
            weight = self.random_features.projection.to(dtype) * head_dim**-0.25
            if self.is_mirrored:
                weight = torch.cat((weight, -weight))
        if self.function != "exp":
            plain = PointwiseMap(weight=weight, head_dim=head_dim, function=self.function, epsilon=self.epsilon)
            return self._mirrored_relu_map(plain) if self._has_mirrored_relu_map(head_dim, dtype) else plain
        if weight is None:
            device = next((buffer.device for buffer in self.buffers()), None)
            weight = torch.eye(head_dim, dtype=dtype, device=device)
        return ExponentialMap(weight=weight, bias=None, factor=0.0)

    def _has_mirrored_relu_map(self, head_dim: int, dtype: torch.dtype) -> bool:
        """Whether W^T W = c I up to the rounding of float32, and products have no more: a model that was cast has not,
        nor has TF32, and for float64 that would be coarse."""
        if self.random_features is None or not self.is_mirrored or self.function != "relu":
            return False
        is_single = dtype == self.random_features.projection.dtype == torch.float32
        has_whole_blocks = self.random_features.num_features % head_dim == 0
        return is_single and has_whole_blocks and torch.get_float32_matmul_precision() == "highest"

    def _mirrored_relu_map(self, plain: PointwiseMap) -> MirroredReluMap:
        assert plain.weight is not None
        half = len(plain.weight) // 2
        # Rows have the squared length d^1/2, so c = half d^1/2 / d.
        root = (half * plain.head_dim**-0.5) ** 0.5
        return MirroredReluMap(weight=plain.weight[:half] / root, offset=2 * self.epsilon / root, plain_map=plain)
