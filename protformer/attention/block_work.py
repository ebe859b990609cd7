"""What the bidirectional and the causal engine share: one piece, the buffers of one block, and steps on a block.

Features are computed into buffers that every block uses again, so that they stay in the processor's cache; none are
remembered.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from protformer.attention.feature_maps import FeatureMap, InputsGradient, Parts, Reference
from protformer.attention.interface import Heads
from protformer.attention.pieces import Piece

Values = Float[Tensor, "batch head residue value_dim"]
"""Like Heads, but as wide as one likes."""
Buffers: TypeAlias = tuple[Float[Tensor, "row size _"], ...]
"""For the parts of the largest block."""
BlockSums = Float[Tensor, "row place channel"]
Denominators = Float[Tensor, "batch head residue 1"]
State = Float[Tensor, "row feature channel"]
"""sum_j phi(k_j) [v_j, 1] over the keys of a segment; a row is one head of one segment."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if any input is: features and sums never have fewer bits."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def empty_like(x: Tensor, pieces: list[Piece]) -> Tensor:
    """For results of the pieces; zero if there is padding, which no piece touches."""
    num_residues = sum(piece.count_residues() for piece in pieces)
    return torch.empty_like(x) if num_residues == x.shape[0] * x.shape[2] else torch.zeros_like(x)


def of_heads(heads: slice, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of (batch, head, ...) tensors."""
    return first[:, heads], second[:, heads], third[:, heads]


def first_places(buffer: Float[Tensor, "row size column"], num_places: int) -> Float[Tensor, "row {num_places} column"]:
    """A buffer for fewer places, without gaps; itself for as many: each view costs threads a wait for Python's lock."""
    if buffer.shape[1] == num_places:
        return buffer
    num_rows, _, num_columns = buffer.shape
    return buffer.view(-1, num_columns)[: num_rows * num_places].view(num_rows, num_places, num_columns)


class BlockWork:
    """The steps on blocks of one piece; a row is one head of one segment."""

    def __init__(self, q: Heads, k: Heads, v: Values, *, piece: Piece, feature_map: FeatureMap, size: int) -> None:
        """`size` is the largest number of residues in a block."""
        self.q, self.k, self.v, self.piece, self.feature_map = q, k, v, piece, feature_map
        self.num_heads, self.num_rows = q.shape[1], piece.num_segments * q.shape[1]
        self.num_features = feature_map.num_features
        self.values = q.new_ones((self.num_rows, size, v.shape[3] + 1), dtype=compute_dtype(q, k, v))
        num_columns = q.shape[3] + feature_map.num_further_columns
        self.query_inputs, self.key_inputs = (self.values.new_empty((self.num_rows, size, num_columns)) for _ in "qk")
        feature_map.fill_further_columns(self.query_inputs)
        feature_map.fill_further_columns(self.key_inputs)
        self.sums = torch.empty_like(self.values)
        self.inputs_gradient: Tensor | None = None

    def no_state(self) -> State:
        return self.values.new_zeros((self.num_rows, self.num_features, self.values.shape[2]))

    def put(
        self,
        x: Float[Tensor, "batch head residue channel"],
        start: int,
        stop: int,
        buffer: BlockSums,
        compute: Callable[[BlockSums], object],
    ) -> None:
        """Let `compute` fill the block's place in x, or a buffer that is then copied to it."""
        place = self.piece.view(x, start, stop) if x.dtype == buffer.dtype else None
        if place is None:
            part = first_places(buffer, stop - start)
            compute(part)
            self.piece.put(x, start, stop, self.by_segment(part))
        else:
            compute(place)

    def put_query_gradients(self, gradient: Heads, products_gradient: Parts, start: int, stop: int) -> None:
        """What |q|^2 and a query's own reference give is zero: they cancel in the quotient."""
        self.put(gradient, start, stop, self._gradient_buffer(), partial(self.feature_map.pull_back, products_gradient))

    def _gradient_buffer(self) -> InputsGradient:
        if self.inputs_gradient is None:
            self.inputs_gradient = self.values.new_empty((*self.values.shape[:2], self.q.shape[3]))
        return self.inputs_gradient

    def matrix(self, reference: Reference | None) -> Tensor | None:
        return self.feature_map.matrix(reference, self.num_rows)

    def key_products(self, matrix: Tensor | None, start: int, stop: int, buffers: Buffers) -> Parts:
        x, inputs = self.piece.take(self.k, start, stop), first_places(self.key_inputs, stop - start)
        out = tuple(first_places(buffer, stop - start) for buffer in buffers)
        return self.feature_map.products(x, inputs, matrix, out, is_key=True)

    def query_products(self, matrix: Tensor | None, start: int, stop: int, buffers: Buffers, *, centre: bool) -> Parts:
        """`centre` gives every query its own reference, the largest of its features, which are in one part then."""
        x, inputs = self.piece.take(self.q, start, stop), first_places(self.query_inputs, stop - start)
        out = tuple(first_places(buffer, stop - start) for buffer in buffers)
        products = self.feature_map.products(x, inputs, matrix, out, is_key=False)
        if centre:
            products[0].sub_(products[0].amax(dim=-1, keepdim=True))
        return products

    def load_values(self, start: int, stop: int) -> BlockSums:
        """[v_j, 1], and zeros where there is no residue."""
        values = first_places(self.values, stop - start)
        by_segment = self.by_segment(values)
        by_segment[..., :-1] = self.piece.take(self.v, start, stop)
        mask = self.piece.mask(start, stop)
        if mask is not None:
            by_segment[..., -1] = 1
            by_segment.mul_(mask)
        return values

    def sums_gradient(self, output: tuple[Values, Denominators, Values], start: int, stop: int) -> BlockSums:
        """G of the module's docstring."""
        y, denominator, gradient = (self.piece.take(x, start, stop) for x in output)
        flat = first_places(self.sums, stop - start)
        sums = self.by_segment(flat)
        torch.div(gradient, denominator, out=sums[..., :-1])
        torch.sum(sums[..., :-1] * y, dim=-1, out=sums[..., -1])
        sums[..., -1].neg_()
        mask = self.piece.mask(start, stop)
        if mask is not None:
            sums.mul_(mask)
        return flat

    def by_segment(self, x: Float[Tensor, "row place channel"]) -> Float[Tensor, "segment head residue channel"]:
        return x.view(self.piece.num_segments, self.num_heads, *x.shape[1:])

    def put_key_gradients(
        self, gradient: Heads, products_gradient: Parts, values_gradient: BlockSums | None, start: int, stop: int
    ) -> None:
        """`values_gradient` is that of [V, 1], if there is a norm factor; it is used up."""
        of_norm = None
        if self.feature_map.norm_factor:
            assert values_gradient is not None
            # The sum over features of products_gradient, from arrays that are smaller.
            of_norm = values_gradient.mul_(first_places(self.values, stop - start)).sum(dim=-1, keepdim=True)

        def compute(out: InputsGradient) -> None:
            self.feature_map.pull_back(products_gradient, out)
            if of_norm is not None:
                k = first_places(self.key_inputs, stop - start)[..., : out.shape[2]]
                out.addcmul_(of_norm, k, value=-2 * self.feature_map.norm_factor)

        self.put(gradient, start, stop, self._gradient_buffer(), compute)
