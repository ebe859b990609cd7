"""What a run draws from, and the proteins that its draws give.

In: one or several token stores, perhaps clusters or pairs of their proteins. Out: `Proteins`, arrays that say where
the drawn proteins lie. Memory is O(1): what a draw needs is read from the files of stores and clusters.

- Proteins of the stores, each once an epoch, or in the shares that weights give.
- With clusters: uniform over clusters, then a member, as models trained on UniRef50 clusters do. A cluster goes
  through its members in a keyed order, one each epoch, so that small families count as much as large ones and yet
  every member has its turn.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.cluster_members import ClusterMembers
from protformer.corpus.draws import DrawOrder
from protformer.corpus.interacting_pairs import InteractingPairs
from protformer.corpus.permutation import keyed_hash, permute
from protformer.corpus.random_reads import ArrayFile
from protformer.corpus.token_store import OFFSETS_FILE, TokenStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """All that a run trains on."""

    stores: tuple[TokenStore, ...]
    clusters: ClusterMembers | None = None
    """Of the only store."""
    pairs: InteractingPairs | None = None
    """Of proteins of the only store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proteins:
    """Where drawn proteins lie; arrays (draw,) of int64."""

    draw: NDArray[np.int64]
    """The number of the draw: what random decisions about this protein depend on."""
    store: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    """Of its tokens in the store, EOS included."""


class ProteinDraws(ABC):
    """An endless order of proteins."""

    def __init__(self, stores: Sequence[TokenStore], *, seed: int) -> None:
        self.seed = seed
        self._offsets = [ArrayFile(store.path / OFFSETS_FILE) for store in stores]

    @property
    @abstractmethod
    def draws_per_epoch(self) -> int:
        """Draws in one epoch."""

    @abstractmethod
    def draw(self, numbers: NDArray[np.int64]) -> Proteins:
        """The proteins of these draws, which count from 0 at the start of a run."""

    def _locate(self, numbers: NDArray[np.int64], store: NDArray[np.int64], protein: NDArray[np.int64]) -> Proteins:
        bounds = np.empty((len(protein), 2), dtype=np.int64)
        for number, offsets in enumerate(self._offsets):
            own = np.flatnonzero(store == number)
            bounds[own] = offsets.rows(protein[own], 2)
        return Proteins(draw=numbers, store=store, start=bounds[:, 0], end=bounds[:, 1])


class StoreDraws(ProteinDraws):
    """Proteins of one or several stores."""

    def __init__(self, stores: Sequence[TokenStore], *, seed: int, weights: Sequence[float] | None = None) -> None:
        """`weights` are shares of tokens: a store of long proteins is drawn from less often."""
        super().__init__(stores, seed=seed)
        if weights is not None:
            weights = [weight * len(store) / store.num_tokens for weight, store in zip(weights, stores, strict=True)]
        self._order = DrawOrder([len(store) for store in stores], seed=seed, weights=weights)

    @property
    def draws_per_epoch(self) -> int:
        return self._order.draws_per_epoch

    def draw(self, numbers: NDArray[np.int64]) -> Proteins:
        draws = self._order.draw(numbers)
        return self._locate(numbers, draws.source, draws.item)


class ClusterDraws(ProteinDraws):
    """One member of each cluster an epoch, the next one in the next epoch."""

    def __init__(self, store: TokenStore, clusters: ClusterMembers, *, seed: int) -> None:
        super().__init__([store], seed=seed)
        self._clusters = clusters
        self._order = DrawOrder([len(clusters)], seed=seed)

    @property
    def draws_per_epoch(self) -> int:
        return len(self._clusters)

    def draw(self, numbers: NDArray[np.int64]) -> Proteins:
        draws = self._order.draw(numbers)
        first, end = self._clusters.starts.rows(draws.item, 2).T
        sizes = end - first
        lap, place = np.divmod(draws.lap, sizes)
        member = permute(place, sizes, keyed_hash(self.seed, draws.item, lap))
        protein = self._clusters.members.rows(first + member)[:, 0]
        return self._locate(numbers, draws.source, protein)
