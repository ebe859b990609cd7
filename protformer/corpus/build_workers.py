"""Parts of a token store by several processes at once, results in order.

In: `PartTask`s. Out: their `PartResult`s in the order of the tasks, whichever was done first; of several faults the
first in that order is raised. With one worker, one task, or input that only this process has, all happens here.
Workers are interpreters of their own that talk over pipes, so that neither threads nor the caller's main module matter;
one whose parent is gone ends at the next word.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from protformer.corpus.build_part import PartResult, PartTask, build_part
from protformer.corpus.compression import describe_source, is_stdin
from protformer.errors import OutputError, ProtformerError

_REPORTED_BYTES = 1 << 22
"""How often a worker tells how far it has come."""

_READ, _DONE, _FAULT, _LOST = "read", "done", "fault", "lost"


class LostWorkerError(OutputError):
    """A worker process ended by itself; finished parts are kept."""


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_parts(
    tasks: Sequence[PartTask], *, workers: int, progress: Callable[[int], None] | None = None
) -> Generator[PartResult, None, None]:
    """The results of all tasks, in order; close it to end the workers. Raises InputError, OutputError."""
    tell = progress or (lambda amount: None)
    workers = min(workers, len(tasks))
    if workers <= 1 or not sys.executable or any(_is_of_this_process(task.chosen.source) for task in tasks):
        for task in tasks:
            yield build_part(task, tell)
        return
    events: SimpleQueue[tuple[int, str, Any]] = SimpleQueue()
    with ExitStack() as leaving:
        queue = _TaskQueue(tasks)
        leaving.callback(queue.close)
        for _ in range(workers):
            process = _start_worker()
            leaving.callback(_end_worker, process)
            Thread(target=_drive, args=(process, queue, events), daemon=True).start()
        results: dict[int, PartResult | ProtformerError] = {}
        for task in tasks:
            while task.number not in results:
                number, kind, value = events.get()
                if kind == _READ:
                    tell(value)
                elif kind == _LOST:
                    raise LostWorkerError(_describe_lost(task, value))
                else:
                    results[number] = value
            result = results.pop(task.number)
            if isinstance(result, ProtformerError):
                raise result
            yield result


def _is_of_this_process(source: str) -> bool:
    """Whether another process could not open it: standard input, a pipe, or `/dev/fd/63`, as the shell names one."""
    return is_stdin(source) or not Path(source).is_file() or source.startswith(("/dev/", "/proc/"))


class _TaskQueue:
    """Hands out tasks to the threads of all workers."""

    def __init__(self, tasks: Sequence[PartTask]) -> None:
        self._tasks = iter(tasks)
        self._lock = Lock()

    def take(self) -> PartTask | None:
        with self._lock:
            return next(self._tasks, None)

    def close(self) -> None:
        """No more tasks."""
        with self._lock:
            self._tasks = iter(())


def _drive(process: "subprocess.Popen[bytes]", queue: _TaskQueue, events: "SimpleQueue[tuple[int, str, Any]]") -> None:
    """Give one worker a task after another, and pass on what it says."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        while (task := queue.take()) is not None:
            pickle.dump(task, process.stdin)
            process.stdin.flush()
            kind = _READ
            while kind == _READ:
                kind, value = pickle.load(process.stdout)
                events.put((task.number, kind, value))
            if kind == _FAULT:
                queue.close()
    except (EOFError, OSError, ValueError, pickle.UnpicklingError):
        events.put((0, _LOST, process.wait()))


def _start_worker() -> "subprocess.Popen[bytes]":
    # The same search path, so that a worker finds this very package.
    code = f"import sys; sys.path[:] = {sys.path!r}; from protformer.corpus import build_workers; build_workers.work()"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _end_worker(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what could not be sent any more
                pipe.close()


def _describe_lost(task: PartTask, exit_code: int) -> str:
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}"
    return (
        f"{describe_source(task.out)}: a worker process {how}, perhaps for want of memory; "
        "the same command goes on from here, fewer workers need less"
    )


def work() -> None:
    """Be a worker: tasks from standard input, what comes of them to standard output, until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C, and what schedulers send, reach all; the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may get between the answers

    def answer(kind: str, value: object) -> None:
        try:
            pickle.dump((kind, value), answers)
            answers.flush()
        except BrokenPipeError:  # the parent is gone
            raise SystemExit(1) from None

    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        told = _Told(answer)
        try:
            result = build_part(task, told)
        except ProtformerError as error:
            answer(_FAULT, error)
        else:
            told.flush()
            answer(_DONE, result)


class _Told:
    """Adds up small amounts before telling them."""

    def __init__(self, answer: Callable[[str, object], None]) -> None:
        self._answer, self._amount = answer, 0

    def __call__(self, amount: int) -> None:
        self._amount += amount
        if self._amount >= _REPORTED_BYTES:
            self.flush()

    def flush(self) -> None:
        self._answer(_READ, self._amount)
        self._amount = 0
