"""What every attention kind provides, and the words used for it.

A kind receives queries, keys and values of one layer, already projected, rotated and split into heads, and
the segment of every position. It returns the attended values. Segments are integers, one a position: 0 marks
padding, which neither attends nor is attended to (its output is zero); equal positive numbers in one row see
each other; different numbers in one row do not. Positions of one segment are contiguous. `packing: attend` is
therefore one segment a row, and `packing: isolate` one segment a protein.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor, nn

from protformer.attention.sequence_group import SequenceGroup
from protformer.errors import ConfigError

Heads = Float[Tensor, "batch head residue head_dim"]
Segments = Int[Tensor, "batch residue"]
AttentionWeights = Float[Tensor, "batch head residue residue"]


class Attention(nn.Module, ABC):
    """One kind of attention over one layer's queries, keys and values."""

    any_channel_order = False
    """Whether queries and keys matter only by their inner products, so that their channels may come in any order."""
    is_sharp = False
    """Whether queries pick few keys by an exact softmax, so that rounding queries and keys to bf16 shows.

    Random features exponentiate too, but their own error is larger than that of rounding.
    """

    @abstractmethod
    def forward(self, q: Heads, k: Heads, v: Heads, segments: Segments) -> Heads:
        """Attended values; rows of padding are zero. Scaling by head_dim ** -0.5 happens inside."""

    @abstractmethod
    def weights(self, q: Heads, k: Heads, segments: Segments) -> AttentionWeights:
        """The matrix that `forward` applies to v, materialised: O(residue ** 2) memory, for contact maps and tests."""

    def redraw(self, step: int) -> None:
        """Draw new random features if `step` (count of optimizer steps done) asks for it; most kinds have none."""

    def split_over(self, group: SequenceGroup | None) -> None:
        """From now on, get slices of windows whose other slices are on the other ranks of a group; None ends it."""
        raise ConfigError("this kind of attention cannot be split over ranks: only linear kinds can")
