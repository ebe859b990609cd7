"""Would FAVOR+ estimate this model's attention? Layer by layer, on proteins or on random residues.

In: a model, whatever its attention, and proteins. Out: a `Readiness` for each layer, and the error of the hidden
states once all layers use random features in place of exact attention. Queries, keys and values are those of the
model as it is; each is asked what FAVOR+ with m features gives on it, and what exact attention gives.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from protformer.attention import build_attention
from protformer.attention.exact import ExactAttention
from protformer.attention.favor import FavorAttention
from protformer.attention.feature_maps import ExponentialMap
from protformer.attention.interface import Heads, Segments
from protformer.config import ExactConfig, FavorConfig
from protformer.evaluation.readiness import Readiness, measure_readiness
from protformer.model.masked_lm_head import ProteinLanguageModel

QUERIES_PER_PROTEIN = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """One layer of a model."""

    layer: int
    """Counted from 1."""
    readiness: Readiness
    propagated_error: float
    """Relative error of the hidden states after this layer, FAVOR+ against exact attention in all layers up to it."""

    def as_json(self) -> dict[str, float | int]:
        return {"layer": self.layer, **self.readiness.as_json(), "propagated_error": self.propagated_error}


def model_readiness(
    model: ProteinLanguageModel,
    proteins: Iterable[Sequence[int]],
    *,
    num_features: int | None,
    advance: Callable[[int], object] = lambda count: None,
) -> list[LayerReport]:
    """A report for each layer; `proteins` are residue tokens.

    `num_features` None takes the model's own number, or the default of `favor`.
    """
    device = model.head.bias.device
    favor = _favor_config(model, num_features)
    linear = _with_favor(model, favor)
    exact = _with_exact(linear)
    readiness = [Readiness(num_features=favor.num_features) for _ in model.encoder.blocks]
    squared_error, squared_exact = ([0.0] * len(readiness) for _ in range(2))
    for protein in proteins:
        before, behind = model.config.frame
        tokens = torch.tensor([[*before, *protein, *behind]], device=device)
        for layer, figures in enumerate(_layers(model, linear, tokens)):
            readiness[layer] = readiness[layer] + figures
        states = zip(hidden_by_layer(linear, tokens), hidden_by_layer(exact, tokens), strict=True)
        for layer, (estimate, true) in enumerate(states):
            squared_error[layer] += float((estimate - true).square().sum())
            squared_exact[layer] += float(true.square().sum())
        advance(1)
    errors = ((error / true) ** 0.5 for error, true in zip(squared_error, squared_exact, strict=True))
    return [
        LayerReport(layer=layer, readiness=figures, propagated_error=error)
        for layer, (figures, error) in enumerate(zip(readiness, errors, strict=True), start=1)
    ]


def random_proteins(frequencies: Sequence[float], *, count: int, length: int, seed: int) -> list[list[int]]:
    """Residues drawn one by one from these frequencies of the 33 tokens: for a model without a file of proteins."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(
        torch.tensor(frequencies, dtype=torch.float64), count * length, replacement=True, generator=generator
    )
    proteins: list[list[int]] = drawn.view(count, length).tolist()
    return proteins


def _favor_config(model: ProteinLanguageModel, num_features: int | None) -> FavorConfig:
    own = model.config.attention
    config = own if isinstance(own, FavorConfig) else FavorConfig()
    return config if num_features is None else replace(config, num_features=num_features)


def _with_favor(model: ProteinLanguageModel, favor: FavorConfig) -> ProteinLanguageModel:
    """The model with FAVOR+ in all layers, sharing its weights; features drawn anew unless they are as they were."""
    if favor == model.config.attention and not model.config.exact_layers:
        return model
    shallow = _shallow_copy(model)
    for layer, block in enumerate(shallow.encoder.blocks):
        attention = build_attention(
            favor,
            head_dim=model.config.head_dim,
            num_heads=model.config.num_heads,
            causal=model.config.direction == "unidirectional",
            seed=0,
            layer=layer,
        ).to(model.head.bias.device)
        if isinstance(block.attention, FavorAttention):  # what it has learned, but its draw
            learned = block.attention.state_dict()
            kept = {name: value for name, value in learned.items() if not name.startswith("random_features.")}
            attention.load_state_dict(attention.state_dict() | kept)
        block.attention = attention
    return shallow.eval()


def _with_exact(linear: ProteinLanguageModel) -> ProteinLanguageModel:
    """The model with softmax attention of the same kernel in all layers."""
    shallow = _shallow_copy(linear)
    for block in shallow.encoder.blocks:
        assert isinstance(block.attention, FavorAttention)
        block.attention = _ExactOfSameKernel(block.attention)
    return shallow.eval()


def _shallow_copy(model: ProteinLanguageModel) -> ProteinLanguageModel:
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class _ExactOfSameKernel(ExactAttention):
    """Softmax attention of the queries and keys that a FAVOR+ layer takes its features of."""

    any_channel_order = False
    """What the layer has learned, it has learned of the channels as they are."""

    def __init__(self, favor: FavorAttention) -> None:
        super().__init__(ExactConfig(), head_dim=0, num_heads=0, causal=favor.causal, seed=0, layer=0)
        self.favor = favor

    def forward(self, q: Heads, k: Heads, v: Heads, segments: Segments) -> Heads:
        return super().forward(*self.favor.prepare(q, k), v, segments)


@torch.no_grad()
def _layers(model: ProteinLanguageModel, linear: ProteinLanguageModel, tokens: Tensor) -> Iterable[Readiness]:
    """Figures of each layer on one protein."""
    segments = torch.ones_like(tokens)
    length = tokens.shape[1]
    generator = torch.Generator().manual_seed(length)
    queries = torch.randperm(length, generator=generator)[:QUERIES_PER_PROTEIN].to(tokens.device)
    inputs = model.encoder.attention_inputs(tokens, segments)
    for (q, k, v), block in zip(inputs, linear.encoder.blocks, strict=True):
        attention = block.attention
        assert isinstance(attention, FavorAttention)
        estimate = attention(q, k, v, segments)
        q, k = attention.prepare(q, k)
        feature_map = attention.feature_map(model.config.head_dim, torch.float64).plain
        assert isinstance(feature_map, ExponentialMap)
        yield measure_readiness(
            q,
            k,
            v,
            segments,
            linear=estimate,
            feature_map=feature_map,
            queries=queries,
            causal=model.config.direction == "unidirectional",
        )


@torch.no_grad()
def hidden_by_layer(model: ProteinLanguageModel, tokens: Tensor) -> list[Tensor]:
    """Hidden states after each block of rows that are one segment each."""
    states: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: states.append(call[2])) for block in model.encoder.blocks]
    model.encoder(tokens, torch.ones_like(tokens))
    for hook in hooks:
        hook.remove()
    return states
