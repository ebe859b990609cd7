"""A folder that one process at a time works in.

In: its path. Out: the folder, locked until the block is left, or an OutputError. The lock (flock(2)) is the system's:
it falls when its holder dies, however that happens, and a file left behind means nothing.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from protformer.corpus.compression import describe_source
from protformer.errors import OutputError

LOCK_FILE = "lock"


@contextmanager
def exclusive_folder(folder: Path, out: Path, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Make and lock the folder in which `out` is built.

    Another process that holds it is waited for, after a call of `wait`; without `wait` that is an error.
    """
    try:
        descriptor = _lock(folder, out, wait)
    except OSError as error:
        raise OutputError(f"{describe_source(out)}: cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        os.close(descriptor)


def remove_exclusive_folder(folder: Path) -> None:
    """Remove the folder, which this process holds; others that wait for it make it anew."""
    for entry in folder.iterdir():
        if entry.name != LOCK_FILE:
            shutil.rmtree(entry, ignore_errors=True)
    (folder / LOCK_FILE).unlink(missing_ok=True)
    with suppress(OSError):  # another process has already made its own lock here
        folder.rmdir()


def _lock(folder: Path, out: Path, wait: Callable[[], None] | None) -> int:
    while True:
        descriptor = _open(folder)
        try:
            if not _try_lock(descriptor, blocking=False):
                if wait is None:
                    raise OutputError(
                        f"{describe_source(out)}: another process is building this token store; "
                        "wait for it, or choose another place"
                    )
                wait()
                _try_lock(descriptor, blocking=True)
            if _is_current(descriptor, folder):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # its holder is just removing it
            return os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)


def _try_lock(descriptor: int, *, blocking: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: there, it is the user's to build a store once at a time
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_current(descriptor: int, folder: Path) -> bool:
    """Whether the locked file is still the one in the folder: its last holder may have removed that."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK_FILE))
    except FileNotFoundError:
        return False
