"""Clusters of keys that are alike, all of one size: the leaves of a balanced tree.

In: the keys of some rows (a row is one head of one segment). Out: `KeyClusters`. From the root down, each node is
halved at the median of its keys' projections on their principal axis, as in a PCA tree (Sproull 1991; McNames 2001), so
that a tree of 2^h leaves holds its n keys in leaves of n / 2^h, rounded up or down. The axis is found by power
iteration from the column of the covariance with the largest variance. Nothing is random; of keys on one spot, the
earlier goes left.
Cost: O(n head_dim h) time, O(n head_dim) memory.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SQUARINGS = 3
"""Of the covariance: 2 ** SQUARINGS power iterations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyClusters:
    """Which keys are in which cluster; every key is in one."""

    members: Int[Tensor, "row cluster place"]
    """Positions of the keys; the last place of a cluster that has a key less than others holds any position."""
    sizes: Int[Tensor, "row cluster"]

    def is_member(self) -> Bool[Tensor, "row cluster place"]:
        """False at places that hold no key."""
        return torch.arange(self.members.shape[2], device=self.members.device) < self.sizes[:, :, None]

    def of_keys(self, num_keys: int) -> Int[Tensor, "row key"]:
        """The cluster of each key."""
        clusters = torch.arange(self.members.shape[1], device=self.members.device)[None, :, None]
        # Places without a key write to a column that is cut off.
        targets = torch.where(self.is_member(), self.members, num_keys).flatten(1)
        found = torch.zeros(len(targets), num_keys + 1, dtype=torch.int64, device=targets.device)
        return found.scatter(1, targets, clusters.expand_as(self.members).flatten(1))[:, :num_keys]

    def take(self, x: Float[Tensor, "row key channel"]) -> Float[Tensor, "row cluster place channel"]:
        """What belongs to each member."""
        first = x.shape[1] * torch.arange(len(x), device=x.device)[:, None, None]
        taken: Tensor = x.flatten(0, 1).index_select(0, (self.members + first).flatten())
        return taken.view(*self.members.shape, -1)


@torch.no_grad()
def balanced_clusters(keys: Float[Tensor, "row key channel"], *, height: int) -> KeyClusters:
    """2 ** height clusters of the keys of each row; there must be as many keys."""
    num_rows, num_keys, _ = keys.shape
    members = torch.arange(num_keys, device=keys.device).expand(num_rows, 1, num_keys)
    clusters = KeyClusters(members=members, sizes=members.new_full((num_rows, 1), num_keys))
    for _ in range(height):
        clusters = _halve(clusters, keys)
    return clusters


def _halve(clusters: KeyClusters, keys: Float[Tensor, "row key channel"]) -> KeyClusters:
    """Two clusters in place of each; sizes differ by one at most, as before: 5 and 4 become 3, 2, 2 and 2."""
    is_member = clusters.is_member()
    order = _projections(clusters.take(keys), is_member).masked_fill(~is_member, torch.inf).argsort(dim=2, stable=True)
    members = clusters.members.gather(2, order)
    left_sizes = (clusters.sizes + 1) // 2
    num_places = (members.shape[2] + 1) // 2
    from_middle = left_sizes[:, :, None] + torch.arange(num_places, device=keys.device)
    right = members.gather(2, from_middle.clamp(max=members.shape[2] - 1))
    return KeyClusters(
        members=torch.stack((members[:, :, :num_places], right), dim=2).flatten(1, 2),
        sizes=torch.stack((left_sizes, clusters.sizes - left_sizes), dim=2).flatten(1, 2),
    )


def _projections(
    keys: Float[Tensor, "row cluster place channel"], is_member: Bool[Tensor, "row cluster place"]
) -> Float[Tensor, "row cluster place"]:
    """Each key along the principal axis of its cluster."""
    mean = (keys * is_member[..., None]).sum(dim=2, keepdim=True) / is_member.sum(dim=2)[:, :, None, None]
    centred = (keys - mean) * is_member[..., None]
    power = covariance = centred.transpose(2, 3) @ centred
    for _ in range(SQUARINGS):
        trace = power.diagonal(dim1=2, dim2=3).sum(dim=2)[:, :, None, None]
        power = power / trace.clamp(min=torch.finfo(trace.dtype).tiny)
        power = power @ power
    widest = covariance.diagonal(dim1=2, dim2=3).argmax(dim=2)[:, :, None, None]
    axis = power @ covariance.gather(3, widest.expand(-1, -1, keys.shape[3], 1))
    return (centred @ axis).squeeze(3)
