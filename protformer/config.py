"""The whole run as frozen dataclasses, read strictly from YAML.

In: a YAML file with differences from the defaults (or the name of a built-in configuration), and `--set a.b=value`
overrides. Out: a `RunConfig`, or one line that names the dotted path, the value, and the nearest right name. Defaults
stand here and nowhere else.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from protformer.alphabet import CLS, EOS
from protformer.attention_config import AttentionConfig as AttentionConfig
from protformer.attention_config import ClusteredConfig as ClusteredConfig
from protformer.attention_config import ExactConfig as ExactConfig
from protformer.attention_config import FavorConfig as FavorConfig
from protformer.attention_config import GeneralizedConfig as GeneralizedConfig
from protformer.attention_config import GeneralizedFunction as GeneralizedFunction
from protformer.attention_config import require as _require
from protformer.decoding import decode, suggest
from protformer.errors import ConfigError
from protformer.lora_config import LoraConfig as LoraConfig

Packing = Literal["attend", "isolate"]
OnLong = Literal["crop", "windows", "skip"]
Direction = Literal["bidirectional", "unidirectional"]
Norm = Literal["pre", "post"]
Framing = Literal["eos", "cls_eos"]
RotaryRounding = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The encoder and its masked-LM head; names as in the paper's (n_heads, n_layers, d_ff, d)."""

    num_layers: int = 6
    num_heads: int = 8
    hidden_size: int = 512
    """d in the paper."""
    feed_forward_size: int = 2048
    """d_ff in the paper."""
    dropout: float = 0.0
    direction: Direction = "bidirectional"
    """`bidirectional` is a masked language model, `unidirectional` predicts each next residue from those before."""
    attention: AttentionConfig = field(default_factory=FavorConfig)
    exact_layers: tuple[int, ...] = ()
    """Layers, counted from 1, that have exact attention instead."""
    qk_norm: bool = False
    """Divide each query and key by its root mean square before the rotary turn, and scale its channels by learned
    numbers: bounds the logits, on whose size the error of random features depends."""
    norm: Norm = "pre"
    """LayerNorm before attention and feed-forward and behind all layers, or (`post`) behind each sum, as in BERT."""
    norm_epsilon: float = 1e-5
    positions: Literal["rotary", "learned"] = "rotary"
    """`learned`: a vector a position is added to the token embedding, as in BERT, for max_positions tokens at most."""
    max_positions: int | None = None
    rotary_rounding: RotaryRounding = "float32"
    """Rotary frequencies of ESM-2 are rounded to float16; weights that were saved as bfloat16 may have them so."""
    embedding_norm: bool = False
    """LayerNorm on what the first layer gets, as in BERT."""
    token_dropout: bool = False
    """As in ESM: MASK has no embedding, and the other tokens' are scaled by the share of masked ones."""
    framing: Framing = "eos"
    """A protein by itself ends in `<eos>`, or begins with `<cls>` as well, as in ESM-2 and BERT."""
    contact_head: bool = False
    """Contacts are a logistic regression on the attention maps, with weights of its own (`convert` reads ESM-2's)."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "hidden_size", "feed_forward_size"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        _require(self.norm_epsilon > 0, "model.norm_epsilon", self.norm_epsilon, "above 0")
        layers = self.exact_layers
        are_layers = len(set(layers)) == len(layers) and all(1 <= layer <= self.num_layers for layer in layers)
        _require(are_layers, "model.exact_layers", list(layers), f"different numbers from 1 to {self.num_layers}")
        limit = self.max_positions
        if self.positions == "learned":
            has_limit = limit is not None and limit >= 1
            _require(has_limit, "model.max_positions", limit, "at least 1 with model.positions learned")
        else:
            _require(limit is None, "model.max_positions", limit, "left out: rotary positions have no limit")
        both_ways = self.direction == "bidirectional" or self.framing == "eos"
        _require(both_ways, "model.framing", self.framing, "eos with model.direction unidirectional")
        kind = self.attention.kind
        can_be_causal = self.direction == "bidirectional" or kind != "clustered"
        _require(can_be_causal, "model.attention.kind", kind, "another with model.direction unidirectional")
        _require(
            self.hidden_size % self.num_heads == 0 and self.head_dim % 2 == 0,
            "model.hidden_size",
            self.hidden_size,
            f"an even multiple of model.num_heads ({self.num_heads}): rotary positions turn pairs of channels",
        )
        _require(0.0 <= self.dropout < 1.0, "model.dropout", self.dropout, "from 0 to below 1")

    def attention_of(self, layer: int) -> AttentionConfig:
        """Of a layer, counted from 0."""
        return ExactConfig() if layer + 1 in self.exact_layers else self.attention

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def frame(self) -> tuple[bytes, bytes]:
        """Tokens before and behind the residues of a protein that is by itself."""
        if self.direction == "unidirectional":
            return bytes([CLS]), b""
        return bytes([CLS] if self.framing == "cls_eos" else []), bytes([EOS])


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskingConfig:
    """Which residues are predicted and what the model sees in their place (Devlin et al. 2019, section 3.1)."""

    rate: float = 0.15
    scheme: Literal["bert", "protein_lm"] = "bert"
    """Shares of MASK, random residue and unchanged: 80/10/10, or 10/80/10 as the released protein_lm code has it."""

    span_mean_length: float = 1.0
    """Above 1, spans of neighbouring residues are masked together: geometric lengths of this mean, at the same rate."""

    def __post_init__(self) -> None:
        _require(0.0 < self.rate <= 1.0, "data.masking.rate", self.rate, "above 0 and at most 1")
        mean, rate = self.span_mean_length, self.rate
        _require(mean >= 1.0, "data.masking.span_mean_length", mean, "at least 1")
        # The mean gap between spans, mean * (1 - rate) / rate, is at least one residue.
        _require(
            mean == 1.0 or mean * (1.0 - rate) >= rate,
            "data.masking.span_mean_length",
            mean,
            f"1, or at least {rate / max(1e-9, 1.0 - rate):.3g}, so that spans at data.masking.rate {rate} leave gaps",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How proteins become rows of tokens."""

    max_residues: int = 1024
    """Tokens a row (window), EOS of each protein included."""
    packing: Packing = "attend"
    """`attend`: proteins chained by EOS and cut into windows, all see all (paper). `isolate`: each sees only itself."""
    on_long: OnLong = "crop"
    """What `isolate` makes of a protein longer than a row, and any packing of such a pair: a random crop each epoch,
    consecutive windows (not for pairs), or nothing."""
    source_weights: list[float] | None = None
    """Share of each --fasta in the tokens, in their order, in any unit; by size if not given."""
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    num_workers: int | None = None
    """Processes that prepare batches ahead; if not given, one on a GPU and none elsewhere. Batches are the same."""
    validation_fraction: float = 0.02
    """Share held out when no --val-fasta is given: of the clusters with --clusters, else of the proteins by a hash of
    the sequence."""
    max_validation_residues: int = 1_000_000
    """Validation during training reads at most this many tokens; `evaluate` reads all."""

    def __post_init__(self) -> None:
        _require(self.max_residues >= 8, "data.max_residues", self.max_residues, "at least 8")
        _require(
            0.0 <= self.validation_fraction < 1.0,
            "data.validation_fraction",
            self.validation_fraction,
            "from 0 to below 1",
        )
        _require(
            self.max_validation_residues >= 1,
            "data.max_validation_residues",
            self.max_validation_residues,
            "at least 1",
        )
        for number, weight in enumerate(self.source_weights or ()):
            _require(weight > 0, f"data.source_weights[{number}]", weight, "above 0")
        _require(self.num_workers is None or self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Optimizer, schedule, batch and how often to look up from the work."""

    max_steps: int = 100_000
    max_time: str | None = None
    """HH:MM:SS of training in this sitting."""
    tokens_per_step: int = 65_536
    """The batch of one optimizer step over all devices, in tokens; whole rows of data.max_residues."""
    accumulate_batches: int | Literal["auto"] = "auto"
    """Rows of a step are worked off in this many parts; `auto` takes few, and twice as many when memory runs out."""
    activation_checkpointing: bool = False
    """Keep only what enters each layer, and compute the rest again for the gradients: less memory, more time."""
    compile: bool = False
    """Let torch compile the layers, but for their attention; needs a C++ compiler, and a minute at the beginning."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` moves the layers' matrices by Muon, scaled so that AdamW's learning rate suits, and all else by AdamW."""
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """After the warm-up: fixed (paper); a half cosine down to a tenth of the rate at schedule_steps; or fixed until the
    last decay_fraction of schedule_steps, over which it falls to zero (warm-up, stable, decay)."""
    decay_fraction: float = 0.2
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """Of `wsd`: the rate falls as 1 - x, or as 1 - sqrt(x), over the decay x = 0 to 1."""
    schedule_steps: int | None = None
    """Length of the schedule; max_steps if not given. Stopping earlier does not change the steps before."""
    warmup_steps: int = 1000
    weight_decay: float = 0.01
    """Decoupled (AdamW), and not on biases and norms."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-9
    gradient_clip_norm: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast where the device multiplies bf16 in hardware, else fp32."""
    validate_every_steps: int = 1000
    log_every_steps: int = 50
    log_readiness: bool = False
    """At each validation, `readiness.csv` gets a line a layer: could random features estimate its attention?"""
    checkpoint_every_steps: int = 500
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work: each with a copy of the model (`ddp`, and `auto`), or each with a part of
    every weight and of its optimizer's state (`fsdp`)."""
    context_parallel: int = 1
    """Devices that one row is split over, for rows that one device has no memory for; all devices are groups of so
    many. Linear kinds of attention only."""
    rank_timeout: str = "00:10:00"
    """HH:MM:SS that a device waits for the others before it takes the job for lost; building stores does not count."""
    frozen_layers: int = 0
    """Keep the embedding and this many of the lowest layers as they begin; 0 trains everything."""
    distill: bool = False
    """Train the attention's own parameters (and the adapters of lora) so that each layer's attention gives what exact
    attention with the weights of --init-from gives."""
    lora: LoraConfig | None = None
    """Train adapters only, of the model that --init-from names."""
    wandb_project: str | None = None
    """Also send the figures to this project of Weights & Biases."""
    max_skipped_steps: int = 10
    """A step without a finite gradient is left out and counted; this many in a row end the run with a diagnosis."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps", "tokens_per_step", "validate_every_steps", "log_every_steps", "checkpoint_every_steps",
            "max_skipped_steps",
        ):  # fmt: skip
            _require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        parts = self.accumulate_batches
        _require(parts == "auto" or parts >= 1, "training.accumulate_batches", parts, "auto, or at least 1")
        _require(self.frozen_layers >= 0, "training.frozen_layers", self.frozen_layers, "0 or more")
        _require(self.warmup_steps >= 0, "training.warmup_steps", self.warmup_steps, "0 or more")
        _require(self.learning_rate > 0, "training.learning_rate", self.learning_rate, "above 0")
        _require(0 < self.decay_fraction <= 1, "training.decay_fraction", self.decay_fraction, "above 0, at most 1")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"training.{name}", value, "from 0 to below 1")
        _require(self.adam_epsilon > 0, "training.adam_epsilon", self.adam_epsilon, "above 0")
        _require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "0 or more")
        _require(self.gradient_clip_norm > 0, "training.gradient_clip_norm", self.gradient_clip_norm, "above 0")
        if self.schedule_steps is not None:
            _require(self.schedule_steps >= 1, "training.schedule_steps", self.schedule_steps, "at least 1")
        _require(
            self.schedule != "wsd" or self.max_steps <= self.num_schedule_steps,
            "training.max_steps",
            self.max_steps,
            f"at most training.schedule_steps ({self.num_schedule_steps}), where `wsd` has a rate of zero",
        )
        if self.max_time is not None:
            parse_duration(self.max_time, "training.max_time")
        parse_duration(self.rank_timeout, "training.rank_timeout")
        _require(self.context_parallel >= 1, "training.context_parallel", self.context_parallel, "at least 1")
        if self.strategy == "fsdp":
            whole = "adamw with training.strategy fsdp, as Muon needs whole matrices"
            _require(self.optimizer == "adamw", "training.optimizer", self.optimizer, whole)
            _require(not self.log_readiness, "training.log_readiness", self.log_readiness, "false with fsdp")
            _require(self.lora is None, "training.lora", self.lora, "left out with training.strategy fsdp")
            _require(not self.distill, "training.distill", self.distill, "false with training.strategy fsdp")

    @property
    def num_schedule_steps(self) -> int:
        return self.max_steps if self.schedule_steps is None else self.schedule_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a training run, apart from the data files themselves."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    FILE_HEADER: ClassVar[str] = "# Resolved configuration of one run; `protformer train --config` reads it again.\n"

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 4294967295")
        ranks, kind = self.training.context_parallel, self.model.attention.kind
        allowed = f"1 with model.attention.kind {kind}: only favor and generalized attention can be split over devices"
        _require(ranks == 1 or kind in ("favor", "generalized"), "training.context_parallel", ranks, allowed)
        exact = self.model.exact_layers
        _require(ranks == 1 or not exact, "model.exact_layers", list(exact), "left out with training.context_parallel")
        length = self.data.max_residues
        allowed = f"a multiple of training.context_parallel ({ranks}), which gives all devices parts of equal length"
        _require(length % ranks == 0, "data.max_residues", length, allowed)


def load_run_config(
    source: str | None, overrides: tuple[str, ...] = (), *, model_defaults: ModelConfig | None = None
) -> RunConfig:
    """Read a run's configuration.

    `source` is a path, or the name of a built-in configuration such as `tiny`; None gives the defaults. Each override
    is `dotted.path=value` with the value in YAML. `model_defaults` stands in for the defaults of `model`. Raises
    ConfigError.
    """
    import yaml

    tree: dict[str, Any] = {}
    if source is not None:
        path = find_config(source)
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(loaded, dict | None):
            raise ConfigError(f"{path}: expected fields and values, found {loaded!r}")
        tree = loaded or {}
    for override in overrides:
        _apply_override(tree, override)
    if model_defaults is not None:
        tree["model"] = _fill_in(tree.get("model", {}), asdict(model_defaults))
    return decode(RunConfig, tree)


def dump_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text that `load_run_config` reads to an equal object."""
    import yaml

    return RunConfig.FILE_HEADER + str(yaml.safe_dump(asdict(config), sort_keys=False))


def find_config(source: str) -> Path:
    """The file behind `--config`: an existing path, or a name among the built-in configurations."""
    path = Path(source)
    if path.is_file():
        return path
    names = {file.stem: file for file in _builtin_config_folder().glob("*.yaml")}
    if source in names:
        return names[source]
    raise ConfigError(
        f"--config {source}: no such file, and no built-in configuration of that name"
        f" (built in: {', '.join(sorted(names))})" + suggest(source, names)
    )


def parse_duration(text: str, path: str) -> float:
    """Seconds in `HH:MM:SS`."""
    parts = text.split(":")
    if len(parts) == 3 and all(part.isdigit() for part in parts):
        hours, minutes, seconds = (int(part) for part in parts)
        if minutes < 60 and seconds < 60 and hours + minutes + seconds > 0:
            return hours * 3600.0 + minutes * 60.0 + seconds
    raise ConfigError(f"{path}: {text!r} is not a duration above zero in HH:MM:SS, such as 01:30:00")


def override_run(config: RunConfig, *, seed: int | None, **training: object) -> RunConfig:
    """The same run with another seed and other fields of `training`; None leaves a field as it is."""
    given: dict[str, Any] = {name: value for name, value in training.items() if value is not None}
    return replace(config, seed=config.seed if seed is None else seed, training=replace(config.training, **given))


def _builtin_config_folder() -> Path:
    """Inside the installed package, or in the checkout of an editable install."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def _fill_in(given: Any, defaults: dict[str, Any]) -> Any:
    """The given fields, and the others from `defaults`; those of one kind of attention do not fit another kind."""
    if not isinstance(given, dict) or ("kind" in defaults and given.get("kind", defaults["kind"]) != defaults["kind"]):
        return given
    filled = dict(defaults)
    for name, value in given.items():
        filled[name] = _fill_in(value, defaults[name]) if isinstance(defaults.get(name), dict) else value
    return filled


def _apply_override(tree: dict[str, Any], override: str) -> None:
    import yaml

    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override}: expected dotted.path=value, such as model.num_layers=12")
    *parents, name = path.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a group of fields")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML") from error
    if name == "kind" and node.get("kind") != value:
        node.clear()  # the fields of the kind that the file chose do not fit another kind
    node[name] = value
