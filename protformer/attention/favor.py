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
"""

import torch

from protformer.attention.feature_maps import ExponentialMap
from protformer.attention.linear_kind import LinearAttention
from protformer.attention.random_features import RandomFeatures
from protformer.config import FavorConfig


class FavorAttention(LinearAttention):
    """Linear attention whose expected weights, before normalisation, are those of softmax attention."""

    random_features: RandomFeatures

    def __init__(
        self, config: FavorConfig, *, head_dim: int, num_heads: int, causal: bool, seed: int, layer: int
    ) -> None:
        super().__init__(causal=causal)
        self.random_features = RandomFeatures(
            config.num_features,
            head_dim,
            orthogonal=config.orthogonal,
            row_norms=config.row_norms,
            redraw_every_steps=config.redraw_every_steps,
            seed=seed,
            layer=layer,
        )

    def feature_map(self, head_dim: int, dtype: torch.dtype) -> ExponentialMap:
        weight = self.random_features.projection.to(dtype) * head_dim**-0.25
        return ExponentialMap(weight=weight, bias=None, factor=head_dim**-0.5 / 2)
