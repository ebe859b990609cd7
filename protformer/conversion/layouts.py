"""Where the layouts of `transformers` keep what our encoder has: ESM (ESM-1b, ESM-1v, ESM-2), BERT, RoBERTa.

In: the configuration and the names of the tensors of a `PretrainedFolder`. Out: a `Layout`: our `ModelConfig`, and for
each of our tensors the ones it is made of. An architecture that our encoder cannot compute exactly is refused.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from protformer.config import ExactConfig, ModelConfig
from protformer.errors import InputError

LAYER_PARTS = {
    "attention_output": "attention.output.dense",
    "feed_forward_input": "intermediate.dense",
    "feed_forward_output": "output.dense",
}
ESM_NORMS = {"attention_norm": "attention.LayerNorm", "feed_forward_norm": "LayerNorm"}
BERT_NORMS = {"attention_norm": "attention.output.LayerNorm", "feed_forward_norm": "output.LayerNorm"}
WITHOUT_MEANING = re.compile(r"(^|\.)(position_ids|inv_freq|pooler\.dense\.(weight|bias))$")
"""Tensors inside an encoder that its outputs do not depend on, or that are computed from the configuration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LmHead:
    """Names of the masked-LM head's tensors."""

    parts: Mapping[str, str]
    """`dense` and `norm`, and their prefixes."""
    bias: str
    decoder: tuple[str, ...]
    """Copies of the embedding and of the bias that checkpoints may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """An architecture, and where its tensors are."""

    name: str
    model: ModelConfig
    prefix: str
    """Of the encoder's tensors; others belong to heads."""
    sources: Mapping[str, tuple[str, ...]]
    """Our tensor, and those that it is made of, one behind the other; embeddings of tokens and positions apart."""
    lm_head: LmHead
    first_position: int = 0
    """Row of the first token's position."""
    vocab_size: int | None = None
    """As the configuration has it."""

    @property
    def token_embedding(self) -> str:
        return f"{self.prefix}embeddings.word_embeddings.weight"

    @property
    def position_embedding(self) -> str:
        return f"{self.prefix}embeddings.position_embeddings.weight"

    @property
    def token_types(self) -> str:
        return f"{self.prefix}embeddings.token_type_embeddings.weight"

    @property
    def contact_head(self) -> str:
        return f"{self.prefix}contact_head.regression"


def find_layout(config: Mapping[str, Any], names: Collection[str], source: str) -> Layout:
    """The layout of `config.json`. Raises InputError, beginning with `source`, for one that is not known."""
    kinds = {"esm": _esm, "bert": _bert, "roberta": _roberta}
    kind = config.get("model_type")
    if kind is None:
        raise InputError(f"{source}: config.json has no model_type; add the one it is: {', '.join(kinds)}")
    if kind not in kinds:
        raise InputError(f"{source}: model_type {kind!r} is not known; expected one of {', '.join(kinds)}")
    for name, allowed in {"hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False}.items():
        _require(name, config.get(name, allowed), allowed, source)
    prefix = f"{kind}." if any(name.startswith(f"{kind}.") for name in names) else ""
    layout = kinds[str(kind)](config, prefix, source)
    has_contact_head = f"{layout.contact_head}.weight" in names
    vocab_size = _integer(config, "vocab_size", source) if "vocab_size" in config else None
    return replace(layout, model=replace(layout.model, contact_head=has_contact_head), vocab_size=vocab_size)


def _esm(config: Mapping[str, Any], prefix: str, source: str) -> Layout:
    """Lin et al. 2023; Rives et al. 2021: pre-LN, and rotary positions or learned ones."""
    _require("is_folding_model", config.get("is_folding_model", False), False, source)
    positions = _choice(config, "position_embedding_type", ("rotary", "absolute"), source)
    rotary = positions == "rotary"
    parameters = config.get("rope_parameters") or {}
    theta = parameters.get("rope_theta", config.get("rope_theta", 10_000.0))
    _require("rope_theta", theta, 10_000.0, source)
    first = 0 if rotary else _integer(config, "pad_token_id", source) + 1
    model = _sizes(config, source) | {
        "norm": "pre",
        "positions": "rotary" if rotary else "learned",
        "max_positions": None if rotary else _integer(config, "max_position_embeddings", source) - first,
        "embedding_norm": bool(config.get("emb_layer_norm_before", False)),
        "token_dropout": bool(config.get("token_dropout", False)),
    }
    names = _blocks(prefix, model["num_layers"], ESM_NORMS) | _pair(
        "encoder.final_norm", f"{prefix}encoder.emb_layer_norm_after"
    )
    if model["embedding_norm"]:
        names |= _pair("encoder.embedding_norm", f"{prefix}embeddings.layer_norm")
    return Layout(
        name="ESM",
        model=ModelConfig(**model),
        prefix=prefix,
        sources=names,
        lm_head=ROBERTA_HEAD,
        first_position=first,
    )


def _bert(config: Mapping[str, Any], prefix: str, source: str) -> Layout:
    """Devlin et al. 2019: post-LN, learned positions."""
    return _post_norm("BERT", config, prefix, source, head=BERT_HEAD, first=0)


def _roberta(config: Mapping[str, Any], prefix: str, source: str) -> Layout:
    """Liu et al. 2019: as BERT, with positions counted from behind the padding token's number."""
    first = _integer(config, "pad_token_id", source) + 1
    return _post_norm("RoBERTa", config, prefix, source, head=ROBERTA_HEAD, first=first)


def _post_norm(name: str, config: Mapping[str, Any], prefix: str, source: str, *, head: LmHead, first: int) -> Layout:
    _choice({"position_embedding_type": "absolute", **config}, "position_embedding_type", ("absolute",), source)
    model = _sizes(config, source) | {
        "norm": "post",
        "positions": "learned",
        "max_positions": _integer(config, "max_position_embeddings", source) - first,
        "embedding_norm": True,
    }
    names = _blocks(prefix, model["num_layers"], BERT_NORMS)
    names |= _pair("encoder.embedding_norm", f"{prefix}embeddings.LayerNorm")
    return Layout(
        name=name, model=ModelConfig(**model), prefix=prefix, sources=names, lm_head=head, first_position=first
    )


def _sizes(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {
        "num_layers": _integer(config, "num_hidden_layers", source),
        "num_heads": _integer(config, "num_attention_heads", source),
        "hidden_size": _integer(config, "hidden_size", source),
        "feed_forward_size": _integer(config, "intermediate_size", source),
        "norm_epsilon": float(config.get("layer_norm_eps", 1e-12)),
        "dropout": float(config.get("hidden_dropout_prob", 0.0)),
        "framing": "cls_eos",
        "attention": ExactConfig(),
    }


def _blocks(prefix: str, num_layers: int, norms: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    for layer in range(num_layers):
        ours, theirs = f"encoder.blocks.{layer}", f"{prefix}encoder.layer.{layer}"
        for part, where in (LAYER_PARTS | dict(norms)).items():
            names |= _pair(f"{ours}.{part}", f"{theirs}.{where}")
        for kind in ("weight", "bias"):
            names[f"{ours}.query_key_value.{kind}"] = tuple(
                f"{theirs}.attention.self.{part}.{kind}" for part in ("query", "key", "value")
            )
    return names


def _pair(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in ("weight", "bias")}


def _integer(config: Mapping[str, Any], name: str, source: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{source}: config.json: {name} is {value!r}, not a whole number")
    return value


def _choice(config: Mapping[str, Any], name: str, allowed: tuple[str, ...], source: str) -> str:
    value = config.get(name, allowed[-1])
    if value not in allowed:
        raise InputError(f"{source}: config.json: {name} {value!r} is not known; expected {' or '.join(allowed)}")
    return str(value)


def _require(name: str, value: object, allowed: object, source: str) -> None:
    if value != allowed:
        raise InputError(f"{source}: config.json: {name} {value!r} cannot be converted, only {allowed!r}")


BERT_HEAD = LmHead(
    parts={"dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm"},
    bias="cls.predictions.bias",
    decoder=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
)
ROBERTA_HEAD = LmHead(
    parts={"dense": "lm_head.dense", "norm": "lm_head.layer_norm"},
    bias="lm_head.bias",
    decoder=("lm_head.decoder.weight", "lm_head.decoder.bias"),
)
