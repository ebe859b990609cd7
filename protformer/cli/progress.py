"""Progress of commands on stderr: a bar on a terminal, one plain line each 30 seconds elsewhere, nothing when quiet."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

PLAIN_LINE_SECONDS = 30.0

Advance = Callable[[int], None]
"""Takes how much was done since the last call."""


class StderrConsole:
    """Progress and remarks of one command."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet

    def byte_progress(self, sources: Sequence[str]) -> AbstractContextManager[Advance]:
        return byte_progress(sources, quiet=self.quiet)

    def tell(self, line: str | None) -> None:
        if line and not self.quiet:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def byte_progress(sources: Sequence[str], *, quiet: bool) -> Iterator[Advance]:
    """Progress through input files, in bytes as they lie on disk; the total is unknown for stdin."""
    paths = [Path(source) for source in sources]
    known = all(path.is_file() for path in paths)
    with _progress("reading", sum(path.stat().st_size for path in paths) if known else None, True, quiet) as advance:
        yield advance


@contextmanager
def transfer_progress(what: str, num_bytes: int, *, quiet: bool) -> Iterator[Advance]:
    """Progress of so many bytes."""
    with _progress(what, num_bytes, True, quiet) as advance:
        yield advance


@contextmanager
def count_progress(what: str, *, quiet: bool) -> Iterator[Advance]:
    """Progress in pieces whose number is not known beforehand."""
    with _progress(what, None, False, quiet) as advance:
        yield advance


@contextmanager
def _progress(what: str, total: int | None, is_bytes: bool, quiet: bool) -> Iterator[Advance]:
    if quiet:
        yield lambda amount: None
    elif sys.stderr.isatty():
        with _bar(what, total, is_bytes) as advance:
            yield advance
    else:
        yield _plain_lines(what, total)


def _plain_lines(what: str, total: int | None) -> Advance:
    done, last = 0, time.monotonic()

    def advance(amount: int) -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= PLAIN_LINE_SECONDS:
            last = time.monotonic()
            share = f" of {total:,} ({done / total:.0%})" if total else ""
            print(f"{what}: {done:,}{share}", file=sys.stderr, flush=True)

    return advance


@contextmanager
def _bar(what: str, total: int | None, is_bytes: bool) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    amount_column = DownloadColumn() if is_bytes else MofNCompleteColumn()
    with Progress(
        TextColumn(what),
        BarColumn(),
        amount_column,
        TimeRemainingColumn() if total else TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.update(task, advance=amount)
