"""What every attention kind promises, for every kind in ATTENTION_KINDS and both directions.

Tolerances. Against the oracle in float64 both sides are exact but for rounding: 1e-9 leaves room for sums of
some hundred terms. In float32 a log feature of size 30 is rounded by about 2e-6, and its exponential by that
in relation: 1e-5 for values of size 3. Where the same arithmetic must run on the same numbers, equality is
exact.
"""

from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor

from protformer.attention import ATTENTION_KINDS, build_attention, head_shares, pieces
from protformer.attention.interface import Attention
from protformer.attention.linear_kind import LinearAttention
from protformer.config import AttentionConfig, ClusteredConfig, ExactConfig, FavorConfig, GeneralizedConfig

CONFIGS: dict[str, AttentionConfig] = {
    "favor-sqrt_d": FavorConfig(num_features=24, features="positive", row_norms="sqrt_d"),
    "favor-chi": FavorConfig(num_features=24, features="positive", row_norms="chi"),
    "favor-hyperbolic": FavorConfig(num_features=24, features="hyperbolic"),
    "favor-damped": FavorConfig(num_features=24, features="favor++", row_norms="chi", rescale=True),
    "favor-scaled": FavorConfig(num_features=24, rescale=True, covariance="diagonal"),
    "generalized-orthogonal": GeneralizedConfig(num_features=24, projection="orthogonal"),
    "generalized-mirrored": GeneralizedConfig(num_features=4 * 8, projection="mirrored"),
    "generalized-uneven": GeneralizedConfig(num_features=24, projection="mirrored"),
    "generalized-none": GeneralizedConfig(projection="none"),
    "generalized-exp": GeneralizedConfig(num_features=24, function="exp", projection="iid"),
    "generalized-sigmoid": GeneralizedConfig(num_features=24, function="sigmoid", projection="mirrored"),
    "generalized-elu": GeneralizedConfig(num_features=24, function="elu_plus_one", projection="none"),
    "generalized-abs": GeneralizedConfig(num_features=24, function="abs"),
    "generalized-gelu": GeneralizedConfig(num_features=24, function="gelu"),
    "clustered": ClusteredConfig(clusters_per_query=3, cluster_size=4),
    "exact": ExactConfig(),
}
LINEAR_NAMES = [name for name, config in CONFIGS.items() if isinstance(config, FavorConfig | GeneralizedConfig)]
CAUSAL_NAMES = [name for name, config in CONFIGS.items() if not isinstance(config, ClusteredConfig)]
"""Clusters of keys would hold later residues beside earlier ones: this kind has no causal form."""
HEAD_DIM, NUM_HEADS = 8, 2
FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}
FLOAT64 = {"atol": 1e-9, "rtol": 1e-9}

over_kinds = pytest.mark.parametrize("name", CONFIGS)
over_causal_kinds = pytest.mark.parametrize("name", CAUSAL_NAMES)
over_kinds_and_directions = pytest.mark.parametrize(
    ("name", "causal"),
    [
        pytest.param(name, causal, id=f"{name}-{'causal' if causal else 'bidirectional'}")
        for name in CONFIGS
        for causal in (False, True)
        if not causal or name in CAUSAL_NAMES
    ],
)
over_directions = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def build(name: str, causal: bool, seed: int = 0) -> Attention:
    """Attention as after some training: nothing that can be learned is at its first value."""
    attention = build_attention(
        CONFIGS[name], head_dim=HEAD_DIM, num_heads=NUM_HEADS, causal=causal, seed=seed, layer=0
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in attention.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    for key, buffer in attention.named_buffers():
        if key == "moments.average":
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.1)
    return attention.eval()


def oracle_weights(name: str, attention: Attention, q: Tensor, k: Tensor, segments: Tensor, causal: bool) -> Tensor:
    config, state = CONFIGS[name], attention.state_dict()
    projection = state.get("random_features.projection")
    if isinstance(config, FavorConfig):
        return reference.favor_weights(
            q,
            k,
            segments,
            causal=causal,
            projection=projection,
            features=config.features,
            moments=state.get("moments.average"),
            rescale=config.rescale,
            covariance_root=state.get("covariance_root"),
        )
    if isinstance(config, GeneralizedConfig):
        return reference.generalized_weights(
            q,
            k,
            segments,
            causal=causal,
            projection=projection,
            epsilon=config.epsilon,
            function=config.function,
            mirrored=config.is_mirrored,
        )
    if isinstance(config, ClusteredConfig):
        return reference.clustered_weights(
            q,
            k,
            segments,
            clusters_per_query=config.clusters_per_query,
            cluster_size=config.cluster_size,
            log_mass=state["log_mass"],
        )
    return reference.exact_weights(q, k, segments, causal=causal)


def draw(length: int, *, batch: int = 1, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, NUM_HEADS, length, HEAD_DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def segments_of(*lengths: int, padding: int = 0) -> Tensor:
    """One row of proteins of these lengths, numbered from 1, then padding."""
    ids = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))
    return torch.cat([ids, torch.zeros(padding, dtype=torch.int64)])[None]


def one_segment(length: int, batch: int = 1) -> Tensor:
    return torch.ones(batch, length, dtype=torch.int64)


# Tiles of causal kinds have 64 residues; these cross their borders in every way.
LAYOUTS: dict[str, Tensor] = {
    "one residue": segments_of(1),
    "one protein": segments_of(300),
    "one protein, padded": torch.cat([segments_of(200, padding=60), segments_of(260), segments_of(3, padding=257)]),
    "padding first": segments_of(200, padding=30).flip(1),
    "two proteins": segments_of(128, 40),
    "several proteins": segments_of(1, 5, 130, 150, padding=9),
    "uneven rows": torch.cat([segments_of(150, 20, 1, padding=29), segments_of(200), segments_of(2, 64, padding=134)]),
    "padding between": torch.tensor([[3] * 70 + [0] * 10 + [1] * 60 + [0] * 130 + [2] * 5]),
    "nothing but padding in a row": torch.cat([segments_of(20), torch.zeros(1, 20, dtype=torch.int64)]),
}
over_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def test_every_kind_is_put_to_these_tests() -> None:
    assert {config.kind for config in CONFIGS.values()} == set(ATTENTION_KINDS)


@over_kinds_and_directions
@over_layouts
def test_output_and_gradients_are_those_of_the_definition(name: str, causal: bool, layout: str) -> None:
    attention, segments = build(name, causal), LAYOUTS[layout]
    inputs = [x.requires_grad_() for x in draw(segments.shape[1], batch=len(segments), dtype=torch.float64)]
    q, k, v = inputs
    output = attention(q, k, v, segments)
    expected = reference.attend(oracle_weights(name, attention, q, k, segments, causal), v)
    torch.testing.assert_close(output, expected, **FLOAT64)

    direction = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for got, wanted in zip(
        torch.autograd.grad(output, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, **FLOAT64)


@pytest.mark.parametrize("name", LINEAR_NAMES)
@over_directions
def test_heads_shared_out_among_threads_give_the_same(name: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, segments = build(name, causal), LAYOUTS["uneven rows"]
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(head_shares, "num_threads", lambda device, threads=threads: threads)
        monkeypatch.setattr(head_shares, "LEAST_FEATURES", 1)
        inputs = [x.requires_grad_() for x in draw(segments.shape[1], batch=len(segments))]
        output = attention(*inputs, segments)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    with torch.inference_mode():
        results[0].append(attention(*inputs, segments))
    results[1].append(output)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, **FLOAT32)


@pytest.mark.parametrize("name", LINEAR_NAMES)
@over_directions
@pytest.mark.parametrize("scales", [(0.1, 1.0), (0.1, 30.0), (30.0, 0.1)], ids=["alike", "growing", "shrinking"])
def test_several_blocks_give_the_same_as_one(
    name: str, causal: bool, scales: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 128 and 32 residues; causal blocks are larger. Which have keys too large for the usual way differs."""
    attention, segments = build(name, causal), one_segment(300)
    factors = torch.linspace(*scales, 300, dtype=torch.float64)[:, None]
    results = []
    for residues in (None, 128, 32):
        if residues is not None:
            features = attention.feature_map(HEAD_DIM, torch.float64).num_features * NUM_HEADS
            monkeypatch.setitem(pieces.NUM_FEATURES_AT_ONCE, "cpu", residues * features)
        q, k, v = draw(300, dtype=torch.float64)
        inputs = [x.requires_grad_() for x in (q, factors * k, v)]
        output = attention(*inputs, segments)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for one, *several in zip(*results, strict=True):
        for other in several:
            torch.testing.assert_close(other, one, **FLOAT64)


@over_kinds_and_directions
def test_float32_output_is_that_of_the_definition(name: str, causal: bool) -> None:
    attention, segments = build(name, causal), LAYOUTS["uneven rows"]
    q, k, v = draw(segments.shape[1], batch=len(segments))
    expected = reference.attend(oracle_weights(name, attention, q, k, segments, causal), v)
    torch.testing.assert_close(attention(q, k, v, segments), expected.float(), **FLOAT32)


@over_kinds_and_directions
@over_layouts
def test_weights_are_the_matrix_that_forward_applies(name: str, causal: bool, layout: str) -> None:
    attention, segments = build(name, causal), LAYOUTS[layout]
    q, k, v = draw(segments.shape[1], batch=len(segments), dtype=torch.float64)
    weights = attention.weights(q, k, segments)
    torch.testing.assert_close(weights @ v, attention(q, k, v, segments), **FLOAT64)
    torch.testing.assert_close(weights, oracle_weights(name, attention, q, k, segments, causal), **FLOAT64)


@over_kinds_and_directions
@over_layouts
def test_weights_are_shares_of_what_a_residue_sees(name: str, causal: bool, layout: str) -> None:
    attention, segments = build(name, causal), LAYOUTS[layout]
    q, k, _ = draw(segments.shape[1], batch=len(segments))
    weights = attention.weights(q, k, segments)
    assert (weights >= 0).all()
    sums = (segments > 0)[:, None].float().expand(weights.shape[:3])
    torch.testing.assert_close(weights.sum(-1), sums, **FLOAT32)
    unseen = segments[:, :, None] != segments[:, None, :]
    if causal:
        unseen = unseen | torch.ones_like(unseen).triu(1)
    assert (weights.masked_select(unseen[:, None]) == 0).all()


@over_kinds_and_directions
@pytest.mark.parametrize(("before", "after"), [(0, 1), (0, 200), (37, 3)])
def test_padding_changes_nothing_and_comes_out_as_zero(name: str, causal: bool, before: int, after: int) -> None:
    attention, length = build(name, causal), 150
    alone = draw(length, dtype=torch.float64)
    padded = []
    for seed, x in enumerate(alone):
        rubbish = 100 * draw(before + length + after, dtype=torch.float64, seed=seed + 10)[0]
        rubbish[:, :, before : before + length] = x
        padded.append(rubbish)
    segments = torch.zeros(1, before + length + after, dtype=torch.int64)
    segments[:, before : before + length] = 1
    output = attention(*padded, segments)
    expected = attention(*alone, one_segment(length))
    torch.testing.assert_close(output[:, :, before : before + length], expected, **FLOAT64)
    assert (output[:, :, segments[0] == 0] == 0).all()


@over_kinds_and_directions
@pytest.mark.parametrize(
    ("lengths", "padding"),
    [((70, 90), 0), ((1, 5, 130, 300), 0), ((300, 1, 5, 130), 17), ((64, 64, 128, 2), 0)],
)
def test_packed_proteins_give_what_each_gives_alone(
    name: str, causal: bool, lengths: tuple[int, ...], padding: int
) -> None:
    attention, segments = build(name, causal), segments_of(*lengths, padding=padding)
    q, k, v = draw(segments.shape[1], dtype=torch.float64)
    output = attention(q, k, v, segments)
    for protein, length in enumerate(lengths, start=1):
        here = segments[0] == protein
        alone = attention(q[:, :, here], k[:, :, here], v[:, :, here], one_segment(length))
        torch.testing.assert_close(output[:, :, here], alone, **FLOAT64)


@over_kinds
def test_permuting_residues_permutes_the_output(name: str) -> None:
    attention, length = build(name, causal=False), 150
    inputs = draw(length, dtype=torch.float64)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(3))
    output = attention(*inputs, one_segment(length))
    permuted = attention(*(x[:, :, order] for x in inputs), one_segment(length))
    torch.testing.assert_close(permuted, output[:, :, order], **FLOAT64)


@over_kinds_and_directions
@pytest.mark.parametrize("layout", ["one protein, padded", "several proteins", "uneven rows"])
@pytest.mark.parametrize("scale", [8.0, 30.0, 300.0])
def test_large_logits_stay_finite_and_right(name: str, causal: bool, layout: str, scale: float) -> None:
    attention, segments = build(name, causal), LAYOUTS[layout]
    q, k, v = (x.double() for x in draw(segments.shape[1], batch=len(segments)))
    q, k = scale * q, scale * k
    expected = reference.attend(oracle_weights(name, attention, q, k, segments, causal), v)
    # Log features reach scale ** 2 * 10, and float64 rounds them by 1e-16 of that.
    torch.testing.assert_close(attention(q, k, v, segments), expected, atol=1e-9, rtol=1e-9)

    single = [x.float().requires_grad_() for x in (q, k, v)]
    output = attention(*single, segments)
    output.square().sum().backward()
    assert output.isfinite().all()
    assert output.abs().max() <= v.abs().max() * (1 + 1e-5)  # a mean of values
    for x in single:
        assert x.grad is not None
        assert x.grad.isfinite().all()


@over_kinds_and_directions
@pytest.mark.parametrize("lengths", [(128, 100), (70, 90)])
@pytest.mark.parametrize("scales", [(1.0, 30.0), (30.0, 1.0)], ids=["small then large", "large then small"])
def test_neighbours_of_another_magnitude_change_nothing(
    name: str, causal: bool, lengths: tuple[int, int], scales: tuple[float, float]
) -> None:
    attention, segments = build(name, causal), segments_of(*lengths)
    scale = torch.tensor(scales, dtype=torch.float64)[segments[0] - 1, None]
    q, k, v = draw(segments.shape[1], dtype=torch.float64)
    expected = reference.attend(oracle_weights(name, attention, scale * q, scale * k, segments, causal), v)
    inputs = [x.requires_grad_() for x in (scale * q, scale * k, v)]
    output = attention(*inputs, segments)
    torch.testing.assert_close(output, expected, **FLOAT64)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.square().sum(), inputs))


@over_kinds_and_directions
def test_gradients_are_right_where_logits_are_large(name: str, causal: bool) -> None:
    attention, segments = build(name, causal), LAYOUTS["several proteins"]
    q, k, v = draw(segments.shape[1], dtype=torch.float64)
    inputs = [(5 * q).requires_grad_(), (5 * k).requires_grad_(), v.requires_grad_()]
    output = attention(*inputs, segments)
    expected = reference.attend(oracle_weights(name, attention, inputs[0], inputs[1], segments, causal), inputs[2])
    direction = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for got, wanted in zip(
        torch.autograd.grad(output, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, **FLOAT64)


@over_causal_kinds
@pytest.mark.parametrize("layout", ["one protein", "several proteins"])
@pytest.mark.parametrize("first_changed", [1, 70, 128, 200])
@pytest.mark.parametrize("factor", [1.0, 100.0], ids=["alike", "huge"])
def test_a_causal_kind_sees_no_future(name: str, layout: str, first_changed: int, factor: float) -> None:
    attention, segments = build(name, causal=True), LAYOUTS[layout]
    q, k, v = draw(segments.shape[1])
    other = [x.clone() for x in (q, k, v)]
    for x, change in zip(other, draw(segments.shape[1], seed=7), strict=True):
        x[:, :, first_changed:] = factor * change[:, :, first_changed:]
    before = attention(q, k, v, segments)[:, :, :first_changed]
    after = attention(*other, segments)[:, :, :first_changed]
    assert torch.equal(before, after)


@over_causal_kinds
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_no_gradient_reaches_the_future_of_a_causal_kind(name: str, scale: float) -> None:
    attention, length, first_future = build(name, causal=True), 200, 70
    q, k, v = draw(length)
    inputs = [(scale * q).requires_grad_(), (scale * k).requires_grad_(), v.requires_grad_()]
    attention(*inputs, one_segment(length))[:, :, :first_future].square().sum().backward()
    for x in inputs:
        assert x.grad is not None
        assert (x.grad[:, :, first_future:] == 0).all()
        assert (x.grad[:, :, :first_future] != 0).any()


@over_kinds_and_directions
def test_state_dict_carries_all_that_decides_the_output(name: str, causal: bool) -> None:
    trained, restored = build(name, causal, seed=1), build(name, causal, seed=2)
    trained.redraw(step=5000)
    restored.load_state_dict(trained.state_dict())
    inputs = draw(40)
    assert torch.equal(trained(*inputs, one_segment(40)), restored(*inputs, one_segment(40)))


@over_kinds_and_directions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["one protein, padded", "several proteins"])
def test_half_precision_differs_by_its_rounding(name: str, causal: bool, dtype: torch.dtype, layout: str) -> None:
    attention, segments = build(name, causal), LAYOUTS[layout]
    rounded = draw(segments.shape[1], batch=len(segments), dtype=dtype)
    expected = attention(*(x.float() for x in rounded), segments)
    output = attention(*rounded, segments)
    assert output.dtype == dtype
    # The result, and in exact attention the weights too, are rounded once to this type.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), expected, atol=step, rtol=step)


@over_kinds_and_directions
@pytest.mark.parametrize("layout", ["one protein, padded", "several proteins"])
def test_autocast_leaves_the_features_in_float32(name: str, causal: bool, layout: str) -> None:
    attention, segments = build(name, causal), LAYOUTS[layout]
    inputs = draw(segments.shape[1], batch=len(segments))
    expected = attention(*inputs, segments)
    with torch.autocast("cpu", torch.bfloat16):
        output = attention(*inputs, segments)
        weights = attention.weights(*inputs[:2], segments)
    assert output.dtype == torch.float32
    assert torch.equal(weights, attention.weights(*inputs[:2], segments))
    if name == "exact":
        # torch's own kernel takes bfloat16: a logit of size 4 is rounded by 2 ** -8 of that, its weight
        # likewise.
        torch.testing.assert_close(output, expected, atol=0.03, rtol=0.03)
    else:
        assert torch.equal(output, expected)


@over_directions
def test_relu_features_do_not_overflow_float16_at_a_long_length(causal: bool) -> None:
    config = GeneralizedConfig(num_features=256)
    attention = build_attention(config, head_dim=HEAD_DIM, num_heads=1, causal=causal, seed=0, layer=0)
    inputs = [3 * x[:, :1] for x in draw(8192, dtype=torch.float16)]
    output = attention(*inputs, one_segment(8192))
    expected = attention(*(x.float() for x in inputs), one_segment(8192))
    torch.testing.assert_close(output.float(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", LINEAR_NAMES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_step_by_step_gives_the_training_outputs(name: str, scale: float, dtype: torch.dtype) -> None:
    attention, length = build(name, causal=True), 150
    assert isinstance(attention, LinearAttention)
    q, k, v = draw(length, batch=2, dtype=dtype)
    q, k = scale * q, scale * k
    expected = attention(q, k, v, one_segment(length, batch=2))
    state, outputs = attention.initial_state(q, v), []
    for at_once in zip(q.split(1, 2), k.split(1, 2), v.split(1, 2), strict=True):
        output, state = attention.step(*at_once, state)
        outputs.append(output)
    # In float32 a log feature of size 30 ** 2 * 10 is rounded by 5e-4.
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32 if scale == 1.0 else {"atol": 5e-3, "rtol": 5e-3}
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, **tolerance)


@pytest.mark.parametrize("name", LINEAR_NAMES)
@over_directions
@pytest.mark.parametrize("protein", [8192, 4], ids=["one protein", "many proteins"])
def test_memory_of_linear_kinds_grows_with_the_length_alone(name: str, causal: bool, protein: int) -> None:
    attention = build(name, causal)

    def largest_saved(num_residues: int) -> int:
        segments = torch.arange(num_residues)[None] // protein + 1
        return _largest_tensor_for_backward(lambda *inputs: attention(*inputs, segments), draw(num_residues))

    assert largest_saved(8192) <= 2.2 * largest_saved(4096)


def _largest_tensor_for_backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    sizes = []

    def note(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        function(*(x.requires_grad_() for x in inputs))
    return max(sizes)
