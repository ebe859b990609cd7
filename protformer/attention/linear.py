"""Bidirectional linear attention in blocks: the features of a whole sequence never exist at once.

In: queries, keys, values, segments and a feature map phi. Out, for each query i, with sums over the keys j of its
segment,

    sum_j phi(q_i) . phi(k_j) v_j  /  sum_j phi(q_i) . phi(k_j)

(Choromanski et al. 2021, eq. 4). One pass over blocks of keys sums the state of a segment, phi(K)^T [V, 1], of shape
(feature, value_dim + 1); a second pass over blocks of queries multiplies with it. The backward pass does the same
with the gradients, computing each block's features again: memory beyond q, k, v, the output and one number a query is
that of two blocks and of the states. All is in float32 (float64 for float64 inputs), whatever the inputs are.

Backward. With F = phi(K), P = phi(Q), S the state, y_i the output, d_i its denominator, g_i the output's gradient:

    G_i = [g_i, -g_i . y_i] / d_i       dP = G S^T      dS = P^T G      dF = [V, 1] dS^T      d[V, 1] = F dS

What all features have in common, an offset epsilon (see `generalized`), is not added to them but to the sums: with
phi = phi' + epsilon, the state is phi'(K)^T [V, 1] + epsilon 1^T [V, 1], and so on for every sum here. Equal numbers
added one after another are rounded the same way each time; this leaves a fifth to a ninth of the rounding error.

Maps for projections with both signs of each row (`mirrored_maps`) are tried first; where their sums cancelled or left
the range in which they have all their digits, everything is computed again with the plain map of the same kernel.

References of exponential features (see `favor`) are constants here, and are guessed before they are known: from
some of the keys. That is right if no sum left the range in which float32 has all its digits, and
where it did, the sums are computed again with references that are certain (`_certain_reference`), or the outputs with
a reference for each query.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from protformer.attention.block_work import (
    BlockSums,
    BlockWork,
    Denominators,
    State,
    Values,
    compute_dtype,
    empty_like,
    first_places,
    of_heads,
)
from protformer.attention.cancellation import all_are_trusted, with_unsigned_column
from protformer.attention.feature_maps import FeatureMap, Parts, Reference
from protformer.attention.feature_parts import (
    TransposedParts,
    add_products,
    contiguous_transpose,
    multiply,
    multiply_and_add,
)
from protformer.attention.head_shares import head_shares, largest_share
from protformer.attention.interface import Heads, Segments
from protformer.attention.pieces import Piece, block_ranges, block_residues, lay_out, norms
from protformer.device import in_threads

NUM_SAMPLED_KEYS = 64
"""Of each segment, for the first guess at its references."""
LARGEST_GUESSED_SUM = 1e17
SMALLEST_GUESSED_SUM = 1e-8
"""A sum over keys of one guessed feature, or a denominator, outside of these is computed again. A query feature
below float32's range (1e-38) times the largest sum is 1e-21, far below the rounding of the smallest denominator."""
SMALLEST_WEIGHT = 1e-12
"""Of a key beside the largest of its segment, where keys are weighed apart from their features: a weight times a value
must not leave float32's range where a feature makes up for it."""


def attend_to_all(q: Heads, k: Heads, v: Values, segments: Segments, feature_map: FeatureMap) -> Values:
    """Every query attends to all keys of its segment; in the dtype of v, zero at padding."""
    shares = head_shares(q, num_features=feature_map.num_features)
    pieces = lay_out(segments, num_features=largest_share(shares) * feature_map.num_features)
    output: Tensor = _AttendToAll.apply(q, k, v, shares, pieces, feature_map)  # type: ignore[no-untyped-call]
    return output


class _AttendToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, shares: list[slice], pieces: list[Piece], feature_map: FeatureMap
    ) -> Tensor:
        output = empty_like(v, pieces)
        denominators = q.new_ones((*q.shape[:3], 1), dtype=compute_dtype(q, k, v))

        def attend(heads: slice) -> list["Summary"]:
            x, results = of_heads(heads, q, k, v), (output[:, heads], denominators[:, heads])
            summaries = []
            for piece in pieces:
                summary = PieceWork(*x, piece=piece, feature_map=feature_map).forward(*results)
                if not summary.is_trusted:
                    summary = PieceWork(*x, piece=piece, feature_map=feature_map.plain).forward(*results)
                    summary = replace(summary, is_trusted=False)
                summaries.append(summary)
            return summaries

        with torch.autocast(q.device.type, enabled=False):
            by_share = in_threads([partial(attend, heads) for heads in shares])
        summaries = [summary for share in by_share for summary in share]
        # The states of many short segments would be more than their features; they are summed again.
        states = [
            summary.state if piece.num_residues >= feature_map.num_features else None
            for share in by_share
            for piece, summary in zip(pieces, share, strict=True)
        ]
        references = [summary.reference for summary in summaries]
        ctx.save_for_backward(q, k, v, output, denominators, *references, *states)
        ctx.shares, ctx.pieces, ctx.feature_map = shares, pieces, feature_map
        ctx.traits = [(summary.is_centred, summary.is_trusted) for summary in summaries]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, denominators, *saved = ctx.saved_tensors
        gradients = (empty_like(q, ctx.pieces), empty_like(k, ctx.pieces), empty_like(v, ctx.pieces))
        references, states = saved[: len(ctx.traits)], saved[len(ctx.traits) :]
        summaries = [
            Summary(reference, state, *traits)
            for reference, state, traits in zip(references, states, ctx.traits, strict=True)
        ]

        def differentiate(number: int, heads: slice) -> None:
            x, results = of_heads(heads, q, k, v), of_heads(heads, output, denominators, gradient)
            found = summaries[number * len(ctx.pieces) : (number + 1) * len(ctx.pieces)]
            for piece, summary in zip(ctx.pieces, found, strict=True):
                feature_map = ctx.feature_map if summary.is_trusted else ctx.feature_map.plain
                work = PieceWork(*x, piece=piece, feature_map=feature_map)
                work.backward(summary, results, of_heads(heads, *gradients))

        with torch.autocast(q.device.type, enabled=False):
            in_threads([partial(differentiate, *share) for share in enumerate(ctx.shares)])
        return *gradients, None, None, None


@dataclass(frozen=True, slots=True)
class Summary:
    """What queries, and the backward pass, need to know of the keys of a piece."""

    reference: Reference | None
    state: State | None
    is_centred: bool
    """Whether queries are given references of their own as well."""
    is_trusted: bool = True
    """Whether no sum cancelled; if one did, all of this is of the plain map."""


class PieceWork(BlockWork):
    """Both passes over one piece."""

    def __init__(self, q: Heads, k: Heads, v: Values, *, piece: Piece, feature_map: FeatureMap) -> None:
        size = block_residues(piece, num_features=q.shape[1] * feature_map.num_features, device=q.device)
        feature_map, self.offset = feature_map.without_offset()
        super().__init__(q, k, v, piece=piece, feature_map=feature_map, size=size)
        self.ranges = block_ranges(piece.num_residues, size)
        self.parts = self._new_parts(size)
        self.gradient_parts: Parts = ()
        self.key_weights: Float[Tensor, "segment head place 1"] | None = None

    def forward(self, output: Values, denominators: Denominators) -> Summary:
        return self.attend(self.summarize(), output, denominators)

    def summarize(self) -> Summary:
        """The state of the keys, relative to references with which it has all its digits."""
        if not self.feature_map.has_references:
            return Summary(None, self._sum_keys(None), is_centred=False)
        untrusted = Summary(None, None, is_centred=False, is_trusted=False)
        if self.feature_map.weighs_keys and not self._weights_are_in_range():
            return untrusted
        reference = self._guess_reference()
        state = self._sum_keys(reference)
        if _is_in_range(state[:, :, -1]):
            return Summary(reference, state, is_centred=False)
        if self.feature_map.weighs_keys:
            return untrusted
        reference = self._certain_reference()
        return Summary(reference, self._sum_keys(reference), is_centred=True)

    def attend(self, summary: Summary, output: Values, denominators: Denominators) -> Summary:
        """Fill in the output and its denominators; gives the summary that the backward pass needs for it."""
        if not summary.is_trusted:
            return summary
        is_trusted = self._attend(summary, output, denominators)
        if not self.feature_map.has_references or summary.is_centred:
            return replace(summary, is_trusted=is_trusted)
        if _is_in_range(self.piece.take(denominators, 0, self.piece.num_residues)):
            return summary
        if self.feature_map.weighs_keys:
            return replace(summary, is_trusted=False)
        summary = replace(summary, is_centred=True)
        self._attend(summary, output, denominators)
        return summary

    def backward(
        self, summary: Summary, output: tuple[Values, Denominators, Values], gradients: tuple[Heads, Heads, Values]
    ) -> None:
        """Fill in the gradients of q, k and v; `output` are the outputs, their denominators, and their gradient."""
        if summary.state is None:
            summary = replace(summary, state=self._sum_keys(summary.reference))
        transposed_gradient = self.differentiate_queries(summary, output, gradients[0])
        self.differentiate_keys(summary.reference, transposed_gradient, gradients[1:])

    def _guess_reference(self) -> Reference:
        """The largest log feature of some of the keys, so that every feature's sum has a term of 1."""
        num_residues = self.piece.num_residues
        stride = max(16, num_residues // NUM_SAMPLED_KEYS)
        sample = self.piece.take(self.k, 0, num_residues)[:, :, ::stride]
        inputs = self.key_inputs.new_empty((self.num_rows, sample.shape[2], self.key_inputs.shape[2]))
        self.feature_map.fill_further_columns(inputs)
        products = self.feature_map.products(
            sample, inputs, self.matrix(None), self._new_parts(sample.shape[2]), is_key=True
        )
        return self.feature_map.guess_reference(products[0])

    def _certain_reference(self) -> Reference:
        """The largest log feature of all keys."""
        matrix = self.matrix(None)
        largest = [self.key_products(matrix, *block, self.parts)[0].amax(dim=1) for block in self.ranges]
        return torch.stack(largest).amax(dim=0)

    def _sum_keys(self, reference: Reference | None) -> State:
        matrix = self.matrix(None if reference is None else -reference)
        transposed, totals = self._no_transposed_states(), self._no_totals()
        for block in self.ranges:
            features = self.feature_map.activate(self.key_products(matrix, *block, self.parts))
            values = self.load_values(*block)
            add_products(transposed, values, features)
            self._add_to(totals, values)
        return contiguous_transpose(self._with_offset(transposed, totals))

    def _new_parts(self, num_places: int) -> Parts:
        sizes = self.feature_map.part_sizes
        return tuple(self.values.new_empty((self.num_rows, num_places, size)) for size in sizes)

    def _no_transposed_states(self) -> TransposedParts:
        shape, sizes = (self.num_rows, self.values.shape[2]), self.feature_map.part_sizes
        return tuple(self.values.new_zeros((*shape, size)) for size in sizes)

    def load_values(self, start: int, stop: int) -> BlockSums:
        """[v_j, 1], times the weight of a key if it has one, and zeros where there is no residue."""
        if not self.feature_map.weighs_keys:
            return super().load_values(start, stop)
        values, weights = first_places(self.values, stop - start), self._weights()[:, :, start:stop]
        by_segment = self.by_segment(values)
        torch.mul(self.piece.take(self.v, start, stop), weights, out=by_segment[..., :-1])
        by_segment[..., -1:] = weights
        return values

    def _weights(self) -> Float[Tensor, "segment head place 1"]:
        """exp(-c |k|^2), relative to the shortest key of a segment's head."""
        if self.key_weights is None:
            mask = self.piece.mask(0, self.piece.num_residues)
            logarithms = norms(self.piece, self.k, self.values.dtype).square_().mul_(-self.feature_map.norm_factor)
            weights = logarithms.sub_(logarithms.amax(dim=2, keepdim=True)).exp_()
            self.key_weights = weights if mask is None else weights * mask
        return self.key_weights

    def _weights_are_in_range(self) -> bool:
        """Whether no weight that a large feature may outweigh has lost its digits."""
        weights, mask = self._weights(), self.piece.mask(0, self.piece.num_residues)
        if mask is not None:
            weights = weights.masked_fill(~mask, 1)
        return bool((weights >= SMALLEST_WEIGHT).all())

    def _attend(self, summary: Summary, output: Values, denominators: Denominators) -> bool:
        """Fill in the output and its denominators; whether all of these can be trusted."""
        matrix = self.matrix(summary.reference)
        assert summary.state is not None
        num_signed, state, value_dim = self.feature_map.num_signed, summary.state, self.v.shape[3]
        if num_signed:
            state = with_unsigned_column(state, num_signed)
        of_offset, states = self._of_offset(state), state.split(self.feature_map.part_sizes, dim=1)
        buffer = self.values.new_empty((*self.values.shape[:2], state.shape[2]))
        totals = self.values.new_empty((self.num_rows, self.piece.num_residues, state.shape[2] - value_dim))
        for start, stop in self.ranges:
            products = self.query_products(matrix, start, stop, self.parts, centre=summary.is_centred)
            sums = multiply(self.feature_map.activate(products), states, first_places(buffer, stop - start))
            if of_offset is not None:
                sums += of_offset
            totals[:, start:stop] = sums[..., value_dim:]
            compute = partial(_divide, sums[..., :value_dim], sums[..., value_dim : value_dim + 1])
            self.put(output, start, stop, self.sums[..., :-1], compute)
        self.piece.put(denominators, 0, self.piece.num_residues, self.by_segment(totals[..., :1]))
        return not num_signed or all_are_trusted(totals)

    def _no_totals(self) -> Float[Tensor, "row 1 channel"]:
        return self.values.new_zeros((self.num_rows, 1, self.values.shape[2]))

    def _add_to(self, totals: Float[Tensor, "row 1 channel"], addends: BlockSums) -> None:
        """Sum over the residues of a block, for the features' offset."""
        if self.offset:
            totals += addends.sum(dim=1, keepdim=True)

    def _with_offset(
        self, transposed: TransposedParts, totals: Float[Tensor, "row 1 channel"]
    ) -> Float[Tensor, "row channel feature"]:
        """Sums over residues of features and addends, completed by those of the offset and the same addends."""
        if self.offset:
            transposed[0].add_(totals.transpose(1, 2), alpha=self.offset)
        return torch.cat(transposed, dim=-1)

    def _of_offset(self, state: State) -> Float[Tensor, "row 1 channel"] | None:
        """What the offset contributes to the product of any features with a state."""
        if not self.offset:
            return None
        return self.offset * state[:, : self.feature_map.part_sizes[0]].sum(dim=1, keepdim=True)

    def differentiate_queries(
        self, summary: Summary, output: tuple[Values, Denominators, Values], gradient: Heads
    ) -> Tensor:
        """Fill in the gradient of q; the gradient of the state, transposed."""
        matrix = self.matrix(summary.reference)
        assert summary.state is not None
        transposed, transposed_gradient = self._transposed_parts(summary.state), self._no_transposed_states()
        totals = self._no_totals()
        for start, stop in self.ranges:
            products = self.query_products(matrix, start, stop, self.parts, centre=summary.is_centred)
            sums_gradient = self.sums_gradient(output, start, stop)
            products_gradient = self._gradient_of_features(sums_gradient, transposed)
            self.feature_map.activate_with_gradient(products, products_gradient)
            add_products(transposed_gradient, sums_gradient, products)
            self._add_to(totals, sums_gradient)
            self.put_query_gradients(gradient, products_gradient, start, stop)
        return self._with_offset(transposed_gradient, totals)

    def differentiate_keys(
        self, reference: Reference | None, transposed_gradient: Tensor, gradients: tuple[Heads, Values]
    ) -> None:
        """Fill in the gradients of k and v, from that of the state."""
        matrix = self.matrix(None if reference is None else -reference)
        needs_last_column = bool(self.feature_map.norm_factor)
        num_columns = transposed_gradient.shape[1] - (not needs_last_column)
        state_gradient = contiguous_transpose(transposed_gradient[:, :num_columns])
        transposed = self._transposed_parts(
            state_gradient if needs_last_column else transposed_gradient.transpose(1, 2)
        )
        of_offset, states = self._of_offset(state_gradient), state_gradient.split(self.feature_map.part_sizes, dim=1)
        for start, stop in self.ranges:
            products, values = self.key_products(matrix, start, stop, self.parts), self.load_values(start, stop)
            products_gradient = self._gradient_of_features(values, transposed)
            self.feature_map.activate_with_gradient(products, products_gradient)
            values_gradient = None
            if needs_last_column:
                values_gradient = multiply(products, states, first_places(self.sums, stop - start))
                of_values = self.by_segment(values_gradient[..., :-1])
                if self.key_weights is not None:
                    of_values = of_values * self.key_weights[:, :, start:stop]
                self.piece.put(gradients[1], start, stop, of_values)
            else:
                self.put(
                    gradients[1],
                    start,
                    stop,
                    self.sums[..., :-1],
                    partial(multiply_and_add, products, states, of_offset),
                )
            self.put_key_gradients(gradients[0], products_gradient, values_gradient, start, stop)

    def _transposed_parts(self, state: State) -> TransposedParts:
        return tuple(map(contiguous_transpose, state.split(self.feature_map.part_sizes, dim=1)))

    def _gradient_of_features(self, left: BlockSums, transposed: TransposedParts) -> Parts:
        """G S^T or [V, 1] dS^T."""
        if not self.gradient_parts:
            self.gradient_parts = tuple(map(torch.empty_like, self.parts))
        places = left.shape[1]
        return tuple(
            torch.bmm(left, part, out=first_places(out, places))
            for part, out in zip(transposed, self.gradient_parts, strict=True)
        )


def _divide(numerator: Tensor, denominator: Tensor, out: Tensor) -> None:
    torch.div(numerator, denominator, out=out)


def _is_in_range(sums: Tensor) -> bool:
    """Whether sums of guessed features, or denominators, have all their digits; NaN has not."""
    smallest, largest = (float(x) for x in sums.aminmax())
    return smallest >= SMALLEST_GUESSED_SUM and largest <= LARGEST_GUESSED_SUM
