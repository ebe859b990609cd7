"""What a file or folder made by protformer holds.

In: a path. Out: a flat mapping of names to values; the first is `kind`. Nothing is loaded but headers and tables.
"""

import csv
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from protformer.config import load_run_config
from protformer.corpus.split_manifest import SPLIT_FILE, read_split_manifest
from protformer.corpus.token_store import MANIFEST_FILE, TokenStore
from protformer.errors import ConfigError, InputError
from protformer.inference.embedding_writers import SUFFIXES
from protformer.inference.written_map import read_written_map
from protformer.model_description import CONFIG_FILE, read_description
from protformer.run_status import is_running, read_status
from protformer.unreadable import UNREADABLE, reason

Facts = dict[str, object]

_DAMAGE: tuple[type[Exception], ...] = (*UNREADABLE, ConfigError)


def describe(path: Path) -> Facts:
    """The facts about `path`. Raises InputError if it is nothing that protformer makes."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    read = _reader(path)
    if read is None:
        raise InputError(
            f"{path}: neither a token store, a split, a model folder, a run folder, an embedding file"
            f" ({', '.join(SUFFIXES)}), nor a contact map (.npz)"
        )
    try:
        return read(path)
    except _DAMAGE as error:
        raise InputError(f"{path}: damaged, or not written by protformer ({reason(error)})") from error


def _reader(path: Path) -> Callable[[Path], Facts] | None:
    if not path.is_dir():
        return _FILES.get(path.suffix)
    if (path / MANIFEST_FILE).is_file():
        return _describe_store
    if (path / SPLIT_FILE).is_file():
        return _describe_split
    if (path / "config.yaml").is_file() and (path / "stores.json").is_file():
        return _describe_run
    return _describe_model if (path / CONFIG_FILE).is_file() else None


def _describe_store(path: Path) -> Facts:
    store = TokenStore.open(path)
    lengths = np.diff(store.offsets) - 1
    facts: Facts = {
        "kind": "token store",
        "proteins": len(store),
        "residues": store.manifest.num_residues,
        "sources": ", ".join(Path(source.path).name for source in store.manifest.sources),
    }
    if len(store):
        facts |= {
            "shortest": int(lengths.min()),
            "median_length": float(np.median(lengths)),
            "longest": int(lengths.max()),
        }
    return facts


def _describe_split(path: Path) -> Facts:
    """The manifest, nested values under names of their own, and what is missing left out."""
    manifest = asdict(read_split_manifest(path))
    facts: Facts = {"kind": "split"}
    for name, value in manifest.items():
        if isinstance(value, dict):
            facts |= {f"{name}_{_as_name(key)}": item for key, item in value.items()}
        elif value not in (None, []) and name != "format_version":
            facts[name] = value
    return facts


def _as_name(words: str) -> str:
    """`similar_to_another_side` for "similar to another side's"."""
    return re.sub(r"'s\b|[^\w ]", "", words).replace(" ", "_")


def _describe_model(path: Path) -> Facts:
    description = read_description(path)
    model, training = description.model, description.training
    facts: Facts = {
        "kind": "model",
        "attention": model.attention.kind,
        "direction": model.direction,
        "layers": model.num_layers,
        "heads": model.num_heads,
        "hidden_size": model.hidden_size,
        "feed_forward_size": model.feed_forward_size,
        "packing": description.packing,
        "lm_head": "trained" if description.has_lm_head else "untrained",
        "contact_head": "yes" if model.contact_head else "none",
        "trained_on": ", ".join(training.sources),
        "steps": training.steps,
        "tokens_seen": training.tokens_seen,
        "protformer_version": description.protformer_version,
    }
    return facts | ({"converted_from": description.converted_from} if description.converted_from else {})


def _describe_run(path: Path) -> Facts:
    facts: Facts = {"kind": "run"} | _describe_progress(path)
    latest: dict[str, str] = {}
    for row in _rows(path / "metrics.csv"):
        latest |= {name: value for name, value in row.items() if name and value}  # no name: more cells than columns
    facts |= {f"latest_{name}": _short_number(value) for name, value in latest.items()}
    if latest:
        places = int(latest["step"]) * load_run_config(str(path / "config.yaml")).training.tokens_per_step
        facts["fill_rate"] = round(int(latest["tokens"]) / places, 4)
    for row in _rows(path / "validation.csv"):
        facts[f"validation_{row['set']}"] = (
            f"step {row['step']}: perplexity {float(row['perplexity']):.3f} (unigram"
            f" {float(row['unigram_perplexity']):.3f}), accuracy {float(row['accuracy']):.2%} (unigram"
            f" {float(row['unigram_accuracy']):.2%})"
        )
    if (path / "model" / CONFIG_FILE).is_file():
        facts |= {f"model_{name}": value for name, value in _describe_model(path / "model").items() if name != "kind"}
    return facts


def _describe_progress(path: Path) -> Facts:
    """How far the run is; rates and the time left are those of its last sitting."""
    status = read_status(path)
    if status is None:
        return {"state": "starting" if is_running(path) else "not started"}
    running = is_running(path)
    now = time.time()
    facts: Facts = {
        "state": "running" if running else "finished" if status.step >= status.max_steps else "stopped",
        "step": f"{status.step} of {status.max_steps}",
        "residues_seen": status.residues_seen,
        "residues_per_second": round(status.residues_per_second),
        "skipped_steps": status.skipped_steps,
        "seconds_since_update": round(now - status.updated),
    }
    if status.train_loss is not None:
        facts["train_loss"] = round(status.train_loss, 4)
    if running and status.seconds_left is not None:
        facts["seconds_left"] = round(max(0.0, status.seconds_left - (now - status.updated)))
    if status.checkpoint_step is not None and status.checkpoint_time is not None:
        facts |= {
            "checkpoint_step": status.checkpoint_step,
            "seconds_since_checkpoint": round(now - status.checkpoint_time),
        }
    return facts


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _short_number(text: str) -> object:
    """A cell of a table as a number of at most six digits, if it is one with more."""
    try:
        return int(text) if text.isdigit() else float(f"{float(text):.6g}")
    except ValueError:
        return text


def _embeddings(path: Path) -> Facts:
    return {"kind": f"embeddings ({path.suffix[1:]})"}


def _describe_h5(path: Path) -> Facts:
    import h5py

    from protformer.inference.hdf5_embeddings import INDEX_GROUP

    with h5py.File(path, "r") as file:
        facts = _embeddings(path) | {name: _plain(value) for name, value in file.attrs.items()}
        if INDEX_GROUP in file:
            facts["proteins"] = len(file[INDEX_GROUP]["id"])
    return facts


def _describe_npy(path: Path) -> Facts:
    matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    return _embeddings(path) | {"rows": matrix.shape[0], "features": matrix.shape[-1], "dtype": str(matrix.dtype)}


def _describe_parquet(path: Path) -> Facts:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install 'protformer[parquet]'") from error
    metadata = pyarrow.parquet.read_metadata(path)
    own = {
        key.decode(): value.decode() for key, value in (metadata.metadata or {}).items() if not key.startswith(b"ARROW")
    }
    facts = _embeddings(path) | {"proteins": metadata.num_rows}
    for name, value in own.items():
        facts |= json.loads(value) if value.startswith("{") else {name: value}
    return facts


def _describe_pt(path: Path) -> Facts:
    from protformer.checkpoint import load_tensors

    content = load_tensors(path)
    told = {name: _plain(value) for name, value in content.items() if isinstance(value, str | int | float)}
    return _embeddings(path) | told


def _describe_map(path: Path) -> Facts:
    written = read_written_map(path)
    lengths = list(map(len, written.chains))
    facts: Facts = {
        "kind": "contact map",
        "residues": sum(lengths),
        "chain_ids": list(written.chain_ids),
        "chain_lengths": lengths,
    }
    return facts | dict(written.provenance) | {"written_with": list(written.files)}


def _plain(value: object) -> object:
    """Values of HDF5 attributes as JSON has them."""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str) and value.startswith("{"):
        return json.loads(value)
    return value


_FILES: dict[str, Callable[[Path], Facts]] = {
    ".h5": _describe_h5,
    ".npy": _describe_npy,
    ".parquet": _describe_parquet,
    ".pt": _describe_pt,
    ".npz": _describe_map,
}
