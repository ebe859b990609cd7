"""Optimizers and schedules: what moves by which rule, and a state that goes on where it was."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim import Muon
from torch.optim.lr_scheduler import LambdaLR

from protformer.config import ExactConfig, ModelConfig, TrainingConfig, load_run_config
from protformer.errors import ConfigError
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.training import muon
from protformer.training.muon import orthogonalized
from protformer.training.optimizer import build_optimizer, learning_rate_factor

SIZES = ModelConfig(num_layers=2, num_heads=2, hidden_size=16, feed_forward_size=32, attention=ExactConfig())


def build(**fields):
    torch.manual_seed(0)
    model = ProteinLanguageModel(SIZES, seed=0)
    config = TrainingConfig(max_steps=20, warmup_steps=3, schedule="wsd", **fields)
    optimizer = build_optimizer(model, config)
    return model, optimizer, LambdaLR(optimizer, learning_rate_factor(config))


def step(model, optimizer, scheduler, number):
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize(("bf16_in_hardware", "tolerance"), [(False, 1e-3), (True, 1e-2)])
def test_an_orthogonalized_matrix_keeps_its_singular_vectors_and_has_singular_values_near_one(
    bf16_in_hardware, tolerance, monkeypatch
):
    monkeypatch.setattr(muon, "multiplies_bf16_in_hardware", lambda device: bf16_in_hardware)
    torch.manual_seed(0)
    matrices = torch.randn(3, 20, 8)
    left, values, right = torch.linalg.svd(orthogonalized(matrices), full_matrices=False)
    assert float((values - 1).abs().max()) < 0.4
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    torch.testing.assert_close(left @ right, u @ v, rtol=0, atol=tolerance)
    assert orthogonalized(torch.zeros(1, 4, 4)).count_nonzero() == 0


def test_a_hidden_matrix_moves_as_torchs_muon_moves_it():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(24, 12), nn.Linear(24, 12)
    theirs.load_state_dict(ours.state_dict())
    config = TrainingConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.1)
    optimizers = [
        build_optimizer(nn.ModuleDict({"inner": ours}), config),
        Muon([theirs.weight], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    before = ours.weight.detach().clone()
    for _ in range(3):
        ours.weight.grad = theirs.weight.grad = torch.randn(12, 24)
        for optimizer in optimizers:
            optimizer.step()
    ours_moved, theirs_moved = ((layer.weight.detach() - before) for layer in (ours, theirs))
    # torch's own works in bfloat16.
    assert float((ours_moved - theirs_moved).norm() / theirs_moved.norm()) < 0.02


def test_queries_keys_and_values_are_three_matrices_to_muon():
    model, optimizer, scheduler = build(optimizer="muon", learning_rate=1e-2, weight_decay=0.0)
    weight = model.encoder.blocks[0].query_key_value.weight
    before = weight.detach().clone()
    step(model, optimizer, scheduler, 0)
    for moved in (weight.detach() - before).chunk(3):
        values = torch.linalg.svdvals(moved)
        assert float(values.max() / values.min()) < 2.0


def test_norms_biases_and_embeddings_move_by_adamw_and_without_decay_also_under_muon():
    runs = [build(optimizer=name, weight_decay=0.5) for name in ("adamw", "muon")]
    for model, optimizer, scheduler in runs:
        for number in range(4):
            step(model, optimizer, scheduler, number)
    first, second = (dict(model.named_parameters()) for model, _, _ in runs)
    linear = {f"{name}.weight" for name, module in runs[0][0].named_modules() if isinstance(module, nn.Linear)}
    for name in first:
        assert torch.equal(first[name], second[name]) == (name not in linear), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_loaded_state_goes_on_bit_for_bit(name):
    model, optimizer, scheduler = build(optimizer=name)
    for number in range(5):
        step(model, optimizer, scheduler, number)
    other, its_optimizer, its_scheduler = build(optimizer=name)
    other.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    its_scheduler.load_state_dict(scheduler.state_dict())
    for number in range(5, 18):
        step(model, optimizer, scheduler, number)
        step(other, its_optimizer, its_scheduler, number)
    for (label, first), second in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second), label


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
def test_wsd_warms_up_stays_and_falls_to_zero(shape):
    config = TrainingConfig(max_steps=100, warmup_steps=10, schedule="wsd", decay_fraction=0.4, decay_shape=shape)
    factor = learning_rate_factor(config)
    assert [factor(step) for step in (0, 4, 9, 10, 60)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert factor(70) == pytest.approx({"linear": 0.75, "sqrt": 0.5}[shape])
    falling = [factor(step) for step in range(60, 101)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-2] > falling[-1] == 0


def test_wsd_refuses_steps_at_a_rate_of_zero():
    with pytest.raises(ConfigError, match=r"training\.max_steps: 200 .* at most training\.schedule_steps \(100\)"):
        TrainingConfig(schedule="wsd", schedule_steps=100, max_steps=200)


@pytest.mark.parametrize("name", ["paper-single", "paper-concat"])
def test_the_papers_recipe_is_in_its_configurations(name):
    training = load_run_config(name).training
    assert (training.optimizer, training.adam_beta1, training.adam_beta2) == ("adamw", 0.9, 0.98)
    assert (training.learning_rate, training.weight_decay, training.gradient_clip_norm) == (1e-3, 0.1, 0.5)
    factor = learning_rate_factor(training)
    assert {factor(step) for step in (0, 1, 1000, 10**6)} == {1.0}
