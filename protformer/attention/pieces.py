"""How a batch of segments is cut into pieces that linear attention works off one after another.

In: segment ids of shape (batch, residue), see `interface`. Out: pieces, each some segments of equal length that
together fill a block of features. A piece takes its residues from a (batch, head, residue, channel) tensor and puts
results back. Segments of LONGEST_GATHERED residues or fewer are gathered with others of about their length, and
those that are shorter than the longest of them are filled up with copies of their last residue; longer ones are
slices of the batch, without a copy. Nothing but residues is ever visited: padding costs nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protformer.attention.interface import Segments
from protformer.attention.segments import runs

LONGEST_GATHERED = {"cpu": 160}
"""By type of device; others gather all but batches of equal lengths, as the fixed cost of a step is higher there."""
NUM_FEATURES_AT_ONCE = {"cpu": 2**19}
"""Numbers in a block of features, by type of device; on the CPU, for each thread. Larger ones leave the caches, smaller
ones have more steps, each of a fixed cost."""
LONGEST_GATHERED_ELSEWHERE = 2**16
NUM_FEATURES_AT_ONCE_ELSEWHERE = 2**25


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Segments that begin and end at the same positions of neighbouring rows."""

    rows: slice
    start: int
    num_segments: int
    num_residues: int

    def take(self, x: Float[Tensor, "batch head residue channel"], start: int, stop: int) -> Tensor:
        """Residues `start` to `stop` of each segment: (segment, head, residue, channel)."""
        return x[self.rows, :, self.start + start : self.start + stop]

    def put(self, x: Float[Tensor, "batch head residue channel"], start: int, stop: int, part: Tensor) -> None:
        """The inverse of `take`."""
        self.take(x, start, stop).copy_(part)

    def view(
        self, x: Float[Tensor, "batch head residue channel"], start: int, stop: int
    ) -> Float[Tensor, "row place channel"] | None:
        """What `take` gives, one row for each head of each segment, if that can be had without a copy."""
        return self.take(x, start, stop)[0] if self.num_segments == 1 else None

    def mask(self, start: int, stop: int) -> None:
        """Every place holds a residue."""

    def count_residues(self) -> int:
        return self.num_segments * self.num_residues

    def begins(self) -> list[tuple[int, int]]:
        """(row, position) of the first residue of each segment."""
        return [(row, self.start) for row in range(self.rows.start, self.rows.stop)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gather:
    """Segments of different lengths from anywhere; the shorter ones end in copies of their last residue."""

    rows: Int[Tensor, "segment 1"]
    positions: Int[Tensor, "segment place"]
    is_residue: Bool[Tensor, "segment place"]
    num_segments: int
    num_residues: int
    """Of the longest."""
    total_residues: int

    def take(self, x: Float[Tensor, "batch head residue channel"], start: int, stop: int) -> Tensor:
        """Places `start` to `stop` of each segment: (segment, head, residue, channel)."""
        return x.transpose(1, 2)[self.rows, self.positions[:, start:stop]].transpose(1, 2)

    def put(self, x: Float[Tensor, "batch head residue channel"], start: int, stop: int, part: Tensor) -> None:
        """The inverse of `take`; what stands at copies is dropped."""
        mask, positions = self.is_residue[:, start:stop], self.positions[:, start:stop]
        x.transpose(1, 2)[self.rows.expand_as(positions)[mask], positions[mask]] = part.transpose(1, 2)[mask].to(
            x.dtype
        )

    def view(self, x: Float[Tensor, "batch head residue channel"], start: int, stop: int) -> None:
        """There is none."""

    def mask(self, start: int, stop: int) -> Bool[Tensor, "segment 1 place 1"]:
        """False at copies."""
        return self.is_residue[:, None, start:stop, None]

    def count_residues(self) -> int:
        return self.total_residues

    def begins(self) -> list[tuple[int, int]]:
        """(row, position) of the first residue of each segment."""
        return list(zip(self.rows[:, 0].tolist(), self.positions[:, 0].tolist(), strict=True))


Piece: TypeAlias = Slice | Gather

RESIDUES_OF_NORMS = 2048
"""At once, where the norms of many are taken: of other dtypes, copies are made."""


def norms(
    piece: Piece, x: Float[Tensor, "batch head residue channel"], dtype: torch.dtype
) -> Float[Tensor, "segment head place 1"]:
    """|x|, in this dtype."""
    steps = [piece.take(x, *step) for step in block_ranges(piece.num_residues, RESIDUES_OF_NORMS)]
    return torch.cat([torch.linalg.vector_norm(step, dim=-1, keepdim=True, dtype=dtype) for step in steps], dim=2)


def lay_out(segments: Segments, *, num_features: int) -> list[Piece]:
    """Pieces that cover every residue once; `num_features` of all heads together are computed for a residue."""
    num_residues = features_at_once(segments.device) // num_features
    longest_gathered = LONGEST_GATHERED.get(segments.device.type, LONGEST_GATHERED_ELSEWHERE)
    found = _find_segments(segments)
    if len({(start, length) for _, start, length in found}) == 1 and len(found) == len(segments):
        return list(_slices(found, num_residues))
    short = sorted(((length, row, start) for row, start, length in found if length <= longest_gathered))
    long = [segment for segment in found if segment[2] > longest_gathered]
    return [*_slices(long, num_residues), *_gathers(short, num_residues, segments.device)]


def block_residues(piece: Piece, *, num_features: int, device: torch.device) -> int:
    """Residues of each segment of a piece in a block of features; `num_features` of all heads together."""
    return min(piece.num_residues, max(16, features_at_once(device) // (num_features * piece.num_segments)))


def features_at_once(device: torch.device) -> int:
    return NUM_FEATURES_AT_ONCE.get(device.type, NUM_FEATURES_AT_ONCE_ELSEWHERE)


def block_ranges(num_residues: int, size: int) -> list[tuple[int, int]]:
    """Start and stop of each block."""
    return [(start, min(start + size, num_residues)) for start in range(0, num_residues, size)]


def tiled_ranges(num_residues: int, size: int, tile: int) -> list[tuple[int, int]]:
    """Blocks of whole tiles, none longer than `size`, a multiple of `tile`; what is left at the end is by itself."""
    whole = num_residues - num_residues % tile
    rest = [(whole, num_residues)] if whole < num_residues else []
    return block_ranges(whole, size) + rest


def _find_segments(segments: Segments) -> list[tuple[int, int, int]]:
    """(row, start, number of residues) of every segment."""
    found = []
    for row, ids in enumerate(segments.cpu()):
        start = 0
        for segment, length in runs(ids):
            if segment > 0:
                found.append((row, start, length))
            start += length
    return found


def _slices(found: list[tuple[int, int, int]], num_residues: int) -> Iterator[Slice]:
    for (start, length), group in groupby(found, key=lambda segment: segment[1:]):
        rows = [row for row, _, _ in group]
        at_once = max(1, num_residues // length)
        for first, last in block_ranges(len(rows), at_once):
            taken = rows[first:last]
            if taken[-1] - taken[0] == len(taken) - 1:
                yield Slice(
                    rows=slice(taken[0], taken[-1] + 1), start=start, num_segments=len(taken), num_residues=length
                )
            else:
                for row in taken:
                    yield Slice(rows=slice(row, row + 1), start=start, num_segments=1, num_residues=length)


def _gathers(short: list[tuple[int, int, int]], num_residues: int, device: torch.device) -> Iterator[Gather]:
    """Sorted by length, neighbours go together while the shortest has 3/4 of the longest's residues."""
    group: list[tuple[int, int, int]] = []
    for segment in short:
        is_longer = bool(group) and 3 * segment[0] > 4 * group[0][0] + 8
        if group and (is_longer or segment[0] * (len(group) + 1) > num_residues):
            yield _gather(group, device)
            group = []
        group.append(segment)
    if group:
        yield _gather(group, device)


def _gather(group: list[tuple[int, int, int]], device: torch.device) -> Gather:
    lengths, rows, starts = torch.tensor(group, device=device).T[:, :, None]
    place = torch.arange(group[-1][0], device=device)
    return Gather(
        rows=rows,
        positions=starts + torch.minimum(place, lengths - 1),
        is_residue=place < lengths,
        num_segments=len(group),
        num_residues=len(place),
        total_residues=sum(length for length, _, _ in group),
    )
