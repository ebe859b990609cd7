"""All proteins of a corpus as one file of tokens, mapped into memory: random access without a copy in RAM.

In: FASTA files. Out: a folder with

- `tokens.bin`: uint8, all proteins in order, each closed by <eos>;
- `offsets.npy`: int64 (protein + 1,), protein i is tokens[offsets[i]:offsets[i + 1]], <eos> included;
- `ids.bin`, `ids_offsets.npy`: the ids in UTF-8 one after another, and where each begins (unless left out);
- `manifest.json`: see `store_manifest`.

One byte a residue and 8 a protein (16 and the id with ids). Building needs a few blocks of memory, and the
folder appears whole or not at all; reading maps the files and leaves the memory to the system's page cache.
"""

import os
import shutil
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import FINGERPRINT, NUM_TOKENS
from protformer.corpus.compression import Source, describe_source, readable
from protformer.corpus.duplicates import OnDuplicate
from protformer.corpus.fasta import FastaReport, read_batches
from protformer.corpus.store_manifest import (
    FORMAT_VERSION,
    SourceFile,
    StoreManifest,
    describe_difference,
    inspect_sources,
    parse_manifest,
)
from protformer.errors import InputError, OutputError

MANIFEST_FILE = "manifest.json"
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.npy"
IDS_FILE = "ids.bin"
IDS_OFFSETS_FILE = "ids_offsets.npy"


def build_token_store(
    fasta: Sequence[Source],
    out: Path,
    *,
    keep_ids: bool = True,
    on_duplicate: OnDuplicate = "allow",
    progress: Callable[[int], None] | None = None,
) -> StoreManifest:
    """Write the proteins of FASTA files to a token store, in order.

    `progress` is told how many bytes of the files were read since it was last told. An older store at `out`
    is replaced at the end. Raises InputError for the files, OutputError for `out`.
    """
    report = FastaReport()
    with TokenStoreWriter(out, keep_ids=keep_ids) as writer:
        sources = inspect_sources(fasta)
        for batch in read_batches(fasta, on_duplicate=on_duplicate, report=report, consumed=progress):
            writer.append(batch.ids, batch.tokens, batch.ends)
        if difference := describe_difference(sources, fasta):
            raise InputError(f"changed while it was read: {difference}")
        return writer.finish(sources, report)


class TokenStore:
    """A token store, open for reading; indices of proteins count from 0 in the order of the FASTA files."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        """Use `open`."""
        self.path, self.manifest = path, manifest
        self.tokens = _map_bytes(path / TOKENS_FILE)
        self.offsets = _map_offsets(path / OFFSETS_FILE)
        # Slices of np.memmap are several times slower than those of an array over the same memory.
        self._plain_tokens = self.tokens.view(np.ndarray)
        self._ids: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None

    @classmethod
    def open(cls, path: Path) -> "TokenStore":
        """Map the store in this folder, read-only. Raises InputError if it is none, or not whole."""
        path = Path(path)
        file = path / MANIFEST_FILE
        if path.is_dir() and not file.exists():
            raise InputError(f"{describe_source(path)}: not a token store: it has no {MANIFEST_FILE}")
        with readable(file):
            text = file.read_bytes().decode("utf-8", "replace")
        store = cls(path, parse_manifest(text, file))
        store._check_sizes()
        return store

    def __len__(self) -> int:
        """Number of proteins."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Residues, and one <eos> a protein."""
        return len(self._plain_tokens)

    def protein(self, index: int) -> NDArray[np.uint8]:
        """(residue,) tokens of one protein without its <eos>; a view of the file."""
        self._check_index(index)
        return self._plain_tokens[int(self.offsets[index]) : int(self.offsets[index + 1]) - 1]

    def id(self, index: int) -> str:
        """The id of one protein. Raises InputError if the store was made without ids."""
        self._check_index(index)
        if self._ids is None:
            if not (self.path / IDS_FILE).exists():
                raise InputError(f"{describe_source(self.path)}: this token store was made without ids")
            self._ids = self._map_ids()
        text, offsets = self._ids
        return text[int(offsets[index]) : int(offsets[index + 1])].tobytes().decode("utf-8")

    def difference_from(self, fasta: Sequence[Source]) -> str | None:
        """One line on how these files differ from those that the store was made from; None if they do not."""
        return describe_difference(self.manifest.sources, fasta)

    def __reduce__(self) -> tuple[Callable[[Path], "TokenStore"], tuple[Path]]:
        """A worker process maps the files again instead of receiving a copy of them."""
        return TokenStore.open, (self.path,)

    def _map_ids(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        text = _map_bytes(self.path / IDS_FILE).view(np.ndarray)
        offsets = _map_offsets(self.path / IDS_OFFSETS_FILE)
        if len(offsets) != len(self.offsets) or int(offsets[-1]) != len(text):
            raise InputError(f"{describe_source(self.path)}: damaged token store: the ids do not fit the proteins")
        return text, offsets

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"protein {index} of {len(self)}")

    def _check_sizes(self) -> None:
        manifest = self.manifest
        expected = (manifest.num_proteins, manifest.num_proteins + manifest.num_residues)
        found = (len(self), self.num_tokens)
        if found != expected or int(self.offsets[0]) != 0 or int(self.offsets[-1]) != self.num_tokens:
            raise InputError(
                f"{describe_source(self.path)}: damaged token store: {found[0]:,} proteins in {found[1]:,} "
                f"tokens, the manifest says {expected[0]:,} in {expected[1]:,}; prepare it again"
            )


class TokenStoreWriter:
    """Writes a token store; use in `with`, call `finish` at the end. Without that nothing is left behind.

    The files grow in a folder beside `out` that takes its place at the end.
    """

    def __init__(self, out: Path, *, keep_ids: bool = True) -> None:
        self._out = Path(os.path.abspath(out))
        self._folder = self._out.with_name(f".{self._out.name}.{os.getpid()}.tmp")
        self._keep_ids = keep_ids
        self._counts = np.zeros(NUM_TOKENS, dtype=np.int64)
        self._files: dict[str, BufferedWriter] = {}
        self._offsets: dict[str, _OffsetsFile] = {}

    def __enter__(self) -> "TokenStoreWriter":
        if self._out.exists() and not _is_replaceable(self._out):
            raise OutputError(f"{describe_source(self._out)}: exists and is not a token store; choose another --out")
        with ExitStack() as on_failure, _writing(self._out):
            on_failure.callback(self._remove)
            self._out.parent.mkdir(parents=True, exist_ok=True)
            if self._folder.exists():  # left by a process that was killed and had the same number
                shutil.rmtree(self._folder)
            self._folder.mkdir()
            self._start(TOKENS_FILE, OFFSETS_FILE)
            if self._keep_ids:
                self._start(IDS_FILE, IDS_OFFSETS_FILE)
            on_failure.pop_all()
        return self

    def append(self, ids: Sequence[str], tokens: bytes, ends: NDArray[np.int64]) -> None:
        """Add proteins: their tokens, each closed by <eos>, and where each ends, its <eos> included."""
        with _writing(self._out):
            self._files[TOKENS_FILE].write(tokens)
            self._offsets[TOKENS_FILE].append(ends)
            self._counts += np.bincount(np.frombuffer(tokens, np.uint8), minlength=NUM_TOKENS)
            if self._keep_ids:
                encoded = [name.encode("utf-8") for name in ids]
                self._files[IDS_FILE].write(b"".join(encoded))
                self._offsets[IDS_FILE].append(np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def finish(self, sources: Sequence[SourceFile], report: FastaReport) -> StoreManifest:
        """Put the store in its place; returns its manifest."""
        num_proteins = self._offsets[TOKENS_FILE].count
        manifest = StoreManifest(
            format_version=FORMAT_VERSION,
            alphabet=FINGERPRINT,
            sources=tuple(sources),
            num_proteins=num_proteins,
            num_residues=int(self._counts.sum()) - num_proteins,
            residue_counts=tuple(self._counts.tolist()),
            report=report,
        )
        with _writing(self._out):
            for offsets in self._offsets.values():
                offsets.finish()
            self._files[MANIFEST_FILE] = self._create(MANIFEST_FILE)
            self._files[MANIFEST_FILE].write(manifest.to_json().encode("utf-8"))
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            _sync_folder(self._folder)
            self._put_in_place()
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def _start(self, data: str, offsets: str) -> None:
        self._files[data] = self._create(data)
        self._files[offsets] = self._create(offsets)
        self._offsets[data] = _OffsetsFile(self._files[offsets])

    def _create(self, name: str) -> BufferedWriter:
        return open(self._folder / name, "wb")

    def _remove(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a full disk, which was reported when it was met
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _put_in_place(self) -> None:
        replaced = self._out.with_name(f".{self._out.name}.{os.getpid()}.old")
        if self._out.exists():
            self._out.rename(replaced)
        self._folder.rename(self._out)
        _sync_folder(self._out.parent)
        shutil.rmtree(replaced, ignore_errors=True)


class _OffsetsFile:
    """An .npy file of int64 that grows: 0, and the running total of what is appended."""

    def __init__(self, file: BufferedWriter) -> None:
        self.count = 0
        self._total = 0
        self._file = file
        self._write_header()
        file.write(np.zeros(1, dtype="<i8").tobytes())

    def append(self, ends: NDArray[np.int64]) -> None:
        self._file.write((ends + self._total).astype("<i8").tobytes())
        self.count += len(ends)
        self._total += int(ends[-1]) if len(ends) else 0

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        """NumPy leaves room for the shape to grow, so the header can be written again over the old one."""
        header = {"descr": "<i8", "fortran_order": False, "shape": (self.count + 1,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _is_replaceable(out: Path) -> bool:
    """Whether nothing is in this folder but a token store, or nothing at all."""
    files = {TOKENS_FILE, OFFSETS_FILE, IDS_FILE, IDS_OFFSETS_FILE, MANIFEST_FILE}
    return out.is_dir() and {entry.name for entry in out.iterdir()} <= files


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{describe_source(out)}: the token store cannot be written: {reason}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _map_bytes(file: Path) -> NDArray[np.uint8]:
    with readable(file):
        # An empty file cannot be mapped.
        is_empty = file.stat().st_size == 0
        return np.empty(0, dtype=np.uint8) if is_empty else np.memmap(file, dtype=np.uint8, mode="r")


def _map_offsets(file: Path) -> NDArray[np.int64]:
    try:
        with readable(file):
            offsets = np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise InputError(f"{describe_source(file)}: damaged token store: not an array; prepare it again") from error
    if offsets.dtype != np.dtype("<i8") or offsets.ndim != 1 or len(offsets) == 0:
        raise InputError(f"{describe_source(file)}: damaged token store: not offsets of proteins; prepare it again")
    return typing.cast(NDArray[np.int64], offsets)
