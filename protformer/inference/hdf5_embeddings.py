"""Embeddings as HDF5: one dataset a protein, named by its escaped id, and a table of all in `%index`.

    /ID                 (residue, feature) or (feature,)       --per residue, --per protein
    /residue/ID, /protein/ID                                   --per both
    /%index/{id,header,length,truncated,sequence_hash}         one entry a protein, in input order

Attributes of the file: `format`, `format_version`, `per`, `dtype`, and `model`, a JSON object. Groups list
their members in the order of writing. Memory is constant. An interrupted file is resumed from its last commit
(see `journaled_file`); commits come every few seconds and megabytes, so at most that much work is lost.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import h5py
import numpy as np

from protformer.errors import OutputError
from protformer.inference.embedding_record import (
    EmbeddingDtype,
    EmbeddingRecord,
    EmbeddingWriter,
    Per,
    hash_of_sequence,
    partial_path,
)
from protformer.inference.journaled_file import JournaledFile, journal_path, roll_back
from protformer.unreadable import UNREADABLE, reason

INDEX_GROUP = "%index"
"""No escaped id has this name: there, `%` is always followed by two hexadecimal digits."""

# Since 1.8, HDF5 keeps the order of a group and adds to it without rewriting it. Since 1.10, it marks a file
# as being written, and refuses it after a crash; the journal already takes care of that.
_HDF5_VERSIONS = ("v108", "v108")

COMMIT_BYTES = 8 << 20
"""The most that a kill or a full disk can cost of the embeddings that were written, however fast they came."""

_INDEX_CHUNK = 1024
_COLUMNS = ("id", "header", "length", "truncated", "sequence_hash")


def escape_id(protein_id: str) -> str:
    """The name of a protein's dataset: its id with `/`, NUL, and a whole `.` or `..` percent-encoded."""
    if protein_id in (".", ".."):
        return protein_id.replace(".", "%2E")
    return re.sub("[%/\0]", lambda match: f"%{ord(match[0]):02X}", protein_id)


def unescape_id(name: str) -> str:
    """The id behind a dataset's name."""
    return unquote(name, errors="strict")


class Hdf5EmbeddingWriter(EmbeddingWriter):
    """The only writer that resumes. `commit_seconds` is the longest time of work that a kill can cost."""

    def __init__(
        self,
        path: Path,
        *,
        per: Per,
        dtype: EmbeddingDtype,
        description: Mapping[str, object],
        resume: bool,
        commit_seconds: float = 5.0,
    ) -> None:
        super().__init__(path, per=per, dtype=dtype, description=description)
        self._commit_seconds = commit_seconds
        self._uncommitted: list[EmbeddingRecord] = []
        self._uncommitted_bytes = 0
        self._num_committed = 0
        self._done: dict[str, int] = {}
        """The ids that a resumed file holds, with the hashes of their sequences."""
        fresh = not (resume and self._prepare_resume())
        if fresh:
            self._partial.unlink(missing_ok=True)
        try:
            self._open(fresh)
        except UNREADABLE as error:
            if fresh:
                self._remove()
            raise OutputError(f"{self._path}: cannot begin the file: {reason(error)}") from error

    def done_ids(self) -> frozenset[str]:
        return frozenset(self._done)

    def has(self, protein_id: str, sequence: bytes) -> bool:
        if protein_id not in self._done:
            return False
        if self._done[protein_id] not in (0, hash_of_sequence(sequence)):
            raise OutputError(
                f"{self._path}: {protein_id!r} is in the file with another sequence; resume with the same proteins, or"
                " choose another --out"
            )
        return True

    def _append(self, record: EmbeddingRecord) -> None:
        for part, values in (("residue", record.residue), ("protein", record.protein)):
            if values is None:
                continue
            group = self._file[part] if self._per == "both" else self._file
            name = escape_id(record.id)
            if name in group:
                raise OutputError(f"{self._path}: {record.id!r} is in the file already; ids must be unique")
            group.create_dataset(name, data=values)
            self._uncommitted_bytes += values.nbytes
        # Without its arrays, which the file has by now, a record is its row of the index.
        self._uncommitted.append(replace(record, residue=None, protein=None))
        is_due = time.monotonic() - self._committed_at >= self._commit_seconds
        if is_due or self._uncommitted_bytes >= COMMIT_BYTES:
            self._commit()

    def _finish(self) -> None:
        self._commit()
        self._file.close()
        # Raises if closing could not write everything.
        self._journaled.commit()
        self._journaled.close(keep_journal=False)

    def _abandon(self) -> None:
        self._close_after_failure()
        if not self._num_committed:
            self._remove()

    def _describe_kept(self) -> list[str]:
        if not self._num_committed:
            return []
        return [f"{self._num_committed:,} proteins are kept in {self._partial}: --resume goes on from there"]

    def _close_after_failure(self) -> None:
        # Should this fail as well (a full disk), the journal puts the file back to its last commit.
        with contextlib.suppress(OSError, RuntimeError):
            if self._file:
                self._commit()
        with contextlib.suppress(OSError, RuntimeError):
            self._file.close()
        self._journaled.close(keep_journal=True)
        # Gives the disk back what comes behind the commit. The journal stays if this fails, for a resume to do it.
        with contextlib.suppress(OSError):
            roll_back(self._partial)

    def _remove(self) -> None:
        self._partial.unlink(missing_ok=True)
        journal_path(self._partial).unlink(missing_ok=True)

    def _commit(self) -> None:
        rows, self._uncommitted = self._uncommitted, []
        index = self._file[INDEX_GROUP]
        for column in _COLUMNS if rows else ():
            dataset = index[column]
            old_size = len(dataset)
            dataset.resize(old_size + len(rows), axis=0)
            dataset[old_size:] = [getattr(row, column) for row in rows]
        self._file.flush()
        self._journaled.commit()
        self._committed_at = time.monotonic()
        self._uncommitted_bytes = 0
        self._num_committed = len(index["id"])

    def _open(self, fresh: bool) -> None:
        self._journaled = JournaledFile(self._partial, create=fresh)
        self._file = h5py.File(
            self._journaled,
            "w" if fresh else "r+",
            libver=_HDF5_VERSIONS,
            track_order=True if fresh else None,
        )
        try:
            if fresh:
                self._create_layout()
            self._commit()
        except UNREADABLE:
            self._close_after_failure()
            raise

    def _create_layout(self) -> None:
        for name, value in self._described().items():
            self._file.attrs[name] = json.dumps(value) if name == "model" else value
        if self._per == "both":
            self._file.create_group("residue", track_order=True)
            self._file.create_group("protein", track_order=True)
        index = self._file.create_group(INDEX_GROUP)
        columns = {
            "id": h5py.string_dtype(),
            "header": h5py.string_dtype(),
            "length": np.int64,
            "truncated": bool,
            "sequence_hash": np.uint64,
        }
        for name, dtype in columns.items():
            index.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(_INDEX_CHUNK,), dtype=dtype)

    def _prepare_resume(self) -> bool:
        """Whether there is a file to go on with, put back to its last commit and under its partial name."""
        if self._partial.exists():
            roll_back(self._partial)
            if self._partial.stat().st_size == 0:
                self._partial.unlink()
        if not (self._path.exists() or self._partial.exists()):
            return False
        if self._path.exists() and self._partial.exists():
            raise OutputError(
                f"both {self._path} and {self._partial.name} exist; delete one of them to resume the other"
            )
        source = self._path if self._path.exists() else self._partial
        self._done = self._done_by_same_run(source)
        if source is self._path:
            # A journal without its file tells nothing of this one.
            journal_path(self._partial).unlink(missing_ok=True)
        os.replace(source, self._partial)
        return True

    def _done_by_same_run(self, source: Path) -> dict[str, int]:
        """Raises OutputError unless the file was begun with the model and options of this run."""
        try:
            with h5py.File(source, "r") as file:
                found = {name: file.attrs.get(name) for name in self._described()}
                index = file.get(INDEX_GROUP, {})
                has_columns = set(index) >= set(_COLUMNS)
                done = _done(index) if has_columns else {}
            if found["format"] is not None:
                found["model"] = dict(json.loads(found["model"]))
        except UNREADABLE as error:
            raise OutputError(
                f"{source}: damaged, cannot be resumed ({reason(error)}); delete it and start anew"
            ) from error
        if found["format"] is None:
            raise OutputError(f"{source}: not written by protformer embed; choose another --out")
        if not has_columns:
            raise OutputError(f"{source}: begun by an earlier version of protformer; delete it and start anew")
        asked = json.loads(json.dumps(self._described()))
        for name, value in {**asked, **asked["model"]}.items():
            old = found[name] if name in found else found["model"].get(name)
            if old != value and name != "model":
                raise OutputError(
                    f"{source}: was begun with {name} {old}, not {value}; resume with the same, or delete it"
                )
        return done


def _done(index: Mapping[str, h5py.Dataset]) -> dict[str, int]:
    """Ids and hashes. Raises ValueError where the columns differ in length, KeyError where one cannot be opened."""
    if len({len(index[column]) for column in _COLUMNS}) > 1:
        raise ValueError("columns of the index differ in length")
    return dict(zip(index["id"].asstr()[:].tolist(), index["sequence_hash"][:].tolist(), strict=True))


def refuse_leftover(path: Path) -> None:
    """Raise OutputError where an interrupted run left work that a fresh start would throw away."""
    partial = partial_path(path)
    if partial.exists():
        raise OutputError(f"{partial}: left by an interrupted run; go on with --resume, or delete it")
