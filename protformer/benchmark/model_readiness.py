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

from protformer.alphabet import EOS
from protformer.attention import build_attention
from protformer.attention.random_features import draw_projection, projection_generator
from protformer.benchmark.approximation import hidden_by_layer
from protformer.config import AttentionConfig, ExactConfig, FavorConfig
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
    advance: Callable[[int], None],
) -> list[LayerReport]:
    """A report for each layer; `proteins` are residue tokens.

    `num_features` None takes the model's own number, or the default of `favor`.
    """
    device = model.head.bias.device
    favor = _favor_config(model, num_features)
    linear, exact = (_with_attention(model, attention) for attention in (favor, ExactConfig()))
    readiness = [Readiness(num_features=favor.num_features) for _ in model.encoder.blocks]
    squared_error, squared_exact = ([0.0] * len(readiness) for _ in range(2))
    for protein in proteins:
        tokens = torch.tensor([[*protein, EOS]], device=device)
        for layer, figures in enumerate(_layers(model, linear, favor, tokens)):
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


def random_proteins(frequencies: Tensor, *, count: int, length: int, seed: int) -> list[list[int]]:
    """Residues drawn one by one from these frequencies of the 33 tokens: for a model without a file of proteins."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(frequencies, count * length, replacement=True, generator=generator)
    proteins: list[list[int]] = drawn.view(count, length).tolist()
    return proteins


def _favor_config(model: ProteinLanguageModel, num_features: int | None) -> FavorConfig:
    own = model.config.attention
    config = own if isinstance(own, FavorConfig) else FavorConfig()
    return config if num_features is None else replace(config, num_features=num_features)


def _with_attention(model: ProteinLanguageModel, attention: AttentionConfig) -> ProteinLanguageModel:
    """The model with another attention in all layers (its own where it is the same), sharing the other weights."""
    if attention == model.config.attention:
        return model
    shallow = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for layer, block in enumerate(shallow.encoder.blocks):
        block.attention = build_attention(
            attention,
            head_dim=model.config.head_dim,
            num_heads=model.config.num_heads,
            causal=model.config.direction == "unidirectional",
            seed=0,
            layer=layer,
        ).to(model.head.bias.device)
    return shallow.eval()


@torch.no_grad()
def _layers(
    model: ProteinLanguageModel, linear: ProteinLanguageModel, favor: FavorConfig, tokens: Tensor
) -> Iterable[Readiness]:
    """Figures of each layer on one protein."""
    segments = torch.ones_like(tokens)
    length, config = tokens.shape[1], model.config
    generator = torch.Generator().manual_seed(length)
    queries = torch.randperm(length, generator=generator)[:QUERIES_PER_PROTEIN].to(tokens.device)
    inputs = model.encoder.attention_inputs(tokens, segments)
    for layer, ((q, k, v), block) in enumerate(zip(inputs, linear.encoder.blocks, strict=True)):
        attention = block.attention
        assert isinstance(attention, torch.nn.Module)
        projection = draw_projection(
            favor.num_features,
            config.head_dim,
            orthogonal=favor.orthogonal,
            row_norms=favor.row_norms,
            generator=projection_generator(0, layer, 0),
        )
        yield measure_readiness(
            q,
            k,
            v,
            segments,
            linear=attention(q, k, v, segments),
            projection=projection.to(tokens.device),
            queries=queries,
            causal=config.direction == "unidirectional",
        )
