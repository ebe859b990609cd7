"""Is a layer's attention of a kind that random features can estimate? Figures that tell before anything is trained.

In: queries, keys and values of one layer, and what linear attention made of them. Out: sums over a sample of queries,
which add up over batches. With x = q d^-1/4 and y = k d^-1/4 (Choromanski et al. 2021), so that x . y is the logit:

- mean |x + y|^2 over pairs. One random feature estimates exp(x . y) with the relative variance exp(|x + y|^2) - 1
  (their lemma 2): with m features, a mean above log m leaves errors as large as the kernel itself.
- spread of the logits about their mean over keys: standard deviation and maximum, in nats. Wide means a sharp head.
- effective features of m: (sum_r c_r)^2 / sum_r c_r^2, where c_r = phi(q_i)_r sum_j phi(k_j)_r is what feature r
  brings to the denominator of query i. Near 1, one feature decides alone.
- relative error of linear against exact attention, |linear - exact| / |exact| over all sampled queries, beside the
  error of the plain mean of the values that a query sees: no better than that means that no key was told from another.

Time and memory are O(queries x residues) and O(residues x features).
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protformer.attention.feature_maps import ExponentialMap

Heads = Float[Tensor, "batch head residue head_dim"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Readiness:
    """Sums over sampled queries of all heads; the properties are the figures."""

    num_features: int
    num_pairs: float = 0.0
    num_queries: float = 0.0
    norm_sum: float = 0.0
    spread_sum: float = 0.0
    logit_spread_max: float = 0.0
    """Largest logit above the mean of its query's."""
    effective_sum: float = 0.0
    squared_error: float = 0.0
    squared_mean_pooling_error: float = 0.0
    squared_exact: float = 0.0

    def __add__(self, other: "Readiness") -> "Readiness":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        largest = max(self.logit_spread_max, other.logit_spread_max)
        return Readiness(**(sums | {"num_features": self.num_features, "logit_spread_max": largest}))

    @property
    def squared_norm(self) -> float:
        """Mean |x + y|^2."""
        return self.norm_sum / self.num_pairs

    @property
    def logit_spread(self) -> float:
        """Mean over queries of the standard deviation of their logits."""
        return self.spread_sum / self.num_queries

    @property
    def effective_features(self) -> float:
        return self.effective_sum / self.num_queries

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.squared_error / self.squared_exact)

    @property
    def mean_pooling_error(self) -> float:
        return math.sqrt(self.squared_mean_pooling_error / self.squared_exact)

    def as_json(self) -> dict[str, float | int]:
        names = (
            "num_features", "squared_norm", "logit_spread", "logit_spread_max", "effective_features", "relative_error",
            "mean_pooling_error",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def measure_readiness(
    q: Heads,
    k: Heads,
    v: Heads,
    segments: Int[Tensor, "batch residue"],
    *,
    linear: Heads,
    feature_map: ExponentialMap,
    queries: Int[Tensor, " query"],
    causal: bool,
) -> Readiness:
    """Figures of one layer at the positions `queries` of each row (padding among them does not count).

    `linear` is what linear attention gave for all positions; `feature_map` are its features, in float64, or those that
    it would have.
    """
    q, k, v, linear = (x.double() for x in (q, k, v, linear))
    q, linear = q[:, :, queries], linear[:, :, queries]
    visible = _visible(segments, queries, causal)
    seen = visible.sum(-1, keepdim=True)
    counts = (seen > 0).squeeze(-1).expand(q.shape[:3])
    root = math.sqrt(q.shape[-1])
    logits = q @ k.transpose(-1, -2) / root
    centred = (logits - _mean(logits, visible, seen)).masked_fill(~visible, 0)
    spread = _mean(centred.square(), visible, seen).sqrt().squeeze(-1)
    norms = (q.square().sum(-1)[..., None] + k.square().sum(-1)[:, :, None]) / root + 2 * logits
    exact = logits.masked_fill(~visible & (seen > 0), -torch.inf).softmax(-1) @ v
    pooled = visible.double() @ v / seen.clamp(min=1)
    effective = _effective_features(q, k, visible, feature_map)
    kept = counts[..., None]
    return Readiness(
        num_features=feature_map.num_features,
        num_pairs=float(visible.expand_as(logits).sum()),
        num_queries=float(counts.sum()),
        norm_sum=float(norms.masked_fill(~visible, 0).sum()),
        spread_sum=float(spread.masked_fill(~counts, 0).sum()),
        logit_spread_max=float(centred.max()),
        effective_sum=float(effective.masked_fill(~counts, 0).sum()),
        squared_error=float((linear - exact).masked_fill(~kept, 0).square().sum()),
        squared_mean_pooling_error=float((pooled - exact).masked_fill(~kept, 0).square().sum()),
        squared_exact=float(exact.masked_fill(~kept, 0).square().sum()),
    )


def _visible(segments: Tensor, queries: Tensor, causal: bool) -> Bool[Tensor, "batch 1 query residue"]:
    own = segments[:, queries, None]
    visible = (own == segments[:, None, :]) & (own > 0)
    if causal:
        visible = visible & (torch.arange(segments.shape[1], device=segments.device) <= queries[:, None])
    return visible[:, None]


def _mean(x: Tensor, visible: Tensor, seen: Tensor) -> Float[Tensor, "batch head query 1"]:
    total: Tensor = x.masked_fill(~visible, 0).sum(-1, keepdim=True)
    return total / seen.clamp(min=1)


def _effective_features(
    q: Float[Tensor, "batch head query head_dim"],
    k: Heads,
    visible: Bool[Tensor, "batch 1 query residue"],
    feature_map: ExponentialMap,
) -> Float[Tensor, "batch head query"]:
    """Sums over keys relative to each feature's largest key, all else as logarithms, so that nothing underflows."""
    log_q, log_k = feature_map.logarithms(q, is_key=False), feature_map.logarithms(k, is_key=True)
    reference = log_k.amax(dim=2, keepdim=True)
    keys = visible.double() @ (log_k - reference).exp()
    shares = log_q + reference + keys.log()
    return (2 * shares.logsumexp(-1) - (2 * shares).logsumexp(-1)).exp()
