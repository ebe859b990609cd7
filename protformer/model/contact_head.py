"""The contact head: a logistic regression on the attention maps of all layers and heads.

In: the maps of one layer after the other, symmetrised and corrected (`apc`). Out: probabilities of contact.
Source: Rao et al. 2021, "Transformer protein language models are unsupervised structure learners", section 3.2; ESM-2's
has the same shape. It is fitted on structures and not trained with the language model, so its weights take no gradient.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ContactHead(nn.Module):
    """sigmoid(sum over layers and heads of weight x map, + bias)."""

    def __init__(self, *, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers, num_heads), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, layers: Iterable[Float[Tensor, "head residue residue"]]) -> Float[Tensor, "residue residue"]:
        """Probabilities, from the maps of each layer in turn: only one layer's need be in memory."""
        logits: Tensor = self.bias
        for weight, maps in zip(self.weight, layers, strict=True):
            with torch.autocast(maps.device.type, enabled=False):
                logits = logits + torch.einsum("h,hij->ij", weight, maps)
        return logits.sigmoid()
