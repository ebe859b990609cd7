"""The model folder: the only reader and writer of weights.

In and out: a `ProteinLanguageModel` with its `ModelDescription`, as `config.json`, `model.safetensors` and a
generated `README.md`. No pickle is read here. Weights that do not fit their description are refused in one line.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from protformer.errors import InputError, ModelFolderError
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model_description import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    ModelDescription,
    find_model_folder,
    read_description,
)
from protformer.unreadable import UNREADABLE, reason
from protformer.whole_file import write_whole


def load_model(path: Path, device: torch.device) -> tuple[ProteinLanguageModel, ModelDescription]:
    """The model in `path`, in evaluation mode on `device`."""
    description = read_description(path)
    weights = find_model_folder(path) / WEIGHTS_FILE
    with torch.device("meta"):
        model = ProteinLanguageModel(description.model, seed=description.training.seed)
    tensors = _load_safetensors(weights, device)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ModelFolderError(
            f"{weights}: does not fit {CONFIG_FILE}: {wrong[0]} is {found.get(wrong[0], 'missing')},"
            f" expected {expected.get(wrong[0], 'nothing')} ({len(wrong)} such tensors)"
        )
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFolderError(f"{weights}: {name} holds a number that is not finite; the training had diverged")
    model.load_state_dict(tensors, assign=True)
    return model.eval(), description


def save_model(folder: Path, model: ProteinLanguageModel, description: ModelDescription) -> None:
    """Write the model folder; each file appears whole or not at all, weights before the description of them."""
    save_weights(folder, model.state_dict(), description, num_parameters=sum(p.numel() for p in model.parameters()))


def save_weights(
    folder: Path, state: Mapping[str, torch.Tensor], description: ModelDescription, *, num_parameters: int
) -> None:
    """As `save_model`, for a model that is not in one place: its state dict is."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_whole(folder / WEIGHTS_FILE, partial(save_safetensors, tensors))
    config = json.dumps(asdict(description), indent=2) + "\n"
    write_whole(folder / CONFIG_FILE, lambda partial: partial.write_text(config, encoding="utf-8"))
    card = model_card(description, num_parameters=num_parameters)
    write_whole(folder / CARD_FILE, lambda partial: partial.write_text(card, encoding="utf-8"))


def save_tensors(content: object, path: Path) -> None:
    """Write tensors in nested dicts as a `.pt` file that `torch.load(..., weights_only=True)` reads."""
    torch.save(content, path)


def load_tensors(path: Path) -> dict[str, object]:
    """What `save_tensors` wrote."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's words advise to unpickle the file nevertheless
        raise InputError(f"{path}: holds other objects than tensors, which are not unpickled, or is damaged") from error
    except UNREADABLE as error:
        raise InputError(f"{path}: no tensors that torch can read, or cut short ({reason(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no mapping of names to tensors")
    return content


def save_safetensors(tensors: dict[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors that share no memory. Raises OSError."""
    path.touch()  # with the mode that the system gives to new files, where safetensors lets the owner alone read them
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
        path.chmod(mode)
    except SafetensorError as error:  # it has its own words for what the system says
        raise OSError(str(error)) from error


def load_pretrained_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of the state dict that a torch file holds."""
    if path.suffix == ".safetensors":
        return _load_safetensors(path, torch.device("cpu"))
    tensors = load_tensors(path)
    other = next((name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)), None)
    if other is not None:
        raise InputError(f"{path}: not a state dict: {other!r} is no tensor")
    return cast(dict[str, Tensor], tensors)


def model_card(description: ModelDescription, *, num_parameters: int) -> str:
    """A README for people who find the folder."""
    model, training = description.model, description.training
    told = []
    if description.converted_from:
        since = f"trained {'since' if training.steps else 'no further'}"
        told.append(f"""- Converted from {description.converted_from} by `protformer convert`, and {since}; what it was
  trained on before, and its licence, are told where those weights were published""")
    if training.initial_model is not None:
        told.append(f"- Begun from the weights of the model {training.initial_model.name}")
    if training.steps or not description.converted_from:
        told.append(f"""- Training data: {", ".join(training.sources) or "unknown"} ({training.num_proteins:,} proteins,
  {training.num_residues:,} residues)
- Training: {training.steps:,} steps, {training.tokens_seen:,} tokens, windows of {training.max_residues:,} tokens,
  seed {training.seed}""")
    origin = "\n".join(told)
    return f"""# A protformer protein language model

{num_parameters:,} parameters; {model.num_layers} layers, {model.num_heads} heads, hidden size {model.hidden_size},
feed-forward {model.feed_forward_size}, {model.attention.kind} attention, {model.direction}, trained with `packing:
{description.packing}`.

{origin}
- Written by protformer {description.protformer_version}

Use it with `protformer embed --model FOLDER --fasta proteins.fa --out embeddings.h5`, or see `protformer --help`.
The licence of the weights follows from the data they were trained on and is not stated here.
"""


def _load_safetensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        with path.open("rb"):  # what the system says; safetensors has no word but "No such file"
            pass
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path}: cannot be read as safetensors ({error})") from error
