"""Feature maps of linear attention, as the blocked engines compute them: in place, on one block of features.

In: a block of queries or keys. Out: phi(x) in a buffer that is given. All maps are a matrix product and an
elementwise function. What is added to the product (offsets of a residue, of a feature) is folded into it as further
columns of x: no extra pass over the features, which are by far the largest arrays here.

    ExponentialMap   log phi(x)_r = w_r . x + b_r - c |x|^2       (FAVOR+; Choromanski et al. 2021, lemma 1)
    PointwiseMap     phi(x)_r = f(w_r . x) + epsilon              (generalized attention; ibid., eq. 5)

Where rows w come with both signs, `mirrored_maps` has faster ones.

The features of an ExponentialMap are only ever computed relative to references: for keys, one number a feature is
taken from log phi(k)_r, and added to log phi(q)_r. They cancel in the quotient (see `favor`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from protformer.config import GeneralizedFunction

Residues = Float[Tensor, "segment head residue head_dim"]
Inputs = Float[Tensor, "row place column"]
"""x and the further columns; a row is one head of one segment."""
Matrix = Float[Tensor, "row column product"]
Block = Float[Tensor, "row place feature"]
Parts: TypeAlias = tuple[Float[Tensor, "row place _"], ...]
"""The features of a block, in one array or two."""
InputsGradient = Float[Tensor, "row place head_dim"]
Reference = Float[Tensor, "row product"]

GELU_RAISED = 0.17
"""Added to gelu, whose least value is -0.16997, as weights must be positive."""


class FeatureMap(ABC):
    """What all maps provide to the engines."""

    num_features: int
    has_references: bool

    num_further_columns: int

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Features in each part."""
        return (self.num_features,)

    @property
    def plain(self) -> "FeatureMap":
        """A map of the same kernel, up to a factor, with features in one part, and not negative."""
        return self

    @property
    def num_signed(self) -> int:
        """The last so many features are x itself. Products with them may cancel in sums over keys; where little is left
        (see `cancellation`), engines turn to `plain`."""
        return 0

    def without_offset(self) -> tuple["FeatureMap", float]:
        """A map whose features in the first part are smaller by a number, and that number, for who adds it to sums."""
        return self, 0.0

    @abstractmethod
    def fill_further_columns(self, inputs: Inputs) -> None:
        """Those that do not depend on x, and zero in the others; once for a buffer."""

    def load(self, x: Residues, inputs: Inputs, *, is_key: bool) -> Inputs:
        """Fill a buffer with x."""
        copy = inputs if inputs.shape[2] == x.shape[3] else inputs[..., : x.shape[3]]
        copy.view(x.shape).copy_(x)
        return inputs

    @abstractmethod
    def products(self, x: Residues, inputs: Inputs, matrix: Matrix | None, out: Parts, *, is_key: bool) -> Parts:
        """The products of a block, in the first part; `inputs` is a buffer for x."""

    def guess_reference(self, products: Block) -> Reference:
        """From some keys' products."""
        return products.amax(dim=1)

    @abstractmethod
    def matrix(self, reference: Reference | None, num_rows: int) -> Matrix | None:
        """What inputs are multiplied with; a reference is added to every feature."""

    @abstractmethod
    def activate(self, parts: Parts) -> Parts:
        """From products to features, in place."""

    @abstractmethod
    def activate_with_gradient(self, parts: Parts, gradient: Parts) -> None:
        """As `activate`, and turn the features' gradient into that of the products, in place too."""

    @property
    @abstractmethod
    def features_tell_gradient(self) -> bool:
        """Whether `turn_gradient` works; if not, `activate_with_gradient` needs the products."""

    @abstractmethod
    def turn_gradient(self, features: Parts, gradient: Parts) -> None:
        """Turn the features' gradient into that of the products, in place."""

    @abstractmethod
    def pull_back(self, gradient: Parts, out: InputsGradient) -> InputsGradient:
        """From the products' gradient to that of x, without what `norm_factor` gives."""

    @property
    def norm_factor(self) -> float:
        """c of the module's docstring."""
        return 0.0

    @property
    def weighs_keys(self) -> bool:
        """Whether a key's features lack the factor exp(-c |k|^2), which its value has instead."""
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Exponentials(FeatureMap):
    """What maps of exponentials share: products with `weight`, and features that are their own derivatives."""

    weight: Float[Tensor, "product head_dim"]
    """The projection, with all scales of x included."""
    factor: float
    """Of |x|^2: head_dim ** -0.5 / 2 for the softmax kernel, as x is scaled by head_dim ** -0.25."""
    has_references = True

    @property
    def norm_factor(self) -> float:
        return self.factor

    def products(self, x: Residues, inputs: Inputs, matrix: Matrix | None, out: Parts, *, is_key: bool) -> Parts:
        assert matrix is not None
        torch.bmm(self.load(x, inputs, is_key=is_key), matrix, out=out[0])
        return out

    def activate_with_gradient(self, parts: Parts, gradient: Parts) -> None:
        self.turn_gradient(self.activate(parts), gradient)

    @property
    def features_tell_gradient(self) -> bool:
        return True

    def pull_back(self, gradient: Parts, out: InputsGradient) -> InputsGradient:
        return torch.bmm(gradient[0], self.weight.expand(len(out), -1, -1), out=out)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExponentialMap(Exponentials):
    """Positive features, kept as logarithms for as long as possible."""

    bias: Float[Tensor, " feature"] | None
    num_further_columns = 2

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return self.weight.shape[0]

    def fill_further_columns(self, inputs: Inputs) -> None:
        inputs[..., -2] = 0
        inputs[..., -1] = 1

    def load(self, x: Residues, inputs: Inputs, *, is_key: bool) -> Inputs:
        copy = inputs[..., : x.shape[3]]
        copy.view(x.shape).copy_(x)
        if is_key:  # that of a query would cancel
            torch.sum((copy * copy).mul_(-self.factor), dim=-1, out=inputs[..., -2])
        return inputs

    def logarithms(self, x: Float[Tensor, "... head_dim"], *, is_key: bool) -> Float[Tensor, "... feature"]:
        """log phi of keys; of queries up to a number for each, which cancels."""
        products = x @ self.weight.T
        if self.bias is not None:
            products = products + self.bias
        return products - self.factor * x.square().sum(-1, keepdim=True) if is_key else products

    def matrix(self, reference: Reference | None, num_rows: int) -> Matrix:
        num_features, head_dim = self.weight.shape
        matrix = self.weight.new_empty((num_rows, head_dim + 2, num_features))
        matrix[:, :-2] = self.weight.T
        matrix[:, -2] = 1
        matrix[:, -1] = 0 if reference is None else reference
        if self.bias is not None:
            matrix[:, -1] += self.bias
        return matrix

    def activate(self, parts: Parts) -> Parts:
        parts[0].exp_()
        return parts

    def turn_gradient(self, features: Parts, gradient: Parts) -> None:
        gradient[0].mul_(features[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class PointwiseMap(FeatureMap):
    """f of every product, plus epsilon; without a projection, of x itself."""

    weight: Float[Tensor, "feature head_dim"] | None
    """The projection, with all scales of x included."""
    head_dim: int
    function: GeneralizedFunction
    epsilon: float
    has_references = False

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return self.head_dim if self.weight is None else self.weight.shape[0]

    def without_offset(self) -> tuple[FeatureMap, float]:
        return replace(self, epsilon=0.0), self.epsilon

    @property
    def shift(self) -> float:
        """What is added to the products: relu(p) + epsilon = max(p + epsilon, epsilon), one pass instead of two."""
        return self.epsilon if self.function == "relu" else 0.0

    @property
    def num_further_columns(self) -> int:  # type: ignore[override]
        return 0 if self.weight is None or not self.shift else 1

    def fill_further_columns(self, inputs: Inputs) -> None:
        inputs[..., self.head_dim :] = self.shift

    def matrix(self, reference: Reference | None, num_rows: int) -> Matrix | None:
        if self.weight is None:
            return None
        ones = self.weight.new_ones((self.num_further_columns, len(self.weight)))
        return torch.cat((self.weight.T, ones)).repeat(num_rows, 1, 1)

    def products(self, x: Residues, inputs: Inputs, matrix: Matrix | None, out: Parts, *, is_key: bool) -> Parts:
        inputs = self.load(x, inputs, is_key=is_key)
        if matrix is None:
            torch.add(inputs, self.shift, out=out[0])
        else:
            torch.bmm(inputs, matrix, out=out[0])
        return out

    def activate(self, parts: Parts) -> Parts:
        (block,) = parts
        if self.function == "relu":
            block.clamp_min_(self.epsilon)
            return parts
        if self.function == "sigmoid":
            block.sigmoid_()
        elif self.function == "abs":
            block.abs_()
        elif self.function == "elu_plus_one":
            F.elu_(block).add_(1)
        else:
            block.copy_(F.gelu(block)).add_(GELU_RAISED)
        if self.epsilon:
            block.add_(self.epsilon)
        return parts

    def activate_with_gradient(self, parts: Parts, gradients: Parts) -> None:
        (block,), (gradient,) = parts, gradients
        if self.function == "relu":
            self.turn_gradient(parts, gradients)
        elif self.function == "sigmoid":
            gradient.mul_(block.sigmoid()).mul_(torch.sigmoid(-block))
        elif self.function == "abs":
            gradient.mul_(block.sign())
        elif self.function == "elu_plus_one":
            gradient.mul_(block.clamp_max(0).exp_())
        else:
            gradient.copy_(torch.ops.aten.gelu_backward(gradient, block))
        self.activate(parts)

    @property
    def features_tell_gradient(self) -> bool:
        return self.function == "relu"

    def turn_gradient(self, features: Parts, gradient: Parts) -> None:
        of_products = gradient[0]
        torch.ops.aten.threshold_backward.grad_input(of_products, features[0], self.epsilon, grad_input=of_products)

    def pull_back(self, gradient: Parts, out: InputsGradient) -> InputsGradient:
        if self.weight is None:
            return out.copy_(gradient[0])
        return torch.bmm(gradient[0], self.weight.expand(len(out), -1, -1), out=out)
