"""The contact head: a logistic regression on the attention maps of all layers and heads.

In: the maps of one layer after the other, special tokens cut off. Out: probabilities of contact. Each map is
symmetrised and corrected for the average product (APC, Dunn et al. 2008); as both are linear but for each map's own
marginals, the maps are summed first and corrected once: `corrected_sum` passes over them only to sum them.
Source: Rao et al. 2021, "Transformer protein language models are unsupervised structure learners", section 3.2; ESM-2's
has the same shape. It is fitted on structures and not trained with the language model, so its weights take no gradient.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ContactHead(nn.Module):
    """sigmoid(sum over layers and heads of weight x corrected map, + bias)."""

    def __init__(self, *, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers, num_heads), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, layers: Iterable[Float[Tensor, "head residue residue"]]) -> Float[Tensor, "residue residue"]:
        """Probabilities, from the maps of each layer in turn: only one layer's need be in memory."""
        logits: Tensor = self.bias
        for weight, maps in zip(self.weight, layers, strict=True):
            logits = logits + corrected_sum(maps, weight)
        return logits.sigmoid()


def corrected_sum(
    maps: Float[Tensor, "map residue residue"], weights: Float[Tensor, " map"]
) -> Float[Tensor, "residue residue"]:
    """The weighted sum of the maps, each plus its transpose, S, less the average product S_i. S_.j / S_.. of that.

    A map that sums to zero has no average product and is not corrected.
    """
    with torch.autocast(maps.device.type, enabled=False):
        summed = torch.einsum("m,mij->ij", weights, maps)
        marginals = maps.sum(dim=-1) + maps.sum(dim=-2)
        totals = marginals.sum(dim=-1)
        shares = torch.where(totals == 0, 0.0, weights / torch.where(totals == 0, 1.0, totals))
        return summed + summed.T - torch.einsum("m,mi,mj->ij", shares, marginals, marginals)
