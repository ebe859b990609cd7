"""Clustered attention: softmax over the keys of a few clusters one by one, and over all other clusters as wholes.

In: queries, keys, values. Out: an approximation of softmax(q k^T / sqrt(d)) v in O(residue ** 1.5) time and linear
memory, for trained heads, whose large weights random features cannot estimate: the sum of a sparse and a coarse part
(Scatterbrain: Chen et al. 2021), both by clusters (Vyas et al. 2020 cluster queries; here keys are clustered, as in
Roy et al. 2021). Keys are put into clusters of equal size by a balanced tree (`key_clusters`). For each query,

    cluster c of n_c keys, with the means mu_c of its keys and m_c of its values, has the weight n_c exp(q . mu_c);
    the `clusters_per_query` clusters of largest weight are opened: their keys have their own weights exp(q . k);
    the others stay as they are, at the value m_c, but for a learned factor exp(a), one a head, which begins as 1.

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

QUERIES_IN_BLOCK = 32
"""Queries of one cluster that are multiplied with its keys at once."""
WEIGHTS_AT_ONCE = 2**22
"""Weights that are in memory at once, of all rows together."""


class ClusteredAttention(Attention):
    """Exact weights in the clusters where a query's largest keys are, and one weight each for the other clusters."""

    is_sharp = True

    def __init__(
        self, config: ClusteredConfig, *, head_dim: int, num_heads: int, causal: bool, seed: int, layer: int
    ) -> None:
        super().__init__()
        assert not causal, "refused by ModelConfig"
        self.clusters_per_query, self.cluster_size = config.clusters_per_query, config.cluster_size
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
        log_mass = self.log_mass.to(dtype).repeat(len(q) // len(self.log_mass))
        clusters = balanced_clusters(k.detach(), height=num_clusters.bit_length() - 1)
        coarse = _describe(clusters, k, v)
        cost = num_clusters + self.clusters_per_query * clusters.members.shape[2]
        rows_at_once = max(1, WEIGHTS_AT_ONCE // (cost * q.shape[1]))
        queries_at_once = max(1, WEIGHTS_AT_ONCE // (cost * min(rows_at_once, len(q))))
        of_rows = []
        for first in range(0, len(q), rows_at_once):
            rows = slice(first, first + rows_at_once)
            parts = q[rows].split(queries_at_once, dim=1)
            coarse_rows = coarse.of_rows(rows)
            of_rows.append(torch.cat([self._attend_of_queries(x, coarse_rows, log_mass[rows]) for x in parts], dim=1))
        attended: Tensor = torch.cat(of_rows).unflatten(0, (-1, len(self.log_mass)))
        return attended

    def _attend_of_queries(self, q: Rows, coarse: "_Coarse", log_mass: Float[Tensor, " row"]) -> Rows:
        """Weights are not kept for the backward pass but computed again."""

        def attend(q: Rows, log_mass: Tensor) -> Rows:
            logits = coarse.logits(q)
            top = logits.detach().topk(self.clusters_per_query, dim=2)
            # The opened clusters hold more than their means say: whatever underflows here is nothing beside them.
            reference = top.values[:, :, :1]
            rest = (logits - reference).exp().scatter(2, top.indices, 0)
            largest, weight_sums, sums = _attend_in_opened(q, coarse, top.indices)
            new_reference = torch.maximum(largest.amax(dim=2, keepdim=True), reference)
            of_opened = (largest - new_reference).exp()
            of_rest = (reference - new_reference + log_mass[:, None, None]).exp()
            total = (weight_sums * of_opened).sum(dim=2, keepdim=True) + rest.sum(dim=2, keepdim=True) * of_rest
            return ((sums * of_opened[..., None]).sum(dim=2) + rest @ coarse.mean_value * of_rest) / total

        if torch.is_grad_enabled():
            recomputed: Rows = checkpoint(attend, q, log_mass, use_reentrant=False, preserve_rng_state=False)
            return recomputed
        return attend(q, log_mass)

    def _weights_of_segment(
        self, q: Float[Tensor, "head residue head_dim"], k: Float[Tensor, "head residue head_dim"]
    ) -> Float[Tensor, "head residue residue"]:
        """As `forward`, but with all logits at once."""
        q, num_keys = q * q.shape[2] ** -0.5, k.shape[1]
        logits, num_clusters = q @ k.transpose(1, 2), self.num_clusters(num_keys)
        if num_clusters <= self.clusters_per_query:
            return logits.softmax(dim=2)
        clusters = balanced_clusters(k.detach(), height=num_clusters.bit_length() - 1)
        of_cluster = _describe(clusters, k, k).logits(q)
        is_opened = torch.zeros_like(of_cluster, dtype=torch.bool)
        is_opened.scatter_(2, of_cluster.topk(self.clusters_per_query, dim=2).indices, True)
        of_key = of_cluster - clusters.sizes.to(q.dtype).log()[:, None] + self.log_mass.to(q.dtype)[:, None, None]
        cluster = clusters.of_keys(num_keys)[:, None].expand(-1, num_keys, -1)
        return torch.where(is_opened.gather(2, cluster), logits, of_key.gather(2, cluster)).softmax(dim=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Coarse:
    """The clusters, their keys and values, and what is known of each as a whole."""

    clusters: KeyClusters
    keys: Float[Tensor, "row cluster place channel"]
    values: Float[Tensor, "row cluster place value_dim"]
    mean_key: Float[Tensor, "row cluster channel"]
    mean_value: Float[Tensor, "row cluster value_dim"]

    def of_rows(self, rows: slice) -> "_Coarse":
        clusters = KeyClusters(members=self.clusters.members[rows], sizes=self.clusters.sizes[rows])
        of_rows = {name: getattr(self, name)[rows] for name in ("keys", "values", "mean_key", "mean_value")}
        return _Coarse(clusters=clusters, **of_rows)

    def logits(self, q: Rows) -> Float[Tensor, "row query cluster"]:
        """log(n_c) + q . mu_c for each query."""
        return torch.baddbmm(self.clusters.sizes.to(q.dtype).log()[:, None], q, self.mean_key.transpose(1, 2))


def _describe(clusters: KeyClusters, k: Rows, v: Rows) -> _Coarse:
    keys, values = clusters.take(k), clusters.take(v)
    is_member, sizes = clusters.is_member()[..., None], clusters.sizes[..., None]
    return _Coarse(
        clusters=clusters,
        keys=keys,
        values=values,
        mean_key=(keys * is_member).sum(dim=2) / sizes,
        mean_value=(values * is_member).sum(dim=2) / sizes,
    )


def _attend_in_opened(
    q: Rows, coarse: _Coarse, opened: Int[Tensor, "row query choice"]
) -> tuple[
    Float[Tensor, "row query choice"], Float[Tensor, "row query choice"], Float[Tensor, "row query choice value_dim"]
]:
    """In each opened cluster: the largest logit, the sum of the weights exp(logit - largest), that of values by them.

    With blocks of 4 places, clusters that 5, 0 and 2 queries have opened get 2, 0 and 1 blocks.
    """
    num_clusters, shape = coarse.mean_key.shape[1], opened.shape
    is_opened = torch.zeros((*shape[:2], num_clusters), dtype=torch.int32, device=q.device).scatter_(2, opened, 1)
    row = torch.arange(len(opened), device=q.device)[:, None, None]
    cluster = (row * num_clusters + opened).flatten()
    # How many queries up to this one have opened the cluster; the last one knows how many have in all.
    ranks = is_opened.cumsum(dim=1, dtype=torch.int32)
    num_blocks = -(-ranks[:, -1].flatten() // QUERIES_IN_BLOCK)
    first_place = QUERIES_IN_BLOCK * (num_blocks.cumsum(0) - num_blocks)
    place = first_place.index_select(0, cluster) + (ranks.gather(2, opened) - 1).flatten()
    of_block = torch.arange(len(num_blocks), device=q.device).repeat_interleave(num_blocks)

    query_at = cluster.new_zeros(QUERIES_IN_BLOCK * len(of_block))
    query_at[place] = torch.arange(len(cluster), device=q.device) // shape[2]
    queries = q.flatten(0, 1).index_select(0, query_at).unflatten(0, (-1, QUERIES_IN_BLOCK))
    keys, values, is_member = (
        x.flatten(0, 1).index_select(0, of_block) for x in (coarse.keys, coarse.values, coarse.clusters.is_member())
    )
    absent = torch.where(is_member, 0.0, -torch.inf).to(q.dtype)
    logits = torch.baddbmm(absent[:, None], queries, keys.transpose(1, 2))
    largest = logits.detach().amax(dim=2, keepdim=True)
    weights = (logits - largest).exp()
    results = (largest.flatten(), weights.sum(dim=2).flatten(), (weights @ values).flatten(0, 1))
    at_pairs = [x.index_select(0, place).unflatten(0, shape) for x in results]
    return at_pairs[0], at_pairs[1], at_pairs[2]


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
