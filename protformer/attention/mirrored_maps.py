"""Feature maps for projections that have each row with both signs: the same kernels, had in fewer products.

In and out as in `feature_maps`. Both are right where sums neither cancel nor leave float32's range, which is nearly
always; engines look whether they did, and turn to the plain map of the same kernel then.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from protformer.attention.feature_maps import (
    Block,
    ExponentialMap,
    Exponentials,
    FeatureMap,
    Inputs,
    InputsGradient,
    Matrix,
    Parts,
    PointwiseMap,
    Reference,
    Residues,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MirroredReluMap(FeatureMap):
    """relu(w_r . x) + epsilon and relu(-w_r . x) + epsilon, for a matrix W with W^T W = c I, up to a factor.

    With u = W x and u' = W x',

        relu(u) relu(u') + relu(-u) relu(-u') = (|u| |u'| + u u') / 2,

    and the sum of u u' over the rows is c x . x'. With epsilon, |u| + 2 epsilon takes the place of |u|. So as many
    features as W has rows and x has channels do the work of twice as many as W has rows, with half of the products.

    Where a product is exactly 0, as all are for x = 0, the gradient is the limit from below.
    """

    weight: Float[Tensor, "half head_dim"]
    """W / sqrt(c)."""
    offset: float
    """2 epsilon / sqrt(c)."""
    plain_map: PointwiseMap
    has_references = False
    num_further_columns = 0

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return sum(self.weight.shape)

    @property
    def plain(self) -> FeatureMap:
        return self.plain_map

    @property
    def part_sizes(self) -> tuple[int, ...]:
        half, head_dim = self.weight.shape
        return (half, head_dim)

    @property
    def num_signed(self) -> int:
        return self.weight.shape[1]

    def without_offset(self) -> tuple[FeatureMap, float]:
        return replace(self, offset=0.0), self.offset

    def fill_further_columns(self, inputs: Inputs) -> None:
        """There are none."""

    def matrix(self, reference: Reference | None, num_rows: int) -> Matrix:
        return self.weight.T.repeat(num_rows, 1, 1)

    def products(self, x: Residues, inputs: Inputs, matrix: Matrix | None, out: Parts, *, is_key: bool) -> Parts:
        assert matrix is not None
        torch.bmm(self.load(x, out[1], is_key=is_key), matrix, out=out[0])
        return out

    def activate(self, parts: Parts) -> Parts:
        parts[0].abs_()
        if self.offset:
            parts[0].add_(self.offset)
        return parts

    def activate_with_gradient(self, parts: Parts, gradient: Parts) -> None:
        of_products = gradient[0]
        torch.ops.aten.leaky_relu_backward.grad_input(of_products, parts[0], -1.0, False, grad_input=of_products)
        self.activate(parts)

    @property
    def features_tell_gradient(self) -> bool:
        return False

    def turn_gradient(self, features: Parts, gradient: Parts) -> None:
        raise NotImplementedError("sizes do not tell the signs of products")

    def pull_back(self, gradient: Parts, out: InputsGradient) -> InputsGradient:
        return torch.baddbmm(gradient[1], gradient[0], self.weight.expand(len(out), -1, -1), out=out)


@dataclass(frozen=True, kw_only=True, slots=True)
class MirroredExponentialMap(Exponentials):
    """The features of an ExponentialMap with the rows w_r and -w_r, without bias.

    The second half are the reciprocals of the first, as long as both hold in float32, references of the second are
    those of the first with the other sign, and the factor exp(-c |k|^2) is with the values. Where sums say that
    this does not do, engines turn to `plain`.
    """

    plain_map: ExponentialMap
    num_further_columns = 1

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return 2 * len(self.weight)

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return (len(self.weight), len(self.weight))

    @property
    def plain(self) -> FeatureMap:
        return self.plain_map

    @property
    def weighs_keys(self) -> bool:
        return True

    def fill_further_columns(self, inputs: Inputs) -> None:
        inputs[..., -1] = 1

    def guess_reference(self, products: Block) -> Reference:
        """In the middle, so that neither half has all that is large."""
        smallest, largest = products.aminmax(dim=1)
        return (smallest + largest) / 2

    def matrix(self, reference: Reference | None, num_rows: int) -> Matrix:
        half, head_dim = self.weight.shape
        matrix = self.weight.new_empty((num_rows, head_dim + 1, half))
        matrix[:, :-1] = self.weight.T
        matrix[:, -1] = 0 if reference is None else reference
        return matrix

    def activate(self, parts: Parts) -> Parts:
        torch.reciprocal(parts[0].exp_(), out=parts[1])
        return parts

    def turn_gradient(self, features: Parts, gradient: Parts) -> None:
        gradient[0].mul_(features[0]).addcmul_(gradient[1], features[1], value=-1)
