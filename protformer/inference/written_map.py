"""What a contact map's `.npz` tells of itself, without the map.

In: a file of `contact_writers`. Out: the chains, and what made the map.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protformer.errors import InputError
from protformer.unreadable import UNREADABLE


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenMap:
    """The chains of a map that was written, and what made it."""

    chain_ids: tuple[str, ...]
    chains: tuple[str, ...]
    """Their sequences."""
    provenance: Mapping[str, object]
    files: tuple[str, ...]
    """The kinds of files that were written with it, itself included."""


def read_written_map(path: Path) -> WrittenMap:
    """All of a `.npz` but its matrices. Raises InputError if it is no contact map, or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            sequence, lengths = str(arrays["sequence"]), arrays["chain_lengths"]
            chain_ids = tuple(map(str, arrays["chain_ids"]))
            provenance = dict(json.loads(str(arrays["provenance"])))
        ends = np.cumsum(lengths).tolist()
        files = tuple(map(str, provenance.pop("files")))
    except UNREADABLE as error:
        raise InputError(f"{path}: not a contact map, or damaged") from error
    chains = tuple(sequence[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))
    return WrittenMap(chain_ids=chain_ids, chains=chains, provenance=provenance, files=files)
