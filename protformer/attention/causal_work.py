"""The steps of causal linear attention on one piece, in blocks.

In and out: as `BlockWork`, and a query attends to itself and the keys before it. A loop over tiles of residues carries
S, the sum of phi(k_j) [v_j, 1] over all keys before the tile, and takes the pairs inside a tile explicitly (Choromanski
et al. 2021, section 2.5.1). All else is computed for a block of several tiles at once. Time is linear in the residues;
memory beyond q, k, v, the output and one number a query is that of some blocks, and of at most MOST_STATES states that
wait for the backward pass. That computes all features again, in one sweep backward: it has the gradient of S from the
tiles behind, and S from the last state that was kept, to which it adds the keys of the blocks between; of such sums it
holds a few times MOST_STATES at most. With P = phi(Q) and F = phi(K) of a tile, G as in `linear`, and the lower
triangles of P F^T and G [V, 1]^T,

    A = tril(P F^T)       B = tril(G [V, 1]^T)
    dP = G S^T + B F      dF = [V, 1] dS^T + B^T P      d[V, 1] = F dS + A^T G      dS += P^T G

No query may know of a later key, not even in rounding. The references of exponential features (see `favor`)
are therefore those of the first key. Keys later on may exceed them, usually by little. From the block on where one
does by LARGEST_EXPONENT, references are the maxima over all keys before the block; in such a block itself, the
queries that see such a key are computed as in `careful_causal`, at some times the cost. Whether a query is
one of them depends on what it sees alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from protformer.attention.block_work import BlockSums, BlockWork, Denominators, State, Values, first_places
from protformer.attention.careful_causal import LARGEST_EXPONENT, CarefulBlock, careful_block
from protformer.attention.feature_maps import Block, ExponentialMap, FeatureMap, Parts, Reference
from protformer.attention.interface import Heads
from protformer.attention.pieces import Piece, block_ranges, block_residues, tiled_ranges

TILE_RESIDUES = 64
"""Larger tiles have more pairs a residue, smaller ones more states."""
TIMES_AS_LARGE = {"cpu": 4}
"""Blocks, by type of device, as those of bidirectional attention: a block has more steps here, each of a fixed cost."""
MOST_STATES = 16
"""Kept for the backward pass of each piece, at about equal distances. With fewer it has more keys to add up again, with
more it would need more memory. It also holds no more at once where it adds keys up."""
RESIDUES_OF_STATE = 4
"""At least so many, times the number of features, are between states that are kept, so that all of them together are
not many more numbers than a quarter of the values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What the backward pass needs of one piece and share of the heads."""

    feature_map: FeatureMap
    references: list[Reference | None]
    """Of each block, and at last those after the end; a block was computed carefully if the next has others."""
    num_states: int
    """Before groups of blocks; that before the first is known."""


class CausalWork(BlockWork):
    """The sweeps over one piece.

    Pairs are taken within the tiles of a block, and every tile has a state of its own.
    """

    def __init__(self, q: Heads, k: Heads, v: Values, *, piece: Piece, feature_map: FeatureMap) -> None:
        size = block_residues(piece, num_features=q.shape[1] * feature_map.num_features, device=q.device)
        size = min(piece.num_residues, TIMES_AS_LARGE.get(q.device.type, 1) * size)
        self.tile = min(TILE_RESIDUES, piece.num_residues)
        size = max(self.tile, size - size % self.tile)
        super().__init__(q, k, v, piece=piece, feature_map=feature_map, size=size)
        self.ranges = tiled_ranges(piece.num_residues, size, self.tile)
        self.groups = _groups(self.ranges, RESIDUES_OF_STATE * self.num_features)
        shape = (self.num_rows, size, self.num_features)
        self.keys, self.key_features, self.queries, self.gradient = (self.values.new_empty(shape) for _ in range(4))
        self.last_matrices: tuple[Reference | None, Tensor | None, Tensor | None] | None = None
        self.past: tuple[State, Reference | None] | None = None
        num_tiles = self.num_rows * (size // self.tile)
        self.pairs, self.pairs_gradient = (self.values.new_empty((num_tiles, self.tile, self.tile)) for _ in range(2))
        self.states = self.values.new_empty((num_tiles, self.num_features, self.values.shape[2]))
        self.sums_of_tiles = torch.empty_like(self.states)

    def go_on_from(self, state: State, reference: Reference | None) -> None:
        """Let the segments have a past before their first residue here."""
        self.past = state, reference

    def forward(self, output: Values, denominators: Denominators, *, keep_states: bool) -> tuple[Kept, list[State]]:
        """Fill in the output; gives the states before all groups but the first, if they are to be kept."""
        state, references, kept = self._first_state(), [self._first_reference()], []
        for number, (start, stop) in enumerate(self.ranges):
            if keep_states and number > 0 and number in self.groups:
                kept.append(state)
            products, exceeds = self._key_products(references[-1], start, stop)
            key_features = self._activate(products)
            query_features = self._activate(self._query_products(references[-1], start, stop))
            values = self.load_values(start, stop)
            reference = references[-1]
            careful = self._careful(state, reference, start, stop) if exceeds else None
            sums, tiles = first_places(self.sums, stop - start), (self._tiles(query_features), self._tiles(values))
            states, state = self._states(state, key_features, values)
            torch.bmm(tiles[0], states, out=self._tiles(sums)).baddbmm_(
                self._pairs(query_features, key_features), tiles[1]
            )
            denominator = sums[..., -1:]
            result = sums[..., :-1].div_(denominator)
            if careful is not None:
                result = torch.where(careful.sees_exceeding, careful.output, result)
                # Other rows, which may be of proteins before this one, must not change by a bit.
                state = torch.where(careful.row_exceeds, careful.state, state)
                reference = careful.reference
            references.append(reference)
            self.piece.put(output, start, stop, self.by_segment(result))
            self.piece.put(denominators, start, stop, self.by_segment(denominator))
        return Kept(feature_map=self.feature_map, references=references, num_states=len(kept)), kept

    def backward(
        self,
        kept: Kept,
        states: list[State],
        output: tuple[Values, Denominators, Values],
        gradients: tuple[Heads, Heads, Values],
    ) -> State:
        """Fill in the gradients of q, k and v; `output` are the outputs, their denominators, and their gradient.

        Gives the gradient of the state before the first residue.
        """
        state_gradient = self.no_state()
        groups = zip(self.groups.values(), [self._first_state(), *states], strict=True)
        for numbers, first_state in reversed(list(groups)):
            for number, state in self._last_to_first(numbers, first_state, kept.references):
                reference, (start, stop) = kept.references[number], self.ranges[number]
                before_and_after = state, state_gradient
                if kept.references[number + 1] is reference:
                    state_gradient = self._differentiate(before_and_after, reference, output, gradients, start, stop)
                else:
                    state_gradient = self._differentiate_carefully(
                        before_and_after, reference, output[2], gradients, start, stop
                    )
        return state_gradient

    def _last_to_first(
        self, numbers: list[int], state: State, references: list[Reference | None]
    ) -> Iterator[tuple[int, State]]:
        """Neighbouring blocks, each with the state before it, from the state before the first of them."""
        size = math.ceil(len(numbers) / MOST_STATES)
        parts = [numbers[start:stop] for start, stop in block_ranges(len(numbers), size)]
        states = [state]
        for part in parts[:-1]:
            for number in part:
                state = self._next_state(state, references[number], references[number + 1], *self.ranges[number])
            states.append(state)
        while parts:
            part, state = parts.pop(), states.pop()
            if len(part) == 1:
                yield part[0], state
            else:
                yield from self._last_to_first(part, state, references)

    def _next_state(
        self, state: State, reference: Reference | None, next_reference: Reference | None, start: int, stop: int
    ) -> State:
        if next_reference is not reference:
            return self._careful(state, reference, start, stop).state
        features = self._activate(self._products_of_keys(reference, start, stop))
        return torch.baddbmm(state, features.transpose(1, 2), self.load_values(start, stop))

    def _differentiate(
        self,
        states: tuple[State, State],
        reference: Reference | None,
        output: tuple[Values, Denominators, Values],
        gradients: tuple[Heads, Heads, Values],
        start: int,
        stop: int,
    ) -> State:
        """The gradients of a block; from the gradient of the state after it to that before it."""
        products = self._products_of_keys(reference, start, stop)
        tells = self.feature_map.features_tell_gradient
        key_features = self._activate(
            products if tells else first_places(self.key_features, stop - start).copy_(products)
        )
        values, sums_gradient = self.load_values(start, stop), self.sums_gradient(output, start, stop)
        pairs_gradient = self._pairs_gradient(sums_gradient, values)

        query_features = self._query_products(reference, start, stop)
        of_tiles, _ = self._states(states[0], key_features, values)
        gradient = self._gradient_of_features(sums_gradient, of_tiles, pairs_gradient, key_features)
        self.feature_map.activate_with_gradient(self._parts(query_features), self._parts(gradient))
        self.put_query_gradients(gradients[0], self._parts(gradient), start, stop)

        pairs = self._pairs(query_features, key_features).transpose(1, 2)
        of_tiles, before = self._states(states[1], query_features, sums_gradient, backwards=True)
        gradient = self._gradient_of_features(values, of_tiles, pairs_gradient.transpose(1, 2), query_features)
        values_gradient = torch.bmm(self._tiles(key_features), of_tiles)
        values_gradient = values_gradient.baddbmm_(pairs, self._tiles(sums_gradient)).view_as(values)
        if tells:
            self.feature_map.turn_gradient(self._parts(key_features), self._parts(gradient))
        else:
            self.feature_map.activate_with_gradient(self._parts(products), self._parts(gradient))
        self.piece.put(gradients[2], start, stop, self.by_segment(values_gradient[..., :-1]))
        self.put_key_gradients(gradients[1], self._parts(gradient), values_gradient, start, stop)
        return before

    def _first_state(self) -> State:
        return self.no_state() if self.past is None else self.past[0]

    def _first_reference(self) -> Reference | None:
        """The past's, or the log features of the first key, which every query of the segment sees."""
        if self.past is not None:
            return self.past[1]
        if not self.feature_map.has_references:
            return None
        return self.key_products(self.matrix(None), 0, 1, (self.keys,))[0][:, 0].clone()

    def _key_products(self, reference: Reference | None, start: int, stop: int) -> tuple[Block, bool]:
        """Products, and whether any exceeded the reference too far: that is cut down to what an exponential holds."""
        products = self._products_of_keys(reference, start, stop)
        exceeds = reference is not None and not float(products.amax()) <= LARGEST_EXPONENT
        return products.clamp_(max=LARGEST_EXPONENT) if exceeds else products, exceeds

    def _products_of_keys(self, reference: Reference | None, start: int, stop: int) -> Block:
        block = first_places(self.keys, stop - start)
        self.key_products(self._matrices(reference)[0], start, stop, self._parts(block))
        return block

    def _query_products(self, reference: Reference | None, start: int, stop: int) -> Block:
        block, matrix = first_places(self.queries, stop - start), self._matrices(reference)[1]
        self.query_products(matrix, start, stop, self._parts(block), centre=self.feature_map.has_references)
        return block

    def _activate(self, block: Block) -> Block:
        self.feature_map.activate(self._parts(block))
        return block

    def _parts(self, block: Block) -> Parts:
        """Views: states are summed from all features together here."""
        sizes = self.feature_map.part_sizes
        return (block,) if len(sizes) == 1 else tuple(block.split(sizes, dim=-1))

    def _matrices(self, reference: Reference | None) -> tuple[Tensor | None, Tensor | None]:
        """What keys and queries are multiplied with, kept for as long as the references last."""
        if self.last_matrices is None or self.last_matrices[0] is not reference:
            of_keys = self.matrix(None if reference is None else -reference)
            self.last_matrices = reference, of_keys, self.matrix(reference)
        return self.last_matrices[1:]

    def _tiles(self, x: Float[Tensor, "row place channel"]) -> Float[Tensor, "tile place_in_tile channel"]:
        return x.view(-1, min(self.tile, x.shape[1]), x.shape[2])

    def _states(
        self, state: State, left: Block, right: BlockSums, *, backwards: bool = False
    ) -> tuple[Float[Tensor, "tile feature channel"], State]:
        """The state before each tile, and that after all: S from F and [V, 1], or backwards dS from P and G."""
        left, right = self._tiles(left), self._tiles(right)
        states, sums = (x if len(x) == len(left) else x[: len(left)] for x in (self.states, self.sums_of_tiles))
        torch.bmm(left.transpose(1, 2), right, out=sums)
        tiles = list(zip(*(x.view(self.num_rows, -1, *x.shape[1:]).unbind(dim=1) for x in (states, sums)), strict=True))
        tiles = tiles[::-1] if backwards else tiles
        tiles[0][0].copy_(state)
        for (before, addend), (after, _) in pairwise(tiles):
            torch.add(before, addend, out=after)
        return states, torch.add(*tiles[-1])

    def _pairs(self, query_features: Block, key_features: Block) -> Tensor:
        """A of the module's docstring, of each tile."""
        return self._lower_triangles(query_features, key_features, self.pairs)

    def _pairs_gradient(self, sums_gradient: BlockSums, values: BlockSums) -> Tensor:
        """B of the module's docstring, of each tile."""
        return self._lower_triangles(sums_gradient, values, self.pairs_gradient)

    def _lower_triangles(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        left, right = self._tiles(left), self._tiles(right)
        tiles, length = left.shape[:2]
        return torch.bmm(left, right.transpose(1, 2), out=out[:tiles, :length, :length]).tril_()

    def _gradient_of_features(self, left: BlockSums, states: Tensor, pairs: Tensor, features: Block) -> Block:
        """G S^T + B F, or [V, 1] dS^T + B^T P."""
        gradient = first_places(self.gradient, left.shape[1])
        torch.bmm(self._tiles(left), states.transpose(1, 2), out=self._tiles(gradient)).baddbmm_(
            pairs, self._tiles(features)
        )
        return gradient

    def _careful(self, state: State, reference: Reference | None, start: int, stop: int) -> CarefulBlock:
        return self._careful_with(self._careful_inputs(state, start, stop), reference, start)

    def _careful_inputs(self, state: State, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k = (self.piece.take(x, start, stop).to(state.dtype).flatten(0, 1) for x in (self.q, self.k))
        return q, k, self.load_values(start, stop).clone(), state

    def _careful_with(
        self, inputs: tuple[Tensor, Tensor, Tensor, Tensor], reference: Reference | None, start: int
    ) -> CarefulBlock:
        assert isinstance(self.feature_map, ExponentialMap)
        assert reference is not None
        return careful_block(*inputs, reference, self.feature_map, is_first=start == 0 and self.past is None)

    def _differentiate_carefully(
        self,
        states: tuple[State, State],
        reference: Reference | None,
        output_gradient: Values,
        gradients: tuple[Heads, Heads, Values],
        start: int,
        stop: int,
    ) -> State:
        """The gradients of a careful block by autograd; from the gradient of the state after it to that before it."""
        state, state_gradient = states
        with torch.enable_grad():
            q, k, values, state = (x.detach().requires_grad_() for x in self._careful_inputs(state, start, stop))
            inputs = q, k, values, state
            block = self._careful_with(inputs, reference, start)
        arriving = self.piece.take(output_gradient, start, stop).to(state.dtype)
        mask = self.piece.mask(start, stop)
        arriving = (arriving if mask is None else arriving * mask).flatten(0, 1)
        *found, before = torch.autograd.grad((block.output, block.state), inputs, (arriving, state_gradient))
        found[2] = found[2][..., :-1]
        for gradient, x in zip(gradients, found, strict=True):
            self.piece.put(gradient, start, stop, self.by_segment(x))
        return before


def _groups(ranges: list[tuple[int, int]], least: int) -> dict[int, list[int]]:
    """Groups of neighbouring blocks, by their first: at most MOST_STATES, of at least so many residues."""
    length, first = max(least, math.ceil(ranges[-1][1] / MOST_STATES)), 0
    groups: dict[int, list[int]] = {0: []}
    for number, (start, _) in enumerate(ranges):
        if start - ranges[first][0] >= length:
            first = number
            groups[first] = []
        groups[first].append(number)
    return groups
