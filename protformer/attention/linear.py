"""Bidirectional linear attention in blocks: the features of a whole sequence never exist at once.

In: queries, keys, values, segments and a feature map phi. Out, for each query i, with sums over the keys j of its
segment,

    sum_j phi(q_i) . phi(k_j) v_j  /  sum_j phi(q_i) . phi(k_j)

(Choromanski et al. 2021, eq. 4). One pass over blocks of keys sums the state of a segment, phi(K)^T [V, 1], of shape
(feature, value_dim + 1); a second pass over blocks of queries multiplies with it. The backward pass does the same
with the gradients, computing each block's features again: memory beyond q, k, v, the output and one number a query is that of
two blocks and of the states. All is in float32 (float64 for float64 inputs), whatever the inputs are.

Backward. With F = phi(K), P = phi(Q), S the state, y_i the output, d_i its denominator, g_i the output's gradient:

    G_i = [g_i, -g_i . y_i] / d_i       dP = G S^T      dS = P^T G      dF = [V, 1] dS^T      d[V, 1] = F dS

References of exponential features (see `favor`) are constants here, and are guessed before they are known: from
some of the keys. That is right if no sum left the range in which float32 has all its digits, and
where it did, the segment is computed again with references that are certain (`_certain_reference`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from protformer.attention.feature_maps import Block, FeatureMap, Reference
from protformer.attention.interface import Heads, Segments
from protformer.attention.pieces import Piece, block_ranges, block_residues, lay_out

Values = Float[Tensor, "batch head residue value_dim"]
"""Like Heads, but as wide as one likes."""
BlockSums = Float[Tensor, "row place channel"]
Denominators = Float[Tensor, "batch head residue 1"]
State = Float[Tensor, "row feature channel"]
"""sum_j phi(k_j) [v_j, 1] over the keys of a segment; a row is one head of one segment."""

NUM_SAMPLED_KEYS = 64
"""Of each segment, for the first guess at its references."""
LARGEST_GUESSED_SUM = 1e17
SMALLEST_GUESSED_SUM = 1e-8
"""A sum over keys of one guessed feature, or a denominator, outside of these is computed again. A query feature
below float32's range (1e-38) times the largest sum is 1e-21, far below the rounding of the smallest denominator."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if any input is: features and sums never have fewer bits."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def attend_to_all(q: Heads, k: Heads, v: Values, segments: Segments, feature_map: FeatureMap) -> Values:
    """Every query attends to all keys of its segment; in the dtype of v, zero at padding."""
    pieces = lay_out(segments, num_features=q.shape[1] * feature_map.num_features)
    output: Tensor = _AttendToAll.apply(q, k, v, pieces, feature_map)  # type: ignore[no-untyped-call]
    return output


class _AttendToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece], feature_map: FeatureMap) -> Tensor:
        output = _empty_like(v, pieces)
        denominators = q.new_ones((*q.shape[:3], 1), dtype=compute_dtype(q, k, v))
        summaries = []
        with torch.autocast(q.device.type, enabled=False):
            for piece in pieces:
                work = _PieceWork(q=q, k=k, v=v, piece=piece, feature_map=feature_map)
                summaries.append(work.forward(output, denominators))
        # The states of many short segments would be more than their features; they are summed again.
        states = [
            summary.state if piece.num_residues >= feature_map.num_features else None
            for piece, summary in zip(pieces, summaries, strict=True)
        ]
        references = [summary.reference for summary in summaries]
        ctx.save_for_backward(q, k, v, output, denominators, *references, *states)
        ctx.pieces, ctx.feature_map = pieces, feature_map
        ctx.is_certain = [summary.is_certain for summary in summaries]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, denominators, *saved = ctx.saved_tensors
        references, states = saved[: len(ctx.pieces)], saved[len(ctx.pieces) :]
        gradients = (_empty_like(q, ctx.pieces), _empty_like(k, ctx.pieces), _empty_like(v, ctx.pieces))
        with torch.autocast(q.device.type, enabled=False):
            for piece, *summary in zip(ctx.pieces, references, states, ctx.is_certain, strict=True):
                work = _PieceWork(q=q, k=k, v=v, piece=piece, feature_map=ctx.feature_map)
                work.backward(_Summary(*summary), (output, denominators, gradient), gradients)
        return *gradients, None, None


@dataclass(frozen=True, slots=True)
class _Summary:
    """What queries, and the backward pass, need to know of the keys of a piece."""

    reference: Reference | None
    state: State | None
    is_certain: bool
    """Whether references are such that no key exceeds them; queries are then given their own as well."""


class _PieceWork:
    """Both passes over one piece, block by block, in one buffer of features."""

    def __init__(self, *, q: Heads, k: Heads, v: Values, piece: Piece, feature_map: FeatureMap) -> None:
        self.q, self.k, self.v, self.piece, self.feature_map = q, k, v, piece, feature_map
        self.dtype = compute_dtype(q, k, v)
        self.num_heads, self.num_rows = q.shape[1], piece.num_segments * q.shape[1]
        num_features = feature_map.num_features
        size = block_residues(piece, num_features=self.num_heads * num_features, device=q.device)
        self.ranges = block_ranges(piece.num_residues, size)
        self.buffer = q.new_empty((self.num_rows, size, num_features), dtype=self.dtype)
        num_columns = q.shape[3] + feature_map.num_further_columns
        self.query_inputs, self.key_inputs = (self.buffer.new_empty((self.num_rows, size, num_columns)) for _ in "qk")
        feature_map.fill_further_columns(self.query_inputs)
        feature_map.fill_further_columns(self.key_inputs)
        self.values = self.buffer.new_ones((self.num_rows, size, v.shape[3] + 1))
        self.sums = torch.empty_like(self.values)

    def forward(self, output: Values, denominators: Denominators) -> _Summary:
        if not self.feature_map.has_references:
            summary = _Summary(None, self._sum_keys(None), is_certain=False)
            self._attend(summary, output, denominators)
            return summary
        reference = self._guess_reference()
        summary = _Summary(reference, self._sum_keys(reference), is_certain=False)
        assert summary.state is not None
        if _is_in_range(summary.state[:, :, -1]):
            self._attend(summary, output, denominators)
            if _is_in_range(self.piece.take(denominators, 0, self.piece.num_residues)):
                return summary
        reference = self._certain_reference()
        summary = _Summary(reference, self._sum_keys(reference), is_certain=True)
        self._attend(summary, output, denominators)
        return summary

    def backward(
        self, summary: _Summary, output: tuple[Values, Denominators, Values], gradients: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Fill in the gradients of q, k and v; `output` are the outputs, their denominators, and their gradient."""
        state = self._sum_keys(summary.reference) if summary.state is None else summary.state
        self.gradient_buffer = torch.empty_like(self.buffer)
        self.inputs_gradient = self.buffer.new_empty((*self.buffer.shape[:2], self.q.shape[3]))
        state_gradient = self._differentiate_queries(
            _Summary(summary.reference, state, summary.is_certain), output, gradients[0]
        )
        self._differentiate_keys(summary.reference, state_gradient, gradients[1], gradients[2])

    def _guess_reference(self) -> Reference:
        """The largest log feature of some of the keys, so that every feature's sum has a term of 1."""
        num_residues = self.piece.num_residues
        stride = max(16, num_residues // NUM_SAMPLED_KEYS)
        sample = self.piece.take(self.k, 0, num_residues)[:, :, ::stride]
        inputs = self.key_inputs.new_empty((self.num_rows, sample.shape[2], self.key_inputs.shape[2]))
        self.feature_map.fill_further_columns(inputs)
        self.feature_map.load(sample, inputs, is_key=True)
        matrix = self._matrix(None)
        assert matrix is not None
        return torch.bmm(inputs, matrix).amax(dim=1)

    def _certain_reference(self) -> Reference:
        """The largest log feature of all keys."""
        matrix = self._matrix(None)
        largest = [self._key_products(matrix, *block).amax(dim=1) for block in self.ranges]
        return torch.stack(largest).amax(dim=0)

    def _sum_keys(self, reference: Reference | None) -> State:
        matrix = self._matrix(None if reference is None else -reference)
        state = self.buffer.new_zeros((self.num_rows, self.buffer.shape[2], self.values.shape[2]))
        for block in self.ranges:
            features = self.feature_map.activate(self._key_products(matrix, *block))
            state.baddbmm_(features.transpose(1, 2), self._load_values(*block))
        return state

    def _attend(self, summary: _Summary, output: Values, denominators: Denominators) -> None:
        matrix = self._matrix(summary.reference)
        assert summary.state is not None
        for start, stop in self.ranges:
            products = self._query_products(matrix, summary, start, stop)
            sums = torch.bmm(self.feature_map.activate(products), summary.state, out=self.sums[:, : stop - start])
            numerator, denominator = self._by_segment(sums[..., :-1]), self._by_segment(sums[..., -1:])
            self.piece.put(output, start, stop, numerator.div_(denominator))
            self.piece.put(denominators, start, stop, denominator)

    def _differentiate_queries(
        self, summary: _Summary, output: tuple[Values, Denominators, Values], gradient: Heads
    ) -> State:
        """Fill in the gradient of q; the gradient of the state."""
        matrix = self._matrix(summary.reference)
        assert summary.state is not None
        state_gradient = torch.zeros_like(summary.state)
        for start, stop in self.ranges:
            products = self._query_products(matrix, summary, start, stop)
            sums_gradient = self._sums_gradient(output, start, stop)
            products_gradient = self._gradient_of_features(sums_gradient, summary.state)
            self.feature_map.activate_with_gradient(products, products_gradient)
            state_gradient.baddbmm_(products.transpose(1, 2), sums_gradient)
            # What |q|^2 and a query's own reference give is zero: they cancel in the quotient.
            self.piece.put(gradient, start, stop, self._by_segment(self._pull_back(products_gradient)))
        return state_gradient

    def _differentiate_keys(
        self, reference: Reference | None, state_gradient: State, k_gradient: Heads, v_gradient: Values
    ) -> None:
        matrix = self._matrix(None if reference is None else -reference)
        for start, stop in self.ranges:
            products, values = self._key_products(matrix, start, stop), self._load_values(start, stop)
            products_gradient = self._gradient_of_features(values, state_gradient)
            self.feature_map.activate_with_gradient(products, products_gradient)
            values_gradient = torch.bmm(products, state_gradient, out=self.sums[:, : stop - start])
            self.piece.put(v_gradient, start, stop, self._by_segment(values_gradient[..., :-1]))
            gradient = self._pull_back(products_gradient)
            if self.feature_map.norm_factor:
                # The sum over features of products_gradient, from arrays that are smaller.
                of_norm = values_gradient.mul_(values).sum(dim=-1, keepdim=True)
                k = self.key_inputs[:, : stop - start, : gradient.shape[2]]
                gradient.addcmul_(of_norm, k, value=-2 * self.feature_map.norm_factor)
            self.piece.put(k_gradient, start, stop, self._by_segment(gradient))

    def _pull_back(self, products_gradient: Block) -> Tensor:
        return self.feature_map.pull_back(products_gradient, self.inputs_gradient[:, : products_gradient.shape[1]])

    def _matrix(self, reference: Reference | None) -> Tensor | None:
        return self.feature_map.matrix(reference, self.num_rows)

    def _key_products(self, matrix: Tensor | None, start: int, stop: int) -> Block:
        num_residues = stop - start
        x = self.piece.take(self.k, start, stop)
        inputs = self.feature_map.load(x, self.key_inputs[:, :num_residues], is_key=True)
        return self.feature_map.multiply(inputs, matrix, self.buffer[:, :num_residues])

    def _query_products(self, matrix: Tensor | None, summary: _Summary, start: int, stop: int) -> Block:
        num_residues = stop - start
        x = self.piece.take(self.q, start, stop)
        inputs = self.feature_map.load(x, self.query_inputs[:, :num_residues], is_key=False)
        products = self.feature_map.multiply(inputs, matrix, self.buffer[:, :num_residues])
        return products.sub_(products.amax(dim=-1, keepdim=True)) if summary.is_certain else products

    def _load_values(self, start: int, stop: int) -> BlockSums:
        """[v_j, 1], and zeros where there is no residue."""
        values = self.values[:, : stop - start]
        by_segment = self._by_segment(values)
        by_segment[..., :-1] = self.piece.take(self.v, start, stop)
        mask = self.piece.mask(start, stop)
        if mask is not None:
            by_segment[..., -1] = 1
            by_segment.mul_(mask)
        return values

    def _sums_gradient(self, output: tuple[Values, Denominators, Values], start: int, stop: int) -> BlockSums:
        """G of the module's docstring."""
        y, denominator, gradient = (self.piece.take(x, start, stop) for x in output)
        flat = self.sums[:, : stop - start]
        sums = self._by_segment(flat)
        torch.div(gradient, denominator, out=sums[..., :-1])
        torch.sum(sums[..., :-1] * y, dim=-1, out=sums[..., -1])
        sums[..., -1].neg_()
        mask = self.piece.mask(start, stop)
        if mask is not None:
            sums.mul_(mask)
        return flat

    def _gradient_of_features(self, left: Tensor, state: State) -> Block:
        return torch.bmm(left, state.transpose(1, 2), out=self.gradient_buffer[:, : left.shape[1]])

    def _by_segment(self, x: Float[Tensor, "row residue channel"]) -> Float[Tensor, "segment head residue channel"]:
        return x.view(self.piece.num_segments, self.num_heads, *x.shape[1:])


def _empty_like(x: Tensor, pieces: list[Piece]) -> Tensor:
    """For results of the pieces; zero if there is padding, which no piece touches."""
    num_residues = sum(piece.count_residues() for piece in pieces)
    return torch.empty_like(x) if num_residues == x.shape[0] * x.shape[2] else torch.zeros_like(x)


def _is_in_range(sums: Tensor) -> bool:
    """Whether sums of guessed features, or denominators, have all their digits; NaN has not."""
    smallest, largest = (float(x) for x in sums.aminmax())
    return smallest >= SMALLEST_GUESSED_SUM and largest <= LARGEST_GUESSED_SUM
