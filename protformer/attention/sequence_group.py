"""Windows that are split over the ranks of a process group: who shares which segment, and the sums over ranks.

In: the segments of this rank's slice of every row; rank r holds the slice behind that of rank r - 1, and all hold the
same rows. Out: a `Window`. A segment that lies on more than one rank is a *spanning* one and gets a number, its slot,
that all ranks know it by; a rank boundary cuts at most one segment of a row, so there are at most ranks - 1 of them in
a row, however many proteins it holds. Four numbers a row and rank are exchanged to find this out, once for all layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

Segments = Int[Tensor, "batch residue"]
"""As in `interface`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """How the slice of this rank hangs together with those of the others."""

    offsets: Int[Tensor, " batch"]
    """Positions of each row's first segment that lie on earlier ranks."""
    num_slots: int
    """Spanning segments of the whole window, on whichever ranks."""
    slots: dict[tuple[int, int], int]
    """(row, start) of the spanning segments on this rank, and their slots."""
    own: Segments
    """Only those segments that no other rank has a part of; the others are 0, as if they were padding."""
    spanning: Segments
    goes_on: Segments
    """Spanning segments of which a later rank has a part, and those of which an earlier one has."""
    came_before: Segments


class SequenceGroup:
    """The ranks that share one window, in the order of their slices."""

    def __init__(self, ranks: dist.ProcessGroup) -> None:
        self.ranks = ranks
        self.rank, self.size = dist.get_rank(ranks), dist.get_world_size(ranks)
        self._latest: tuple[Segments, Window] | None = None

    def window(self, segments: Segments) -> Window:
        """The same object for the same tensor: layers ask one after another."""
        if self._latest is None or self._latest[0] is not segments:
            self._latest = segments, self._find_window(segments)
        return self._latest[1]

    def largest(self, x: Tensor) -> Tensor:
        """Elementwise over ranks; a constant to autograd."""
        largest = x.detach().clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.ranks)
        return largest

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, on all of them; so is its gradient."""
        total: Tensor = _Total.apply(x, self.ranks)  # type: ignore[no-untyped-call]
        return total

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks in a new first dimension; a constant to autograd."""
        gathered = x.new_empty((self.size, *x.shape))
        dist.all_gather(list(gathered.unbind()), x.detach().contiguous(), self.ranks)
        return gathered

    def _find_window(self, segments: Segments) -> Window:
        first, last = _edge_lengths(segments)
        length = segments.shape[1]
        edges = torch.stack((segments[:, 0], segments[:, -1], last, torch.full_like(last, length)), dim=1)
        slot_behind, offsets = _join(self.gather(edges).tolist())
        none: list[int | None] = [None] * len(segments)
        before, behind = ([none, *slot_behind, none][self.rank + side] for side in (0, 1))
        starts = [length - num_residues for num_residues in last.tolist()]
        slots = {(row, start): slot for row, (start, slot) in enumerate(zip(starts, behind, strict=True))}
        slots |= {(row, 0): slot for row, slot in enumerate(before) if slot is not None}
        place = torch.arange(length, device=segments.device)
        came_before = (place < first[:, None]) & _exist(before, segments.device)
        goes_on = (place >= length - last[:, None]) & _exist(behind, segments.device)
        return Window(
            offsets=torch.tensor(offsets[self.rank], device=segments.device),
            num_slots=len({slot for by_row in slot_behind for slot in by_row if slot is not None}),
            slots={place: slot for place, slot in slots.items() if slot is not None},
            own=segments.masked_fill(came_before | goes_on, 0),
            spanning=segments.where(came_before | goes_on, 0),
            goes_on=segments.where(goes_on, 0),
            came_before=segments.where(came_before, 0),
        )


def _edge_lengths(segments: Segments) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Positions of the first and of the last run of equal ids in each row."""
    differs_from_first = segments != segments[:, :1]
    differs_from_last = segments.flip(1) != segments[:, -1:]
    lengths = [
        torch.where(differs.any(dim=1), differs.int().argmax(dim=1), segments.shape[1])
        for differs in (differs_from_first, differs_from_last)
    ]
    return lengths[0], lengths[1]


def _join(edges: list[list[list[int]]]) -> tuple[list[list[int | None]], list[list[int]]]:
    """By rank boundary and row, the slot of the segment that it cuts; by rank and row, `Window.offsets`.

    `edges` has for each rank and row: the first and the last id, the positions of the last run and those of the slice.
    """
    num_slots, num_rows = 0, len(edges[0])
    slots: list[list[int | None]] = [[None] * num_rows for _ in edges[:-1]]
    offsets = [[0] * num_rows for _ in edges]
    for row in range(num_rows):
        for rank in range(len(edges) - 1):
            _, last_id, last, length = edges[rank][row]
            if last_id == 0 or last_id != edges[rank + 1][row][0]:
                continue
            goes_through = last == length and rank > 0 and slots[rank - 1][row] is not None
            offsets[rank + 1][row] = last + (offsets[rank][row] if goes_through else 0)
            slots[rank][row] = slots[rank - 1][row] if goes_through else num_slots
            num_slots += not goes_through
    return slots, offsets


def _exist(slots: list[int | None], device: torch.device) -> Tensor:
    return torch.tensor([slot is not None for slot in slots], device=device)[:, None]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: dist.ProcessGroup) -> Tensor:
        ctx.ranks = ranks
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, dist.ReduceOp.SUM, ranks)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, dist.ReduceOp.SUM, ctx.ranks)
        return total, None
