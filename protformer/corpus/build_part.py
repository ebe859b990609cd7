"""One part of a token store: a range of the sources read into a folder of its own, by whichever process.

In: a `PartTask`. Out: `PartResult`, kept as JSON in the folder as well. A part's folder gets its name when all is in
it, so that a folder of that name is a finished part. Memory is that of the FASTA reader.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.byte_ranges import ByteRange, count_lines_before
from protformer.corpus.fasta import read_batches, read_range
from protformer.corpus.records import FastaReport, RecordBatch
from protformer.corpus.store_files import StoreCounts, StoreFiles, writing
from protformer.errors import InputError

RESULT_FILE = "part.json"


@runtime_checkable
class Divide(Protocol):
    """Decides for each protein into which of several stores it comes; what it decides must be told by its `repr`."""

    def __call__(self, batch: RecordBatch) -> NDArray[np.int64]:
        """(protein,) numbers of stores, from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartTask:
    """What to read, and where to put it."""

    number: int
    """Place in the order of parts, from 0."""
    chosen: ByteRange
    folder: Path
    """Where the folders of all parts are."""
    out: Path
    """The store that this is for, as messages name it."""
    num_stores: int
    divide: Divide | None
    """Needed if there are several stores."""
    keep_ids: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PartResult:
    """How much came of some text."""

    report: FastaReport
    counts: tuple[StoreCounts, ...]
    """Of each store."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PartResult":
        tree = json.loads(text)
        counts = [StoreCounts(**(each | {"token_counts": tuple(each["token_counts"])})) for each in tree["counts"]]
        return cls(report=FastaReport(**tree["report"]), counts=tuple(counts))


def build_part(task: PartTask, consumed: Callable[[int], None]) -> PartResult:
    """Read and write one part. Raises InputError for the source, OutputError for the store."""
    folder = part_folder(task.folder, task.number)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    report = FastaReport()
    with ExitStack() as leaving:
        leaving.callback(shutil.rmtree, partial, ignore_errors=True)
        with writing(task.out):
            shutil.rmtree(partial, ignore_errors=True)
            files = [_begin(store_folder(partial, number), task, leaving) for number in range(task.num_stores)]
        for batch in _read(task.chosen, report, consumed):
            with writing(task.out):
                _append(files, batch, task.divide)
        result = PartResult(report=report, counts=tuple(each.counts for each in files))
        with writing(task.out):
            for each in files:
                each.finish(sync=False)
            (partial / RESULT_FILE).write_text(result.to_json(), encoding="utf-8")
            partial.rename(folder)
    return result


def load_part(folder: Path, number: int) -> PartResult | None:
    """What came of a part if it is finished and its files are there."""
    file = part_folder(folder, number) / RESULT_FILE
    if not file.exists():
        return None
    result = PartResult.from_json(file.read_text(encoding="utf-8"))
    is_there = all(store_folder(file.parent, each).is_dir() for each in range(len(result.counts)))
    return result if is_there else None


def part_folder(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}"


def store_folder(folder: Path, number: int) -> Path:
    """Where a part, or the whole, keeps what is for one of the stores."""
    return folder / f"store-{number}"


def _begin(folder: Path, task: PartTask, leaving: ExitStack) -> StoreFiles:
    folder.mkdir(parents=True)
    files = StoreFiles(folder, keep_ids=task.keep_ids)
    leaving.callback(files.close)
    return files


def _append(files: list[StoreFiles], batch: RecordBatch, divide: Divide | None) -> None:
    if divide is None:
        files[0].append(batch.id_words, batch.tokens, batch.ends, batch.token_counts)
        return
    numbers = divide(batch)
    for number, each in enumerate(files):
        if (chosen := numbers == number).any():
            some = batch.select(chosen)
            each.append(some.id_words, some.tokens, some.ends, some.token_counts)


def _read(chosen: ByteRange, report: FastaReport, consumed: Callable[[int], None]) -> Iterator[RecordBatch]:
    if chosen.is_whole:
        yield from read_batches([chosen.source], on_duplicate="allow", report=report, consumed=consumed)
        return
    try:
        yield from read_range(chosen, first_line=1, report=report, consumed=consumed)
    except InputError:
        # Only a fault asks for line numbers, which the text before the range decides.
        for _ in read_range(chosen, first_line=1 + count_lines_before(chosen), report=FastaReport()):
            pass
        raise
