"""What random features promise of softmax attention: unbiased kernels, errors that fall, rounding that stays small."""

import math

import pytest
import reference
import torch
from torch import Tensor

from protformer.attention import build_attention
from protformer.attention.random_features import draw_projection, trigonometric_features
from protformer.config import AttentionConfig, FavorConfig, GeneralizedConfig

PAPER = FavorConfig(features="positive", row_norms="chi")


def draw(length: int, head_dim: int, *, scale: float, seed: int, num_heads: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, num_heads, length, head_dim)
    return [torch.randn(shape, generator=generator) * s for s in (scale, scale, 1.0)]


def attend(config: AttentionConfig, inputs: list[Tensor], *, seed: int = 0, causal: bool = False) -> Tensor:
    _, num_heads, length, head_dim = inputs[0].shape
    attention = build_attention(config, head_dim=head_dim, num_heads=num_heads, causal=causal, seed=seed, layer=0)
    return attention.eval()(*inputs, torch.ones(1, length, dtype=torch.int64))


def squared_errors(config: FavorConfig, *, draws: int, length: int, head_dim: int, scale: float) -> Tensor:
    errors = []
    for seed in range(draws):
        q, k, v = draw(length, head_dim, scale=scale, seed=seed)
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        errors.append((attend(config, [q, k, v], seed=seed) - exact).square().mean())
    return torch.stack(errors)


def kernel_estimates(features: str, x: Tensor, y: Tensor, *, damping: float = 0.0, blocks: int = 8000) -> Tensor:
    """Independent estimates of exp(x . y), one a block of orthogonal rows."""
    generator = torch.Generator().manual_seed(0)
    rows = draw_projection(blocks * len(x), len(x), orthogonal=True, row_norms="chi", generator=generator).double()
    if features == "trigonometric":
        by_row = [trigonometric_features(z[None], rows)[0].view(2, -1) for z in (x, y)]
        estimates = (by_row[0] * by_row[1]).sum(0) * len(rows)
    elif features == "hyperbolic":
        estimates = sum(reference.softmax_kernel_estimates(x, y, sign * rows) for sign in (1, -1)) / 2
    else:
        estimates = reference.damped_kernel_estimates(x, y, rows, damping)
    return estimates.view(blocks, -1).mean(dim=1)


@pytest.mark.parametrize("features", ["trigonometric", "hyperbolic", "favor++"])
def test_every_estimator_of_the_softmax_kernel_is_unbiased(features: str) -> None:
    x, y = torch.full((16,), 0.1875, dtype=torch.float64), torch.linspace(-0.2, 0.3, 16, dtype=torch.float64)
    estimates = kernel_estimates(features, x, y, damping=-0.05)
    standard_error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - torch.exp(x @ y)) < 4 * standard_error


def test_damping_that_is_best_by_the_formula_has_the_least_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, generator=generator, dtype=torch.float64) * 0.5 for _ in "xy")
    root = 16**0.25  # moments are of vectors that are not scaled yet
    best = reference.best_damping(x * root, y * root, (x * root) ** 2, (y * root) ** 2, torch.ones(16))
    assert -0.2 < best < -0.01
    spread = {a: float(kernel_estimates("favor++", x, y, damping=a).std()) for a in (best, best / 3, best * 3, 0.0)}
    assert min(spread, key=lambda a: spread[a]) == best


def test_the_error_falls_with_the_square_root_of_the_features() -> None:
    few, many = (
        squared_errors(
            FavorConfig(num_features=m, orthogonal=False, features="positive", row_norms="chi"),
            draws=15,
            length=256,
            head_dim=16,
            scale=0.5,
        ).median()
        for m in (64, 1024)
    )
    assert 0.5 < float(few / many) / 16 < 2


def test_orthogonal_features_beat_independent_ones_at_the_papers_setting() -> None:
    """Figure 4 at d = 16 and fewer residues: medians of 15 draws, as single errors have heavy tails."""
    orthogonal, independent = (
        squared_errors(
            FavorConfig(num_features=32, features="positive", row_norms="chi", orthogonal=is_orthogonal),
            draws=15,
            length=1024,
            head_dim=16,
            scale=0.5,
        ).median()
        for is_orthogonal in (True, False)
    )
    assert orthogonal < 0.9 * independent


def test_the_default_has_a_smaller_error_than_the_papers_estimator() -> None:
    setting = {"draws": 15, "length": 512, "head_dim": 64, "scale": 0.5}
    assert squared_errors(FavorConfig(), **setting).median() < 0.7 * squared_errors(PAPER, **setting).median()


@pytest.mark.parametrize("config", [FavorConfig(), PAPER, GeneralizedConfig()], ids=["default", "paper", "relu"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_bf16_is_within_one_percent_of_float32(config: AttentionConfig, causal: bool) -> None:
    rounded = [x.bfloat16().requires_grad_() for x in draw(1000, 64, scale=0.7, seed=0, num_heads=2)]
    full = [x.detach().float().requires_grad_() for x in rounded]
    outputs = [attend(config, x, causal=causal) for x in (rounded, full)]
    assert (outputs[0].float() - outputs[1]).norm() < 0.01 * outputs[1].norm()
    direction = torch.randn(outputs[1].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.autograd.backward(outputs, [direction, direction.float()])
    for a, b in zip(rounded, full, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad.float() - b.grad).norm() < 0.01 * b.grad.norm()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_relu_attention_is_finite_in_float16_over_65536_residues(causal: bool) -> None:
    inputs = [3 * x.half() for x in draw(65_536, 16, scale=1.0, seed=0)]
    output = attend(GeneralizedConfig(), inputs, causal=causal)
    assert output.dtype == torch.float16
    assert output.isfinite().all()
