"""Training runs: the same numbers whatever interrupts them, whole files, and one clear line for a mistake."""

import csv
import json
import logging
import shutil
import signal

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from small_runs import (
    arguments,
    assert_same_run,
    assert_same_weights,
    fails_with,
    metrics,
    start_and_signal,
    write_proteins,
)

from protformer.cli import run
from protformer.corpus.token_store import MANIFEST_FILE, build_token_store
from protformer.errors import InterruptedRunError
from protformer.training import fit


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    return write_proteins(tmp_path_factory.mktemp("data") / "proteins.fa")


@pytest.fixture(scope="module")
def undisturbed(fasta, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert run(arguments(fasta, out)) == 0
    return out


def test_a_run_writes_all_that_is_promised(undisturbed):
    for name in (
        "config.yaml", "metrics.csv", "curves.png", "checkpoints/last.ckpt", "model/config.json",
        "model/model.safetensors", "model/README.md",
    ):  # fmt: skip
        assert (undisturbed / name).stat().st_size > 0
    assert not list(undisturbed.rglob("*.partial"))
    rows = metrics(undisturbed)
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert [row["val_perplexity"] != "" for row in rows] == [False, False, False, True] * 2
    # With padded last windows a step holds a little less than 512 tokens.
    assert 8 * 400 < int(rows[-1]["tokens"]) <= 8 * 512
    description = json.loads((undisturbed / "model" / "config.json").read_text())
    assert description["training"]["steps"] == 8
    assert description["packing"] == "attend"
    assert sum(description["residue_counts"]) > 0


def test_the_resolved_configuration_makes_the_same_run_again(fasta, undisturbed, tmp_path):
    command = ["train", "--fasta", str(fasta), "--out", str(tmp_path / "again"), "--quiet"]
    assert run([*command, "--config", str(undisturbed / "config.yaml")]) == 0
    assert_same_run(undisturbed, tmp_path / "again")


def test_another_seed_makes_another_run(fasta, undisturbed, tmp_path):
    assert run(arguments(fasta, tmp_path / "other", "--seed", 1)) == 0
    assert metrics(undisturbed) != metrics(tmp_path / "other")


def test_eight_steps_equal_four_a_kill_and_four_more_bit_for_bit(fasta, undisturbed, tmp_path):
    out = tmp_path / "killed"
    code, _ = start_and_signal(arguments(fasta, out), signal.SIGKILL, once=(out / "checkpoints" / "last.ckpt").exists)
    assert code == -signal.SIGKILL
    assert run([*arguments(fasta, out), "--resume"]) == 0
    assert_same_run(undisturbed, out)


def test_stopping_at_four_steps_and_going_on_to_eight_is_the_same_run(fasta, undisturbed, tmp_path):
    out = tmp_path / "stopped"
    assert run(arguments(fasta, out, "--max-steps", 4)) == 0
    assert len(metrics(out)) == 4
    assert run(["train", "--fasta", str(fasta), "--out", str(out), "--resume", "--max-steps", "8", "--quiet"]) == 0
    assert_same_run(undisturbed, out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_leaves_with_130_and_resumes(fasta, undisturbed, tmp_path, number):
    out = tmp_path / "signalled"
    code, messages = start_and_signal(
        arguments(fasta, out), number, once=lambda: (out / "metrics.csv").exists() and metrics(out)
    )
    assert code == 130
    assert messages.splitlines()[-1].startswith(f"error: stopped by {number.name} after step ")
    assert "Traceback" not in messages
    assert run([*arguments(fasta, out), "--resume"]) == 0
    assert_same_run(undisturbed, out)


def test_isolated_packing_next_residue_prediction_and_muon_resume_too(fasta, tmp_path):
    changes = {"data__packing": "isolate", "model__direction": "unidirectional", "data__max_residues": 128}
    changes |= {"training__optimizer": "muon", "training__schedule": "wsd"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(arguments(fasta, whole, **changes)) == 0
    assert run(arguments(fasta, parts, "--max-steps", 3, **changes)) == 0
    assert run(arguments(fasta, parts, "--resume", **changes)) == 0
    assert_same_weights(whole, parts)


def test_the_readiness_of_the_layers_is_logged_and_changes_nothing(fasta, undisturbed, tmp_path):
    def rows():
        with (out / "readiness.csv").open() as file:
            return list(csv.DictReader(file))

    out = tmp_path / "watched"
    watched = ["--set", "training.log_readiness=true"]
    assert run([*arguments(fasta, out, "--max-steps", 6), *watched]) == 0
    first, _ = rows()
    assert (first["step"], first["layer"]) == ("4", "1")
    assert 0 < float(first["relative_error"]) < 10
    assert run([*arguments(fasta, out), *watched, "--resume"]) == 0
    assert [row["step"] for row in rows()] == ["4", "4", "8", "8"]
    assert_same_weights(undisturbed, out)


def test_an_existing_run_is_refused_without_resume(fasta, undisturbed, capsys):
    assert "exists already; choose another --out, or add --resume" in fails_with(capsys, arguments(fasta, undisturbed))


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_run_killed_while_its_store_was_built_begins_anew(fasta, undisturbed, tmp_path, resume):
    out = tmp_path / "run"
    (out / ".store.123.tmp").mkdir(parents=True)
    (out / ".protformer-starting").touch()
    (out / ".store.123.tmp" / "tokens.bin").write_bytes(b"half")
    assert run([*arguments(fasta, out), *resume]) == 0
    assert_same_run(undisturbed, out)


def test_a_folder_with_other_things_in_it_is_not_touched(fasta, tmp_path, capsys):
    for name in ("thesis.tex", "store", "stores.json"):
        folder = tmp_path / f"run_{name}"
        folder.mkdir()
        (folder / name).write_text("all of it")
        assert "exists already" in fails_with(capsys, arguments(fasta, folder))
        assert "no run to resume here" in fails_with(capsys, [*arguments(fasta, folder), "--resume"])
        assert (folder / name).read_text() == "all of it"


def test_input_inside_the_run_folder_is_refused_and_kept(tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    inside = out / ".." / "run" / "a.fa"
    assert "lies inside the run folder" in fails_with(capsys, arguments(inside, out))
    assert out.is_dir()


def test_an_empty_folder_may_become_the_run_and_stays_after_a_mistake(tmp_path, capsys):
    bad = tmp_path / "bad.fa"
    bad.write_text(">x\nMK1V\n")
    out = tmp_path / "mounted"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    fails_with(capsys, arguments(bad, tmp_path / "link"))
    assert list(out.iterdir()) == []


def test_a_diverged_run_keeps_the_last_good_checkpoint(fasta, tmp_path, capsys):
    out = tmp_path / "run"
    command = arguments(fasta, out, training__learning_rate="1e30", training__checkpoint_every_steps=1)
    message = fails_with(capsys, command)
    assert "not finite, the run has diverged: the first layer whose output is not finite is encoder.blocks.0" in message
    saved = out / "model" / "model.safetensors"
    assert not saved.exists() or all(np.isfinite(array).all() for array in load_file(saved).values())


def test_a_prepared_store_that_was_replaced_is_noticed_on_a_resume(fasta, tmp_path, capsys):
    store, out = tmp_path / "store", tmp_path / "run"
    assert run(["prepare", "--fasta", str(fasta), "--out", str(store), "--quiet"]) == 0
    assert run(arguments(store, out, "--max-steps", 1)) == 0
    assert "exists already" in fails_with(capsys, ["prepare", "--fasta", str(fasta), "--out", str(store), "--quiet"])
    other = tmp_path / "other.fa"
    other.write_text(">x\nMKV\n")
    build_token_store([other], store)
    assert "not the one that the run began with" in fails_with(capsys, [*arguments(store, out), "--resume"])


def test_a_resume_with_another_validation_file_is_refused(fasta, undisturbed, tmp_path, capsys):
    other = tmp_path / "other.fa"
    other.write_text(">x\nMKV\n")
    assert "--val-fasta" in fails_with(capsys, [*arguments(fasta, undisturbed), "--resume", "--val-fasta", str(other)])


def test_a_resume_applies_overrides_to_the_stored_configuration(fasta, undisturbed, tmp_path):
    command = ["train", "--fasta", str(fasta), "--out", str(undisturbed), "--resume", "--quiet"]
    assert run([*command, "--set", "training.log_every_steps=1"]) == 0


def test_a_resume_needs_a_run(fasta, tmp_path, capsys):
    assert "no run to resume here" in fails_with(capsys, [*arguments(fasta, tmp_path / "none"), "--resume"])


def test_a_resume_with_another_configuration_names_what_changed(fasta, undisturbed, capsys):
    command = [*arguments(fasta, undisturbed, model__num_layers=3), "--resume"]
    assert "--resume: model.num_layers was 2 and is now 3" in fails_with(capsys, command)


def test_a_resume_with_other_data_is_refused(fasta, undisturbed, tmp_path, capsys):
    other = tmp_path / "other.fa"
    other.write_text(">x\nMKV\n")
    assert "a run goes on with the data it began with" in fails_with(
        capsys, [*arguments(other, undisturbed), "--resume"]
    )


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "flipped": lambda content: content.replace(content[len(content) // 2 :][:64], bytes(64)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_told_in_one_line_and_kept(fasta, undisturbed, tmp_path, capsys, damage):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    checkpoint = out / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    assert "last.ckpt: is damaged" in fails_with(capsys, [*arguments(fasta, out, "--max-steps", 9), "--resume"])
    assert checkpoint.is_file()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stores.json", b'"train"', b'"trail"'),
        ("stores.json", b"{", b"["),
        ("stores.json", b"{", b"\xff"),
        ("metrics.csv", b"\n2,", b"\n2;"),
        ("metrics.csv", b"\n2,", b"\n2,2,"),
        ("metrics.csv", b"step,", b"stop,"),
        ("metrics.csv", b"\n2,", b"\n2,x"),
        ("validation.csv", b"\n4,", b"\n4,\xff"),
    ],
)
def test_damaged_notes_of_a_run_are_told_and_left(fasta, undisturbed, tmp_path, capsys, name, old, new):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    content = (out / name).read_bytes()
    damaged = content.replace(old, new, 1)
    assert damaged != content
    (out / name).write_bytes(damaged)
    assert f"{name}: is damaged" in fails_with(capsys, [*arguments(fasta, out, "--max-steps", 9), "--resume"])
    assert (out / name).read_bytes() == damaged


def test_a_row_that_was_cut_off_by_a_kill_is_written_anew(fasta, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    with (out / "metrics.csv").open("a") as file:
        file.write("1")
    assert run([*arguments(fasta, out, "--max-steps", 9), "--resume"]) == 0
    assert [int(row["step"]) for row in metrics(out)] == list(range(1, 10))


def test_a_resume_with_a_store_of_another_alphabet_is_refused(fasta, undisturbed, tmp_path, capsys):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    manifest = out / "store" / MANIFEST_FILE
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(tree | {"alphabet": "another"}))
    assert "made with another alphabet" in fails_with(capsys, [*arguments(fasta, out), "--resume"])


def test_bad_input_leaves_no_run_folder_behind(tmp_path, capsys):
    bad = tmp_path / "bad.fa"
    bad.write_text(">x\nMK1V\n")
    assert "line 2" in fails_with(capsys, arguments(bad, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_into_rows_names_the_nearest_that_does(fasta, tmp_path, capsys):
    command = arguments(fasta, tmp_path / "run", training__tokens_per_step=500)
    assert "training.tokens_per_step: 500 is not a multiple" in (line := fails_with(capsys, command))
    assert line.endswith("the nearest is 512")


def test_a_corpus_smaller_than_one_window_trains(tmp_path):
    small = tmp_path / "small.fa"
    small.write_text(">x\nMKVAAA\n>y\nMKL\n")
    assert run(arguments(small, tmp_path / "run", "--max-steps", 2)) == 0


def test_a_prepared_store_trains_like_its_fasta(fasta, tmp_path):
    held_out = tmp_path / "held_out.fa"
    held_out.write_text(">x\nMKVAAACDEFGHIKLMNPQRSTVWYMKVAAACDEFGHIKLMNPQRSTVWY\n")
    assert run(["prepare", "--fasta", str(fasta), "--out", str(tmp_path / "store"), "--quiet"]) == 0
    runs = [tmp_path / "from_fasta", tmp_path / "from_store"]
    for source, out in zip((fasta, tmp_path / "store"), runs, strict=True):
        assert run(arguments(source, out, "--val-fasta", held_out, "--max-steps", 2)) == 0
    assert_same_run(*runs)


def test_the_stored_configuration_is_plain_yaml(undisturbed):
    tree = yaml.safe_load((undisturbed / "config.yaml").read_text())
    assert tree["model"]["attention"]["kind"] == "favor"


def test_a_prepared_split_is_trained_and_validated_on_as_it_lies(fasta, tmp_path, capsys):
    split, out = tmp_path / "split", tmp_path / "run"
    options = ["--split", "hash", "--validation-fraction", "0.3", "--quiet"]
    assert run(["prepare", "--fasta", str(fasta), "--out", str(split), *options]) == 0
    assert f"give --fasta {split / 'train'} --val-fasta" in fails_with(capsys, arguments(split, out))
    assert not out.exists()
    command = arguments(split / "train", out, "--val-fasta", split / "validation")
    assert run([*command, "--max-steps", "1"]) == 0
    assert not (out / "validation").exists()
    assert run([*command, "--resume", "--max-steps", "4"]) == 0
    assert metrics(out)[-1]["val_loss"]
    other = arguments(split / "train", out, "--val-fasta", split / "test", "--resume")
    assert "the run began with" in fails_with(capsys, other)


def test_lightnings_loggers_are_as_before_also_after_a_stop():
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level

    @fit._lightning_kept_quiet()
    def stopped():
        assert logger.level == logging.ERROR != before
        raise InterruptedRunError("stopped")

    with pytest.raises(InterruptedRunError):
        stopped()
    assert logger.level == before
