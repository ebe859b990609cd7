"""FAVOR+: softmax attention in linear time by positive random features.

Choromanski et al. 2021, sections 2.2 to 2.4. In: queries, keys, values. Out: an estimate of softmax(q k^T /
sqrt(d)) v. The features are

    log phi(x) = W x - |x|^2 / 2 - log(m) / 2,     x = q d^-1/4 or k d^-1/4

(their lemma 1, SM+; our `num_features` is their m, our `head_dim` their d), for which E[phi(q) . phi(k)] is
the softmax kernel. They are only ever exponentiated relative to references that cancel in the quotient, so that nothing
can overflow, and underflows only what is negligible, at any size of q and k. There is no additive epsilon: it would
turn attention into the mean of the values wherever all features are small. log(m) / 2 and the |q|^2 of
a query cancel too, and are never computed.

Reference of a key feature r: c_r, about the largest log phi(k_j)_r over keys. Reference of a query, where it
needs one: M_i, the largest log phi(q_i)_r + c_r over features. In

    sum_r exp(log phi(q_i)_r + c_r - M_i) sum_j exp(log phi(k_j)_r - c_r) [v_j, 1]

all exponents are then at most 0, and at the feature where M_i is attained the denominator has a term of at least
1. References are constants to autograd, which is exact, as the quotient does not depend on them. How they are had
is told in `linear` and `causal`, which do the work.

Further choices, each of which leaves all this as it is. `hyperbolic` takes every row of W with both signs. `favor++`
adds A |w_r|^2 to log phi(x)_r, with W times sqrt(1 - 4 A) (Likhosherstov et al. 2022); A is the best for the mean
|q + k|^2 of past training steps. `rescale` replaces q and k by q Psi and k / Psi (SADERF, Likhosherstov et al.
2023), Psi from past steps too. `covariance` is no estimator of the same kernel but another one, exp(q^T M k / sqrt(d))
with a learned diagonal M: channels c and c + d / 2, which rotary positions turn together, share an entry, so that M
commutes with the turns and the kernel still depends on differences of positions only.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from protformer.attention.block_work import Values, compute_dtype
from protformer.attention.favor_statistics import Moments
from protformer.attention.feature_maps import ExponentialMap, FeatureMap
from protformer.attention.interface import Heads, Segments
from protformer.attention.linear_kind import LinearAttention
from protformer.attention.mirrored_maps import MirroredExponentialMap
from protformer.attention.random_features import RandomFeatures
from protformer.config import FavorConfig


class FavorAttention(LinearAttention):
    """Linear attention whose expected weights, before normalisation, are those of softmax attention."""

    random_features: RandomFeatures

    def __init__(
        self, config: FavorConfig, *, head_dim: int, num_heads: int, causal: bool, seed: int, layer: int
    ) -> None:
        super().__init__(causal=causal)
        self.features, self.rescale = config.features, config.rescale
        self.random_features = RandomFeatures(
            config.num_features // 2 if config.features == "hyperbolic" else config.num_features,
            head_dim,
            orthogonal=config.orthogonal,
            row_norms=config.row_norms,
            redraw_every_steps=config.redraw_every_steps,
            seed=seed,
            layer=layer,
        )
        needs_moments = config.rescale or config.features == "favor++"
        self.moments = Moments(num_heads=num_heads, head_dim=head_dim) if needs_moments else None
        has_covariance = config.covariance == "diagonal"
        self.covariance_root = nn.Parameter(torch.ones(num_heads, 1, head_dim // 2)) if has_covariance else None

    def feature_map(self, head_dim: int, dtype: torch.dtype) -> FeatureMap:
        weight, bias = self.random_features.projection.to(dtype), None
        if self.features == "hyperbolic":
            weight = torch.cat((weight, -weight))
        elif self.features == "favor++":
            assert self.moments is not None
            damping = self.moments.damping(dtype, rescaled=self.rescale)
            bias = damping * weight.square().sum(-1)
            weight = weight * (1 - 4 * damping).sqrt()
        plain = ExponentialMap(weight=weight * head_dim**-0.25, bias=bias, factor=head_dim**-0.5 / 2)
        if self.features != "hyperbolic":
            return plain
        half = plain.weight[: plain.num_features // 2]
        return MirroredExponentialMap(weight=half, factor=plain.factor, plain_map=plain)

    def redraw(self, step: int) -> None:
        super().redraw(step)
        if self.moments is not None:
            self.moments.take_over()

    def prepare(self, q: Heads, k: Heads) -> tuple[Heads, Heads]:
        """Queries and keys, scaled as the features expect them."""
        q, k = self._with_covariance(q, k)
        if self.rescale:
            assert self.moments is not None
            psi = self.moments.rescaling(compute_dtype(q, k)).unsqueeze(1)
            q, k = _multiply(q, psi), _multiply(k, 1 / psi)
        return q, k

    def _attend(self, q: Heads, k: Heads, v: Values, segments: Segments, *, plain: bool = False) -> Values:
        if self.moments is not None and self.training:
            self.moments.gather(*self._with_covariance(q.detach(), k.detach()), segments)
        return super()._attend(q, k, v, segments, plain=plain)

    def _with_covariance(self, q: Heads, k: Heads) -> tuple[Heads, Heads]:
        if self.covariance_root is None:
            return q, k
        root = self.covariance_root.repeat(1, 1, 2)
        return _multiply(q, root), _multiply(k, root)


def _multiply(x: Heads, scale: Float[Tensor, "head 1 head_dim"]) -> Heads:
    dtype = compute_dtype(x)
    return x.to(dtype) * scale.to(dtype)
