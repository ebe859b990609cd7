"""Training over several processes: the numbers of one process, one stop for all, and an end when one of them dies.

Runs are started as users start them, over gloo on the CPU.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from protformer.checkpoint import load_model
from protformer.cli import run
from protformer.errors import ConfigError
from protformer.training.ranks import RankLayout

SETTINGS = {
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.hidden_size": 32,
    "model.feed_forward_size": 64,
    "model.attention": "{kind: favor, features: favor++, row_norms: chi, num_features: 16, redraw_every_steps: 3}",
    "data.max_residues": 64,
    "data.validation_fraction": 0.2,
    "training.tokens_per_step": 512,
    "training.accumulate_batches": 2,
    "training.max_steps": 4,
    "training.warmup_steps": 2,
    "training.learning_rate": "1e-2",
    "training.validate_every_steps": 2,
    "training.log_every_steps": 1,
    "training.checkpoint_every_steps": 2,
    "training.rank_timeout": "00:03:00",
    "training.precision": "fp32",  # `auto` is bf16 where hardware multiplies it, which no 1e-5 survives
}
ON_TWO = ("--devices", "2")


def arguments(fasta: Path, out: Path, *extra: str, **changes: object) -> list[str]:
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["train", "--fasta", str(fasta), "--out", str(out), "--quiet", "--device", "cpu", *sets, *extra]


def start(command: list[str], **environment: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "protformer", *command]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    _, messages = process.communicate(timeout=300)
    assert process.returncode == code, messages
    return messages


def column(out: Path, name: str) -> list[float]:
    with (out / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def assert_same_figures(first: Path, second: Path) -> None:
    for name in ("tokens", "train_loss", "val_loss", "val_accuracy", "gradient_norm"):
        assert column(first, name) == pytest.approx(column(second, name), rel=1e-5), name


def assert_same_model(first: Path, second: Path) -> None:
    one, two = (load_file(out / "model" / "model.safetensors") for out in (first, second))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)  # sums of moments differ most
    load_model(second, torch.device("cpu"))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "proteins.fa"
    with path.open("w") as file:
        for number, length in enumerate(rng.integers(5, 150, 80)):
            file.write(f">p{number}\n{''.join(rng.choice(list('ACDEFGHIKLMNPQRSTVWY'), length))}\n")
    return path


@pytest.fixture(scope="module")
def alone(fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert run(arguments(fasta, out)) == 0
    return out


@pytest.mark.slow
def test_two_processes_each_with_rows_of_its_own_give_the_numbers_of_one(
    fasta: Path, alone: Path, tmp_path: Path
) -> None:
    finish(start(arguments(fasta, tmp_path / "ddp", *ON_TWO, training__strategy="ddp")))
    assert_same_figures(alone, tmp_path / "ddp")
    assert_same_model(alone, tmp_path / "ddp")
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_weights_and_rows_spread_over_two_processes_go_on_in_one(fasta: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "fsdp"
    spread = {"training__strategy": "fsdp", "training__context_parallel": 2}
    finish(start(arguments(fasta, out, *ON_TWO, "--max-steps", "2", **spread)))
    load_model(out, torch.device("cpu"))
    alone_again = {"training__strategy": "auto", "training__context_parallel": 1}
    assert run(arguments(fasta, out, "--resume", **alone_again)) == 0
    assert_same_figures(alone, out)
    assert_same_model(alone, out)


@pytest.mark.slow
def test_causal_rows_of_several_proteins_are_split_over_processes_that_torchrun_starts(
    fasta: Path, tmp_path: Path
) -> None:
    changes = {"model__direction": "unidirectional", "data__packing": "isolate", "data__max_residues": 128}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "protformer"]
    done = subprocess.run(
        [*words, *arguments(fasta, tmp_path / "split", "--set", "training.context_parallel=2", **changes)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" steps, ") == 1
    assert run(arguments(fasta, tmp_path / "one", **changes)) == 0
    assert_same_figures(tmp_path / "one", tmp_path / "split")
    assert_same_model(tmp_path / "one", tmp_path / "split")


def helpers_of(out: Path) -> list[int]:
    """Process ids of those that Lightning started for a run, other than the first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = ((folder / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(out).encode() in words and b"LOCAL_RANK=1" in environment.split(b"\0"):
            found.append(int(folder.name))
    return found


def wait_until_trained(out: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 200
    while not (out / "checkpoints" / "last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_happens_to_one_process_ends_the_job_and_it_resumes(
    fasta: Path, alone: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A signal to stop saves and stops all; a death is an error, and nobody waits."""
    out = tmp_path / "run"
    process = start(arguments(fasta, out, *ON_TWO, training__max_steps=10_000, training__schedule_steps=4))
    wait_until_trained(out, process)
    (helper,) = helpers_of(out)
    os.kill(helper, number)
    _, messages = process.communicate(timeout=150)
    assert "Traceback" not in messages
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert messages.count("error: stopped by SIGTERM after step ") == 1
    else:
        # Lightning kills the first process, too, where that has not noticed by itself within some seconds.
        assert process.returncode in (1, -signal.SIGKILL)
    steps = len(column(out, "train_loss"))
    resumed = arguments(fasta, out, "--resume", "--max-steps", str(steps + 1), training__schedule_steps=4)
    assert run(resumed) == 0
    assert column(out, "step")[-1] == steps + 1


def test_ranks_share_rows_in_groups_of_neighbours() -> None:
    layout = RankLayout(num_ranks=6, context_parallel=3)
    assert layout.num_data_ranks == 2
    assert [layout.data_rank(rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [layout.part(rank, 12).start for rank in range(6)] == [0, 4, 8, 0, 4, 8]
    with pytest.raises(ConfigError, match=r"training\.context_parallel: .* 4 devices"):
        RankLayout(num_ranks=4, context_parallel=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__attention": "{kind: exact}", "training__context_parallel": 2}, "1 with model.attention.kind exact"),
        ({"data__max_residues": 63, "training__context_parallel": 2}, "a multiple of training.context_parallel"),
        ({"training__optimizer": "muon", "training__strategy": "fsdp"}, "adamw with training.strategy fsdp"),
        ({"training__context_parallel": 2}, "must be a multiple"),
        ({"training__rank_timeout": "5 min"}, "training.rank_timeout: '5 min' is not a duration"),
    ],
)
def test_what_cannot_be_split_is_said_before_data_are_read(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    assert run(arguments(fasta, tmp_path / "run", **changes)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_processes_of_a_launcher_know_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from protformer.device import launched_rank, launched_size

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "SLURM_STEP_ID", "SLURM_JOB_NAME")
    for name in (*names, "SLURM_NTASKS", "SLURM_NNODES", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert (launched_rank(), launched_size()) == (0, None)
    with monkeypatch.context() as env:
        env.setenv("LOCAL_RANK", "1")
        assert (launched_rank(), launched_size()) == (1, None)
    with monkeypatch.context() as env:
        for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
            env.setenv(name, value)
        assert (launched_rank(), launched_size()) == (5, (4, 2))
    slurm = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_STEP_ID": "0"}
    with monkeypatch.context() as env:
        for name, value in slurm.items():
            env.setenv(name, value)
        assert (launched_rank(), launched_size()) == (3, (4, 2))
        env.setenv("SLURM_JOB_NAME", "bash")
        assert launched_size() is None
