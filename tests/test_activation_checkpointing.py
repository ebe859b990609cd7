"""Activation checkpointing gives the gradients of the plain pass, and touches nothing but training."""

import pytest
import torch
from small_runs import SETTINGS, arguments, weights
from test_training import fasta as fasta  # the module's fixture

from protformer.alphabet import FIRST_RESIDUE, LAST_RESIDUE
from protformer.cli import run
from protformer.config import ExactConfig, FavorConfig, GeneralizedConfig, ModelConfig
from protformer.model import encoder
from protformer.model.masked_lm_head import ProteinLanguageModel

KINDS = [
    FavorConfig(num_features=16, redraw_every_steps=1),
    FavorConfig(num_features=16, features="favor++", row_norms="chi", rescale=True),
    GeneralizedConfig(num_features=16),
    ExactConfig(),
]


def make_model(attention, *, recomputes, direction="bidirectional", dropout=0.2):
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=3, num_heads=2, hidden_size=16, feed_forward_size=32, dropout=dropout, attention=attention,
        direction=direction,
    )  # fmt: skip
    model = ProteinLanguageModel(config, seed=0).train()
    if recomputes:
        model.encoder.recompute_in_backward()
    return model


def make_row(length=40):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(FIRST_RESIDUE, LAST_RESIDUE + 1, (2, length), generator=generator)
    segments = torch.ones_like(tokens)
    segments[1, length // 2 :] = 2
    return tokens, segments


def gradients_of_steps(model, *, bf16=False):
    """Of three steps, with other features in each."""
    found = []
    for step in range(3):
        torch.manual_seed(step)
        model.encoder.redraw_features(step)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(*make_row()).float().square().sum()
        loss.backward()
        found += [parameter.grad for parameter in model.parameters()]
    return found


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("direction", ["bidirectional", "unidirectional"])
@pytest.mark.parametrize("attention", KINDS, ids=["redrawn", "statistics", "generalized", "exact"])
def test_gradients_are_those_of_the_plain_pass_with_dropout_and_redraws(attention, direction, bf16):
    plain = gradients_of_steps(make_model(attention, recomputes=False, direction=direction), bf16=bf16)
    recomputed = gradients_of_steps(make_model(attention, recomputes=True, direction=direction), bf16=bf16)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6 * float(a.abs().max() + 1))


def test_blocks_along_the_residues_change_nothing_in_the_gradients(monkeypatch):
    plain = gradients_of_steps(make_model(ExactConfig(), recomputes=False, dropout=0.0))
    monkeypatch.setattr(encoder, "BLOCK_TOKENS", 30)
    model = make_model(ExactConfig(), recomputes=True, dropout=0.0)
    lengths = []
    model.encoder.blocks[0].feed_forward_norm.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
    for a, b in zip(plain, gradients_of_steps(model), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max() + 1))
    assert set(lengths) == {15, 10}


def test_only_the_input_of_each_layer_is_kept():
    def kept(model):
        tensors = {}

        def note(tensor):
            tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model.encoder(*make_row()).hidden
        del output
        return sum(size for address, size in tensors.items() if address not in weights)

    plain, recomputed = (kept(make_model(KINDS[2], recomputes=recomputes)) for recomputes in (False, True))
    assert recomputed < 0.4 * plain


def test_inference_is_untouched():
    models = [make_model(ExactConfig(), recomputes=recomputes).eval() for recomputes in (False, True)]
    calls = []
    models[1].encoder.blocks[0].attention_norm.register_forward_hook(lambda *call: calls.append(1))
    with torch.no_grad():
        first, second = (model(*make_row()) for model in models)
    assert torch.equal(first, second)
    assert len(calls) == 1
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_a_run_learns_the_same_with_it_and_may_take_it_up_on_a_resume(fasta, tmp_path):
    assert SETTINGS["model.dropout"] > 0
    more = ["--set", "training.activation_checkpointing=true"]
    assert run(arguments(fasta, tmp_path / "plain", "--max-steps", 4)) == 0
    assert run(arguments(fasta, tmp_path / "other", "--max-steps", 2)) == 0
    assert run([*arguments(fasta, tmp_path / "other", "--max-steps", 4), *more, "--resume"]) == 0
    first, second = weights(tmp_path / "plain"), weights(tmp_path / "other")
    for name in first:
        torch.testing.assert_close(torch.tensor(second[name]), torch.tensor(first[name]), rtol=1e-3, atol=1e-4)
