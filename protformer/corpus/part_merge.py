"""Finished parts to stores: appended in order, with a journal that a killed build goes on from.

In: parts, one after another. Out: the stores in their places. A part's folder is removed once its files are appended
and the journal says so; what was appended behind the journal's last word is cut off again. The first part's files
become the stores' own, so that a source read as one part is never copied.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from protformer.corpus.build_part import PartResult, load_part, part_folder, store_folder
from protformer.corpus.records import FastaReport
from protformer.corpus.store_files import StoreFiles, writing
from protformer.corpus.store_manifest import SourceFile, StoreManifest
from protformer.corpus.store_writer import finish_store, put_in_place

JOURNAL_FILE = "merged.json"


class MergedStores:
    """The stores so far; use in `with`."""

    def __init__(self, folder: Path, outs: Sequence[Path], *, keep_ids: bool) -> None:
        """Go on with what the folder holds, or begin."""
        self._folder, self._outs, self._keep_ids = folder, outs, keep_ids
        self._leaving = ExitStack()
        self._files: list[StoreFiles] = []
        self._report = FastaReport()
        self.num_parts = 0

    def __enter__(self) -> "MergedStores":
        with writing(self._outs[0]):
            self._folder.mkdir(exist_ok=True)
            journal = self._folder / JOURNAL_FILE
            tree = json.loads(journal.read_text(encoding="utf-8")) if journal.exists() else None
            folders = [store_folder(self._folder, number) for number in range(len(self._outs))]
            if tree is not None and all(each.is_dir() for each in folders):
                self.num_parts = tree["num_parts"]
                self._adopt(PartResult.from_json(tree["so_far"]))
            else:  # nothing yet, or killed while the first files were taken over, or the last ones put in their places
                for each in folders:
                    shutil.rmtree(each, ignore_errors=True)
                journal.unlink(missing_ok=True)
            self._remove_parts_before(self.num_parts)
        return self

    def __exit__(self, *exception: object) -> None:
        self._leaving.close()

    def add(self, part: PartResult) -> None:
        """Append the next part."""
        folder = part_folder(self._folder, self.num_parts)
        with writing(self._outs[0]):
            if self._files:
                for number, files in enumerate(self._files):
                    files.append_files(store_folder(folder, number), part.counts[number])
                    files.finish(sync=False)
                self._report.merge(part.report)
            else:
                for number in range(len(self._outs)):
                    store_folder(folder, number).rename(store_folder(self._folder, number))
                self._adopt(part)
            self.num_parts += 1
            self._write_journal()
            shutil.rmtree(folder)

    def finish(self, sources: Sequence[SourceFile]) -> list[StoreManifest | None]:
        """Put the stores in their places, the first one last; of the others those that hold anything."""
        manifests: list[StoreManifest | None] = [None] * len(self._outs)
        with writing(self._outs[0]):
            for number in reversed(range(len(self._outs))):
                files, folder = self._files[number], store_folder(self._folder, number)
                if number == 0 or files.counts.num_proteins:
                    manifests[number] = finish_store(folder, files, sources, self._report)
                    put_in_place(folder, self._outs[number])
        return manifests

    def _adopt(self, so_far: PartResult) -> None:
        self._report = so_far.report
        for number, counts in enumerate(so_far.counts):
            files = StoreFiles(store_folder(self._folder, number), keep_ids=self._keep_ids, start=counts)
            self._leaving.callback(files.close)
            self._files.append(files)

    def _write_journal(self) -> None:
        so_far = PartResult(report=self._report, counts=tuple(files.counts for files in self._files))
        partial = self._folder / f"{JOURNAL_FILE}.partial"
        partial.write_text(json.dumps({"num_parts": self.num_parts, "so_far": so_far.to_json()}), encoding="utf-8")
        os.replace(partial, self._folder / JOURNAL_FILE)

    def _remove_parts_before(self, number: int) -> None:
        """Also parts that were not finished, or not taken over whole."""
        for entry in self._folder.glob("part-*"):
            is_named = entry.suffix != ".tmp"
            each = int(entry.name.removeprefix("part-")) if is_named else -1
            if each < number or load_part(self._folder, each) is None:
                shutil.rmtree(entry)
