"""Distillation brings attention closer to exact attention, changes nothing else, and goes on as if never stopped."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from small_model import write_model
from small_runs import assert_same_run, fails_with, write_proteins
from test_fine_tuning import changed
from test_fine_tuning import fine_tune as fine_tune_on

from protformer.attention.exact import ExactAttention
from protformer.checkpoint import load_model, save_model
from protformer.cli import run
from protformer.config import ClusteredConfig, ExactConfig, FavorConfig, ModelConfig
from protformer.errors import ConfigError
from protformer.evaluation.attention_error import attention_errors, compare_with_exact
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model_description import read_description

CPU = torch.device("cpu")
CLUSTERED = ClusteredConfig(clusters_per_query=1, cluster_size=2)


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    return write_proteins(tmp_path_factory.mktemp("data") / "proteins.fa")


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
    """Attention of which one weight a head is wrong, and can be learned back."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "drawn", CLUSTERED)
    model, description = load_model(folder / "drawn", CPU)
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.attention.log_mass.fill_(-3.0)
    save_model(folder / "initial", model, description)
    return folder / "initial"


def fine_tune(*arguments, **changes):
    return fine_tune_on(*arguments, **{"training__tokens_per_step": 128} | changes)


def errors_by_step(out):
    with (out / "distillation.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = sorted({int(row["step"]) for row in rows})
    return {step: [float(row["relative_error"]) for row in rows if int(row["step"]) == step] for step in steps}


def test_distillation_learns_the_attention_alone_and_its_errors_fall(fasta, initial, tmp_path):
    settings = {"training__learning_rate": 0.3}
    assert run(fine_tune(fasta, tmp_path / "run", initial, "--distill", "--max-steps", 8, **settings)) == 0
    errors = errors_by_step(tmp_path / "run")
    assert list(errors) == list(range(1, 9))
    for layer in (0, 1):
        assert errors[8][layer] < 0.9 * errors[1][layer]
    assert changed(initial, tmp_path / "run") == {f"encoder.blocks.{n}.attention.log_mass" for n in (0, 1)}


def test_the_last_step_is_logged_however_seldom_others_are(fasta, initial, tmp_path):
    assert run(fine_tune(fasta, tmp_path / "run", initial, "--distill", training__log_every_steps=3)) == 0
    assert list(errors_by_step(tmp_path / "run")) == [3, 4]


def test_a_distillation_resumes_bit_for_bit(fasta, initial, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(fine_tune(fasta, whole, initial, "--distill")) == 0
    assert run(fine_tune(fasta, parts, initial, "--distill", "--max-steps", 2)) == 0
    assert run(["train", "--fasta", str(fasta), "--out", str(parts), "--resume", "--max-steps", "4", "-q"]) == 0
    assert_same_run(whole, parts)
    assert (whole / "distillation.csv").read_text() == (parts / "distillation.csv").read_text()


def test_adapters_of_queries_keys_and_values_learn_as_well(fasta, initial, tmp_path):
    pytest.importorskip("peft")
    lora = {"training__lora": "{rank: 2, targets: [query_key_value]}"}
    assert run(fine_tune(fasta, tmp_path / "run", initial, "--distill", **lora)) == 0
    learned = ("attention.log_mass", "query_key_value.weight")
    assert changed(initial, tmp_path / "run") == {f"encoder.blocks.{n}.{name}" for n in (0, 1) for name in learned}


def test_the_kind_may_change_at_the_start_and_its_parameters_begin_anew(fasta, initial, tmp_path):
    favor = "{kind: favor, num_features: 8, covariance: diagonal}"
    assert run(fine_tune(fasta, tmp_path / "run", initial, "--distill", model__attention=favor)) == 0
    description = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert description["model"]["attention"]["kind"] == "favor"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__attention": "{kind: favor}"}, "--distill: favor attention with these settings has no parameters"),
        ({"training__frozen_layers": 1}, "training.frozen_layers: --distill trains no layer's weights"),
        ({"training__lora": "{}"}, "with --distill it must be ['query_key_value']"),
    ],
)
def test_what_cannot_be_distilled_is_refused(fasta, initial, tmp_path, capsys, changes, told):
    assert told in fails_with(capsys, fine_tune(fasta, tmp_path / "run", initial, "--distill", **changes))
    assert not (tmp_path / "run").exists()


def test_distillation_needs_a_teacher(fasta, tmp_path, capsys):
    command = ["train", "--fasta", str(fasta), "--out", str(tmp_path / "run"), "--distill", "-q"]
    assert "name it by --init-from" in fails_with(capsys, command)


def test_errors_of_layers_are_those_of_their_definition_and_padding_does_not_count():
    config = ModelConfig(num_layers=2, num_heads=2, hidden_size=16, feed_forward_size=16, attention=CLUSTERED)
    torch.manual_seed(0)
    student = ProteinLanguageModel(config, seed=0).eval().encoder
    teacher = ProteinLanguageModel(replace(config, attention=ExactConfig()), seed=0).eval().encoder
    teacher.load_state_dict(student.state_dict(), strict=False)
    tokens = torch.randint(4, 24, (1, 40))
    segments = torch.ones_like(tokens)
    errors = attention_errors(student, teacher, tokens, segments)
    for layer, (block, x, angles) in enumerate(teacher.layer_inputs(tokens, segments)):
        q, k, v = block.queries_keys_values(x, angles)
        wanted = block.attention(q, k, v, segments)
        error = (student.blocks[layer].attention(q, k, v, segments) - wanted).square().sum()
        variance = wanted.var(dim=2, correction=0).sum() * 40
        assert 0.0 < errors[layer] < 10.0
        torch.testing.assert_close(errors[layer], error / variance)
    padded, own = (torch.nn.functional.pad(x, (0, 7)) for x in (tokens, segments))
    torch.testing.assert_close(attention_errors(student, teacher, padded, own), errors, rtol=1e-4, atol=1e-6)


def test_chosen_layers_have_exact_attention():
    config = ModelConfig(num_layers=3, num_heads=2, hidden_size=16, attention=CLUSTERED, exact_layers=(1, 3))
    blocks = ProteinLanguageModel(config, seed=0).encoder.blocks
    assert [isinstance(block.attention, ExactAttention) for block in blocks] == [True, False, True]
    for layers in ((0,), (4,), (2, 2)):
        with pytest.raises(ConfigError, match=r"model\.exact_layers"):
            replace(config, exact_layers=layers)


def test_exact_layers_have_no_distance_from_exact_attention():
    config = ModelConfig(
        num_layers=2, num_heads=2, hidden_size=16, attention=FavorConfig(num_features=8), exact_layers=(1,)
    )
    first, second = compare_with_exact(
        ProteinLanguageModel(config, seed=0).eval(), [list(range(4, 24)) * 2], advance=lambda count: None
    )
    assert (first.relative_error, first.hidden_error) == (0.0, 0.0)
    assert second.relative_error > 0
    assert second.hidden_error > 0


@pytest.mark.parametrize("distills", [True, False])
def test_a_head_that_was_never_trained_stays_one_under_distillation(fasta, initial, tmp_path, capsys, distills):
    model, description = load_model(initial, CPU)
    save_model(tmp_path / "headless", model, replace(description, has_lm_head=False))
    options = ("--distill", "--max-steps", 1) if distills else ("--max-steps", 1)
    assert run(fine_tune(fasta, tmp_path / "run", tmp_path / "headless", *options)) == 0
    told = capsys.readouterr().out
    assert ("perplexity is left out" in told, "unigram baseline" in told) == (distills, not distills)
    (measured,) = [
        row["val_perplexity"] for row in csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines())
    ]
    assert bool(measured) is not distills
    assert (tmp_path / "run" / "curves.png").exists() is not distills
    assert read_description(tmp_path / "run").has_lm_head is not distills
