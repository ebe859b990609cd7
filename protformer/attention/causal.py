"""Causal linear attention: a query attends to itself and the keys before it.

In and out as in `linear`. What is computed, and in which order, is in `causal_work`.
"""

from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protformer.attention.block_work import Denominators, State, Values, compute_dtype, empty_like, of_heads
from protformer.attention.cancellation import trusted_of_past
from protformer.attention.causal_work import CausalWork, Kept
from protformer.attention.feature_maps import FeatureMap, Reference
from protformer.attention.head_shares import head_shares, largest_share
from protformer.attention.interface import Heads, Segments
from protformer.attention.past import Past
from protformer.attention.pieces import Piece, lay_out
from protformer.device import in_threads


def attend_to_past(
    q: Heads,
    k: Heads,
    v: Values,
    segments: Segments,
    feature_map: FeatureMap,
    *,
    past: Past | None = None,
    past_of: dict[tuple[int, int], int] | None = None,
) -> Values:
    """Every query attends to the keys of its segment up to its own; in the dtype of v, zero at padding.

    With a `past`, the segment that begins at (row, position) goes on from its entry `past_of` there.
    """
    if feature_map.weighs_keys or past is not None:
        feature_map = feature_map.plain  # each query has a reference of its own here, and a past is of plain features
    shares = head_shares(q, num_features=feature_map.num_features)
    pieces = lay_out(segments, num_features=largest_share(shares) * feature_map.num_features)
    entries = None if past_of is None else [[past_of[begin] for begin in piece.begins()] for piece in pieces]
    state, reference = (None, None) if past is None else (past.state, past.reference)
    output: Tensor = _AttendToPast.apply(q, k, v, state, reference, shares, pieces, entries, feature_map)  # type: ignore[no-untyped-call]
    return output


class _AttendToPast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        reference: Tensor | None,
        shares: list[slice],
        pieces: list[Piece],
        entries: list[list[int]] | None,
        feature_map: FeatureMap,
    ) -> Tensor:
        output = empty_like(v, pieces)
        denominators = q.new_ones((*q.shape[:3], 1), dtype=compute_dtype(q, k, v))
        keep_states = any(ctx.needs_input_grad)

        def attend(heads: slice) -> list[tuple[Kept, list[Tensor]]]:
            found, x, results = [], of_heads(heads, q, k, v), (output[:, heads], denominators[:, heads])
            for number, piece in enumerate(pieces):
                past = None
                if entries is not None and state is not None:
                    known = None if reference is None else reference[entries[number], heads].flatten(0, 1)
                    past = state[entries[number], heads].flatten(0, 1), known
                found.append(_attend(x, piece, feature_map, past, results, keep_states=keep_states))
            return found

        with torch.autocast(q.device.type, enabled=False):
            found = in_threads([partial(attend, heads) for heads in shares])
        states = chain.from_iterable(states for share in found for _, states in share)
        ctx.save_for_backward(q, k, v, state, output, denominators, *states)
        ctx.kept = [[kept for kept, _ in share] for share in found]
        ctx.shares, ctx.pieces, ctx.entries = shares, pieces, entries
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, state, output, denominators, *all_states = ctx.saved_tensors
        next_states = iter(all_states)
        found = [[(kept, list(islice(next_states, kept.num_states))) for kept in share] for share in ctx.kept]
        gradients = (empty_like(q, ctx.pieces), empty_like(k, ctx.pieces), empty_like(v, ctx.pieces))
        state_gradient = None if state is None else torch.zeros_like(state)

        def differentiate(heads: slice, by_piece: list[tuple[Kept, list[Tensor]]]) -> None:
            x, results = of_heads(heads, q, k, v), of_heads(heads, output, denominators, gradient)
            for number, (piece, (kept, states)) in enumerate(zip(ctx.pieces, by_piece, strict=True)):
                work = CausalWork(*x, piece=piece, feature_map=kept.feature_map)
                if state is not None:
                    work.go_on_from(state[ctx.entries[number], heads].flatten(0, 1), kept.references[0])
                before = work.backward(kept, states, results, of_heads(heads, *gradients))
                if state_gradient is not None:
                    state_gradient[ctx.entries[number], heads] = before.unflatten(0, (piece.num_segments, -1))

        with torch.autocast(q.device.type, enabled=False):
            in_threads([partial(differentiate, *share) for share in zip(ctx.shares, found, strict=True)])
        return *gradients, state_gradient, None, None, None, None, None


def _attend(
    x: tuple[Heads, Heads, Values],
    piece: Piece,
    feature_map: FeatureMap,
    past: tuple[State, Reference | None] | None,
    results: tuple[Values, Denominators],
    *,
    keep_states: bool,
) -> tuple[Kept, list[State]]:
    """Fill in the results of a piece; where a query's sums cancelled, those of the plain map, which is then kept.

    All others keep what they have: that anything is computed again may be due to queries after them.
    """
    work = CausalWork(*x, piece=piece, feature_map=feature_map)
    if past is not None:
        work.go_on_from(*past)
    found = work.forward(*results, keep_states=keep_states)
    del work  # and its buffers
    output, denominators = results
    is_trusted = trusted_of_past(*x[:2], denominators, piece) if feature_map.num_signed else None
    if is_trusted is None or bool(is_trusted.all()):
        return found
    del found
    first = piece.take(output, 0, piece.num_residues).clone()
    found = _attend(x, piece, feature_map.plain, past, results, keep_states=keep_states)
    piece.put(output, 0, piece.num_residues, first.where(is_trusted, piece.take(output, 0, piece.num_residues)))
    return found
