"""Linear attention over windows that are split over ranks, exactly as if one process held them.

In: the queries, keys, values and segments of this rank's slice. Out: the outputs of its queries. Segments that lie on
one rank alone are worked off there as ever. For those that span ranks, only their states travel, (feature, value_dim +
1) numbers a head, whatever the length of the window: bidirectional attention sums them over ranks (two collectives
forward, one backward), causal attention gathers them and adds up those of earlier ranks (one each way; the keys of
spanning segments are visited once more than in one process).

References (see `favor`) are had without asking anyone: after its sum over keys, a rank takes the logarithm of each
feature's sum as its reference, so that the sum becomes 1. Those of several ranks are brought to the largest of their
references, so that sums of a feature over ranks lie between 1 and the number of ranks. A causal rank has its
references from earlier ranks only: nothing of the future acts on the past, not even in rounding.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from protformer.attention.block_work import Values, compute_dtype, empty_like, of_heads
from protformer.attention.causal import attend_to_past
from protformer.attention.feature_maps import FeatureMap
from protformer.attention.head_shares import head_shares, largest_share
from protformer.attention.interface import Heads, Segments
from protformer.attention.linear import PieceWork, Summary, attend_to_all
from protformer.attention.past import Past
from protformer.attention.pieces import Piece, lay_out
from protformer.attention.sequence_group import SequenceGroup, Window
from protformer.device import in_threads

States = Float[Tensor, "slot head feature channel"]
References = Float[Tensor, "slot head feature"]


def attend_to_all_across_ranks(
    q: Heads, k: Heads, v: Values, segments: Segments, feature_map: FeatureMap, group: SequenceGroup
) -> Values:
    """As `linear.attend_to_all`, where segments may go on on other ranks."""
    window = group.window(segments)
    if window.num_slots == 0:
        return attend_to_all(q, k, v, segments, feature_map)
    parts = _Parts(window.spanning, window, q, feature_map)
    states, own_references = parts.sum_keys(k, v)
    references = None if own_references is None else group.largest(own_references)
    if references is not None:
        assert own_references is not None
        states = states * _factor(own_references, references)
    states = group.total(states)
    output: Tensor = _AttendToStates.apply(q, v.detach(), states, references, parts)  # type: ignore[no-untyped-call]
    return output + attend_to_all(q, k, v, window.own, feature_map) if bool((window.own > 0).any()) else output


def attend_to_past_across_ranks(
    q: Heads, k: Heads, v: Values, segments: Segments, feature_map: FeatureMap, group: SequenceGroup
) -> Values:
    """As `causal.attend_to_past`, where segments may have begun on earlier ranks."""
    window = group.window(segments)
    if window.num_slots == 0:
        return attend_to_past(q, k, v, segments, feature_map)
    states, own_references = _Parts(window.goes_on, window, q, feature_map).sum_keys(k, v)
    references = None if own_references is None else group.gather(own_references)
    before: Tensor = _StatesBefore.apply(states, references, group)  # type: ignore[no-untyped-call]
    past = Past(before, None if references is None else _references_before(references, group.rank))
    output = attend_to_past(q, k, v, window.came_before, feature_map, past=past, past_of=window.slots)
    begun_here = segments.masked_fill(window.came_before > 0, 0)
    return output + attend_to_past(q, k, v, begun_here, feature_map) if bool((begun_here > 0).any()) else output


class _Parts:
    """What this rank holds of spanning segments: pieces, and the slots of the segments in each."""

    def __init__(self, segments: Segments, window: Window, q: Heads, feature_map: FeatureMap) -> None:
        self.feature_map, self.num_slots = feature_map, window.num_slots
        self.shares = head_shares(q, num_features=feature_map.num_features)
        self.pieces = lay_out(segments, num_features=largest_share(self.shares) * feature_map.num_features)
        self.slots = [[window.slots[begin] for begin in piece.begins()] for piece in self.pieces]

    def sum_keys(self, k: Heads, v: Values) -> tuple[States, References | None]:
        """The states of this rank's keys, zero for slots that it has no part of, and their references, -inf there."""
        states: Tensor
        references: Tensor
        states, references = _SumKeys.apply(k, v, self)  # type: ignore[no-untyped-call]
        return states, references if self.feature_map.has_references else None

    def work(self, piece: Piece, heads: slice, q: Heads, k: Heads, v: Values) -> PieceWork:
        return PieceWork(*of_heads(heads, q, k, v), piece=piece, feature_map=self.feature_map)

    def summary(self, number: int, heads: slice, states: States, references: References | None) -> Summary:
        """The states of the segments of a piece, as its work has them."""
        slots = self.slots[number]
        state = states[slots, heads].flatten(0, 1)
        return Summary(None if references is None else references[slots, heads].flatten(0, 1), state, is_centred=False)


class _SumKeys(torch.autograd.Function):
    """From keys and values to the states of their segments, with each feature's sum in the reference."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, parts: _Parts) -> tuple[Tensor, Tensor]:
        num_features = parts.feature_map.num_features
        states = k.new_zeros((parts.num_slots, k.shape[1], num_features, v.shape[3] + 1), dtype=compute_dtype(k, v))
        references = states.new_full(states.shape[:3], -torch.inf)

        def sum_share(heads: slice) -> None:
            for piece, slots in zip(parts.pieces, parts.slots, strict=True):
                summary = parts.work(piece, heads, k, k, v).summarize()
                state, reference = summary.state, summary.reference
                assert state is not None
                if reference is not None:
                    sums = state[:, :, -1].clone()
                    state /= sums.unsqueeze(-1)
                    references[slots, heads] = (reference + sums.log()).unflatten(0, (len(slots), -1))
                states[slots, heads] = state.unflatten(0, (len(slots), -1))

        with torch.autocast(k.device.type, enabled=False):
            in_threads([partial(sum_share, heads) for heads in parts.shares])
        ctx.save_for_backward(k, v, references)
        ctx.parts = parts
        ctx.mark_non_differentiable(references)
        return states, references

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        k, v, references = ctx.saved_tensors
        parts: _Parts = ctx.parts
        gradients = empty_like(k, parts.pieces), empty_like(v, parts.pieces)

        def differentiate(heads: slice) -> None:
            known = references if parts.feature_map.has_references else None
            for number, piece in enumerate(parts.pieces):
                summary = parts.summary(number, heads, gradient, known)
                assert summary.state is not None
                parts.work(piece, heads, k, k, v).differentiate_keys(
                    summary.reference, summary.state.transpose(1, 2), (gradients[0][:, heads], gradients[1][:, heads])
                )

        with torch.autocast(k.device.type, enabled=False):
            in_threads([partial(differentiate, heads) for heads in parts.shares])
        return *gradients, None


class _AttendToStates(torch.autograd.Function):
    """The outputs of queries, from the states of whole segments; v has the shape and dtype of the output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, v: Tensor, states: Tensor, references: Tensor | None, parts: _Parts) -> Tensor:
        output = empty_like(v, parts.pieces)
        denominators = q.new_ones((*q.shape[:3], 1), dtype=states.dtype)

        def attend(heads: slice) -> list[bool]:
            is_centred = []
            for number, piece in enumerate(parts.pieces):
                work, summary = parts.work(piece, heads, q, q, v), parts.summary(number, heads, states, references)
                is_centred.append(work.attend(summary, output[:, heads], denominators[:, heads]).is_centred)
            return is_centred

        with torch.autocast(q.device.type, enabled=False):
            ctx.is_centred = in_threads([partial(attend, heads) for heads in parts.shares])
        ctx.save_for_backward(q, v, states, references, output, denominators)
        ctx.parts = parts
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, v, states, references, output, denominators = ctx.saved_tensors
        parts: _Parts = ctx.parts
        query_gradient, states_gradient = empty_like(q, parts.pieces), torch.zeros_like(states)

        def differentiate(heads: slice, is_centred: list[bool]) -> None:
            results = of_heads(heads, output, denominators, gradient)
            for number, piece in enumerate(parts.pieces):
                work, summary = parts.work(piece, heads, q, q, v), parts.summary(number, heads, states, references)
                summary = Summary(summary.reference, summary.state, is_centred[number])
                transposed = work.differentiate_queries(summary, results, query_gradient[:, heads])
                states_gradient[parts.slots[number], heads] = transposed.transpose(1, 2).unflatten(
                    0, (piece.num_segments, -1)
                )

        with torch.autocast(q.device.type, enabled=False):
            in_threads([partial(differentiate, *share) for share in zip(parts.shares, ctx.is_centred, strict=True)])
        return query_gradient, None, states_gradient, None, None


class _StatesBefore(torch.autograd.Function):
    """The sum of the states of earlier ranks, relative to the largest of their references."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, references: Tensor | None, group: SequenceGroup) -> Tensor:
        earlier = group.gather(states)[: group.rank]
        if references is not None:
            earlier = earlier * _factor(references[: group.rank], _references_before(references, group.rank))
        ctx.references, ctx.group = references, group
        return earlier.sum(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        references, group = ctx.references, ctx.group
        gathered, total = group.gather(gradient), torch.zeros_like(gradient)
        for later in range(group.rank + 1, group.size):
            if references is None:
                total += gathered[later]
            else:
                total += gathered[later] * _factor(references[group.rank], _references_before(references, later))
        return total, None, None


def _references_before(references: Float[Tensor, "rank slot head feature"], rank: int) -> References:
    """The largest of the ranks before; -inf if none of them has a part of a segment."""
    if rank == 0:
        return torch.full_like(references[0], -torch.inf)
    return references[:rank].amax(dim=0)


def _factor(
    before: Float[Tensor, "*ranks slot head feature"], after: References
) -> Float[Tensor, "*ranks slot head feature 1"]:
    """What turns states relative to one reference into states relative to another; 0 where there are no keys."""
    return torch.where(before == -torch.inf, 0.0, (before - after).exp()).unsqueeze(-1)
