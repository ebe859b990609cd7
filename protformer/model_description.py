"""What is known about a model besides its weights: `config.json` of a model folder, read without torch.

In: a model folder or a run folder. Out: a `ModelDescription`. A folder of another alphabet, of a newer format, or with
missing parts is refused in one line.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from protformer import __version__
from protformer.alphabet import FINGERPRINT, FIRST_RESIDUE, LAST_RESIDUE, NUM_TOKENS
from protformer.config import ModelConfig, Packing
from protformer.decoding import decode
from protformer.errors import ConfigError, ModelFolderError

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
    initial_model: "InitialModel | None" = None
    """What the weights began from, if not from random numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialModel:
    """A model that another one was trained on from."""

    name: str
    """Of its folder."""
    weights_sha256: str
    training: TrainingProvenance


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """Everything about a model that is not a weight: `config.json`."""

    format_version: int = FORMAT_VERSION
    alphabet_fingerprint: str = FINGERPRINT
    protformer_version: str = __version__
    packing: Packing = "attend"
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingProvenance = field(default_factory=TrainingProvenance)
    converted_from: str = ""
    """Name of the pretrained weights, and of their layout, that `convert` read, however often trained on since."""
    has_lm_head: bool = True
    """False where the converted weights had none: that of the folder is then untrained."""
    residue_counts: list[int]
    """How often each of the 33 tokens stood in the training corpus: the unigram baseline."""

    @property
    def unigram_frequencies(self) -> list[float]:
        """Probabilities of the 33 tokens: of the 25 residues, with one pseudo-count each; other tokens have none."""
        residues = range(FIRST_RESIDUE, LAST_RESIDUE + 1)
        counts = [self.residue_counts[token] + 1 if token in residues else 0 for token in range(NUM_TOKENS)]
        return [count / sum(counts) for count in counts]


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


def model_name(folder: Path) -> str:
    """What to call the model of this model folder: the folder's name, or that of the run it lies in."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def weights_sha256(folder: Path) -> str:
    """Checksum of the weights' file."""
    digest = hashlib.sha256()
    with (folder / WEIGHTS_FILE).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
