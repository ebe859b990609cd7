"""Embeddings to a file: the format follows the suffix (.h5, .npy, .parquet, .pt).

npy (one matrix in input order) and parquet (one row a protein) are written with constant memory; pt is
gathered in memory, and only h5 can be resumed. How to read each format is said at its writer, for h5 in
`hdf5_embeddings`.
"""

import contextlib
import csv
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from protformer.errors import OutputError
from protformer.inference.embedding_record import (
    EmbeddingDtype,
    EmbeddingRecord,
    EmbeddingWriter,
    Per,
    partial_path,
)
from protformer.inference.hdf5_embeddings import Hdf5EmbeddingWriter, refuse_leftover

__all__ = [
    "SUFFIXES",
    "EmbeddingDtype",
    "EmbeddingRecord",
    "EmbeddingWriter",
    "Per",
    "open_embedding_writer",
]

SUFFIXES = (".h5", ".npy", ".parquet", ".pt")

Save = Callable[[object, Path], None]

_NPY_HEADER_BYTES = 128
_PARQUET_ROW_GROUP_BYTES = 16 * 2**20


def open_embedding_writer(
    path: Path,
    *,
    per: Per,
    dtype: EmbeddingDtype,
    description: Mapping[str, object],
    resume: bool,
    save: Save,
) -> EmbeddingWriter:
    """The writer for the suffix of `path`.

    `description` says what made the embeddings (model, layer, pooling, version, hash of the weights) in
    values that JSON knows. `save` writes an object of tensors to a path, for .pt. Raises OutputError where
    the file exists and `resume` is not given, where the format cannot do what is asked, or where the suffix
    is unknown.
    """
    check_output(path, resume=resume)
    suffix = path.suffix
    if suffix == ".h5":
        return Hdf5EmbeddingWriter(path, per=per, dtype=dtype, description=description, resume=resume)
    if suffix == ".npy":
        return NpyEmbeddingWriter(path, per=per, dtype=dtype, description=description)
    if suffix == ".parquet":
        return ParquetEmbeddingWriter(path, per=per, dtype=dtype, description=description)
    return TorchEmbeddingWriter(path, per=per, dtype=dtype, description=description, save=save)


def check_output(path: Path, *, resume: bool) -> None:
    """Raise OutputError where no writer could write: a name, a folder, or a file that is there already."""
    suffix = path.suffix
    if suffix not in SUFFIXES:
        raise OutputError(f"{path}: unknown suffix {suffix!r}; use one of {', '.join(SUFFIXES)}")
    if resume and suffix != ".h5":
        raise OutputError(f"{path}: only h5 can be resumed; leave out --resume, or write to {path.stem}.h5")
    if not path.parent.is_dir():
        if path.parent.exists():
            raise OutputError(f"{path}: {path.parent} is a file; choose another --out")
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it first")
    if not resume:
        _refuse_existing(path)


def _refuse_existing(path: Path) -> None:
    for existing in (path, *_npy_sidecars(path)) if path.suffix == ".npy" else (path,):
        if existing.exists():
            raise OutputError(f"{existing}: exists already; choose another --out, or delete it")
    if path.suffix == ".h5":
        refuse_leftover(path)


class NpyEmbeddingWriter(EmbeddingWriter):
    """One matrix, `X.npy`, its rows explained in `X.tsv`, the model in `X.json`.

    Per protein, row i of the matrix is line i of the table. Per residue, a protein has the rows `start:stop`,
    two more columns of its line. The matrix can be memory-mapped (`np.load(path, mmap_mode="r")`).
    """

    def __init__(self, path: Path, *, per: Per, dtype: EmbeddingDtype, description: Mapping[str, object]) -> None:
        super().__init__(path, per=per, dtype=dtype, description=description)
        if per == "both":
            raise OutputError(f"{path}: npy holds one matrix, not both; use .h5, .parquet or .pt, or another --per")
        self._table_path, self._description_path = _npy_sidecars(path)
        self._num_rows = 0
        self._num_features = 0
        self._matrix = self._partial.open("wb")
        self._matrix.write(_npy_header(self._dtype, 0, 0))
        self._table_file: IO[str] = partial_path(self._table_path).open("w", newline="", encoding="utf-8")
        self._table = csv.writer(self._table_file, delimiter="\t", lineterminator="\n")
        rows = ["start", "stop"] if per == "residue" else []
        self._table.writerow(["id", "header", "length", "truncated", *rows])

    def _append(self, record: EmbeddingRecord) -> None:
        values = record.protein[None] if record.protein is not None else record.residue
        assert values is not None
        if self._num_features not in (0, values.shape[1]):
            raise ValueError(f"record {record.id!r} has {values.shape[1]} features, others {self._num_features}")
        self._num_features = values.shape[1]
        start, self._num_rows = self._num_rows, self._num_rows + len(values)
        self._matrix.write(np.ascontiguousarray(values).tobytes())
        rows = [start, self._num_rows] if self._per == "residue" else []
        self._table.writerow([record.id, record.header, record.length, int(record.truncated), *rows])

    def _finish(self) -> None:
        self._matrix.seek(0)
        self._matrix.write(_npy_header(self._dtype, self._num_rows, self._num_features))
        self._matrix.close()
        self._table_file.close()
        description_partial = partial_path(self._description_path)
        description_partial.write_text(json.dumps(self._described(), indent=2) + "\n", encoding="utf-8")
        # The matrix takes its name last, so where it is, the other two are.
        os.replace(description_partial, self._description_path)
        os.replace(partial_path(self._table_path), self._table_path)

    def _abandon(self) -> None:
        for file in (self._matrix, self._table_file):
            with contextlib.suppress(OSError):
                file.close()
        for path in (self._path, self._table_path, self._description_path):
            partial_path(path).unlink(missing_ok=True)


class ParquetEmbeddingWriter(EmbeddingWriter):
    """One row a protein: id, header, length, truncated and `embedding`, or both `residue` and `protein`.

    A residue embedding is the list of its (residue, feature) matrix row by row; `dim` in the metadata of the
    schema gives the number of features, `protformer` there the model as JSON.
    """

    def __init__(self, path: Path, *, per: Per, dtype: EmbeddingDtype, description: Mapping[str, object]) -> None:
        super().__init__(path, per=per, dtype=dtype, description=description)
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise OutputError(f"{path}: parquet needs pyarrow; run: pip install 'protformer[parquet]'") from error
        self._partial.open("wb").close()  # a folder where nothing can be written is told before the work
        self._pyarrow: Any = pyarrow
        self._writer: Any = None
        self._rows: list[dict[str, Any]] = []
        self._row_bytes = 0

    def _append(self, record: EmbeddingRecord) -> None:
        row: dict[str, Any] = {
            "id": record.id,
            "header": record.header,
            "length": record.length,
            "truncated": record.truncated,
        }
        for part, values in (("residue", record.residue), ("protein", record.protein)):
            if values is not None:
                self._open(values.shape[-1])
                row[self._column(part)] = values.reshape(-1)
                self._row_bytes += values.nbytes
        self._rows.append(row)
        if self._row_bytes >= _PARQUET_ROW_GROUP_BYTES:
            self._flush()

    def _finish(self) -> None:
        self._open(0)
        self._flush()
        self._writer.close()

    def _abandon(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        rows, self._rows, self._row_bytes = self._rows, [], 0
        columns = [self._column_array([row[field.name] for row in rows], field) for field in self._writer.schema]
        self._writer.write_table(self._pyarrow.Table.from_arrays(columns, schema=self._writer.schema))

    def _column_array(self, entries: list[Any], field: Any) -> Any:
        pa = self._pyarrow
        if not pa.types.is_list(field.type):
            return pa.array(entries, type=field.type)
        # Handed over as a whole: pyarrow would convert a list of arrays number by number.
        offsets = np.cumsum([0, *(len(values) for values in entries)], dtype=np.int32)
        values = np.concatenate(entries) if entries else np.empty(0, self._dtype)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    def _open(self, num_features: int) -> None:
        """Open the file once the number of features, part of its schema, is known."""
        if self._writer is not None:
            return
        pa = self._pyarrow
        values = pa.list_(pa.float16() if self._dtype == np.float16 else pa.float32())
        parts = ("residue", "protein") if self._per == "both" else (self._per,)
        schema = pa.schema(
            [("id", pa.string()), ("header", pa.string()), ("length", pa.int64()), ("truncated", pa.bool_())]
            + [(self._column(part), values) for part in parts],
            metadata={"dim": str(num_features), "protformer": json.dumps(self._described())},
        )
        self._writer = pa.parquet.ParquetWriter(self._partial, schema, use_dictionary=False)

    def _column(self, part: str) -> str:
        return part if self._per == "both" else "embedding"


class TorchEmbeddingWriter(EmbeddingWriter):
    """One dict for `torch.load(path, weights_only=True)`, gathered in memory and saved on closing.

    `embeddings` maps an id to its tensors (`residue`, `protein`, as asked for); `index` holds the columns id,
    header, length and truncated in input order; the rest describes the model.
    """

    def __init__(
        self, path: Path, *, per: Per, dtype: EmbeddingDtype, description: Mapping[str, object], save: Save
    ) -> None:
        super().__init__(path, per=per, dtype=dtype, description=description)
        self._partial.open("wb").close()  # as for Parquet
        self._save = save
        self._embeddings: dict[str, dict[str, object]] = {}
        self._index: dict[str, list[object]] = {"id": [], "header": [], "length": [], "truncated": []}

    def _append(self, record: EmbeddingRecord) -> None:
        from torch import from_numpy

        if record.id in self._embeddings:
            raise OutputError(f"{self._path}: {record.id!r} is in the file already; ids must be unique")
        parts = {"residue": record.residue, "protein": record.protein}
        self._embeddings[record.id] = {
            part: from_numpy(values.copy()) for part, values in parts.items() if values is not None
        }
        for column, entries in self._index.items():
            entries.append(getattr(record, column))

    def _finish(self) -> None:
        try:
            self._save({**self._described(), "index": self._index, "embeddings": self._embeddings}, self._partial)
        except RuntimeError as error:
            # This is how torch says that the disk is full.
            raise OSError(f"torch could not save it: {error}") from error

    def _abandon(self) -> None:
        self._partial.unlink(missing_ok=True)


def _npy_sidecars(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".tsv"), path.with_suffix(".json")


def _npy_header(dtype: np.dtype[Any], num_rows: int, num_features: int) -> bytes:
    """NumPy's header (format 1.0), padded so that it can be rewritten once the number of rows is known."""
    magic = np.lib.format.magic(1, 0)
    length_bytes = 2
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": (num_rows, num_features)})
    size = _NPY_HEADER_BYTES - len(magic) - length_bytes
    return magic + size.to_bytes(length_bytes, "little") + text.ljust(size - 1).encode("latin1") + b"\n"
