"""Token stores from FASTA: in parallel, resumable after a kill, and the same byte for byte however it went.

In: FASTA files, and perhaps a rule that divides the proteins between several stores. Out: the stores in their places.
The sources are read in parts (`byte_ranges`), by any number of processes (`build_workers`), each part into a folder of
its own (`build_part`); parts are appended in order beside the place of the store (`part_merge`). All this is in
`.NAME.building`, in a folder named after what is built (the sources' sizes, times and ends, the parts, the options):
who builds the same again after a kill goes on from the finished parts, who builds something else throws them away.
Memory is that of one FASTA reader a worker; the disk holds the store and the few parts that are not appended yet.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from protformer.alphabet import FINGERPRINT
from protformer.corpus.build_lock import exclusive_folder, remove_exclusive_folder
from protformer.corpus.build_part import Divide, PartTask, load_part
from protformer.corpus.build_workers import LostWorkerError, run_parts
from protformer.corpus.byte_ranges import RANGE_BYTES, ByteRange, plan_ranges
from protformer.corpus.compression import Source
from protformer.corpus.duplicates import OnDuplicate
from protformer.corpus.fasta import read_batches
from protformer.corpus.part_merge import MergedStores
from protformer.corpus.records import FastaReport
from protformer.corpus.store_files import writing
from protformer.corpus.store_manifest import (
    FORMAT_VERSION,
    SourceFile,
    StoreManifest,
    describe_difference,
    inspect_sources,
)
from protformer.corpus.store_writer import TokenStoreWriter, check_replaceable
from protformer.errors import InputError, InterruptedRunError

Progress = Callable[[int], None]
"""Told how many bytes of the files were read since it was last told."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def build_token_store(
    fasta: Sequence[Source],
    out: Path,
    *,
    keep_ids: bool = True,
    on_duplicate: OnDuplicate = "allow",
    workers: int = 1,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> StoreManifest:
    """Write the proteins of FASTA files to a token store, in order.

    An older store at `out` is replaced at the end. Unless duplicates are allowed, one process reads all. `tell` is told
    what an interrupted build has left to go on from. Raises InputError for the files, OutputError for `out`,
    InterruptedRunError if Ctrl-C left something.
    """
    if on_duplicate != "allow":
        return _build_with_unique_ids(fasta, out, keep_ids, on_duplicate, progress)
    (manifest,) = build_stores(fasta, [out], keep_ids=keep_ids, workers=workers, progress=progress, tell=tell)
    assert manifest is not None
    return manifest


def build_stores(
    fasta: Sequence[Source],
    outs: Sequence[Path],
    *,
    divide: Divide | None = None,
    keep_ids: bool = True,
    workers: int = 1,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
    _range_bytes: int = RANGE_BYTES,
) -> list[StoreManifest | None]:
    """Write one store, or by `divide` several in one pass; ids may come back.

    All but the first are left out (and None) if they come to nothing; the first appears last. Works beside the first,
    so all must be on its file system. Raises as `build_token_store` does.
    """
    outs = [Path(os.path.abspath(out)) for out in outs]
    for out in outs:
        check_replaceable(out)
    building = building_folder(outs[0])
    with exclusive_folder(building, outs[0]):
        try:
            manifests = _build(fasta, outs, building, divide, keep_ids, workers, progress, tell, _range_bytes)
        except LostWorkerError:
            raise
        except KeyboardInterrupt as error:
            if not has_finished_parts(building):
                remove_exclusive_folder(building)
                raise
            raise InterruptedRunError(
                f"interrupted; the same command goes on from here, else delete {building}"
            ) from error
        except BaseException:
            remove_exclusive_folder(building)
            raise
        remove_exclusive_folder(building)
    return manifests


def building_folder(out: Path) -> Path:
    """Where a store is built; it may stay behind a kill."""
    return out.with_name(f".{out.name}.building")


def has_finished_parts(building: Path) -> bool:
    """Whether there is anything to go on from."""
    return any(building.glob("*/store-*")) or any(building.glob("*/part-*/part.json"))


def _build(
    fasta: Sequence[Source],
    outs: Sequence[Path],
    building: Path,
    divide: Divide | None,
    keep_ids: bool,
    workers: int,
    progress: Progress | None,
    tell: Callable[[str], None] | None,
    range_bytes: int,
) -> list[StoreManifest | None]:
    sources = inspect_sources(fasta)
    ranges = plan_ranges(fasta, range_bytes)
    folder = building / _name_work(sources, ranges, [len(outs), repr(divide), keep_ids])
    with writing(outs[0]):
        _remove_other_work(building, folder)
    tasks = [
        PartTask(
            number=number,
            chosen=chosen,
            folder=folder,
            out=outs[0],
            num_stores=len(outs),
            divide=divide,
            keep_ids=keep_ids,
        )
        for number, chosen in enumerate(ranges)
    ]
    with MergedStores(folder, outs, keep_ids=keep_ids) as merged:
        _merge(tasks, merged, workers, progress, tell)
        if difference := describe_difference(sources, fasta):
            raise InputError(f"changed while it was read: {difference}")
        return merged.finish(sources)


def _merge(
    tasks: Sequence[PartTask],
    merged: MergedStores,
    workers: int,
    progress: Progress | None,
    tell: Callable[[str], None] | None,
) -> None:
    """Build the parts that are missing, and append all in order."""
    if progress is not None:
        for task in tasks[: merged.num_parts]:
            progress(task.chosen.num_bytes)
    remaining = tasks[merged.num_parts :]
    finished = {task.number: part for task in remaining if (part := load_part(task.folder, task.number))}
    if tell is not None and (num_there := merged.num_parts + len(finished)):
        tell(f"going on with an interrupted build: {num_there:,} of {len(tasks):,} parts are there already")
    missing = [task for task in remaining if task.number not in finished]
    with closing(run_parts(missing, workers=workers, progress=progress)) as built:
        for task in remaining:
            if task.number not in finished:
                merged.add(next(built))
                continue
            merged.add(finished.pop(task.number))
            if progress is not None:
                progress(task.chosen.num_bytes)


def _name_work(sources: Sequence[SourceFile], ranges: Sequence[ByteRange], options: list[object]) -> str:
    """The same name for the same work, as long as the machine was not restarted: parts are not forced to the disk."""
    identity: list[object] = [
        FORMAT_VERSION,
        FINGERPRINT,
        options,
        list(map(asdict, sources)),
        list(map(asdict, ranges)),
    ]
    identity += [os.stat(source.path).st_mtime_ns if source.head_sha256 else uuid.uuid4().hex for source in sources]
    identity.append(_BOOT_ID.read_text(encoding="ascii") if _BOOT_ID.exists() else "")
    return hashlib.sha256(json.dumps(identity).encode("utf-8")).hexdigest()[:16]


def _remove_other_work(building: Path, folder: Path) -> None:
    for entry in building.iterdir():
        if entry.is_dir() and entry != folder:
            shutil.rmtree(entry)


def _build_with_unique_ids(
    fasta: Sequence[Source], out: Path, keep_ids: bool, on_duplicate: OnDuplicate, progress: Progress | None
) -> StoreManifest:
    """Whether an id is new depends on all before it."""
    report = FastaReport()
    with TokenStoreWriter(out, keep_ids=keep_ids) as writer:
        sources = inspect_sources(fasta)
        for batch in read_batches(fasta, on_duplicate=on_duplicate, report=report, consumed=progress):
            writer.append(batch.ids, batch.tokens, batch.ends)
        if difference := describe_difference(sources, fasta):
            raise InputError(f"changed while it was read: {difference}")
        return writer.finish(sources, report)
