"""Training and held-out proteins, whole clusters at a time, told apart while the FASTA is read.

In: a table as MMseqs2 writes it (representative, member), and a fraction. Out: the hashes of the names of all members
that are held out, in a file that every worker maps; with it, `ClusterSplit` divides proteins. The hash of the
representative's name decides, so that a cluster keeps its side when others are added. Proteins that the table does not
list are never held out. Memory is 16 bytes for each member that is held out.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.clusters import table_columns
from protformer.corpus.compression import Source
from protformer.corpus.identifiers import hash_names, short_name
from protformer.corpus.records import RecordBatch
from protformer.corpus.store_manifest import SourceFile, inspect_sources
from protformer.corpus.tables import read_lines


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSplit:
    """Sends the proteins of some clusters to the second of two stores."""

    held_out: Path
    """uint64 (name,) in .npy: hashes of names, sorted."""
    table: SourceFile
    fraction: float
    """What the file was made from: part of what tells one split from another."""

    def __call__(self, batch: RecordBatch) -> NDArray[np.int64]:
        held_out = _load(self.held_out, self.held_out.stat().st_mtime_ns)
        ids = [name.encode("utf-8") for name in batch.ids]
        is_held_out = np.isin(hash_names(ids), held_out) | np.isin(hash_names(map(short_name, ids)), held_out)
        return is_held_out.astype(np.int64)


def split_by_clusters(table: Source, fraction: float, held_out: Path) -> ClusterSplit:
    """The split that holds out this share of a table's clusters; writes the file `held_out`. Raises InputError."""
    found = [np.empty(0, dtype=np.uint64)]
    for number, lines in read_lines(table):
        pairs = [table_columns(line, table, number + i) for i, line in enumerate(lines) if line]
        is_chosen = hash_names(first for first, _ in pairs) < fraction * 2.0**64
        members = [pairs[i][1] for i in np.flatnonzero(is_chosen)]
        found += [hash_names(members), hash_names(map(short_name, members))]
    held_out.parent.mkdir(parents=True, exist_ok=True)
    np.save(held_out, np.unique(np.concatenate(found)))
    (source,) = inspect_sources([table])
    return ClusterSplit(held_out=held_out, table=source, fraction=fraction)


@lru_cache(maxsize=1)
def _load(file: Path, changed_ns: int) -> NDArray[np.uint64]:
    names: NDArray[np.uint64] = np.load(file)
    return names
