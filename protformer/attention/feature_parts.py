"""Products of features, which may be in parts, with values and with the sums over them."""

from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from protformer.attention.block_work import BlockSums
from protformer.attention.feature_maps import Parts

StateParts: TypeAlias = tuple[Float[Tensor, "row _ channel"], ...]
TransposedParts: TypeAlias = tuple[Float[Tensor, "row channel _"], ...]


def add_products(transposed: TransposedParts, addends: BlockSums, features: Parts) -> None:
    """Add the sums over residues of features times addends."""
    addends = addends.transpose(1, 2)
    for state, part in zip(transposed, features, strict=True):
        state.baddbmm_(addends, part)


def multiply(features: Parts, states: StateParts, out: BlockSums) -> BlockSums:
    """The sum over features of features times states."""
    torch.bmm(features[0], states[0], out=out)
    for part, state in zip(features[1:], states[1:], strict=True):
        out.baddbmm_(part, state)
    return out


def multiply_and_add(features: Parts, states: StateParts, addend: Tensor | None, out: BlockSums) -> None:
    multiply(features, states, out)
    if addend is not None:
        out += addend


def contiguous_transpose(state: Tensor) -> Tensor:
    """Sums over residues are faster into (channel, feature), products with the sums from (feature, channel)."""
    return state.transpose(1, 2).contiguous()
