"""What a run says about itself while it goes on: `status.json`, and a lock that falls with its process.

In: a run folder. Out: a `RunStatus`, and whether a process is training there. Written by training every few seconds,
read by `describe` without torch. The lock (fcntl(2)) is the system's: it falls when its holder dies, however that
happens, and processes forked by the holder do not keep it.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from protformer.decoding import decode
from protformer.errors import OutputError
from protformer.whole_file import write_whole

STATUS_FILE, LOCK_FILE = "status.json", ".running"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """How far a run has come. Times are seconds since 1970."""

    step: int
    max_steps: int
    residues_seen: int
    residues_per_second: float
    """In this sitting."""
    train_loss: float | None
    """Since the last row of `metrics.csv`, or in it."""
    skipped_steps: int
    seconds_left: float | None
    """At the rate of this sitting; None before its first step."""
    updated: float
    checkpoint_step: int | None
    checkpoint_time: float | None


def write_status(run: Path, status: RunStatus) -> None:
    """Replace the status; a reader sees the old one or this one."""
    text = json.dumps(asdict(status), indent=1) + "\n"
    write_whole(run / STATUS_FILE, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_status(run: Path) -> RunStatus | None:
    """The last status, None if the run has not begun to train."""
    path = run / STATUS_FILE
    return decode(RunStatus, json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


@contextmanager
def sole_process(run: Path) -> Iterator[None]:
    """Be the only process that trains in this folder, or raise OutputError."""
    descriptor = os.open(run / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _try_lock(descriptor, shared=False):
            holder = (run / LOCK_FILE).read_text(encoding="utf-8").strip()
            raise OutputError(f"{run}: another process is training here ({holder}); wait for it, or stop it")
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def is_running(run: Path) -> bool:
    """Whether a process trains there now."""
    try:
        descriptor = os.open(run / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(descriptor, shared=True)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, *, shared: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: there, it is the user's to train once at a time
        return True
    try:
        fcntl.lockf(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
