"""How far random features are from exact softmax attention: against their number (Choromanski et al. 2021, fig. 4), and
through the layers of a model (their fig. 14).

In: sizes and a number of draws. Out: medians over draws of fresh queries, keys, values and features, with the
interval that holds the true median in 95 % of such experiments (order statistics; no distribution is assumed). All
estimators see the same queries, keys and values in one draw, so that they can be compared draw by draw.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from protformer.alphabet import FIRST_RESIDUE, LAST_RESIDUE
from protformer.attention import build_attention
from protformer.attention.random_features import draw_projection, projection_generator, trigonometric_features
from protformer.config import ExactConfig, FavorConfig, ModelConfig
from protformer.evaluation.model_readiness import hidden_by_layer
from protformer.model.masked_lm_head import ProteinLanguageModel

Rows: TypeAlias = Float[Tensor, "residue head_dim"]

QUERY_BLOCK = 1024
"""Queries whose exact attention is computed at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """An estimator of softmax attention; without a configuration it is the trigonometric one, which no model uses."""

    name: str
    config: FavorConfig | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A median over draws and where the true one lies."""

    median: float
    low: float
    high: float

    def as_json(self, name: str) -> dict[str, float]:
        return {name: self.median, f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputError:
    """Error of the output of attention, of one estimator with one number of features."""

    variant: str
    num_features: int
    mean_squared: Interval
    relative: Interval
    """|estimate - exact| / |exact|"""
    wins_over_iid: float
    """Share of draws with a smaller error than iid positive features with chi row norms."""

    def as_json(self) -> dict[str, object]:
        return {
            "estimator": self.variant,
            "num_features": self.num_features,
            **self.mean_squared.as_json("mean_squared_error"),
            **self.relative.as_json("relative_error"),
            "wins_over_iid": self.wins_over_iid,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """Relative error of the hidden states after a layer, all layers up to it using random features."""

    num_features: int
    layer: int
    relative: Interval

    def as_json(self) -> dict[str, object]:
        return {
            "num_features": self.num_features,
            "layer": self.layer,
            **self.relative.as_json("relative_error"),
        }


IID = "positive, iid, chi"
TRIGONOMETRIC = "trigonometric, orthogonal"


def variants() -> list[Variant]:
    """The paper's estimators and what came after them."""
    paper = FavorConfig(features="positive", orthogonal=True, row_norms="chi")
    return [
        Variant(name=IID, config=replace(paper, orthogonal=False)),
        Variant(name="positive, orthogonal, chi", config=paper),
        Variant(name="positive, orthogonal, sqrt_d", config=replace(paper, row_norms="sqrt_d")),
        Variant(name=TRIGONOMETRIC, config=None),
        Variant(name="hyperbolic, orthogonal, chi", config=replace(paper, features="hyperbolic")),
        Variant(
            name="hyperbolic, orthogonal, sqrt_d", config=replace(paper, features="hyperbolic", row_norms="sqrt_d")
        ),
        Variant(name="FAVOR++, orthogonal", config=replace(paper, features="favor++")),
    ]


def output_errors(
    *, length: int, head_dim: int, scale: float, counts: Sequence[int], draws: int, advance: Callable[[int], None]
) -> Iterator[OutputError]:
    """For each variant and number of features; queries and keys are normal with standard deviation `scale`."""
    estimators = variants()
    inputs = [_draw_inputs(length, head_dim, scale, draw) for draw in range(draws)]
    exact = [exact_attention(q, k, v) for q, k, v in inputs]
    for num_features in counts:
        squares: dict[str, list[float]] = {}
        for variant in estimators:
            outputs = (estimate(variant, num_features, *inputs[draw], seed=draw) for draw in range(draws))
            pairs = zip(outputs, exact, strict=True)
            squares[variant.name] = [float((output - true).square().mean()) for output, true in pairs]
            advance(draws)
        for name, errors in squares.items():
            relative = [math.sqrt(e / float(t.square().mean())) for e, t in zip(errors, exact, strict=True)]
            wins = [error < other for error, other in zip(errors, squares[IID], strict=True)]
            yield OutputError(
                variant=name,
                num_features=num_features,
                mean_squared=median_interval(errors),
                relative=median_interval(relative),
                wins_over_iid=sum(wins) / draws,
            )


def estimate(variant: Variant, num_features: int, q: Rows, k: Rows, v: Rows, *, seed: int) -> Rows:
    """Attention by the estimator, with the features that `seed` decides."""
    if variant.config is None:
        return trigonometric_attention(q, k, v, num_features, seed=seed)
    config = replace(variant.config, num_features=num_features)
    attention = build_attention(config, head_dim=q.shape[1], num_heads=1, causal=False, seed=seed, layer=0)
    inputs = (q[None, None], k[None, None], v[None, None], torch.ones(1, len(q), dtype=torch.int64))
    with torch.no_grad():
        if config.features == "favor++":
            attention(*inputs)  # gathers the moments of queries and keys, as training does
            attention.redraw(step=0)
        attended: Tensor = attention(*inputs)
    return attended[0, 0]


def exact_attention(q: Rows, k: Rows, v: Rows) -> Rows:
    """softmax(q k^T / sqrt(d)) v, some queries at a time."""
    scaled = q / math.sqrt(q.shape[1])
    return torch.cat([(part @ k.T).softmax(-1) @ v for part in scaled.split(QUERY_BLOCK)])


def trigonometric_attention(q: Rows, k: Rows, v: Rows, num_features: int, *, seed: int) -> Rows:
    """By m / 2 orthogonal rows; for the figure only, as denominators may come out negative, or near zero."""
    generator = projection_generator(seed, 0, 0)
    projection = draw_projection(
        num_features // 2, q.shape[1], orthogonal=True, row_norms="chi", generator=generator
    ).double()

    phi_q, phi_k = (trigonometric_features(x.double() * q.shape[1] ** -0.25, projection) for x in (q, k))
    ones = torch.ones(len(v), 1, dtype=torch.float64)
    sums = phi_q @ (phi_k.T @ torch.cat((v.double(), ones), dim=1))
    return (sums[:, :-1] / sums[:, -1:]).to(v.dtype)


def layer_errors(
    *, model: ModelConfig, length: int, counts: Sequence[int], draws: int, advance: Callable[[int], None]
) -> Iterator[LayerError]:
    """Hidden states of a model of random weights, by FAVOR+ in every layer against exact attention in every layer."""
    favor = model.attention if isinstance(model.attention, FavorConfig) else FavorConfig()
    errors: dict[int, list[list[float]]] = {num_features: [] for num_features in counts}
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        tokens = torch.randint(FIRST_RESIDUE, LAST_RESIDUE + 1, (1, length), generator=generator)
        exact = hidden_by_layer(_random_model(replace(model, attention=ExactConfig()), draw), tokens)
        for num_features in counts:
            attention = replace(favor, num_features=num_features)
            linear = hidden_by_layer(_random_model(replace(model, attention=attention), draw), tokens)
            errors[num_features].append([relative_error(a, b) for a, b in zip(linear, exact, strict=True)])
            advance(1)
    for num_features, by_draw in errors.items():
        for layer, values in enumerate(zip(*by_draw, strict=True), start=1):
            yield LayerError(num_features=num_features, layer=layer, relative=median_interval(values))


def relative_error(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).norm() / exact.norm())


def median_interval(values: Sequence[float]) -> Interval:
    """The median and a 95 % interval for the true one: of 15 values, the 4th and the 12th; of 5 or fewer, all."""
    ordered = sorted(values)
    count = len(ordered)
    below = 0
    while sum(math.comb(count, i) for i in range(below + 2)) / 2**count <= 0.025:
        below += 1
    # Outside the ranks below + 1 and count - below the median lies with a probability of at most 2.5 % on each side.
    return Interval(median=statistics.median(ordered), low=ordered[below], high=ordered[-1 - below])


def _draw_inputs(length: int, head_dim: int, scale: float, seed: int) -> tuple[Rows, Rows, Rows]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(length, head_dim, generator=generator) for _ in range(3))
    return q * scale, k * scale, v


def _random_model(config: ModelConfig, seed: int) -> ProteinLanguageModel:
    torch.manual_seed(seed)
    return ProteinLanguageModel(config, seed=seed).eval()
