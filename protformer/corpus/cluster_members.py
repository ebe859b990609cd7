"""The proteins of each cluster of a token store, as arrays on disk: for sampling uniformly over clusters.

In: a token store with ids and a table of clusters (see `clusters`). Out: a folder with

- `starts.npy`: int64 (cluster + 1,), cluster c has members[starts[c]:starts[c + 1]];
- `members.npy`: int32 or int64 (protein,), indices of proteins in the store.

A protein that the table does not list is a cluster of its own. Making the arrays takes some 60 bytes of memory a
protein; sampling reads what it needs from the files.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protformer.corpus.clusters import read_clusters
from protformer.corpus.compression import Source
from protformer.corpus.random_reads import ArrayFile
from protformer.corpus.token_store import TokenStore

STARTS_FILE, MEMBERS_FILE = "starts.npy", "members.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterReport:
    """What matching a table with a store gave."""

    num_clusters: int
    """Of the store, unlisted proteins included."""
    num_unlisted: int
    num_absent: int

    def summary(self) -> str:
        """One line for the user."""
        return (
            f"{self.num_clusters:,} clusters; {self.num_unlisted:,} proteins that the table does not list are clusters"
            f" of their own; {self.num_absent:,} members of the table are not in the training store, being held"
            " out or not in the FASTA"
        )


class ClusterMembers:
    """The clusters of one store, open for reading."""

    def __init__(self, folder: Path) -> None:
        self.starts, self.members = ArrayFile(folder / STARTS_FILE), ArrayFile(folder / MEMBERS_FILE)

    def __len__(self) -> int:
        """Number of clusters."""
        return self.starts.shape[0] - 1


def build_cluster_members(store: TokenStore, table: Source, folder: Path) -> ClusterReport:
    """Find the store's proteins in the table and write the arrays to this existing folder. Raises InputError."""
    clusters = read_clusters(table, store, unlisted="single")
    num_clusters = len(clusters.keys)
    starts = np.zeros(num_clusters + 1, dtype=np.int64)
    np.cumsum(np.bincount(clusters.of_protein, minlength=num_clusters), out=starts[1:])
    members = np.argsort(clusters.of_protein, kind="stable")
    np.save(folder / STARTS_FILE, starts)
    np.save(folder / MEMBERS_FILE, members.astype(np.int32 if len(store) < 2**31 else np.int64))
    return ClusterReport(num_clusters=num_clusters, num_unlisted=clusters.num_unlisted, num_absent=clusters.num_absent)
