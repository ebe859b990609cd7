"""On CUDA everything gives what it gives on the CPU. Runs only where there is a device: `pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch

from protformer.alphabet import FIRST_RESIDUE
from protformer.attention import ATTENTION_KINDS, build_attention
from protformer.benchmark.cases import ATTENTION_CONFIGS, Grid, attention_cases, model_cases
from protformer.benchmark.measure import Limits, measure
from protformer.config import ModelConfig
from protformer.model.masked_lm_head import ProteinLanguageModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SIZES = ModelConfig(num_layers=2, num_heads=2, hidden_size=64, feed_forward_size=128)
SEGMENTS = torch.tensor([[1] * 150 + [2] * 100 + [0] * 50, [1] * 300])


@pytest.mark.parametrize("direction", ["bidirectional", "unidirectional"])
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_attention_and_its_gradients_agree_with_the_cpu(kind, direction):
    torch.manual_seed(0)
    attention = build_attention(
        ATTENTION_CONFIGS[kind](), head_dim=32, num_heads=2, causal=direction == "unidirectional", seed=0, layer=0
    )
    inputs = torch.randn(3, 2, 2, 300, 32)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in inputs]
        attended = attention.to(device)(*leaves, SEGMENTS.to(device))
        gradients = torch.autograd.grad(attended.square().sum(), leaves)
        results.append([x.cpu() for x in (attended, *gradients)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_a_model_under_bf16_autocast_stays_near_float32(kind):
    torch.manual_seed(0)
    model = ProteinLanguageModel(replace(SIZES, attention=ATTENTION_CONFIGS[kind]()), seed=0).eval().cuda()
    tokens = torch.randint(FIRST_RESIDUE, FIRST_RESIDUE + 20, SEGMENTS.shape, device="cuda")
    with torch.no_grad():
        exact = model(tokens, SEGMENTS.cuda())
        with torch.autocast("cuda", dtype=torch.bfloat16):
            rounded = model(tokens, SEGMENTS.cuda())
    seen = SEGMENTS > 0
    assert float((rounded.float() - exact)[seen.cuda()].norm() / exact[seen.cuda()].norm()) < 0.03


def test_the_benchmark_measures_time_and_the_allocators_peak():
    every = Grid(
        kinds=list(ATTENTION_KINDS),
        directions=["bidirectional"],
        dtypes=["fp32", "bf16"],
        passes=["forward", "forward+backward"],
        lengths=[1024],
        batch=1,
        device="cuda",
        peers=False,
    )
    cases = [*attention_cases(every, heads=2, head_dim=32, num_features=64), *model_cases(every, SIZES)]
    limits = Limits(repeats=1, with_memory=True, max_seconds=60.0, max_gb=8.0)
    rows = list(measure(cases, limits, tell=print, advance=lambda n: None))
    assert len(rows) == len(cases)
    assert all(row.seconds > 0 and row.peak_extra_mb is not None and row.peak_extra_mb > 0 for row in rows)
