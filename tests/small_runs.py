"""Training runs of seconds, and what can be asked of them."""

import csv
import subprocess
import sys
import time

import numpy as np
from safetensors.numpy import load_file

from protformer.cli import run

MEASURED = ("tokens_per_second", "peak_memory_gb")

SETTINGS = {
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.hidden_size": 32,
    "model.feed_forward_size": 64,
    "model.dropout": 0.1,
    "model.attention": "{kind: favor, num_features: 16, redraw_every_steps: 3}",
    "data.max_residues": 64,
    "data.validation_fraction": 0.2,
    "training.tokens_per_step": 512,
    "training.accumulate_batches": 2,
    "training.max_steps": 8,
    "training.warmup_steps": 2,
    "training.learning_rate": "1e-2",
    "training.validate_every_steps": 4,
    "training.log_every_steps": 1,
    "training.checkpoint_every_steps": 4,
}


def arguments(fasta, out, *extra, **changes):
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["train", "--fasta", str(fasta), "--out", str(out), "--quiet", *sets, *map(str, extra)]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def metrics(out):
    with (out / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in MEASURED} for row in csv.DictReader(file)]


def assert_same_weights(first, second):
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def assert_same_run(first, second):
    assert_same_weights(first, second)
    assert metrics(first) == metrics(second)
    assert (first / "validation.csv").read_text() == (second / "validation.csv").read_text()
    assert (first / "model" / "config.json").read_text() == (second / "model" / "config.json").read_text()


def write_proteins(path, *, seed=0, letters="ACDEFGHIKLMNPQRSTVWY"):
    """Eighty random proteins."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for number, length in enumerate(rng.integers(5, 150, 80)):
            file.write(f">p{number}\n{''.join(rng.choice(list(letters), length))}\n")
    return path


def start_and_signal(command, number, *, once):
    """Run a command in a process of its own, and send the signal once that is true."""
    process = subprocess.Popen([sys.executable, "-m", "protformer", *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not once() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    _, messages = process.communicate(timeout=120)
    return process.returncode, messages


def fails_with(capsys, command, code=1):
    assert run(command) == code
    captured = capsys.readouterr().err.strip().splitlines()
    assert captured[-1].startswith("error: ")
    return captured[-1]
