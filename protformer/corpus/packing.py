"""Proteins to rows of a fixed number of tokens, in an order that is computed and never stored.

In: a `TokenStore`, in which every protein ends with EOS. Out: `PackedRow`s, an endless stream of them, each with the
`SamplerPosition` behind it, so that a run resumes with the very next row.

- `attend` (the paper's concatenation task, Choromanski et al. 2021, section 4.5): the store is one chain of proteins,
  cut into windows of `max_residues` tokens. A protein may straddle two windows; all tokens of a window see each
  other. O(1) memory.
- `isolate`: whole proteins, best-fit decreasing into rows, within pools of `POOL_SIZE` proteins of the epoch's
  permutation; each protein is a segment of its own. A protein that is longer than a row gives a random crop of it,
  another one each epoch.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import PAD
from protformer.config import Packing
from protformer.corpus.permutation import permute
from protformer.corpus.token_store import TokenStore

POOL_SIZE = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One row of tokens, and which of them belong together."""

    tokens: NDArray[np.uint8]
    """(residue,) tokens; PAD behind the last protein."""
    segments: NDArray[np.int32]
    """(residue,) 0 for padding; in `attend` 1; in `isolate` 1, 2, ... for the first, second, ... protein of the row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerPosition:
    """Where a stream of rows stands: the next row to come."""

    epoch: int = 0
    unit: int = 0
    """Count of windows (attend) or pools (isolate) that this rank has finished in this epoch."""
    row: int = 0
    """Rows of the current pool already given; always 0 for windows."""


class RowPacking(ABC):
    """A way of making rows; a unit is what gives a known set of rows at once (a window, or a pool of proteins)."""

    def __init__(self, store: TokenStore, *, max_residues: int, seed: int) -> None:
        self.store, self.max_residues, self.seed = store, max_residues, seed

    @property
    @abstractmethod
    def num_units(self) -> int:
        """Units in one epoch."""

    @abstractmethod
    def rows(self, unit: int, *, epoch: int, shuffled: bool = True) -> list[PackedRow]:
        """The rows of the unit in this place of the epoch's order (or of the store's order)."""

    def in_order(self) -> Iterator[PackedRow]:
        """Every row once, in the order of the store: for validation."""
        for unit in range(self.num_units):
            yield from self.rows(unit, epoch=0, shuffled=False)


def build_packing(kind: Packing, store: TokenStore, *, max_residues: int, seed: int) -> RowPacking:
    """The packing of this name."""
    classes: dict[Packing, type[RowPacking]] = {"attend": AttendPacking, "isolate": IsolatePacking}
    return classes[kind](store, max_residues=max_residues, seed=seed)


def endless_rows(
    packing: RowPacking, start: SamplerPosition, *, rank: int = 0, num_ranks: int = 1
) -> Iterator[tuple[PackedRow, np.random.Generator, SamplerPosition]]:
    """Rows epoch after epoch from `start` on, each with a generator of its own and the position behind it.

    Rank r of w takes the units r, r + w, r + 2 w, ... of each epoch's permutation. The generator depends on the seed,
    the epoch and the row's place in it, never on batch size or number of workers. An epoch with fewer units than
    ranks repeats some.
    """
    units_per_rank = max(1, packing.num_units // num_ranks)
    position = start
    while True:
        place = (position.unit * num_ranks + rank) % packing.num_units
        rows = packing.rows(place, epoch=position.epoch)
        for number in range(position.row, len(rows)):
            generator = np.random.default_rng((packing.seed, position.epoch, place, number))
            if number + 1 < len(rows):
                after = SamplerPosition(epoch=position.epoch, unit=position.unit, row=number + 1)
            elif position.unit + 1 < units_per_rank:
                after = SamplerPosition(epoch=position.epoch, unit=position.unit + 1)
            else:
                after = SamplerPosition(epoch=position.epoch + 1)
            yield rows[number], generator, after
        position = after


class AttendPacking(RowPacking):
    """Windows over the chain of all proteins."""

    @property
    def num_units(self) -> int:
        return -(-self.store.num_tokens // self.max_residues)

    def rows(self, unit: int, *, epoch: int, shuffled: bool = True) -> list[PackedRow]:
        window = permute(unit, self.num_units, seed=self.seed, epoch=epoch) if shuffled else unit
        tokens = self.store.tokens[window * self.max_residues : (window + 1) * self.max_residues]
        return [_assemble([np.asarray(tokens)], self.max_residues)]


class IsolatePacking(RowPacking):
    """Whole proteins, each a segment of its own."""

    @property
    def num_units(self) -> int:
        return -(-len(self.store) // POOL_SIZE)

    def rows(self, unit: int, *, epoch: int, shuffled: bool = True) -> list[PackedRow]:
        num_proteins = len(self.store)
        places = range(unit * POOL_SIZE, min((unit + 1) * POOL_SIZE, num_proteins))
        proteins = [permute(p, num_proteins, seed=self.seed, epoch=epoch) if shuffled else p for p in places]
        pieces = [self._piece(protein, epoch) for protein in proteins]
        return [
            _assemble([pieces[i] for i in row], self.max_residues)
            for row in best_fit_decreasing([len(piece) for piece in pieces], self.max_residues)
        ]

    def _piece(self, protein: int, epoch: int) -> NDArray[np.uint8]:
        """The protein and its EOS, or a random crop of them when they are longer than a row."""
        start, end = int(self.store.offsets[protein]), int(self.store.offsets[protein + 1])
        if end - start > self.max_residues:
            generator = np.random.default_rng((self.seed, epoch, protein))
            start += int(generator.integers(0, end - start - self.max_residues + 1))
            end = start + self.max_residues
        return np.asarray(self.store.tokens[start:end])


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


def _assemble(pieces: list[NDArray[np.uint8]], max_residues: int) -> PackedRow:
    tokens = np.full(max_residues, PAD, dtype=np.uint8)
    segments = np.zeros(max_residues, dtype=np.int32)
    end = 0
    for number, piece in enumerate(pieces, start=1):
        tokens[end : end + len(piece)] = piece
        segments[end : end + len(piece)] = number
        end += len(piece)
    return PackedRow(tokens=tokens, segments=segments)
