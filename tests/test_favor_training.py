"""What attention promises to training: recomputation, ranks and resumes change nothing; statistics are of the past."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from protformer.attention import build_attention
from protformer.attention.favor import FavorAttention
from protformer.attention.interface import Attention
from protformer.config import FavorConfig
from protformer.errors import ConfigError
from protformer.model.rotary import rotary_angles, rotate

CONFIGS = {
    "default": FavorConfig(num_features=16, redraw_every_steps=2),
    "damped": FavorConfig(num_features=16, features="favor++", row_norms="chi", rescale=True, redraw_every_steps=2),
    "learned": FavorConfig(num_features=16, covariance="diagonal", redraw_every_steps=2),
}
over_configs = pytest.mark.parametrize("name", CONFIGS)
SEGMENTS = torch.tensor([[1] * 20 + [2] * 15 + [0] * 5, [1] * 40])


def build(name: str, *, causal: bool = False, layer: int = 0) -> Attention:
    attention = build_attention(CONFIGS[name], head_dim=8, num_heads=2, causal=causal, seed=5, layer=layer)
    return attention.train()


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 2, 40, 8, generator=generator).requires_grad_() for _ in range(3)]


def train(attention: Attention, steps: range, *, recompute: bool = False) -> list[Tensor]:
    """Gradients of every step, in the order of a training loop."""
    found = []
    for step in steps:
        attention.redraw(step)
        inputs = draw(step)
        if recompute:
            output = checkpoint(attention, *inputs, SEGMENTS, use_reentrant=False)
        else:
            output = attention(*inputs, SEGMENTS)
        leaves = [*inputs, *attention.parameters()]
        found += torch.autograd.grad(output.square().sum(), leaves)
        with torch.no_grad():
            for parameter, gradient in zip(attention.parameters(), found[-len(leaves) :][3:], strict=True):
                parameter -= 1e-3 * gradient
    return found


@over_configs
@pytest.mark.parametrize("causal", [False, True])
def test_activation_checkpointing_changes_no_gradient(name: str, causal: bool) -> None:
    plain = train(build(name, causal=causal), range(7))
    recomputed = train(build(name, causal=causal), range(7), recompute=True)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@over_configs
def test_a_resumed_run_is_the_uninterrupted_one(name: str) -> None:
    whole, first, second = build(name), build(name), build(name)
    expected = train(whole, range(9))
    train(first, range(5))
    second.load_state_dict(first.state_dict())
    resumed = train(second, range(5, 9))
    for a, b in zip(expected[-len(resumed) :], resumed, strict=True):
        assert torch.equal(a, b)


def test_ranks_that_see_different_data_draw_the_same_features() -> None:
    ranks = [build("default"), build("default")]
    train(ranks[0], range(5))
    for step in range(5):
        ranks[1].redraw(step)
    projections = [dict(rank.named_buffers())["random_features.projection"] for rank in ranks]
    assert torch.equal(*projections)


def test_statistics_act_from_the_next_step_on() -> None:
    attention, fresh = build("damped", causal=True), build("damped", causal=True)
    inputs, segments = draw(0), SEGMENTS
    first = attention(*inputs, segments)
    assert torch.equal(attention(*inputs, segments), first)
    assert torch.equal(fresh.eval()(*inputs, segments), first)
    attention.redraw(step=1)
    assert not torch.equal(attention(*inputs, segments), first)


def test_statistics_are_those_of_the_residues_alone() -> None:
    attention = build("damped")
    assert isinstance(attention, FavorAttention)
    assert attention.moments is not None
    q, k, v = draw(0)
    attention(q, k, v, SEGMENTS)
    attention.redraw(step=1)
    residues = [x.detach().transpose(1, 2)[SEGMENTS > 0] for x in (q, k)]
    expected = torch.stack([x.pow(power).mean(0) for power in (1, 2) for x in residues])
    torch.testing.assert_close(attention.moments.average, expected)
    attention(q, k, v, SEGMENTS)
    attention.redraw(step=2)
    torch.testing.assert_close(attention.moments.average, expected)  # an average with itself


def test_evaluation_gathers_no_statistics() -> None:
    attention = build("damped").eval()
    before = {key: value.clone() for key, value in attention.state_dict().items()}
    attention(*draw(0), SEGMENTS)
    for key, value in attention.state_dict().items():
        assert torch.equal(value, before[key])


def test_the_covariance_is_learned_and_positions_stay_relative() -> None:
    attention = build("learned")
    attention(*draw(0), SEGMENTS).square().sum().backward()
    ((name, root),) = attention.named_parameters()
    assert name == "covariance_root"
    assert root.grad is not None
    torch.nn.init.uniform_(root, 0.5, 2.0)
    q, k, _ = (x.detach() for x in draw(1))
    angles = [rotary_angles(torch.arange(40).expand(2, -1) + offset, 8) for offset in (0, 100)]
    exact = [torch.softmax(_logits(attention, rotate(q, *turn), rotate(k, *turn)), -1) for turn in angles]
    torch.testing.assert_close(exact[0], exact[1], rtol=1e-4, atol=1e-6)


def _logits(attention: Attention, q: Tensor, k: Tensor) -> Tensor:
    assert isinstance(attention, FavorAttention)
    q, k = attention.prepare(q, k)
    return q @ k.transpose(-1, -2) / 8**0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_features": 7}, "model.attention.num_features: 7 is not allowed; it must be even"),
        ({"features": "favor++"}, "model.attention.row_norms: 'sqrt_d' is not allowed; it must be chi"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        FavorConfig(**fields)
