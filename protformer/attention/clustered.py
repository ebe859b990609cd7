"""Clustered attention: softmax over the keys of a few clusters one by one, and over all other clusters as wholes.

In: queries, keys, values. Out: an approximation of softmax(q k^T / sqrt(d)) v in O(residue ** 1.5) time and linear
memory, for trained heads, whose large weights random features cannot estimate: the sum of a sparse and a coarse part
(Scatterbrain: Chen et al. 2021), both by clusters (Vyas et al. 2020 cluster queries; here keys are clustered, as in
Roy et al. 2021). Keys are put into clusters of equal size by a balanced tree (`key_clusters`). Cluster c of n_c keys,
with mean mu_c, variances v_c of the channels and mean value, has for a query q the estimated logit

    l_c = q . mu_c + b f(sigma),     sigma^2 = sum_j q_j^2 v_cj,

where f(sigma) = log(mean(exp(x))) for n_c Gaussian numbers x of deviation sigma: sigma^2 / 2 up to s = sqrt(2 log n_c),
from where on the largest of them decides and f goes on as its tangent (Derrida 1981, the random energy model).
The `clusters_per_query` clusters of largest l_c are opened: their keys have the exact weights exp(q . k). The others
have the weight n_c exp(l_c + a) and their mean value. b = 1 and a = 0, one of each a head, are where learning begins.
A segment with no more clusters than that has exact attention. Which clusters are opened takes no gradient.

The work with opened clusters is a product of matrices for each: the queries that opened it, in blocks, with its keys.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from protformer.attention.block_work import compute_dtype
from protformer.attention.interface import Attention, AttentionWeights, Heads, Segments
from protformer.attention.key_clusters import KeyClusters, balanced_clusters
from protformer.attention.segments import runs
from protformer.config import ClusteredConfig

Rows = Float[Tensor, "row residue channel"]
"""A row is one head of one segment."""
Scores = Float[Tensor, "row query cluster"]

QUERIES_IN_BLOCK = 32
"""Queries of one cluster that are multiplied with its keys at once."""
WEIGHTS_AT_ONCE = 2**22
"""Weights that are in memory at once, of all rows together."""
TINY = 1e-30


class ClusteredAttention(Attention):
    """Exact weights in the clusters where a query's largest keys are, and one weight each for the other clusters."""

    def __init__(
        self, config: ClusteredConfig, *, head_dim: int, num_heads: int, causal: bool, seed: int, layer: int
    ) -> None:
        super().__init__()
        assert not causal, "refused by ModelConfig"
        self.clusters_per_query, self.cluster_size = config.clusters_per_query, config.cluster_size
        self.spread_factor = nn.Parameter(torch.ones(num_heads))
        """b."""
        self.log_mass = nn.Parameter(torch.zeros(num_heads))
        """a."""

    def forward(self, q: Heads, k: Heads, v: Heads, segments: Segments) -> Heads:
        parts: dict[tuple[int, int], Tensor] = {}
        with torch.autocast(q.device.type, enabled=False):
            for (start, stop), rows in _same_extents(segments).items():
                of_rows = (x[_as_index(rows, len(q)), :, start:stop] for x in (q, k, v))
                attended = self._attend(*of_rows).to(v.dtype)
                parts |= {(row, start): part for row, part in zip(rows, attended.split(1), strict=True)}
        return torch.cat([_join(parts, row, v[row : row + 1], segments[row]) for row in range(len(v))])

    def weights(self, q: Heads, k: Heads, segments: Segments) -> AttentionWeights:
        length, dtype = q.shape[2], compute_dtype(q, k)
        weights = torch.zeros((*q.shape[:2], length, length), dtype=dtype, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            for (start, stop), rows in _same_extents(segments).items():
                for row in rows:
                    own = (x[row, :, start:stop].to(dtype) for x in (q, k))
                    weights[row, :, start:stop, start:stop] = self._weights_of_segment(*own)
        return weights

    def num_clusters(self, num_keys: int) -> int:
        """A power of two; clusters have cluster_size keys, or sqrt(num_keys) / 2 where that is more, or fewer, but more
        than half of that."""
        size = max(self.cluster_size, math.sqrt(num_keys) / 2)
        return int(2 ** max(0, math.ceil(math.log2(num_keys / size))))

    def _attend(self, q: Heads, k: Heads, v: Heads) -> Heads:
        """Attention within segments of the same length."""
        dtype, num_clusters = compute_dtype(q, k, v), self.num_clusters(q.shape[2])
        q, k, v = (x.to(dtype) for x in (q, k, v))
        if num_clusters <= self.clusters_per_query:
            return F.scaled_dot_product_attention(q, k, v)
        q, k, v = (x.flatten(0, 1) for x in (q * q.shape[3] ** -0.5, k, v))
        spread_factor, log_mass = (x.to(dtype).repeat(len(q) // len(x)) for x in (self.spread_factor, self.log_mass))
        clusters = balanced_clusters(k.detach(), height=num_clusters.bit_length() - 1)
        coarse = _describe(clusters, k, v)
        cost = num_clusters + self.clusters_per_query * clusters.members.shape[2]
        parts = q.split(max(1, WEIGHTS_AT_ONCE // (len(q) * cost)), dim=1)
        attended = [self._attend_of_queries(len(parts) > 1, part, coarse, spread_factor, log_mass) for part in parts]
        return torch.cat(attended, dim=1).unflatten(0, (-1, len(self.log_mass)))

    def _attend_of_queries(
        self, recomputes: bool, q: Rows, coarse: "_Coarse", spread_factor: Tensor, log_mass: Tensor
    ) -> Rows:
        """The backward pass keeps the weights of all queries only if there are few."""

        def attend(q: Rows, spread_factor: Tensor, log_mass: Tensor) -> Rows:
            logits = coarse.logits(q, spread_factor)
            opened = logits.detach().topk(self.clusters_per_query, dim=2).indices
            logits = logits + log_mass[:, None, None] + coarse.clusters.sizes.to(q.dtype).log()[:, None]
            rest = logits.scatter(2, opened, -torch.inf)
            sums, values = _attend_in_opened(q, coarse, opened)
            shares = torch.cat((sums, rest.logsumexp(dim=2, keepdim=True)), dim=2).softmax(dim=2)
            of_rest = rest.softmax(dim=2) @ coarse.mean_value
            return (shares[:, :, None, :-1] @ values).squeeze(2) + shares[:, :, -1:] * of_rest

        if recomputes and torch.is_grad_enabled():
            recomputed: Rows = checkpoint(
                attend, q, spread_factor, log_mass, use_reentrant=False, preserve_rng_state=False
            )
            return recomputed
        return attend(q, spread_factor, log_mass)

    def _weights_of_segment(
        self, q: Float[Tensor, "head residue head_dim"], k: Float[Tensor, "head residue head_dim"]
    ) -> Float[Tensor, "head residue residue"]:
        """As `forward`, but with all logits at once."""
        q, num_keys = q * q.shape[2] ** -0.5, k.shape[1]
        logits, num_clusters = q @ k.transpose(1, 2), self.num_clusters(num_keys)
        if num_clusters <= self.clusters_per_query:
            return logits.softmax(dim=2)
        clusters = balanced_clusters(k.detach(), height=num_clusters.bit_length() - 1)
        of_cluster = _describe(clusters, k, k).logits(q, self.spread_factor.to(q.dtype))
        is_opened = torch.zeros_like(of_cluster, dtype=torch.bool)
        is_opened.scatter_(2, of_cluster.topk(self.clusters_per_query, dim=2).indices, True)
        cluster = clusters.of_keys(num_keys)[:, None].expand(-1, num_keys, -1)
        estimate = of_cluster.gather(2, cluster) + self.log_mass.to(q.dtype)[:, None, None]
        return torch.where(is_opened.gather(2, cluster), logits, estimate).softmax(dim=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Coarse:
    """The clusters, their keys and values, and what is known of each as a whole."""

    clusters: KeyClusters
    keys: Float[Tensor, "row cluster place channel"]
    values: Float[Tensor, "row cluster place value_dim"]
    mean_key: Float[Tensor, "row cluster channel"]
    variance: Float[Tensor, "row cluster channel"]
    mean_value: Float[Tensor, "row cluster value_dim"]

    def logits(self, q: Rows, spread_factor: Float[Tensor, " row"]) -> Scores:
        """l_c for each query."""
        variance = q.square() @ self.variance.transpose(1, 2)
        bounded = variance.minimum(2 * self.clusters.sizes.to(q.dtype).log()[:, None])
        # variance / 2 where that is bounded, else the tangent; the root would have no derivative at 0.
        spread = (variance * bounded + TINY).sqrt() - bounded / 2
        return q @ self.mean_key.transpose(1, 2) + spread_factor[:, None, None] * spread


def _describe(clusters: KeyClusters, k: Rows, v: Rows) -> _Coarse:
    keys, values = clusters.take(k), clusters.take(v)
    is_member, sizes = clusters.is_member()[..., None], clusters.sizes[..., None]
    mean_key = (keys * is_member).sum(dim=2) / sizes
    deviations = (keys - mean_key[:, :, None]) * is_member
    return _Coarse(
        clusters=clusters,
        keys=keys,
        values=values,
        mean_key=mean_key,
        variance=deviations.square().sum(dim=2) / sizes,
        mean_value=(values * is_member).sum(dim=2) / sizes,
    )


def _attend_in_opened(
    q: Rows, coarse: _Coarse, opened: Int[Tensor, "row query choice"]
) -> tuple[Float[Tensor, "row query choice"], Float[Tensor, "row query choice value_dim"]]:
    """In each opened cluster: the logarithm of the sum of the weights, and the mean value by these weights.

    With blocks of 4 places, clusters that 5, 0 and 2 queries have opened get 2, 0 and 1 blocks.
    """
    num_rows, num_queries, num_choices = opened.shape
    num_clusters = coarse.clusters.members.shape[1]
    row = torch.arange(num_rows, device=q.device)[:, None, None]
    cluster = (row * num_clusters + opened).flatten()
    order = cluster.argsort()
    counts = cluster.bincount(minlength=num_rows * num_clusters)
    num_blocks = -(-counts // QUERIES_IN_BLOCK)
    # The place of the i-th query of a cluster, counted along the sorted list.
    first_place = QUERIES_IN_BLOCK * (num_blocks.cumsum(0) - num_blocks) - (counts.cumsum(0) - counts)
    place = torch.empty_like(cluster)
    place[order] = torch.arange(len(cluster), device=q.device) + first_place[cluster[order]]
    of_block = torch.arange(len(counts), device=q.device).repeat_interleave(num_blocks)

    query_at = cluster.new_zeros(QUERIES_IN_BLOCK * len(of_block))
    query_at[place] = torch.arange(len(cluster), device=q.device) // num_choices
    queries = q.flatten(0, 1)[query_at].unflatten(0, (-1, QUERIES_IN_BLOCK))
    keys, values = (x.flatten(0, 1)[of_block] for x in (coarse.keys, coarse.values))
    is_member = coarse.clusters.is_member().flatten(0, 1)[of_block]
    logits = (queries @ keys.transpose(1, 2)).masked_fill(~is_member[:, None], -torch.inf)
    sums, means = logits.logsumexp(dim=2), logits.softmax(dim=2) @ values
    shape = (num_rows, num_queries, num_choices)
    return sums.flatten()[place].unflatten(0, shape), means.flatten(0, 1)[place].unflatten(0, shape)


def _same_extents(segments: Segments) -> dict[tuple[int, int], list[int]]:
    """The rows that have a segment from start to stop."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, ids in enumerate(segments.cpu()):
        start = 0
        for segment, length in runs(ids):
            if segment > 0:
                found[start, start + length].append(row)
            start += length
    return found


def _as_index(rows: list[int], num_rows: int) -> slice | list[int]:
    """All rows are had without a copy."""
    return slice(None) if len(rows) == num_rows else rows


def _join(
    parts: dict[tuple[int, int], Tensor],
    row: int,
    v: Float[Tensor, "1 head residue head_dim"],
    segments: Int[Tensor, " residue"],
) -> Float[Tensor, "1 head residue head_dim"]:
    """The attended values of one row, zero at padding."""
    found, start = [], 0
    for segment, length in runs(segments):
        found.append(parts[row, start] if segment > 0 else torch.zeros_like(v[:, :, start : start + length]))
        start += length
    return torch.cat(found, dim=2)
