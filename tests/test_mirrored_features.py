"""Projections with both signs, whose features take fewer products: of ReLU as |W x| and x, of exp with reciprocals.

The same kernels, and the plain features where sums cancel or leave float32's range.
"""

import math

import pytest
import reference
import torch
from torch import Tensor

from protformer.attention import build_attention, cancellation
from protformer.attention.causal import attend_to_past
from protformer.attention.feature_maps import ExponentialMap, PointwiseMap
from protformer.attention.interface import Attention
from protformer.attention.linear import attend_to_all
from protformer.attention.mirrored_maps import MirroredExponentialMap, MirroredReluMap
from protformer.attention.random_features import haar_directions
from protformer.config import FavorConfig, GeneralizedConfig

HEAD_DIM, NUM_HEADS, EPSILON = 16, 2, 1e-3
over_directions = pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])


def build(is_causal: bool, projection: str = "mirrored") -> Attention:
    config = GeneralizedConfig(num_features=4 * HEAD_DIM, projection=projection)
    return build_attention(config, head_dim=HEAD_DIM, num_heads=NUM_HEADS, causal=is_causal, seed=0, layer=0)


def draw(length: int, *, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, NUM_HEADS, length, HEAD_DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def opposed(length: int, *, from_residue: int = 0) -> list[Tensor]:
    """Keys in one direction, and queries in the opposite one from some residue on."""
    q, k, v = draw(length)
    direction = 4 * torch.nn.functional.normalize(q[:, :, :1], dim=-1)
    sign = torch.where(torch.arange(length) < from_residue, 1.0, -1.0)[:, None]
    return [sign * direction + 0.01 * q, direction + 0.01 * k, v]


def expected_output(attention: Attention, inputs: list[Tensor], segments: Tensor, is_causal: bool) -> Tensor:
    weights = reference.generalized_weights(
        *inputs[:2],
        segments,
        causal=is_causal,
        projection=attention.state_dict()["random_features.projection"],
        epsilon=EPSILON,
        function="relu",
        mirrored=True,
    )
    return reference.attend(weights, inputs[2])


def largest_error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


LAYOUTS = {
    "one protein": torch.ones(1, 300, dtype=torch.int64),
    "several": torch.tensor([[1] * 5 + [2] * 130 + [3] + [0] * 9 + [4] * 155]),
}


def test_half_the_rows_and_a_quarter_less_features_do() -> None:
    attention = build(False)
    feature_map = attention.feature_map(HEAD_DIM, torch.float32)
    assert attention.state_dict()["random_features.projection"].shape == (2 * HEAD_DIM, HEAD_DIM)
    assert isinstance(feature_map, MirroredReluMap)
    assert (feature_map.num_features, feature_map.plain.num_features) == (3 * HEAD_DIM, 4 * HEAD_DIM)


@pytest.mark.parametrize("num_features", [2 * HEAD_DIM - 2, 3 * HEAD_DIM])
def test_rows_that_do_not_fill_orthogonal_blocks_have_plain_features(num_features: int) -> None:
    config = GeneralizedConfig(num_features=num_features, projection="mirrored")
    attention = build_attention(config, head_dim=HEAD_DIM, num_heads=1, causal=False, seed=0, layer=0)
    feature_map = attention.feature_map(HEAD_DIM, torch.float32)
    assert isinstance(feature_map, PointwiseMap)
    assert feature_map.num_features == num_features


@over_directions
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_output_and_gradients_are_those_of_the_definition(is_causal: bool, layout: str) -> None:
    attention, segments = build(is_causal), LAYOUTS[layout]
    inputs = [x.requires_grad_() for x in draw(segments.shape[1])]
    output, expected = attention(*inputs, segments), expected_output(attention, inputs, segments, is_causal)
    assert largest_error(output, expected) < 1e-6
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(output, inputs, direction)
    for one, other in zip(found, torch.autograd.grad(expected, inputs, direction.double()), strict=True):
        assert largest_error(one, other) < 2e-6


@over_directions
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_identity_is_exact_where_rows_are_orthogonal_in_float64(is_causal: bool, layout: str) -> None:
    rows = math.sqrt(HEAD_DIM) * haar_directions(2 * HEAD_DIM, HEAD_DIM, torch.Generator().manual_seed(0))
    weight, root = rows * HEAD_DIM**-0.25, math.sqrt(2 * math.sqrt(HEAD_DIM))
    plain = PointwiseMap(weight=torch.cat((weight, -weight)), head_dim=HEAD_DIM, function="relu", epsilon=EPSILON)
    mirrored = MirroredReluMap(weight=weight / root, offset=2 * EPSILON / root, plain_map=plain)
    attend, segments = attend_to_past if is_causal else attend_to_all, LAYOUTS[layout]
    inputs = [x.requires_grad_() for x in draw(segments.shape[1], dtype=torch.float64)]
    outputs = [attend(*inputs, segments, feature_map) for feature_map in (mirrored, plain)]
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=1e-12)
    by_map = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    for one, other in zip(*by_map, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


@over_directions
@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_opposed_to_all_keys_have_their_digits(
    is_causal: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, segments = build(is_causal), LAYOUTS[layout]
    inputs = [x.requires_grad_() for x in opposed(segments.shape[1])]
    expected = expected_output(attention, inputs, segments, is_causal)
    plain = attention.feature_map(HEAD_DIM, torch.float32).plain
    outputs = attention(*inputs, segments), (attend_to_past if is_causal else attend_to_all)(*inputs, segments, plain)
    assert largest_error(outputs[0], expected) < 1e-6
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(expected, inputs, direction.double())
    errors = [
        [
            largest_error(one, other)
            for one, other in zip(torch.autograd.grad(x, inputs, direction), wanted, strict=True)
        ]
        for x in outputs
    ]
    # The queries' gradients themselves are differences of nearly equal numbers here.
    assert all(here < 1.1 * plain + 1e-7 for here, plain in zip(*errors, strict=True))
    monkeypatch.setattr(cancellation, "SMALLEST_TRUSTED_SHARE", 0.0)
    assert largest_error(attention(*inputs, segments), expected) > 1e-5


def test_that_later_queries_are_computed_another_way_is_not_seen_before_them() -> None:
    attention, length, first_opposed = build(True), 300, 170
    segments = torch.ones(1, length, dtype=torch.int64)
    before = attention(*opposed(length, from_residue=length), segments)
    after = attention(*opposed(length, from_residue=first_opposed), segments)
    assert torch.equal(before[:, :, :first_opposed], after[:, :, :first_opposed])
    expected = expected_output(attention, opposed(length, from_residue=first_opposed), segments, True)
    assert largest_error(after, expected) < 1e-6


def test_a_projection_that_is_not_orthogonal_to_the_last_digit_has_plain_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kind_of_map(attention: Attention) -> type:
        return type(attention.feature_map(HEAD_DIM, torch.float32))

    assert kind_of_map(build(False)) is MirroredReluMap
    assert kind_of_map(build(False).bfloat16()) is PointwiseMap
    assert kind_of_map(build(False).double()) is PointwiseMap
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert kind_of_map(build(False)) is PointwiseMap


def hyperbolic_maps() -> tuple[MirroredExponentialMap, ExponentialMap]:
    attention = build_attention(
        FavorConfig(num_features=24), head_dim=HEAD_DIM, num_heads=NUM_HEADS, causal=False, seed=0, layer=0
    )
    feature_map = attention.feature_map(HEAD_DIM, torch.float64)
    assert isinstance(feature_map, MirroredExponentialMap)
    assert isinstance(feature_map.plain, ExponentialMap)
    return feature_map, feature_map.plain


def assert_same_results(inputs: list[Tensor], segments: Tensor) -> None:
    """Of both hyperbolic maps: outputs and gradients."""
    inputs = [x.requires_grad_() for x in inputs]
    outputs = [attend_to_all(*inputs, segments, feature_map) for feature_map in hyperbolic_maps()]
    torch.testing.assert_close(*outputs, atol=1e-11, rtol=1e-11)
    by_map = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    for one, other in zip(*by_map, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def scaled(length: int, *, q: float = 1, k: float = 1, last_key: float = 1) -> list[Tensor]:
    inputs = draw(length, dtype=torch.float64)
    inputs[0] *= q
    inputs[1] *= k
    inputs[1][:, :, -1] *= last_key
    return inputs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reciprocals_alone_do_for_hyperbolic_features_of_usual_size(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = LAYOUTS[layout]
    inputs = [x.requires_grad_() for x in scaled(segments.shape[1], q=2, k=2)]
    expected = attend_to_all(*inputs, segments, hyperbolic_maps()[1])
    monkeypatch.delattr(ExponentialMap, "activate")
    monkeypatch.setattr(ExponentialMap, "products", None)
    output = attend_to_all(*inputs, segments, hyperbolic_maps()[0])
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
    output.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "scales",
    [{}, {"q": 30.0}, {"k": 30.0}, {"q": 10.0, "k": 10.0}, {"last_key": 30.0}, {"k": 3.0, "last_key": 0.01}],
    ids=["usual", "large queries", "large keys", "both large", "a large key", "a small key"],
)
def test_hyperbolic_features_hold_at_any_size(layout: str, scales: dict[str, float]) -> None:
    """In sums that stay in range, in those that do not, and where one key weighs next to nothing beside others."""
    segments = LAYOUTS[layout]
    assert_same_results(scaled(segments.shape[1], **scales), segments)


@pytest.mark.parametrize(
    "scales", [{"q": 60.0}, {"k": 12.0}, {"last_key": 12.0}], ids=["large queries", "large keys", "a large key"]
)
def test_what_leaves_float32_is_computed_with_plain_features(
    scales: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    activate = ExponentialMap.activate
    monkeypatch.setattr(ExponentialMap, "activate", lambda *arguments: seen.append(1) or activate(*arguments))
    inputs, segments = [x.float() for x in scaled(300, **scales)], LAYOUTS["one protein"]
    single = FavorConfig(num_features=24)
    attention = build_attention(single, head_dim=HEAD_DIM, num_heads=NUM_HEADS, causal=False, seed=0, layer=0)
    output = attention(*inputs, segments)
    assert seen
    expected = attend_to_all(*(x.double() for x in inputs), segments, hyperbolic_maps()[1])
    torch.testing.assert_close(output.double(), expected, atol=1e-3, rtol=1e-3)


def test_keys_that_share_a_direction_are_still_had_by_reciprocals(monkeypatch: pytest.MonkeyPatch) -> None:
    """References in the middle of a feature's products, which are far from zero here."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 500, 64, generator=generator) for _ in range(3))
    shared, segments = 4 * torch.randn(64, generator=generator), torch.ones(1, 500, dtype=torch.int64)
    attention = build_attention(FavorConfig(), head_dim=64, num_heads=2, causal=False, seed=0, layer=0)
    products = torch.tensor([[[-3.0, 5.0], [1.0, 6.0], [0.0, 8.0]]])
    assert attention.feature_map(64, torch.float32).guess_reference(products).tolist() == [[-1.0, 6.5]]
    monkeypatch.setattr(ExponentialMap, "products", None)
    assert attention(q / 2, k / 4 + shared, v, segments).isfinite().all()


def test_weights_are_never_negative() -> None:
    """Not even of keys that are opposed to a query, where sums over all keys do not cancel."""
    attention, segments = build(False), LAYOUTS["one protein"]
    q = 1e6 * draw(300)[0]
    assert (attention.weights(q, -q, segments) >= 0).all()
    identity = torch.eye(300).expand(1, NUM_HEADS, -1, -1)
    signed = attend_to_all(q, -q, identity, segments, attention.feature_map(HEAD_DIM, torch.float32))
    assert (signed < 0).any()  # what plain features are for


def test_a_past_is_gone_on_from() -> None:
    attention, first = build(True), 70
    q, k, v = draw(100)
    whole = attention(q, k, v, torch.ones(1, 100, dtype=torch.int64))
    past = attention.initial_state(q, v)
    for at_once in zip(*(x[:, :, :first].split(1, 2) for x in (q, k, v)), strict=True):
        _, past = attention.step(*at_once, past)
    rest = [x[:, :, first:] for x in (q, k, v)]
    feature_map, segments = attention.feature_map(HEAD_DIM, torch.float32), torch.ones(1, 30, dtype=torch.int64)
    output = attend_to_past(*rest, segments, feature_map, past=past, past_of={(0, 0): 0})
    torch.testing.assert_close(output, whole[:, :, first:], atol=1e-5, rtol=1e-5)


def test_mirrored_rows_have_a_fifth_of_the_error_of_as_many_others() -> None:
    """Against infinitely many rows (Cho and Saul 2009, eq. 6), at the default's sizes, over 15 draws."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 256, 64, generator=generator, dtype=torch.float64) for _ in range(3))
    kernel = reference.relu_kernel(q, k)
    expected, segments = kernel / kernel.sum(dim=-1, keepdim=True) @ v, torch.ones(1, 256, dtype=torch.int64)
    errors = {}
    for projection in ("mirrored", "orthogonal", "iid"):
        config = GeneralizedConfig(projection=projection, epsilon=1e-9)
        outputs = [
            build_attention(config, head_dim=64, num_heads=1, causal=False, seed=seed, layer=0)(q, k, v, segments)
            for seed in range(15)
        ]
        errors[projection] = float(torch.stack([(output - expected).square().mean() for output in outputs]).median())
    assert errors["mirrored"] < errors["orthogonal"] / 4
    assert errors["orthogonal"] < 0.7 * errors["iid"]
