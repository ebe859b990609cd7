"""Random reads from the files of a token store and its tables, without mapping them.

In: a file and places in it. Out: arrays. A mapped file counts as memory of its reader page by page as it is
touched, so that a sampler would seem to hold the whole store after an epoch; what `pread` copies out stays with
the system's page cache. A read costs some 2 us, twice a copy from a map. Processes may share a file after a fork.
"""

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.compression import describe_source, readable
from protformer.errors import InputError


class BytesFile:
    """A file of bytes, open for reading anywhere."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable(path):
            self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill `out` with the bytes from `start` on. Raises InputError if the file ends before."""
        if os.preadv(self._descriptor, [out], start) != len(out):
            raise _shortened(self.path)

    def __reduce__(self) -> tuple[Callable[[Path], "BytesFile"], tuple[Path]]:
        """Another process opens the file again."""
        return BytesFile, (self.path,)


class ArrayFile:
    """An array in an .npy file, of which single rows are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable(path):
            header: np.memmap[tuple[int, ...], np.dtype[np.int64]] = np.load(path, mmap_mode="r")
            self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.shape, self.dtype, self._start = header.shape, header.dtype, header.offset
        self._row_bytes = header.dtype.itemsize * (header.shape[1] if header.ndim == 2 else 1)

    def rows(self, indices: NDArray[np.int64], count: int = 1) -> NDArray[np.int64]:
        """(index, value) the numbers of `count` rows from each index on; a row of a vector is one number."""
        descriptor, num_bytes = self._descriptor, count * self._row_bytes
        places = (self._start + indices * self._row_bytes).tolist()
        content = b"".join([os.pread(descriptor, num_bytes, place) for place in places])
        if len(content) != num_bytes * len(places):
            raise _shortened(self.path)
        values = np.frombuffer(content, dtype=self.dtype).astype(np.int64)
        return values.reshape(len(places), num_bytes // self.dtype.itemsize)

    def __reduce__(self) -> tuple[Callable[[Path], "ArrayFile"], tuple[Path]]:
        """Another process opens the file again."""
        return ArrayFile, (self.path,)


def _shortened(path: Path) -> InputError:
    return InputError(f"{describe_source(path)}: is shorter than it was when it was opened")
