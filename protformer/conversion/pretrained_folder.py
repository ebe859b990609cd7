"""Pretrained weights as others publish them: a folder in the layout of Hugging Face's `transformers`.

In: a folder, or a hub id such as `facebook/esm2_t6_8M_UR50D`, which huggingface_hub brings into its cache. Out: a
`PretrainedFolder`: `config.json`, the tensors (`model.safetensors` or `pytorch_model.bin`, whole or in shards, nothing
unpickled), and the vocabulary. A folder on the disk never touches the network.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from protformer.checkpoint import load_pretrained_tensors
from protformer.errors import InputError
from protformer.unreadable import reason

WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip
"""In the order of preference; an index lists the shards."""
VOCABULARY_FILES = ("vocab.txt", "vocab.json", "tokenizer.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedFolder:
    """What a folder of pretrained weights holds."""

    name: str
    """As the weights are known: the hub id, or the name of the folder."""
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    vocabulary: tuple[str, ...] | None
    """Tokens in the order of their numbers; None where the folder has none."""


def read_pretrained(source: str) -> PretrainedFolder:
    """Read a folder, or download a hub id. Raises InputError for what is neither, and for what is missing."""
    folder = Path(source)
    if folder.is_dir():
        return _read_folder(folder, folder.resolve().name)
    if not HUB_ID.fullmatch(source) or folder.exists():
        raise InputError(f"--from {source}: neither a folder nor a hub id such as facebook/esm2_t6_8M_UR50D")
    return _read_folder(_download(source), source)


def _read_folder(folder: Path, name: str) -> PretrainedFolder:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json; expected a folder as transformers' save_pretrained writes it")
    config = _read_json(folder / "config.json")
    if "format_version" in config and "alphabet_fingerprint" in config:
        raise InputError(f"{folder}: is a protformer model already; use it as --model")
    return PretrainedFolder(
        name=name, config=config, tensors=_read_tensors(folder), vocabulary=_read_vocabulary(folder, config)
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder}: no weights here (expected {', '.join(WEIGHT_FILES[::2])})")
    if file.suffix != ".json":
        return load_pretrained_tensors(file)
    shards = _read_json(file).get("weight_map")
    if not isinstance(shards, dict):
        raise InputError(f"{file}: lists no shards (weight_map)")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= load_pretrained_tensors(folder / shard)
    return tensors


def _read_vocabulary(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    if isinstance(listed := config.get("vocab_list"), list):
        return tuple(map(str, listed))
    file = next((folder / name for name in VOCABULARY_FILES if (folder / name).is_file()), None)
    if file is None:
        return None
    if file.suffix == ".txt":
        return tuple(file.read_text(encoding="utf-8").split())
    numbers = _read_json(file)
    if file.name == "tokenizer.json":
        added = {token["content"]: token["id"] for token in numbers.get("added_tokens", [])}
        numbers = numbers.get("model", {}).get("vocab", {})
        numbers = (numbers if isinstance(numbers, dict) else {}) | added
    tokens = sorted(numbers, key=lambda token: int(numbers[token]))
    if [numbers[token] for token in tokens] != list(range(len(tokens))):
        raise InputError(f"{file}: tokens are not numbered from 0 without gaps")
    return tuple(tokens)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise InputError(f"{file}: expected a mapping, found {type(tree).__name__}")
    return tree


def _download(hub_id: str) -> Path:
    """Bring the description, one form of the weights, and the vocabulary into the hub's cache."""
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise InputError(
            f"--from {hub_id}: downloading needs huggingface_hub: pip install 'protformer[hub]'; a folder does not"
        ) from error
    try:
        files = HfApi().list_repo_files(hub_id)
        weights = next((name for name in WEIGHT_FILES if name in files), None)
        if weights is None:
            raise InputError(f"--from {hub_id}: the hub has no {' or '.join(WEIGHT_FILES[::2])} there")
        shards = [f"{weights.split('.')[0]}-*"] if weights.endswith(".json") else []
        return Path(snapshot_download(hub_id, allow_patterns=["config.json", weights, *shards, *VOCABULARY_FILES]))
    except InputError:
        raise
    except Exception as error:  # besides its own, the errors of whatever library it uses for HTTP
        raise InputError(
            f"--from {hub_id}: there is no such folder, and it cannot be had from the hub ({reason(error)})"
        ) from error
