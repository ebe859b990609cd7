"""The files of a token store while they grow: tokens, ids and the offsets of both.

In: batches of proteins, or the files of another such folder. Out: the files that `token_store` describes, without the
manifest. How far they have come is a `StoreCounts`; files cut back to one are as they were when it was taken, which is
how a build that was killed goes on.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import NUM_TOKENS
from protformer.corpus.compression import describe_source
from protformer.corpus.records import Words
from protformer.errors import OutputError

MANIFEST_FILE = "manifest.json"
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.npy"
IDS_FILE = "ids.bin"
IDS_OFFSETS_FILE = "ids_offsets.npy"

_COPY_BYTES = 1 << 20
_COPY_OFFSETS = 1 << 17
_HEADER_BYTES = 128
"""Of an .npy file with one axis; NumPy leaves room in it for the shape to grow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreCounts:
    """How much is in a store."""

    num_proteins: int = 0
    num_id_bytes: int = 0
    token_counts: tuple[int, ...] = (0,) * NUM_TOKENS
    """How often each of the 33 tokens occurs, <eos> included."""

    @property
    def num_tokens(self) -> int:
        return sum(self.token_counts)


class StoreFiles:
    """Grows the files of a store in an existing folder; `close` when done, also after a failure."""

    def __init__(self, folder: Path, *, keep_ids: bool, start: StoreCounts | None = None) -> None:
        """Begin new files, or go on with those in the folder from `start`."""
        self._num_proteins = start.num_proteins if start else 0
        self._token_counts = np.array(start.token_counts if start else StoreCounts().token_counts, dtype=np.int64)
        with ExitStack() as closing:
            names = [(TOKENS_FILE, OFFSETS_FILE)] + [(IDS_FILE, IDS_OFFSETS_FILE)] * keep_ids
            sizes = None if start is None else (start.num_tokens, start.num_id_bytes)
            files = []
            for i, (data, offsets) in enumerate(names):
                files.append(_PiecesFile(closing, folder / data, folder / offsets, is_new=start is None))
                if sizes is not None:
                    files[i].cut_back(self._num_proteins, sizes[i])
            self._tokens, self._ids = files[0], files[1] if keep_ids else None
            self._closing = closing.pop_all()

    @property
    def counts(self) -> StoreCounts:
        return StoreCounts(
            num_proteins=self._num_proteins,
            num_id_bytes=self._ids.num_bytes if self._ids else 0,
            token_counts=tuple(self._token_counts.tolist()),
        )

    def append(self, ids: Words, tokens: bytes, ends: NDArray[np.int64], token_counts: NDArray[np.int64]) -> None:
        """Add proteins: their tokens, each closed by <eos>, where each ends, its <eos> included, and (256,) counts."""
        self._tokens.append(tokens, ends)
        if self._ids is not None:
            self._ids.append(*ids.joined())
        self._num_proteins += len(ends)
        self._token_counts += token_counts[:NUM_TOKENS]

    def append_files(self, folder: Path, counts: StoreCounts) -> None:
        """Add what the files in another folder hold, of which `counts` are known."""
        self._tokens.append_files(folder / TOKENS_FILE, folder / OFFSETS_FILE)
        if self._ids is not None:
            self._ids.append_files(folder / IDS_FILE, folder / IDS_OFFSETS_FILE)
        self._num_proteins += counts.num_proteins
        self._token_counts += np.array(counts.token_counts, dtype=np.int64)

    def finish(self, *, sync: bool) -> None:
        """Write all that is still in memory; with `sync` until it is on the disk."""
        for pieces in filter(None, (self._tokens, self._ids)):
            pieces.finish(self._num_proteins, sync=sync)

    def close(self) -> None:
        self._closing.close()


class _PiecesFile:
    """Bytes of pieces one after another, and beside it an .npy file of int64: 0, and where each piece ends."""

    def __init__(self, closing: ExitStack, data: Path, offsets: Path, *, is_new: bool) -> None:
        self.num_bytes = 0
        self._data, self._offsets = (_open(path, is_new, closing) for path in (data, offsets))
        if is_new:
            self._write_header(0)
            self._offsets.write(np.zeros(1, dtype="<i8").tobytes())

    def cut_back(self, num_pieces: int, num_bytes: int) -> None:
        """Forget everything behind so many pieces."""
        self.num_bytes = num_bytes
        for file, size in ((self._data, num_bytes), (self._offsets, _HEADER_BYTES + 8 * (num_pieces + 1))):
            if os.fstat(file.fileno()).st_size < size:
                raise OSError(errno.EIO, "what was there before is damaged; run the same command again")
            file.truncate(size)
            file.seek(size)

    def append(self, data: bytes, ends: NDArray[np.int64]) -> None:
        self._data.write(data)
        self._offsets.write((ends + self.num_bytes).astype("<i8").tobytes())
        self.num_bytes += len(data)

    def append_files(self, data: Path, offsets: Path) -> None:
        with open(data, "rb", buffering=0) as file:
            shutil.copyfileobj(file, self._data, _COPY_BYTES)
        ends = np.load(offsets, mmap_mode="r")[1:]
        for start in range(0, len(ends), _COPY_OFFSETS):
            self._offsets.write((ends[start : start + _COPY_OFFSETS] + self.num_bytes).astype("<i8").tobytes())
        self.num_bytes += data.stat().st_size

    def finish(self, num_pieces: int, *, sync: bool) -> None:
        end = self._offsets.tell()
        self._write_header(num_pieces)
        self._offsets.seek(end)
        for file in (self._data, self._offsets):
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def _write_header(self, num_pieces: int) -> None:
        self._offsets.seek(0)
        header = {"descr": "<i8", "fortran_order": False, "shape": (num_pieces + 1,)}
        np.lib.format.write_array_header_1_0(self._offsets, header)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns what the system says about a store that cannot be written into an OutputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{describe_source(out)}: the token store cannot be written: {reason}") from error


def _open(path: Path, is_new: bool, closing: ExitStack) -> IO[bytes]:
    file = open(path, "wb" if is_new else "rb+")  # noqa: SIM115
    closing.callback(_close, file)
    return file


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # a full disk, which was reported when it was met
        file.close()
