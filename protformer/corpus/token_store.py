"""All proteins of a corpus as one file of tokens, mapped into memory: random access without a copy in RAM.

In: a folder with

- `tokens.bin`: uint8, all proteins in order, each closed by <eos>;
- `offsets.npy`: int64 (protein + 1,), protein i is tokens[offsets[i]:offsets[i + 1]], <eos> included;
- `ids.bin`, `ids_offsets.npy`: the ids in UTF-8 one after another, and where each begins (unless left out);
- `manifest.json`: see `store_manifest`.

Out: proteins and ids by number.

One byte a residue and 8 a protein (16 and the id with ids). `store_build` makes stores; reading maps the files and
leaves the memory to the system's page cache.
"""

import tokenize
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protformer.corpus.compression import Source, describe_source, readable
from protformer.corpus.store_build import build_token_store
from protformer.corpus.store_files import IDS_FILE, IDS_OFFSETS_FILE, MANIFEST_FILE, OFFSETS_FILE, TOKENS_FILE
from protformer.corpus.store_manifest import StoreManifest, describe_difference, parse_manifest
from protformer.corpus.store_writer import TokenStoreWriter
from protformer.errors import InputError

__all__ = [
    "IDS_FILE",
    "IDS_OFFSETS_FILE",
    "MANIFEST_FILE",
    "OFFSETS_FILE",
    "TOKENS_FILE",
    "TokenStore",
    "TokenStoreWriter",
    "build_token_store",
]


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


def _map_bytes(file: Path) -> NDArray[np.uint8]:
    with readable(file):
        # An empty file cannot be mapped.
        is_empty = file.stat().st_size == 0
        return np.empty(0, dtype=np.uint8) if is_empty else np.memmap(file, dtype=np.uint8, mode="r")


def _map_offsets(file: Path) -> NDArray[np.int64]:
    try:
        with readable(file):
            offsets = np.load(file, mmap_mode="r")
    except (EOFError, ValueError, tokenize.TokenError) as error:
        raise InputError(f"{describe_source(file)}: damaged token store: not an array; prepare it again") from error
    if offsets.dtype != np.dtype("<i8") or offsets.ndim != 1 or len(offsets) == 0:
        raise InputError(f"{describe_source(file)}: damaged token store: not offsets of proteins; prepare it again")
    return typing.cast(NDArray[np.int64], offsets)
