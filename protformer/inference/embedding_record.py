"""What every writer of embeddings shares: the record it is given, its life cycle, and the checks on both.

In: one `EmbeddingRecord` a protein, in the order in which they shall lie in the file. Out, after `close`, a
file under its final name; until then everything lies under `NAME.partial` in the same folder, so a file with
the final name is always complete.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from jaxtyping import Float

from protformer.errors import InterruptedRunError, OutputError, ProtformerError

Per = Literal["protein", "residue", "both"]
EmbeddingDtype = Literal["float16", "float32"]

FORMAT_NAME = "protformer embeddings"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingRecord:
    """The embeddings of one protein.

    `id` is the first word of its FASTA header, `header` the whole line. `length` counts the residues of the
    protein in the FASTA file; where `truncated`, `residue` has fewer rows. `residue` or `protein` is None
    where it was not asked for.
    """

    id: str
    header: str
    length: int
    truncated: bool
    residue: Float[np.ndarray, "residue feature"] | None = None
    protein: Float[np.ndarray, "feature"] | None = None
    sequence_hash: int = 0
    """See `hash_of_sequence`; 0 if unknown."""


class EmbeddingWriter(ABC):
    """Writes records one by one; as a context manager, leaves no final file after an exception.

    The message of a ProtformerError then also says what is kept; Ctrl-C becomes an InterruptedRunError if anything is.
    """

    def __init__(self, path: Path, *, per: Per, dtype: EmbeddingDtype, description: Mapping[str, object]) -> None:
        self._path = path
        self._partial = partial_path(path)
        self._per = per
        self._dtype = np.dtype(dtype)
        self._description = dict(description)

    def done_ids(self) -> frozenset[str]:
        """Identifiers of the proteins that an interrupted run has already written."""
        return frozenset()

    def has(self, protein_id: str, sequence: bytes) -> bool:
        """Whether the protein was written already. Raises OutputError if one of that id was, with another sequence."""
        return False

    def write(self, record: EmbeddingRecord) -> None:
        """Add one protein. Raises OutputError where a value does not fit the dtype or the disk is full."""
        stored = replace(
            record,
            residue=self._stored(record, "residue", record.residue),
            protein=self._stored(record, "protein", record.protein),
        )
        try:
            self._append(stored)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot write {record.id!r}: {error}") from error

    def close(self) -> None:
        """Finish the file and give it its final name."""
        try:
            self._finish()
            os.replace(self._partial, self._path)
        except OSError as error:
            self._abandon()
            kept = self._describe_kept()
            raise OutputError("; ".join([f"{self._path}: cannot finish the file: {error}", *kept])) from error

    def __enter__(self) -> "EmbeddingWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._abandon()
        kept = self._describe_kept()
        if kept and isinstance(error, ProtformerError):
            raise type(error)("; ".join([str(error), *kept])) from error
        if kept and isinstance(error, KeyboardInterrupt):
            raise InterruptedRunError("; ".join(["interrupted", *kept])) from error

    def _describe_kept(self) -> list[str]:
        """After an exception, what the user should know of the work that was kept; empty if there is none."""
        return []

    @abstractmethod
    def _append(self, record: EmbeddingRecord) -> None:
        """Write a record whose arrays are those asked for, in the dtype of the file."""

    @abstractmethod
    def _finish(self) -> None:
        """Complete the partial file and close it."""

    @abstractmethod
    def _abandon(self) -> None:
        """Close the partial file after an exception; keep it only where a later run can go on with it.

        The disk may be full, and `_finish` may have done a part of its work.
        """

    def _described(self) -> dict[str, object]:
        """What a reader must know of the whole file."""
        return {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "per": self._per,
            "dtype": self._dtype.name,
            "model": self._description,
        }

    def _stored(
        self, record: EmbeddingRecord, part: Literal["residue", "protein"], values: np.ndarray | None
    ) -> np.ndarray | None:
        """The array in the dtype of the file, or None where the file has no such part."""
        if self._per not in (part, "both"):
            return None
        if values is None:
            raise ValueError(f"record {record.id!r} lacks its {part} embedding")
        with np.errstate(over="ignore"):
            stored = values.astype(self._dtype, copy=False)
        if np.isinf(stored).any() and not np.isinf(values).any():
            largest = float(np.abs(values).max())
            raise OutputError(
                f"{self._path}: {record.id!r} has the value {largest:.6g}, but {self._dtype.name} ends at "
                f"{np.finfo(self._dtype).max:.6g}; use --dtype float32"
            )
        return stored


def hash_of_sequence(tokens: bytes) -> int:
    """64 bits of BLAKE2b, never 0: tells whether a protein of an interrupted run is the same now."""
    return int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little") or 1


def partial_path(path: Path) -> Path:
    """Where an unfinished file lies."""
    return path.with_name(path.name + ".partial")
