"""The model folder: the only reader and writer of weights.

In and out: a `ProteinLanguageModel` with its `ModelDescription`, as `config.json`, `model.safetensors` and a
generated `README.md`. No pickle is read here. A folder of another alphabet, of a newer format, or with missing parts
is refused in one line.
"""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from protformer import __version__
from protformer.alphabet import FINGERPRINT, FIRST_RESIDUE, LAST_RESIDUE, NUM_TOKENS
from protformer.config import ModelConfig, Packing
from protformer.decoding import decode
from protformer.errors import ConfigError, InputError, ModelFolderError
from protformer.model.masked_lm_head import ProteinLanguageModel

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingProvenance:
    """Where the weights come from."""

    sources: list[str] = field(default_factory=list)
    """Names of the FASTA files."""
    num_proteins: int = 0
    num_residues: int = 0
    """Size of the training corpus."""
    steps: int = 0
    tokens_seen: int = 0
    seed: int = 0
    max_residues: int = 1024
    """Tokens of a training window."""
    masking_rate: float = 0.15
    masking_scheme: str = "bert"
    masking_span_mean_length: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """Everything about a model that is not a weight: `config.json`."""

    format_version: int = FORMAT_VERSION
    alphabet_fingerprint: str = FINGERPRINT
    protformer_version: str = __version__
    packing: Packing = "attend"
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingProvenance = field(default_factory=TrainingProvenance)
    residue_counts: list[int]
    """How often each of the 33 tokens stood in the training corpus: the unigram baseline."""

    @property
    def unigram_frequencies(self) -> torch.Tensor:
        """(33,) float64 probabilities of the 25 residue tokens, with one pseudo-count each; other tokens have none."""
        counts = torch.zeros(NUM_TOKENS, dtype=torch.float64)
        residues = slice(FIRST_RESIDUE, LAST_RESIDUE + 1)
        counts[residues] = torch.tensor(self.residue_counts, dtype=torch.float64)[residues] + 1.0
        return counts / counts.sum()


def find_model_folder(path: Path) -> Path:
    """`path` itself, or the `model/` inside a run folder."""
    for candidate in (path, path / "model"):
        if (candidate / CONFIG_FILE).is_file() and (candidate / WEIGHTS_FILE).is_file():
            return candidate
    if not path.exists():
        raise ModelFolderError(f"{path}: no such model folder")
    raise ModelFolderError(
        f"{path}: no model here (expected {CONFIG_FILE} and {WEIGHTS_FILE}, in the folder or in its model/)"
    )


def read_description(path: Path) -> ModelDescription:
    """The description of the model in `path` (a model folder or run folder), checked against this program."""
    file = find_model_folder(path) / CONFIG_FILE
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{file}: not JSON ({error})") from error
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if not isinstance(version, int):
        raise ModelFolderError(f"{file}: not the description of a protformer model (no format_version)")
    if version > FORMAT_VERSION:
        raise ModelFolderError(
            f"{file}: format {version} is newer than this program reads ({FORMAT_VERSION}); upgrade protformer"
        )
    if tree.get("alphabet_fingerprint") != FINGERPRINT:
        raise ModelFolderError(
            f"{file}: made with another alphabet ({tree.get('alphabet_fingerprint')!r}, not {FINGERPRINT!r})"
        )
    try:
        description = decode(ModelDescription, tree)
    except ConfigError as error:
        raise ModelFolderError(f"{file}: {error}") from error
    if len(description.residue_counts) != NUM_TOKENS:
        raise ModelFolderError(
            f"{file}: residue_counts has {len(description.residue_counts)} numbers, not {NUM_TOKENS}"
        )
    return description


def load_model(path: Path, device: torch.device) -> tuple[ProteinLanguageModel, ModelDescription]:
    """The model in `path`, in evaluation mode on `device`."""
    description = read_description(path)
    weights = find_model_folder(path) / WEIGHTS_FILE
    with torch.device("meta"):
        model = ProteinLanguageModel(description.model, seed=description.training.seed)
    try:
        tensors = load_file(weights, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{weights}: cannot be read as safetensors ({error})") from error
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
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _write_whole(folder / WEIGHTS_FILE, lambda partial: save_file(tensors, partial))
    config = json.dumps(asdict(description), indent=2) + "\n"
    _write_whole(folder / CONFIG_FILE, lambda partial: partial.write_text(config, encoding="utf-8"))
    card = model_card(description, num_parameters=sum(p.numel() for p in model.parameters()))
    _write_whole(folder / CARD_FILE, lambda partial: partial.write_text(card, encoding="utf-8"))


def save_tensors(content: object, path: Path) -> None:
    """Write tensors in nested dicts as a `.pt` file that `torch.load(..., weights_only=True)` reads."""
    torch.save(content, path)


def load_tensors(path: Path) -> dict[str, object]:
    """What `save_tensors` wrote."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: not a readable .pt file of tensors ({' '.join(str(error).split())[:200]})"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no mapping of names to tensors")
    return content


def model_card(description: ModelDescription, *, num_parameters: int) -> str:
    """A README for people who find the folder."""
    model, training = description.model, description.training
    return f"""# A protformer protein language model

{num_parameters:,} parameters; {model.num_layers} layers, {model.num_heads} heads, hidden size {model.hidden_size},
feed-forward {model.feed_forward_size}, {model.attention.kind} attention, {model.direction}, trained with `packing:
{description.packing}`.

- Training data: {", ".join(training.sources) or "unknown"} ({training.num_proteins:,} proteins,
  {training.num_residues:,} residues)
- Training: {training.steps:,} steps, {training.tokens_seen:,} tokens, windows of {training.max_residues:,} tokens,
  seed {training.seed}
- Written by protformer {description.protformer_version}

Use it with `protformer embed --model FOLDER --fasta proteins.fa --out embeddings.h5`, or see `protformer --help`.
The licence of the weights follows from the data they were trained on and is not stated here.
"""


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
