"""Kills a training run twenty times at random moments, resumes it each time, and compares it with an undisturbed one.

`python tests/benchmarks/survival.py [FASTA ...] [--kills 20] [--steps 300] [--seed 0]`: SIGKILL and SIGTERM by chance;
a quarter of them while the program starts, a quarter while a checkpoint is being written, the others after a random
number of steps. SIGTERM must be answered by 130 (or kill before Python can listen). At the end the model folder's
weights and config.json, and all columns of metrics.csv and validation.csv that do not measure time or memory, must be
equal, bit for bit. Some ten minutes of one core.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.hidden_size": 64,
    "model.feed_forward_size": 128,
    "model.dropout": 0.1,
    "model.attention": "{kind: favor, num_features: 32, redraw_every_steps: 30}",
    "data.max_residues": 256,
    "data.max_validation_residues": 20_000,
    "training.tokens_per_step": 2048,
    "training.accumulate_batches": 2,
    "training.warmup_steps": 20,
    "training.learning_rate": "2e-3",
    "training.validate_every_steps": 50,
    "training.log_every_steps": 1,
    "training.checkpoint_every_steps": 7,
}
PHASES = ("starting", "training", "saving")
MEASURED = {"tokens_per_second", "peak_memory_gb"}


@dataclass
class Sitting:
    """What one kill met."""

    signal_name: str
    phase: str
    code: int
    step: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fasta", nargs="*", default=[str(ROOT / "data" / "trembl_sample.fasta.gz")])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "undisturbed", Path(folder) / "killed"
        start = time.monotonic()
        finish(command(chosen, whole))
        seconds = time.monotonic() - start
        print(f"undisturbed: {seconds:.0f} s for {chosen.steps} steps", flush=True)
        sittings = kill_often(chosen, killed)
        finish([*command(chosen, killed), *resumed(killed)])
        report(sittings)
        faults = differences(whole, killed)
    faults += [
        f"SIGTERM left with {s.code}" for s in sittings if s.signal_name == "SIGTERM" and s.code not in (130, -15)
    ]
    print("\n".join(faults) or "final weights and figures are equal, bit for bit")
    sys.exit(bool(faults))


def command(chosen: argparse.Namespace, out: Path) -> list[str]:
    sources = [word for path in chosen.fasta for word in ("--fasta", path)]
    sets = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    program = [sys.executable, "-m", "protformer", "train", *sources, "--out", str(out), "--quiet", *sets]
    return [*program, "--max-steps", str(chosen.steps)]


def resumed(out: Path) -> list[str]:
    return ["--resume"] if out.exists() and any(out.iterdir()) else []


def finish(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a run that nobody disturbed failed with {done.returncode}: {done.stderr}")


def kill_often(chosen: argparse.Namespace, out: Path) -> list[Sitting]:
    draw = random.Random(chosen.seed)
    sittings: list[Sitting] = []
    for number in range(chosen.kills):
        signal_number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        phase = draw.choices(PHASES, weights=[1, 2, 1])[0]
        begun = last_step(out)
        # Every later kill shall find some steps left.
        furthest = chosen.steps - 4 * (chosen.kills - number)
        target = min(furthest, begun + draw.randint(1, 2 * chosen.steps // chosen.kills))
        delay = draw.uniform(0.0, 8.0 if phase == "starting" else 0.3)
        process = subprocess.Popen(
            [*command(chosen, out), *resumed(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if phase != "starting":
            wait_until(lambda: last_step(out) >= target, process)  # noqa: B023
        if phase == "saving":
            wait_until((out / "checkpoints" / "last.ckpt.partial").exists, process)
        else:
            time.sleep(delay)
        process.send_signal(signal_number)
        _, messages = process.communicate()
        sittings.append(Sitting(signal_number.name, phase, process.returncode, last_step(out)))
        print(sittings[-1], flush=True)
        if process.returncode not in (-signal_number, 130):
            print(messages, file=sys.stderr)
    return sittings


def wait_until(holds: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while not holds() and process.poll() is None:
        time.sleep(0.0005)


def last_step(out: Path) -> int:
    rows = table(out / "metrics.csv")
    return int(rows[-1]["step"]) if rows else 0


def report(sittings: list[Sitting]) -> None:
    for name in ("SIGKILL", "SIGTERM"):
        codes = Counter(sitting.code for sitting in sittings if sitting.signal_name == name)
        print(f"{name}: {sum(codes.values())} times; exit codes " + ", ".join(f"{c} x{n}" for c, n in codes.items()))
    print(", ".join(f"{n} while {phase}" for phase, n in Counter(sitting.phase for sitting in sittings).items()))


def differences(first: Path, second: Path) -> list[str]:
    faults = [
        f"{name} differs"
        for name in ("model/model.safetensors", "model/config.json")
        if (first / name).read_bytes() != (second / name).read_bytes()
    ]
    for name in ("metrics.csv", "validation.csv"):
        ours, theirs = table(first / name), table(second / name)
        print(f"{name}: {len(ours)} rows, {len(theirs)} after kills")
        if ours != theirs:
            faults.append(f"{name} differs")
    left = [str(path.relative_to(second)) for path in second.rglob("*.partial")]
    return faults + [f"left behind: {path}" for path in left]


def table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
