"""From attention maps or a categorical Jacobian to a contact map: pure functions, and the map they give.

In: attention weights or logit differences of one protein (or of several chains in one row). Out: one
symmetric score for each pair of residues. None of it is fitted; a fitted contact head lives in `model`. Cost:
O(map residue^2) for attention, O(residue^2 20^2) for the Jacobian.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from protformer.model.contact_head import corrected_sum

PROBABILITIES = "are probabilities, of the model's contact head"
RANKS = "rank the pairs and are no probabilities"
"""What scores are, behind "scores"."""

Maps = Float[Tensor, "*map residue residue"]
ContactScores = Float[Tensor, "residue residue"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ContactMap:
    """The contacts of one protein, or of several chains predicted together.

    `contacts` is symmetric, in [0, 1], with the chains one after the other along both axes; `sequence` is the
    chains' residues in the same order. `chain_ids` are the identifiers of the proteins, one a chain; `id`
    names the whole map (the protein's identifier, or `a__b` for a pair).
    """

    id: str
    contacts: Float32[np.ndarray, "residue residue"]
    sequence: str
    chain_lengths: tuple[int, ...]
    chain_ids: tuple[str, ...]
    provenance: Mapping[str, object] = field(default_factory=dict)
    """What made the map: model, method, precision; in terms of JSON."""

    def __post_init__(self) -> None:
        length = len(self.sequence)
        if self.contacts.shape != (length, length):
            raise ValueError(f"{self.id}: contacts are {self.contacts.shape}, but the sequence has {length} residues")
        if sum(self.chain_lengths) != length or len(self.chain_ids) != len(self.chain_lengths):
            raise ValueError(
                f"{self.id}: chains {self.chain_ids} of {self.chain_lengths} residues do not make up {length}"
            )


def contacts_from_attention(weights: Float[Tensor, "map residue residue"]) -> ContactScores:
    """Mean over the maps, each symmetrised and APC-corrected.

    The features are those of Rao et al. 2021, "Transformer protein language models are unsupervised structure
    learners" (their logistic regression is replaced by equal weights). A map is one head of one layer,
    special tokens cut off.
    """
    return corrected_sum(weights, weights.new_full((len(weights),), 1 / len(weights)))


def contacts_from_jacobian(jacobian: Float[Tensor, "residue 20 residue 20"]) -> ContactScores:
    """Contact scores of the categorical Jacobian (Zhang et al. 2024, PNAS 121(45) e2406285121).

    `jacobian[i, a, j, b]` is the change of the logit of amino acid b at position j when position i is set to
    a. Means are subtracted along each of the four axes, both directions averaged, and each 20x20 block
    reduced to its Frobenius norm; a residue's effect on itself is no contact, so the diagonal is zero before
    APC.
    """
    for axis in range(4):
        jacobian = jacobian - jacobian.mean(dim=axis, keepdim=True)
    couplings = (jacobian + jacobian.permute(2, 3, 0, 1)) / 2
    norms = couplings.square().sum(dim=(1, 3)).sqrt()
    return apc(norms.fill_diagonal_(0.0))


def symmetrize(maps: Maps) -> Maps:
    """Each map plus its transpose (a sum, as in Rao et al. 2021; the factor does not change a ranking)."""
    return maps + maps.transpose(-1, -2)


def apc(maps: Maps) -> Maps:
    """Average product correction of each map: S_ij - S_i. S_.j / S_.. (Dunn et al. 2008).

    A map that sums to zero has no average product and is returned as it is.
    """
    total = maps.sum(dim=(-1, -2), keepdim=True)
    product = maps.sum(dim=-1, keepdim=True) * maps.sum(dim=-2, keepdim=True)
    empty = total == 0
    return maps - torch.where(empty, 0.0, product / torch.where(empty, 1.0, total))


def unit_scale(scores: ContactScores) -> Float32[Tensor, "residue residue"]:
    """Scores stretched to [0, 1]: the weakest pair of residues becomes 0, the strongest 1, the diagonal 0.

    A ranking score, not a calibrated probability: 0.5 does not mean that half of such pairs touch, and values
    of different proteins do not compare. Pairs that all score the same become 0. An asymmetric input is
    averaged with its transpose.
    """
    symmetric = symmetrize(scores.to(torch.float32)) / 2
    off_diagonal = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    pairs = symmetric[off_diagonal]
    if pairs.numel() == 0 or pairs.max() == pairs.min():
        return torch.zeros_like(symmetric)
    scaled = (symmetric - pairs.min()) / (pairs.max() - pairs.min())
    return torch.where(off_diagonal, scaled, 0.0)
