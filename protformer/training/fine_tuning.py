"""Training that begins from a model: its weights, frozen lower layers, and low-rank adapters.

In: the model folder of --init-from, and `training.frozen_layers` or `training.lora`. Out: a model to train, of which
`build_optimizer` takes what still learns; and of an adapted model the plain one it equals. LoRA is Hu et al. 2022,
"LoRA: Low-Rank Adaptation of Large Language Models", eq. 3, by the peft library: our `rank` is their r.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from protformer.checkpoint import load_model
from protformer.config import ExactConfig, LoraConfig, ModelConfig, TrainingConfig
from protformer.decoding import decode, flatten
from protformer.errors import ConfigError, InputError
from protformer.model.encoder import Encoder
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model_description import (
    InitialModel,
    find_model_folder,
    model_name,
    read_description,
    weights_sha256,
)
from protformer.training.run_folder import RunFolder
from protformer.whole_file import write_whole

ADAPTER = "default"
"""peft's name for the one adapter of a layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialWeights:
    """Where a run's first weights are: `initial_model.json` of the run folder."""

    path: str
    model: InitialModel
    has_lm_head: bool = True
    """Whether they predict residues; of converted weights, some do not."""
    converted_from: str = ""
    """See `ModelDescription`; however often they were trained since."""

    @classmethod
    def of(cls, path: Path) -> "InitialWeights":
        """Of a model folder or run folder. Raises ModelFolderError."""
        folder = find_model_folder(path)
        description = read_description(folder)
        model = InitialModel(
            name=model_name(folder), weights_sha256=weights_sha256(folder), training=description.training
        )
        return cls(
            path=str(folder.resolve()),
            model=model,
            has_lm_head=description.has_lm_head,
            converted_from=description.converted_from,
        )


def save_initial_weights(run: RunFolder, initial: InitialWeights) -> None:
    text = json.dumps(asdict(initial), indent=1) + "\n"
    write_whole(run.initial_model, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_initial_weights(run: RunFolder) -> InitialWeights | None:
    """None if the run began with random weights."""
    if not run.initial_model.is_file():
        return None
    return decode(InitialWeights, json.loads(run.initial_model.read_text(encoding="utf-8")))


def check_initial_unchanged(run: RunFolder, init_from: Path | None) -> None:
    """Refuse to resume with another initial model than the run began with; without the option, that one counts."""
    if init_from is None:
        return
    began = read_initial_weights(run)
    if began is None:
        raise InputError(f"--resume: --init-from {init_from}: the run began with random weights")
    if InitialWeights.of(init_from).model.weights_sha256 != began.model.weights_sha256:
        raise InputError(f"--resume: --init-from {init_from}: the run began from other weights ({began.path})")


def check_fine_tuning(config: TrainingConfig, model: ModelConfig, *, has_initial: bool) -> None:
    """Raise ConfigError for what does not go together, or needs a package that is missing."""
    if config.frozen_layers > model.num_layers:
        raise ConfigError(
            f"training.frozen_layers: {config.frozen_layers} is more than the model has (model.num_layers"
            f" {model.num_layers})"
        )
    if config.distill:
        _check_distillation(config, model, has_initial=has_initial)
    if config.lora is None:
        return
    if not has_initial:
        raise ConfigError("training.lora: adapts a trained model; name it by --init-from")
    if config.frozen_layers:
        raise ConfigError("training.frozen_layers: with training.lora all layers are frozen; leave one of them out")
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("training.lora: needs the package peft: pip install 'protformer[lora]'")


def check_same_weights(path: Path, initial: ModelConfig, chosen: ModelConfig) -> None:
    """Refuse a configuration in which the initial model's weights would not fit, or would mean something else.

    Dropout may differ, and how attention is computed from queries and keys: by another kind, whose own parameters
    then begin anew, or by the same kind if it has the same parameters.
    """
    theirs, ours = flatten(asdict(initial)), flatten(asdict(chosen))
    differing = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    fits = initial.attention.kind != chosen.attention.kind or _weight_shapes(initial) == _weight_shapes(chosen)
    for name in differing:
        if name not in ("dropout", "exact_layers") and not (fits and name.startswith("attention.")):
            raise ConfigError(
                f"--init-from {path}: model.{name} is {theirs.get(name)!r} in that model and {ours.get(name)!r} in this"
                f" configuration; leave it out to train that model on, or leave out --init-from"
            )


def load_initial_weights(model: ProteinLanguageModel, initial: InitialWeights) -> None:
    """Copy the weights; and with the same attention its random features too, which last until the first redraw."""
    now = InitialWeights.of(Path(initial.path))
    if now.model.weights_sha256 != initial.model.weights_sha256:
        raise InputError(f"{initial.path}: is not the model that the run was to begin from; its weights have changed")
    source, description = load_model(Path(initial.path), torch.device("cpu"))
    kept = dict(source.named_parameters())
    if description.model.attention == model.config.attention:
        kept = source.state_dict()
    model.load_state_dict(kept, strict=False)


def load_teacher(config: ModelConfig, initial: InitialWeights) -> ProteinLanguageModel:
    """The model that a run began from, with exact attention in all layers."""
    teacher = ProteinLanguageModel(replace(config, attention=ExactConfig(), exact_layers=(), dropout=0.0), seed=0)
    load_initial_weights(teacher, initial)
    return teacher.eval().requires_grad_(False)


def learn_attention_only(model: ProteinLanguageModel) -> None:
    """Let the parameters that the attention itself has, and adapters if there are any, learn and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".attention." in name or ".lora_" in name)


def freeze_lower_layers(encoder: Encoder, num_layers: int) -> None:
    """Keep the embedding, which is also the output matrix, and this many blocks from below as they are."""
    if num_layers:
        for module in (encoder.embedding, *list(encoder.blocks)[:num_layers]):
            module.requires_grad_(False)


def add_lora(model: ProteinLanguageModel, config: LoraConfig) -> None:
    """Put adapters beside the linear layers named; nothing else learns from here on."""
    import peft

    peft.inject_adapter_in_model(
        peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets)), model, ADAPTER
    )


def merge_adapters(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The state dict of a plain model, with W + (alpha / rank) B A in place of each adapted W."""
    merged = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}
    for name, left in weights.items():
        layer, _, suffix = name.partition(".lora_B.")
        if suffix:
            right = weights[f"{layer}.lora_A.{suffix}"]
            merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + config.alpha / config.rank * (left @ right)
    return merged


def _check_distillation(config: TrainingConfig, model: ModelConfig, *, has_initial: bool) -> None:
    if not has_initial:
        raise ConfigError("--distill: the teacher is a trained model with exact attention; name it by --init-from")
    if config.frozen_layers:
        raise ConfigError("training.frozen_layers: --distill trains no layer's weights; leave one of them out")
    if config.lora is not None and config.lora.targets != ["query_key_value"]:
        raise ConfigError(
            f"training.lora.targets: {config.lora.targets} is not allowed; with --distill it must be"
            f" ['query_key_value'], on which alone the attention depends"
        )
    if config.lora is None and not any(".attention." in name for name in _weight_shapes(model)):
        raise ConfigError(
            f"--distill: {model.attention.kind} attention with these settings has no parameters to learn; choose"
            f" clustered, or favor with model.attention.covariance=diagonal, or add training.lora"
        )


def _weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = ProteinLanguageModel(config, seed=0)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
