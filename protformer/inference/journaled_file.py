"""A file that can be put back to its last commit after the process that wrote it was killed.

HDF5 overwrites its own tables in place, in no particular order, so a file whose writer was killed is often
unreadable, however often it was flushed. Here every byte that was part of the last commit is copied to a
rollback journal (`NAME.journal`) before it is overwritten; bytes beyond the end of that commit need no copy.
`roll_back` undoes what came after the commit. h5py takes a `JournaledFile` in place of a path.

It protects from the death of the process (SIGKILL, out of memory, a scheduler's limit), which keeps the order
of writes, and not from the loss of power, for which every overwrite would need an fsync.

Journal: the committed size (8 bytes), then entries (offset, count, the `count` old bytes). Numbers are
little-endian.
"""

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SIZE = struct.Struct("<Q")
_ENTRY = struct.Struct("<QQ")


class JournaledFile:
    """A binary file, opened for reading and writing, with a rollback journal beside it.

    A write that fails (the disk is full) raises at the next `commit`, and until then nothing more is written:
    HDF5 flushes in destructors, where an exception is lost, and crashes when it cannot write while it closes.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self._failure: OSError | None = None
        self._journal_path = journal_path(path)
        if create:
            self._journal_path.unlink(missing_ok=True)
        else:
            roll_back(path)
        self._file = path.open("x+b" if create else "r+b", buffering=0)
        self._journal = self._journal_path.open("wb", buffering=0)
        try:
            self.commit()
        except OSError:
            self.close(keep_journal=True)
            raise

    def commit(self) -> None:
        """Make the present content what `roll_back` returns to.

        Between the two journal writes the journal is empty, which means "nothing to undo", and so it is.
        """
        self._attempt(self._begin_journal)
        if self._failure is not None:
            raise self._failure

    def close(self, *, keep_journal: bool) -> None:
        """Close the file; without its journal, it stays as it is now."""
        self._file.close()
        self._journal.close()
        if not keep_journal:
            self._journal_path.unlink()

    def write(self, data: Any) -> int:
        """`data` has the buffer protocol: h5py hands over a memory view of its own type."""
        view = memoryview(data).cast("B")
        self._attempt(lambda: self._overwrite(view))
        return len(view)

    def truncate(self, size: int) -> int:
        self._attempt(lambda: self._shorten(size))
        return size

    def read(self, count: int = -1) -> bytes:
        return self._file.read(count)

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        """Nothing is buffered here."""

    def _attempt(self, change: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                change()
            except OSError as error:
                self._failure = error

    def _begin_journal(self) -> None:
        position = self._file.tell()
        self._committed_size = self._file.seek(0, os.SEEK_END)
        self._file.seek(position)
        self._journal.seek(0)
        self._journal.truncate()
        _write_all(self._journal, _SIZE.pack(self._committed_size))

    def _overwrite(self, data: memoryview) -> None:
        self._save(self._file.tell(), len(data))
        _write_all(self._file, data)

    def _shorten(self, size: int) -> None:
        self._save(size, self._committed_size - size)
        self._file.truncate(size)

    def _save(self, offset: int, count: int) -> None:
        """Copy the bytes to be overwritten, as far as they belong to the last commit, to the journal."""
        count = min(count, self._committed_size - offset)
        if count <= 0:
            return
        position = self._file.tell()
        self._file.seek(offset)
        old = self._file.read(count)
        self._file.seek(position)
        _write_all(self._journal, _ENTRY.pack(offset, len(old)) + old)


def journal_path(path: Path) -> Path:
    """Where the journal of `path` lies."""
    return path.with_name(path.name + ".journal")


def roll_back(path: Path) -> None:
    """Put `path` back to its last commit, if it has a journal. Safe to be interrupted and repeated."""
    try:
        journal = journal_path(path).read_bytes()
    except FileNotFoundError:
        return
    if len(journal) >= _SIZE.size:
        (size,) = _SIZE.unpack_from(journal)
        with path.open("r+b", buffering=0) as file:
            # Newest first: where a byte was overwritten twice, the older entry holds the committed one.
            for offset, old in reversed(_entries(journal)):
                file.seek(offset)
                _write_all(file, old)
            file.truncate(size)
    journal_path(path).unlink()


def _entries(journal: bytes) -> list[tuple[int, bytes]]:
    """The complete entries. A torn last one was cut off before its overwrite began: nothing to undo."""
    entries = []
    position = _SIZE.size
    while position + _ENTRY.size <= len(journal):
        offset, count = _ENTRY.unpack_from(journal, position)
        position += _ENTRY.size
        if position + count <= len(journal):
            entries.append((offset, journal[position : position + count]))
        position += count
    return entries


def _write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    """Write all of `data`; one call of the operating system may write less (above 2 GiB, or interrupted)."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
