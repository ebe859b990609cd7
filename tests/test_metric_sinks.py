"""Figures reach TensorBoard and Weights & Biases as they reach metrics.csv: once, whatever interrupts the run."""

import importlib.util
import json

import pytest
from small_runs import arguments, fails_with, metrics, write_proteins

from protformer.cli import run

SMALL = {"model__num_layers": 1, "model__attention": "{kind: exact}", "training__max_steps": 6}


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    return write_proteins(tmp_path_factory.mktemp("data") / "proteins.fa")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_each_step_once_after_a_resume(fasta, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert run(arguments(fasta, out, **SMALL)) == 0
    # As if the run had been killed behind step 4: the table and TensorBoard know more than the checkpoint.
    short = tmp_path / "short"
    assert run(arguments(fasta, short, "--max-steps", 4, **SMALL)) == 0
    (short / "checkpoints" / "last.ckpt").replace(out / "checkpoints" / "last.ckpt")
    assert run(arguments(fasta, out, "--resume", **SMALL)) == 0
    shown = EventAccumulator(str(out / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("train/train_loss")] == [1, 2, 3, 4, 5, 6]
    losses = [float(row["train_loss"]) for row in metrics(out)]
    assert [event.value for event in shown.Scalars("train/train_loss")] == pytest.approx(losses)
    assert [event.step for event in shown.Scalars("validation/accuracy")] == [4, 6]


def test_weights_and_biases_keeps_one_run_offline(fasta, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    named = SMALL | {"training__wandb_project": "proteins"}
    assert run(arguments(fasta, out, "--max-steps", 3, **named)) == 0
    assert run(arguments(fasta, out, "--resume", **named)) == 0
    identifier = (out / "wandb_id").read_text()
    folders = [path.name for path in (out / "wandb").glob("offline-run-*")]
    assert folders
    assert all(name.endswith(f"-{identifier}") for name in folders)
    assert list((out / "wandb").glob(f"offline-run-*/run-{identifier}.wandb"))


def test_weights_and_biases_without_its_package_is_refused_before_data_are_read(fasta, tmp_path, capsys, monkeypatch):
    honest = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else honest(name))
    message = fails_with(capsys, arguments(fasta, tmp_path / "run", training__wandb_project="proteins"))
    assert message == "error: training.wandb_project: needs the package wandb: pip install 'protformer[wandb]'"
    assert not (tmp_path / "run").exists()


def test_several_sets_are_validated_each_by_itself(fasta, tmp_path, capsys):
    """The first has the columns of metrics.csv; all are in validation.csv, the summary and describe."""
    near = write_proteins(tmp_path / "near.fa", seed=1)
    family = write_proteins(tmp_path / "far.v2.fa", seed=2, letters="ACDE")
    out = tmp_path / "run"
    sets = ["--val-fasta", near, "--val-fasta", f"family={family}"]
    assert run(arguments(fasta, out, *sets, "--max-steps", 3, **SMALL)) == 0
    assert run(arguments(fasta, out, *sets, "--resume", **SMALL)) == 0
    printed = capsys.readouterr().out
    assert "held-out proteins (near), " in printed
    assert "held-out proteins (family), " in printed
    lines = [line.split(",") for line in (out / "validation.csv").read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    assert [(row["step"], row["set"]) for row in rows] == [
        (step, name) for step in ("3", "4", "6") for name in ("near", "family")
    ]
    assert metrics(out)[-1]["val_perplexity"] == rows[-2]["perplexity"]
    assert rows[-1]["unigram_perplexity"] != rows[-2]["unigram_perplexity"]
    assert run(["describe", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["validation_family"].startswith("step 6: perplexity ")
    other = ["--val-fasta", f"another={near}", "--resume"]
    assert "began without a set another (it has near, family)" in fails_with(
        capsys, arguments(fasta, out, *other, **SMALL)
    )
    swapped = ["--val-fasta", f"family={near}", "--resume"]
    assert "--resume: --val-fasta" in fails_with(capsys, arguments(fasta, out, *swapped, **SMALL))
    twice = ["--val-fasta", near, "--val-fasta", near]
    assert "two sets have the name near" in fails_with(capsys, arguments(fasta, tmp_path / "twice", *twice, **SMALL))
