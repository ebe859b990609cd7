"""A token store from proteins as they come: whole at the end, or not there at all.

In: batches of proteins. Out: a store in its place, with its manifest. The files grow in a folder beside that place.
`store_build` makes stores from FASTA, on several cores and resumable; this is for who selects proteins otherwise.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import FINGERPRINT
from protformer.corpus.compression import describe_source
from protformer.corpus.letters import count_codes
from protformer.corpus.records import FastaReport, Words
from protformer.corpus.store_files import (
    IDS_FILE,
    IDS_OFFSETS_FILE,
    MANIFEST_FILE,
    OFFSETS_FILE,
    TOKENS_FILE,
    StoreCounts,
    StoreFiles,
    writing,
)
from protformer.corpus.store_manifest import FORMAT_VERSION, SourceFile, StoreManifest
from protformer.errors import OutputError
from protformer.whole_file import sync_folder


class TokenStoreWriter:
    """Writes a token store; use in `with`, call `finish` at the end. Without that nothing is left behind."""

    def __init__(self, out: Path, *, keep_ids: bool = True) -> None:
        self._out = Path(os.path.abspath(out))
        self._folder = self._out.with_name(f".{self._out.name}.{os.getpid()}.tmp")
        self._keep_ids = keep_ids
        self._closing = ExitStack()

    def __enter__(self) -> "TokenStoreWriter":
        check_replaceable(self._out)
        with ExitStack() as on_failure, writing(self._out):
            on_failure.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self._out.parent.mkdir(parents=True, exist_ok=True)
            if self._folder.exists():  # left by a process that was killed and had the same number
                shutil.rmtree(self._folder)
            self._folder.mkdir()
            self._files = StoreFiles(self._folder, keep_ids=self._keep_ids)
            on_failure.callback(self._files.close)
            self._closing = on_failure.pop_all()
        return self

    def append(self, ids: Sequence[str], tokens: bytes, ends: NDArray[np.int64]) -> None:
        """Add proteins: their tokens, each closed by <eos>, and where each ends, its <eos> included."""
        with writing(self._out):
            self._files.append(Words.of(ids), tokens, ends, count_codes(tokens))

    def finish(self, sources: Sequence[SourceFile], report: FastaReport) -> StoreManifest:
        """Put the store in its place; returns its manifest."""
        with writing(self._out):
            manifest = finish_store(self._folder, self._files, sources, report)
            put_in_place(self._folder, self._out)
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.close()


def finish_store(folder: Path, files: StoreFiles, sources: Sequence[SourceFile], report: FastaReport) -> StoreManifest:
    """Complete the files of a store by a manifest, all of it on the disk."""
    manifest = make_manifest(files.counts, sources, report)
    files.finish(sync=True)
    files.close()
    with (folder / MANIFEST_FILE).open("wb") as file:
        file.write(manifest.to_json().encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    return manifest


def make_manifest(counts: StoreCounts, sources: Sequence[SourceFile], report: FastaReport) -> StoreManifest:
    return StoreManifest(
        format_version=FORMAT_VERSION,
        alphabet=FINGERPRINT,
        sources=tuple(sources),
        num_proteins=counts.num_proteins,
        num_residues=counts.num_tokens - counts.num_proteins,
        residue_counts=counts.token_counts,
        report=report,
    )


def check_replaceable(out: Path) -> None:
    """Refuse a place where anything but a token store or an empty folder is."""
    files = {TOKENS_FILE, OFFSETS_FILE, IDS_FILE, IDS_OFFSETS_FILE, MANIFEST_FILE}
    if out.exists() and not (out.is_dir() and {entry.name for entry in out.iterdir()} <= files):
        raise OutputError(f"{describe_source(out)}: exists and is not a token store; choose another --out")


def put_in_place(folder: Path, out: Path) -> None:
    """Let a finished store take the place of what `check_replaceable` found there."""
    replaced = folder.with_name(f"{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)  # of a process that was killed right here
    if out.exists():
        out.rename(replaced)
    folder.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
