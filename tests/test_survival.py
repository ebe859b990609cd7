"""Whatever stops a run, and whatever numbers it meets: nothing saved is lost, nothing is counted twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import arguments, assert_same_run, assert_same_weights, fails_with, metrics, weights, write_proteins

from protformer import whole_file
from protformer.cli import run
from protformer.config import ModelConfig
from protformer.errors import OutputError
from protformer.evaluation.masked_lm import MaskedBatch
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.training import callbacks, fit, validation
from protformer.training.callbacks import StopRequest
from protformer.training.masked_lm import MaskedLmTask
from protformer.training.micro_batches import MicroBatches
from protformer.training.nonfinite import find_nonfinite
from protformer.whole_file import write_whole

SMALL = {"model__num_layers": 1, "model__attention": "{kind: exact}", "training__max_steps": 6}


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    return write_proteins(tmp_path_factory.mktemp("data") / "proteins.fa")


@pytest.fixture(scope="module")
def undisturbed(fasta, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert run(arguments(fasta, out, **SMALL)) == 0
    return out


@pytest.fixture
def faulty_batches(monkeypatch):
    """Numbers of batches, one a step, whose loss is no number."""
    numbers: set[int] = set()
    honest_step, honest_backward = MaskedLmTask.training_step, MicroBatches.backward
    latest: list[int] = []

    def training_step(self, batch, batch_idx):
        latest[:] = [batch.number]
        honest_step(self, batch, batch_idx)

    def backward(self, model, batch, *, num_asked):
        loss_sum = honest_backward(self, model, batch, num_asked=num_asked)
        if latest[0] not in numbers:
            return loss_sum
        for parameter in model.parameters():
            parameter.grad *= float("nan")
        return loss_sum * float("nan")

    monkeypatch.setattr(MaskedLmTask, "training_step", training_step)
    monkeypatch.setattr(MicroBatches, "backward", backward)
    return numbers


def optimizer_state(out):
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    state = checkpoint["optimizer_states"][0]["state"]
    return {(number, name): tensor for number, entry in state.items() for name, tensor in entry.items()}


def test_a_step_without_a_finite_gradient_changes_neither_weights_nor_optimizer_and_is_counted(
    fasta, undisturbed, tmp_path, faulty_batches
):
    faulty_batches.update({3, 6})
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert run(arguments(fasta, parts, "--max-steps", 2, **SMALL)) == 0
    weights_before, optimizer_before = weights(parts), optimizer_state(parts)
    assert run(arguments(fasta, parts, "--resume", "--max-steps", 3, **SMALL)) == 0
    assert all(weights_before[name].tobytes() == tensor.tobytes() for name, tensor in weights(parts).items())
    assert all(torch.equal(optimizer_before[key], tensor) for key, tensor in optimizer_state(parts).items())
    assert run(arguments(fasta, parts, "--resume", **SMALL)) == 0
    assert run(arguments(fasta, whole, **SMALL)) == 0
    assert_same_weights(whole, parts)
    assert [row["skipped_steps"] for row in metrics(whole)] == ["0", "0", "1", "1", "1", "2"]
    assert [row["learning_rate"] for row in metrics(whole)] == [row["learning_rate"] for row in metrics(undisturbed)]
    assert "nan" not in {row["train_loss"] for row in metrics(whole)}


def test_too_many_such_steps_in_a_row_end_the_run_with_a_diagnosis_and_the_state_of_before(
    fasta, tmp_path, capsys, faulty_batches
):
    out = tmp_path / "run"
    command = arguments(fasta, out, training__max_skipped_steps=2, training__checkpoint_every_steps=100, **SMALL)
    faulty_batches.update({4, 5, 6})
    message = fails_with(capsys, command)
    assert message.startswith("error: step 5: 2 steps in a row (training.max_skipped_steps) had no finite gradient")
    for part in ("every layer gave finite numbers when asked again", "loss nan", "gradient norm nan", "learning rate"):
        assert part in message
    assert f"--init-from {out}" in message
    faulty_batches.clear()
    assert run([*command, "--resume"]) == 0
    assert metrics(out)[-1]["skipped_steps"] == "2"


def small_model():
    torch.manual_seed(0)
    config = ModelConfig(num_layers=3, num_heads=2, hidden_size=16, feed_forward_size=24)
    return ProteinLanguageModel(config, seed=0)


BATCH = MaskedBatch(
    inputs=torch.full((2, 8), 5), targets=torch.full((2, 8), 6), segments=torch.ones((2, 8), dtype=torch.int64)
)


def spoil_weight(model):
    model.encoder.blocks[1].attention_output.weight.data[0, 0] = float("inf")


def spoil_output(model):
    model.encoder.blocks[1].feed_forward_norm.weight.data.fill_(1e38)


def spoil_gradient(model):
    model.encoder.blocks[1].feed_forward_output.weight.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_weight, "the weights encoder.blocks.1.attention_output.weight are not finite"),
        (spoil_output, "the first layer whose output is not finite is encoder.blocks.1.feed_forward_"),
        (spoil_gradient, "the gradient is first not finite at encoder.blocks.1.feed_forward_output.weight"),
        (lambda model: None, "every layer gave finite numbers"),
    ],
)
def test_the_first_layer_that_went_wrong_is_named(spoil, told):
    model = small_model()
    spoil(model)
    assert told in find_nonfinite(model, [BATCH], torch.enable_grad)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_finished_run_that_is_resumed_has_the_same_rows(fasta, undisturbed, tmp_path):
    out = tmp_path / "run"
    sparse = SMALL | {"training__log_every_steps": 3}
    assert run(arguments(fasta, out, **sparse)) == 0
    rows = metrics(out)
    assert [row["step"] for row in rows] == ["3", "4", "6"]
    assert rows[-1]["train_loss"]
    assert rows[-1]["val_loss"]
    finished = {name: (out / name).read_text() for name in ("metrics.csv", "validation.csv")}
    # As it is, then as if it had been killed before the last validation, then between the two tables.
    *first, last = finished["metrics.csv"].splitlines(keepends=True)
    fields = dict(zip(first[0].strip().split(","), last.strip().split(","), strict=True))
    unvalidated = {name: "" if name.startswith(("val_", "unigram_")) else value for name, value in fields.items()}
    killed = "".join(first) + ",".join(unvalidated.values()) + "\r\n"
    without_set = "".join(finished["validation.csv"].splitlines(keepends=True)[:-1])
    for left in (
        finished,
        {"metrics.csv": killed, "validation.csv": without_set},
        finished | {"validation.csv": without_set},
    ):
        for name, text in left.items():
            (out / name).write_bytes(text.encode())
        assert run(arguments(fasta, out, "--resume", **sparse)) == 0
        assert {name: (out / name).read_text() for name in finished} == finished


def test_a_stop_signal_does_not_wait_for_validation_and_the_resumed_run_makes_up_for_it(
    fasta, undisturbed, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    honest, calls = validation.score_units, []

    def interrupted(model, batches, frequencies):
        if not calls:
            signal.raise_signal(signal.SIGTERM)
        calls.append(len(list(batches)))
        return honest(model, iter(()), frequencies)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "score_units", interrupted)
        assert run(arguments(fasta, out, **SMALL)) == 130
    assert calls == [0]
    assert [row["step"] for row in metrics(out)] == ["1", "2", "3"]
    assert run(arguments(fasta, out, "--resume", **SMALL)) == 0
    assert_same_run(undisturbed, out)


def test_a_second_ctrl_c_leaves_at_once_and_keeps_what_was_saved_before(tmp_path, monkeypatch):
    class LeftError(BaseException):
        pass

    def leave(code):
        raise LeftError(code)

    def write(partial):
        partial.write_text("half of the ne")
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(callbacks.os, "_exit", leave)
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_text("the old one")
    checkpointing = callbacks.Checkpointing(fit.RunFolder(tmp_path), every_steps=1, save_model=lambda task, step: None)
    with StopRequest(checkpointing, max_seconds=None).listening(), pytest.raises(LeftError, match="130"):
        write_whole(checkpoint, write)
    assert checkpoint.read_text() == "the old one"


def test_a_file_is_on_the_disk_before_it_takes_its_place_and_its_name_before_the_next_step(tmp_path, monkeypatch):
    order = []
    honest_replace = Path.replace

    def replace(self, target):
        order.append("replace")
        return honest_replace(self, target)

    monkeypatch.setattr(whole_file.os, "fsync", lambda fd: order.append("folder" if is_folder(fd) else "file"))
    monkeypatch.setattr(Path, "replace", replace)
    write_whole(tmp_path / "a", lambda partial: partial.write_text("x"))
    assert order == ["file", "replace", "folder"]


def is_folder(descriptor):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


def test_a_write_that_fails_keeps_the_old_file_and_is_told(tmp_path):
    def write(partial):
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("old")
    with pytest.raises(OutputError, match="a: cannot be written: No space left on device"):
        write_whole(tmp_path / "a", write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_leaves_with_130(tmp_path, number):
    """While it reads: from a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "pipe.fa")
    command = [sys.executable, "-m", "protformer", *arguments(tmp_path / "pipe.fa", tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    writer = os.open(tmp_path / "pipe.fa", os.O_WRONLY)  # waits until the pipe is opened for reading
    process.send_signal(number)
    _, messages = process.communicate(timeout=120)
    os.close(writer)
    assert (process.returncode, messages.strip()) == (130, "error: interrupted")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_spares_those_that_prepare_batches(fasta, undisturbed, tmp_path):
    out = tmp_path / "run"
    long = SMALL | {"training__max_steps": 100_000, "training__schedule_steps": 6, "data__num_workers": 1}
    command = [sys.executable, "-m", "protformer", *arguments(fasta, out, **long)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGUSR1)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130, messages
    assert messages.count("SIGUSR1: stopping after this step") == 1
