"""Proteins to rows of a fixed number of tokens, in an order that is computed and never stored.

In: a `Corpus`, in whose stores every protein ends with EOS. Out: for each unit of work (a window, or a pool of
proteins that are packed together) its `RowPlan`s, and from plans `PackedRows`. Units count from 0 at the start of a
run and never end; any of them can be asked for at any time.

- `attend` (the paper's concatenation task, Choromanski et al. 2021, section 4.5): proteins are chained and cut into
  windows of `max_residues` tokens; a protein may straddle two windows; all tokens of a window see each other. A store
  is one ring of proteins, cut at other places in each epoch (`WindowPacking`). Proteins drawn from clusters are chained
  pool by pool (`ChainPacking`).
- `isolate`: whole proteins, best-fit decreasing into rows within pools; each protein sees only itself
  (`IsolatePacking`).
- Pairs: two proteins that interact, one behind the other, packed like one protein; in `isolate` they see each other
  and no other pair, in `attend` the whole row sees itself (`PairPacking`).
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import PAD
from protformer.config import DataConfig, OnLong
from protformer.corpus.draws import DrawOrder
from protformer.corpus.interacting_pairs import InteractingPairs
from protformer.corpus.permutation import keyed_hash, keyed_integers, permute
from protformer.corpus.random_reads import ArrayFile, BytesFile
from protformer.corpus.sampling import ClusterDraws, Corpus, ProteinDraws, Proteins, StoreDraws
from protformer.corpus.token_store import OFFSETS_FILE, TOKENS_FILE, TokenStore

POOL_SIZE = 512
"""Proteins (or pairs) that are packed together."""
CHAIN_WINDOWS = 64
"""Windows of a chain of sampled proteins, on average; the last is part empty, so that 1 % or less is padding."""
CROP, ORDER, CUT = 1, 2, 3
"""Keys that keep random decisions apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One row of tokens, and which of them belong together."""

    tokens: NDArray[np.uint8]
    """(residue,) tokens; PAD behind the last protein."""
    segments: NDArray[np.int32]
    """(residue,) 0 for padding; in `attend` 1; in `isolate` 1, 2, ... for the first, second, ... protein of the row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Several rows; iterating gives each as a `PackedRow`."""

    tokens: NDArray[np.uint8]
    """(row, residue)"""
    segments: NDArray[np.int32]
    """(row, residue)"""

    def __iter__(self) -> Iterator[PackedRow]:
        for tokens, segments in zip(self.tokens, self.segments, strict=True):
            yield PackedRow(tokens=tokens, segments=segments)


Span = tuple[int, int, int]
"""A stretch of tokens: number of its store, start, end."""


class RowPlan(NamedTuple):
    """What a row is to hold: spans of stores, in groups that see each other."""

    groups: tuple[tuple[Span, ...], ...]
    unit: int
    row: int
    """Its place among the rows of its unit; what is random about a row depends on the seed, the unit and this."""
    is_last: bool
    """Of its unit."""


class RowPacking(ABC):
    """A way of making rows."""

    units_at_once = 1
    """How many units `plan` is best asked for."""

    def __init__(self, stores: Sequence[TokenStore], *, max_residues: int, seed: int) -> None:
        self.max_residues, self.seed = max_residues, seed
        self._files = [BytesFile(store.path / TOKENS_FILE) for store in stores]
        self._one_segment: NDArray[np.int32] = np.broadcast_to(np.int32(1), (1, max_residues))

    @property
    @abstractmethod
    def units_per_epoch(self) -> int:
        """Units in one epoch."""

    @abstractmethod
    def plan(self, units: NDArray[np.int64]) -> list[RowPlan]:
        """The rows of these units, unit by unit."""

    def assemble(self, plans: Sequence[RowPlan]) -> PackedRows:
        """The rows themselves; their segments may not be written to."""
        length = self.max_residues
        tokens = np.empty((len(plans), length), dtype=np.uint8)
        room = tokens.reshape(-1).data
        others: list[int] = []
        read_into = [file.read_into for file in self._files]
        for number, (groups, _, _, _) in enumerate(plans):
            store, start, end = groups[0][0]
            if end - start == length:  # one span is all of the row, as nearly always with windows
                read_into[store](room[number * length : (number + 1) * length], start)
            else:
                others.append(number)
        if len(self._one_segment) != len(plans):
            self._one_segment = np.broadcast_to(np.int32(1), tokens.shape)
        segments = self._one_segment
        if others:
            segments = segments.copy()
            for number in others:
                self._fill(tokens[number], segments[number], plans[number].groups)
        return PackedRows(tokens=tokens, segments=segments)

    def _fill(
        self, tokens: NDArray[np.uint8], segments: NDArray[np.int32], groups: tuple[tuple[Span, ...], ...]
    ) -> None:
        filled = 0
        for segment, group in enumerate(groups, start=1):
            begin = filled
            for store, start, end in group:
                self._files[store].read_into(tokens[filled : filled + end - start].data, start)
                filled += end - start
            segments[begin:filled] = segment
        tokens[filled:], segments[filled:] = PAD, 0


def build_packing(corpus: Corpus, config: DataConfig, *, seed: int) -> RowPacking:
    """The packing that the configuration asks for."""
    stores, length, weights = corpus.stores, config.max_residues, config.source_weights
    if corpus.pairs is not None:
        sees_row = config.packing == "attend"
        return PairPacking(
            stores[0], corpus.pairs, max_residues=length, seed=seed, on_long=config.on_long, sees_row=sees_row
        )
    if corpus.clusters is None and config.packing == "attend":
        return WindowPacking(stores, max_residues=length, seed=seed, weights=weights)
    proteins: ProteinDraws
    if corpus.clusters is not None:
        proteins = ClusterDraws(stores[0], corpus.clusters, seed=seed)
    else:
        proteins = StoreDraws(stores, seed=seed, weights=weights)
    if config.packing == "attend":
        return ChainPacking(stores, proteins, max_residues=length, seed=seed)
    return IsolatePacking(stores, proteins, max_residues=length, seed=seed, on_long=config.on_long)


class WindowPacking(RowPacking):
    """Windows over the ring of all proteins of a store; a unit is a window.

    In lap e (the e-th time through the store) window i holds the tokens from s_e + i L on, with L tokens a window and
    a start s_e that is a function of the seed. Every token is in one window a lap, and one window of a lap is short.
    """

    units_at_once = 1024

    def __init__(
        self,
        stores: Sequence[TokenStore],
        *,
        max_residues: int,
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(stores, max_residues=max_residues, seed=seed)
        self._sizes = np.array([store.num_tokens for store in stores], dtype=np.int64)
        self._order = DrawOrder([-(-int(size) // max_residues) for size in self._sizes], seed=seed, weights=weights)

    @property
    def units_per_epoch(self) -> int:
        return self._order.draws_per_epoch

    def plan(self, units: NDArray[np.int64]) -> list[RowPlan]:
        draws = self._order.draw(units)
        sizes = self._sizes[draws.source]
        first = keyed_integers(sizes, self.seed, CUT, draws.source, draws.lap)
        first[sizes <= self.max_residues] = 0  # one window holds it all, and there is no need to cut
        begin = draws.item * self.max_residues
        length = np.minimum(self.max_residues, sizes - begin)
        start = (first + begin) % sizes
        columns = (units, draws.source, start, start + length, sizes)
        return [
            RowPlan((((store, begin, end),) if end <= size else _on_ring(store, begin, end, size),), unit, 0, True)
            for unit, store, begin, end, size in zip(*(column.tolist() for column in columns), strict=True)
        ]


class PoolPacking(RowPacking):
    """Rows made of pools of draws; a unit is a pool, and the last pool of an epoch is smaller."""

    def __init__(self, stores: Sequence[TokenStore], *, max_residues: int, seed: int) -> None:
        super().__init__(stores, max_residues=max_residues, seed=seed)
        self.pool_size = POOL_SIZE

    @property
    @abstractmethod
    def draws_per_epoch(self) -> int:
        """Draws in one epoch."""

    @abstractmethod
    def rows(self, draws: NDArray[np.int64]) -> list[tuple[tuple[Span, ...], ...]]:
        """What these draws give, packed into rows."""

    @property
    def units_per_epoch(self) -> int:
        return -(-self.draws_per_epoch // self.pool_size)

    def plan(self, units: NDArray[np.int64]) -> list[RowPlan]:
        return [plan for unit in units.tolist() for plan in self._plan(unit)]

    def _plan(self, unit: int) -> list[RowPlan]:
        """The rows of one pool, in a random order: best-fit would give the longest proteins first."""
        epoch, pool = divmod(unit, self.units_per_epoch)
        begin, end = pool * self.pool_size, min((pool + 1) * self.pool_size, self.draws_per_epoch)
        rows = self.rows(epoch * self.draws_per_epoch + np.arange(begin, end))
        order = permute(np.arange(len(rows)), max(1, len(rows)), keyed_hash(self.seed, ORDER, unit))
        last = len(rows) - 1
        return [RowPlan(rows[chosen], unit, row, row == last) for row, chosen in enumerate(order.tolist())]


class ChainPacking(PoolPacking):
    """Sampled proteins chained and cut into windows, a chain for each pool."""

    def __init__(self, stores: Sequence[TokenStore], proteins: ProteinDraws, *, max_residues: int, seed: int) -> None:
        super().__init__(stores, max_residues=max_residues, seed=seed)
        self._proteins = proteins
        mean_length = sum(store.num_tokens for store in stores) / sum(len(store) for store in stores)
        self.pool_size = max(1, round(CHAIN_WINDOWS * max_residues / mean_length))

    @property
    def draws_per_epoch(self) -> int:
        return self._proteins.draws_per_epoch

    def rows(self, draws: NDArray[np.int64]) -> list[tuple[tuple[Span, ...], ...]]:
        windows: list[list[Span]] = []
        room = 0
        for store, start, end in _spans(self._proteins.draw(draws)):
            while start < end:
                if room == 0:
                    windows.append([])
                    room = self.max_residues
                cut = min(end, start + room)
                windows[-1].append((store, start, cut))
                room -= cut - start
                start = cut  # noqa: PLW2901
        return [(tuple(window),) for window in windows]


class IsolatePacking(PoolPacking):
    """Whole proteins, each a segment of its own."""

    def __init__(
        self,
        stores: Sequence[TokenStore],
        proteins: ProteinDraws,
        *,
        max_residues: int,
        seed: int,
        on_long: OnLong = "crop",
    ) -> None:
        super().__init__(stores, max_residues=max_residues, seed=seed)
        self._proteins, self._on_long = proteins, on_long

    @property
    def draws_per_epoch(self) -> int:
        return self._proteins.draws_per_epoch

    def rows(self, draws: NDArray[np.int64]) -> list[tuple[tuple[Span, ...], ...]]:
        proteins = self._proteins.draw(draws)
        excess = proteins.end - proteins.start - self.max_residues
        # A crop's place, or how much shorter the first of its windows is.
        windows = -(-(excess + self.max_residues) // self.max_residues)
        slack = excess if self._on_long == "crop" else windows * self.max_residues - (excess + self.max_residues)
        shift = keyed_integers(np.maximum(slack, 0) + 1, self.seed, CROP, proteins.draw)
        pieces: list[Span] = []
        for span, over, by in zip(_spans(proteins), excess.tolist(), shift.tolist(), strict=True):
            pieces += [span] if over <= 0 else self._parts(*span, by)
        rows = best_fit_decreasing([end - start for _, start, end in pieces], self.max_residues)
        return [tuple((pieces[i],) for i in row) for row in rows]

    def _parts(self, store: int, start: int, end: int, shift: int) -> list[Span]:
        """What a protein that is longer than a row gives."""
        length = self.max_residues
        if self._on_long == "skip":
            return []
        if self._on_long == "crop":
            return [(store, start + shift, start + shift + length)]
        return [(store, max(cut, start), min(cut + length, end)) for cut in range(start - shift, end, length)]


class PairPacking(PoolPacking):
    """Pairs of proteins, in both orders in each epoch, each protein closed by EOS."""

    def __init__(
        self,
        store: TokenStore,
        pairs: InteractingPairs,
        *,
        max_residues: int,
        seed: int,
        on_long: OnLong,
        sees_row: bool,
    ) -> None:
        """`sees_row`: all tokens of a row see each other, not only those of a pair."""
        super().__init__([store], max_residues=max_residues, seed=seed)
        self._pairs, self._on_long, self._sees_row = pairs.proteins, on_long, sees_row
        self._offsets = ArrayFile(store.path / OFFSETS_FILE)
        self._order = DrawOrder([2 * len(pairs)], seed=seed)

    @property
    def draws_per_epoch(self) -> int:
        return self._order.draws_per_epoch

    def rows(self, draws: NDArray[np.int64]) -> list[tuple[tuple[Span, ...], ...]]:
        item = self._order.draw(draws).item
        swapped = (item % 2)[:, None]
        proteins = np.take_along_axis(self._pairs.rows(item // 2), np.concatenate([swapped, 1 - swapped], axis=1), 1)
        starts, ends = self._offsets.rows(proteins.ravel(), 2).reshape(-1, 2, 2).transpose(2, 0, 1)
        kept = share_room(ends - starts, self.max_residues)
        shift = np.stack(
            [keyed_integers((ends - starts - kept)[:, i] + 1, self.seed, CROP, draws, i) for i in (0, 1)], axis=1
        )
        groups = [
            (*_closed(*first), *_closed(*second))
            for first, second in np.stack([starts, ends, kept, shift], axis=2).tolist()
        ]
        if self._on_long == "skip":
            fits = ((ends - starts).sum(axis=1) <= self.max_residues).tolist()
            groups = [group for group, does_fit in zip(groups, fits, strict=True) if does_fit]
        lengths = [sum(end - start for _, start, end in group) for group in groups]
        rows = [[groups[i] for i in row] for row in best_fit_decreasing(lengths, self.max_residues)]
        return [(tuple(span for group in row for span in group),) if self._sees_row else tuple(row) for row in rows]


def share_room(lengths: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """(pair, 2) tokens that each protein of a pair keeps: all if both fit, else the longer one gives first."""
    first, second = lengths[:, 0], lengths[:, 1]
    kept_first = np.minimum(first, np.maximum(room - second, room // 2))
    return np.stack([kept_first, np.minimum(second, room - kept_first)], axis=1)


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indices of pieces, row by row: longest first, each into the fullest row that still has room.

    Source: Johnson 1973; at most 11/9 of the least possible number of rows, plus one.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for piece in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        best = bisect_left(free, (lengths[piece], 0))
        if best < len(free):
            room, row = free.pop(best)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        insort(free, (room - lengths[piece], row))
    return rows


def _spans(proteins: Proteins) -> list[Span]:
    columns = (proteins.store.tolist(), proteins.start.tolist(), proteins.end.tolist())
    return list(zip(*columns, strict=True))


def _on_ring(store: int, start: int, end: int, size: int) -> tuple[Span, ...]:
    """A stretch that goes on at the start of its store."""
    return ((store, start, size), (store, 0, end - size))


def _closed(start: int, end: int, kept: int, shift: int) -> tuple[Span, ...]:
    """A protein of one store, or `kept` tokens of it that end with its EOS: where one protein ends must be seen."""
    if kept == end - start:
        return ((0, start, end),)
    return ((0, start + shift, start + shift + kept - 1), (0, end - 1, end))
