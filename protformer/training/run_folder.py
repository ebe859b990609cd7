"""What a training run keeps on disk, and how it is found again.

RUN/config.yaml               resolved configuration
RUN/store, RUN/validation     token stores (validation is absent when nothing is held out); with source_weights the
                              second --fasta has RUN/store-2 and RUN/validation-2, and so on; a second --val-fasta
                              has RUN/validation-2
RUN/clusters, RUN/pairs.npy   what --clusters and --pairs gave, as indices of proteins
RUN/initial_model.json        what --init-from named
RUN/metrics.csv, curves.png   figures as they come; also readiness.csv if training.log_readiness is on
                              and distillation.csv with --distill
RUN/validation.csv            a line for each validation and set of held-out proteins
RUN/tensorboard, wandb        the same figures, where these packages are (`metric_sinks`)
RUN/status.json, .running     how far the run has come, and the lock of the process that trains (`run_status`)
RUN/checkpoints/last.ckpt     state for --resume only
RUN/model/                    the model folder
"""

import csv
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protformer.corpus.store_manifest import SourceFile
from protformer.corpus.token_store import MANIFEST_FILE
from protformer.errors import InputError, OutputError
from protformer.unreadable import UNREADABLE, reason
from protformer.whole_file import write_whole

METRIC_FIELDS = (
    "step", "tokens", "train_loss", "val_loss", "val_perplexity", "val_accuracy", "learning_rate", "tokens_per_second",
    "peak_memory_gb", "unigram_perplexity", "unigram_accuracy", "gradient_norm", "skipped_steps",
)  # fmt: skip
VALIDATION_FIELDS = (
    "step", "set", "num_masked", "loss", "perplexity", "accuracy", "unigram_perplexity", "unigram_accuracy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class StorePaths:
    """What a run reads: token stores, and what --clusters and --pairs gave."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    """Empty if nothing is held out."""
    validation_names: tuple[str, ...]
    """Of the set that each of these stores belongs to."""
    clusters: Path | None = None
    pairs: Path | None = None
    clusters_source: SourceFile | None = None
    pairs_source: SourceFile | None = None
    """The tables that these were made from, to know them again on a resume."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside one run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def validation(self) -> Path:
        return self.root / "validation.csv"

    @property
    def distillation(self) -> Path:
        return self.root / "distillation.csv"

    @property
    def readiness(self) -> Path:
        return self.root / "readiness.csv"

    @property
    def curves(self) -> Path:
        return self.root / "curves.png"

    @property
    def initial_model(self) -> Path:
        return self.root / "initial_model.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoints" / "last.ckpt"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def refuse_trained(self) -> None:
        """Raise OutputError if a run has come to a checkpoint here.

        That is an earlier run for certain: the processes of one job write none before all of them have begun.
        """
        if self.root.exists() and not self.root.is_dir():
            raise OutputError(f"{self.root}: is a file; choose another --out")
        if self.checkpoint.exists():
            raise self.exists_already()

    def refuse_damaged(self) -> None:
        """Raise InputError if the checkpoint cannot be read from end to end."""
        if not self.checkpoint.is_file():
            return
        try:
            with zipfile.ZipFile(self.checkpoint) as file:
                damaged = file.testzip() is not None
        except UNREADABLE:
            damaged = True
        if damaged:
            raise self._is_damaged(self.checkpoint)

    def _is_damaged(self, path: Path) -> InputError:
        return InputError(
            f"{path}: is damaged; put back a copy of it, or begin another run from the weights of the last save by"
            f" --init-from {self.model}"
        )

    def exists_already(self) -> OutputError:
        return OutputError(f"{self.root}: exists already; choose another --out, or add --resume to go on with it")

    def save_stores(self, paths: StorePaths) -> None:
        """Note where the token stores are; those inside the run folder relative to it, so that it may be moved."""

        def relative(path: Path) -> str:
            return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

        tree = {
            "train": [relative(path) for path in paths.train],
            "validation": [relative(path) for path in paths.validation],
            "validation_names": list(paths.validation_names),
            "clusters": None if paths.clusters is None else relative(paths.clusters),
            "pairs": None if paths.pairs is None else relative(paths.pairs),
            "clusters_source": None if paths.clusters_source is None else asdict(paths.clusters_source),
            "pairs_source": None if paths.pairs_source is None else asdict(paths.pairs_source),
            "train_sha256": [_sha256_of_manifest(path) for path in paths.train],
        }
        text = json.dumps(tree, indent=1) + "\n"
        write_whole(self.root / "stores.json", lambda partial: partial.write_text(text, encoding="utf-8"))

    def has_stores(self, paths: StorePaths) -> bool:
        """Whether the training stores are still those that `save_stores` saw."""
        return self._read_stores()[1] == [_sha256_of_manifest(path) for path in paths.train]

    def load_stores(self) -> StorePaths:
        """What `save_stores` noted. Raises InputError if that is damaged."""
        return self._read_stores()[0]

    def _read_stores(self) -> tuple[StorePaths, list[str]]:
        path = self.root / "stores.json"
        try:
            tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return self._store_paths(tree), [str(digest) for digest in tree["train_sha256"]]
        except (LookupError, TypeError, ValueError) as error:
            raise self._is_damaged(path) from error

    def _store_paths(self, tree: Mapping[str, Any]) -> StorePaths:
        def path(name: str) -> Path | None:
            return None if tree[name] is None else self.root / tree[name]

        def source(name: str) -> SourceFile | None:
            return None if tree[name] is None else SourceFile(**tree[name])

        return StorePaths(
            train=tuple(self.root / name for name in tree["train"]),
            validation=tuple(self.root / name for name in tree["validation"]),
            validation_names=tuple(tree["validation_names"]),
            clusters=path("clusters"),
            pairs=path("pairs"),
            clusters_source=source("clusters_source"),
            pairs_source=source("pairs_source"),
        )


def _sha256_of_manifest(store: Path) -> str:
    """Of the file that names the store's sources and counts their residues."""
    return hashlib.sha256((store / MANIFEST_FILE).read_bytes()).hexdigest()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of `metrics.csv` or its like, empty if there is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_metrics(path: Path, rows: Sequence[Mapping[str, object]], fields: Sequence[str] = METRIC_FIELDS) -> None:
    """Add rows, and bring them to the disk: a checkpoint that is written later knows of them."""
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, fields, restval="").writerows(rows)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def keep_metrics_until(
    path: Path, step: int, fields: Sequence[str] = METRIC_FIELDS, *, then: Sequence[Mapping[str, object]] = ()
) -> None:
    """Drop rows behind `step`, and put those of `then` there, in one move.

    A run that was killed had gone further than its last checkpoint. Raises InputError if a row is damaged.
    """

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields, restval="")
            writer.writeheader()
            writer.writerows(kept)
            writer.writerows(then)

    try:
        rows = read_metrics(path)
        if rows and None in rows[-1].values():
            rows.pop()  # cut off while it was written, behind the last checkpoint
        for row in rows:
            _require_whole(row, fields)
        kept = [row for row in rows if int(row["step"]) <= step]
    except (LookupError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path}: is damaged ({reason(error)}); mend it, or delete it to go on without its rows"
        ) from error
    write_whole(path, write)


def _require_whole(row: Mapping[str, str | None], fields: Sequence[str]) -> None:
    """Raise ValueError if the row has other cells than it was written with, or words where numbers belong."""
    if not row.keys() <= set(fields) or None in row.values():
        raise ValueError(f"step {row['step']}: not the columns of the header")
    for name in row.keys() & {*METRIC_FIELDS, *VALIDATION_FIELDS} - {"set"}:
        float(row[name] or "nan")
