"""Training that begins from a model: its weights and history go in, and what learns is what was asked for."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_model import write_model
from small_runs import arguments, assert_same_run, fails_with, write_proteins

from protformer.checkpoint import load_model, save_model
from protformer.cli import run
from protformer.config import ExactConfig, FavorConfig, LoraConfig, TrainingConfig
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model_description import find_model_folder
from protformer.training.fine_tuning import add_lora, merge_adapters
from protformer.training.optimizer import build_optimizer

CPU = torch.device("cpu")
SHORT = {
    "data.max_residues": 64,
    "data.validation_fraction": 0.2,
    "training.tokens_per_step": 512,
    "training.max_steps": 4,
    "training.warmup_steps": 0,
    "training.log_every_steps": 1,
    "training.validate_every_steps": 2,
    "training.checkpoint_every_steps": 2,
}


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    return write_proteins(tmp_path_factory.mktemp("data") / "proteins.fa")


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "initial"
    write_model(folder, FavorConfig(num_features=8, redraw_every_steps=0))
    return folder


def fine_tune(fasta, out, initial, *extra, **changes):
    settings = SHORT | {name.replace("__", "."): value for name, value in changes.items()}
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return [
        "train",
        "--fasta",
        str(fasta),
        "--out",
        str(out),
        "--init-from",
        str(initial),
        "-q",
        *sets,
        *map(str, extra),
    ]


def changed(first, second):
    """Names of the weights that differ."""
    before, after = weights_of(first), weights_of(second)
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


def weights_of(path):
    return load_file(find_model_folder(path) / "model.safetensors")


def test_the_origin_of_converted_weights_stays_however_often_they_are_trained(fasta, initial, tmp_path, capsys):
    model, description = load_model(initial, CPU)
    save_model(tmp_path / "converted", model, replace(description, converted_from="esm2 (ESM)"))
    assert "Converted from esm2 (ESM)" in (card := (tmp_path / "converted" / "README.md").read_text())
    assert "Training data" not in card
    began = tmp_path / "converted"
    for name in ("once", "twice"):
        assert run(fine_tune(fasta, tmp_path / name, began, "--max-steps", 1)) == 0
        began = tmp_path / name
        card = " ".join((began / "model" / "README.md").read_text().split())
        assert "Converted from esm2 (ESM) by `protformer convert`, and trained since" in card
        assert f"Training data: {fasta.name}" in card
        capsys.readouterr()
        assert run(["describe", str(began / "model"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["converted_from"] == "esm2 (ESM)"
    assert "Begun from the weights of the model once" in card


def test_training_begins_with_the_weights_and_keeps_their_history(fasta, initial, tmp_path):
    out = tmp_path / "run"
    tiny_rate = {"training__learning_rate": "1e-12", "training__weight_decay": 0}
    assert run(fine_tune(fasta, out, initial, **tiny_rate)) == 0
    before, after = weights_of(initial), weights_of(out)
    assert all(np.allclose(before[name], after[name], atol=1e-9) for name in before)
    description = json.loads((out / "model" / "config.json").read_text())
    assert description["model"] == json.loads((initial / "config.json").read_text())["model"]
    history = description["training"]["initial_model"]
    assert history["name"] == "initial"
    assert len(history["weights_sha256"]) == 64
    assert run(fine_tune(fasta, tmp_path / "next", out)) == 0
    history = json.loads((tmp_path / "next" / "model" / "config.json").read_text())["training"]["initial_model"]
    assert (history["name"], history["training"]["steps"]) == ("run", 4)
    assert history["training"]["initial_model"]["name"] == "initial"


def test_a_fine_tuned_run_resumes_bit_for_bit_without_naming_the_model_again(fasta, initial, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(fine_tune(fasta, whole, initial)) == 0
    assert run(fine_tune(fasta, parts, initial, "--max-steps", 2)) == 0
    assert run(["train", "--fasta", str(fasta), "--out", str(parts), "--resume", "--max-steps", "4", "-q"]) == 0
    assert_same_run(whole, parts)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model__num_layers": 3}, "model.num_layers is 2 in that model and 3 in this configuration"),
        ({"model__num_heads": 4}, "model.num_heads is 2 in that model and 4 in this configuration"),
        ({"model__attention__covariance": "diagonal"}, "model.attention.covariance is 'identity' in that model"),
    ],
)
def test_a_model_setting_that_does_not_fit_the_weights_is_refused(fasta, initial, tmp_path, capsys, change, told):
    message = fails_with(capsys, fine_tune(fasta, tmp_path / "run", initial, **change))
    assert told in message
    assert not (tmp_path / "run").exists()


def test_dropout_and_the_estimator_of_attention_may_differ(fasta, initial, tmp_path):
    changes = {"model__dropout": 0.2, "model__attention": "{kind: exact}"}
    assert run(fine_tune(fasta, tmp_path / "run", initial, **changes)) == 0
    description = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert description["model"]["dropout"] == 0.2
    assert description["model"]["attention"] == {"kind": "exact"}


def test_another_initial_model_on_a_resume_is_refused(fasta, initial, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(fine_tune(fasta, out, initial, "--max-steps", 2)) == 0
    other = write_model(tmp_path / "other", ExactConfig())
    command = ["train", "--fasta", str(fasta), "--out", str(out), "--resume", "-q"]
    assert "the run began from other weights" in fails_with(capsys, [*command, "--init-from", str(other)])
    plain = tmp_path / "plain"
    assert run(arguments(fasta, plain, "--max-steps", 1)) == 0
    command = ["train", "--fasta", str(fasta), "--out", str(plain), "--resume", "-q", "--init-from", str(other)]
    assert "the run began with random weights" in fails_with(capsys, command)


def test_frozen_layers_keep_their_weights_and_the_others_learn(fasta, initial, tmp_path):
    assert run(fine_tune(fasta, tmp_path / "run", initial, training__frozen_layers=1)) == 0
    learnt = changed(initial, tmp_path / "run")
    assert not any(name.startswith(("encoder.embedding", "encoder.blocks.0.")) for name in learnt)
    assert {"encoder.blocks.1.query_key_value.weight", "encoder.final_norm.weight", "head.bias"} <= learnt


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training__frozen_layers": 3}, "training.frozen_layers: 3 is more than the model has"),
        ({"training__lora": "{}", "training__frozen_layers": 1}, "leave one of them out"),
        ({"training__lora": "{rank: 0}"}, "training.lora.rank: 0 is not allowed"),
        ({"training__lora": "{targets: [query]}"}, "'query' is not one of query_key_value, attention_output"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused_before_data_are_read(fasta, initial, tmp_path, capsys, changes, told):
    assert told in fails_with(capsys, fine_tune(fasta, tmp_path / "run", initial, **changes))
    assert not (tmp_path / "run").exists()


def test_lora_needs_a_trained_model(fasta, tmp_path, capsys):
    message = fails_with(capsys, arguments(fasta, tmp_path / "run", training__lora="{}"))
    assert "training.lora: adapts a trained model; name it by --init-from" in message


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def test_lora_trains_adapters_only_and_leaves_a_plain_model_that_gives_the_same(initial, peft):
    model, _ = load_model(initial, CPU)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = LoraConfig(rank=2, alpha=4, targets=["query_key_value", "feed_forward_output"])
    add_lora(model, lora)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2 * 2 * 2
    assert all(".lora_" in name for name in learning)
    optimizer = build_optimizer(model, TrainingConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(learning)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in learning:
                parameter.normal_(std=0.3)
    merged = ProteinLanguageModel(model.config, seed=0).eval()
    merged.load_state_dict(merge_adapters(model.state_dict(), lora))
    tokens = torch.randint(4, 24, (2, 12))
    segments = torch.ones_like(tokens)
    torch.testing.assert_close(merged(tokens, segments), model.eval()(tokens, segments), rtol=1e-4, atol=1e-4)
    differing = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert differing == {
        f"encoder.blocks.{n}.{layer}.weight" for n in (0, 1) for layer in ("query_key_value", "feed_forward_output")
    }


def test_a_run_with_lora_resumes_bit_for_bit_and_its_model_needs_no_peft(fasta, initial, tmp_path, peft):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    lora = {"training__lora": "{rank: 2, targets: [query_key_value]}"}
    assert run(fine_tune(fasta, whole, initial, **lora)) == 0
    assert changed(initial, whole) == {f"encoder.blocks.{n}.query_key_value.weight" for n in (0, 1)}
    assert run(fine_tune(fasta, parts, initial, "--max-steps", 2, **lora)) == 0
    assert run(["train", "--fasta", str(fasta), "--out", str(parts), "--resume", "--max-steps", "4", "-q"]) == 0
    assert_same_run(whole, parts)
    load_model(whole, CPU)
