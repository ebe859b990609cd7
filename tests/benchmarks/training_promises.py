"""What a training step promises, measured in one run: `python tests/benchmarks/training_promises.py [memory] [speed]`.

Needs the extra `bench` and some 17 GB of free memory; takes about ten minutes on two cores for `speed`, and for
`memory` about 20 where bf16 has no hardware. Prints a line for each promise, figures beside them, and exits with 1 if a
promise is missed. The model is paper-concat's (8 heads, 6 layers, d_ff 2048, d 512) at rows of 8192; GB are 1e9 bytes.

Memory is the peak of a fresh process that runs `protformer train` on the shipped sample for one step. Speed is a step
of forward pass, backward pass and optimizer at batch 1 in float32 and in bf16, each side at the better of the two;
repeats alternate, medians are compared. Nothing else should run on the machine meanwhile.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from engine_promises import Promise

from protformer.benchmark.cases import Case
from protformer.benchmark.peers import peer_model, require_peer
from protformer.config import ModelConfig, RunConfig, load_run_config
from protformer.device import (
    is_out_of_memory,
    keep_freed_memory,
    limit_memory,
    memory_bytes,
    multiplies_bf16_in_hardware,
)
from protformer.evaluation.masked_lm import IGNORE, MaskedBatch, masked_lm_loss_sum
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.training.optimizer import build_optimizer

LENGTH, BATCH = 8192, 16
LIMIT_GB = 16.0
REPEATS, REPEATS_WITHOUT_HARDWARE = 3, 1
PRECISIONS = ("fp32", "bf16")
SAMPLE = Path(__file__).parents[2] / "data" / "trembl_sample.fasta.gz"


def main() -> None:
    chosen = sys.argv[1:] or ["memory", "speed"]
    if chosen[0] == "materialised":
        step_with_materialised_weights(*chosen[1:])
        return
    missed = 0
    for name in chosen:
        for promise in {"memory": memory, "speed": speed}[name]():
            sign = ">=" if promise.at_least else "<="
            verdict = "kept" if promise.is_kept else "MISSED"
            print(f"{verdict:7} {promise.name:75} {promise.measured:8.2f} {sign} {promise.limit:g}", flush=True)
            missed += not promise.is_kept
    sys.exit(missed > 0)


def memory() -> Iterator[Promise]:
    gigabytes, seconds = one_training_step(BATCH)
    tell(f"one step of {BATCH} rows by `protformer train`, process and start included: {seconds:.0f} s")
    yield Promise(name=f"peak GB of a step of batch {BATCH}, bf16", measured=gigabytes, limit=LIMIT_GB, at_least=False)
    variants = {
        f"{BATCH} rows at once, activation checkpointing": (
            BATCH, "training.accumulate_batches=1", "training.activation_checkpointing=true"
        ),
        "1 row": (1,),
        "1 row, exact attention by SDPA": (1, "model.attention={kind: exact}"),
    }  # fmt: skip
    for name, (rows, *overrides) in variants.items():
        gigabytes, seconds = one_training_step(rows, *overrides)
        tell(f"{name}: peak {gigabytes:.2f} GB, {seconds:.0f} s")
    tell(f"1 row, materialised weights in bf16 throughout: peak {materialised_gigabytes('bf16'):.2f} GB")
    yield Promise(
        name=f"GB of a step with materialised weights, 1 row, bf16 (ended at {LIMIT_GB:g})",
        measured=materialised_gigabytes("fp32"),
        limit=LIMIT_GB,
        at_least=True,
    )


def one_training_step(rows: int, *overrides: str) -> tuple[float, float]:
    """Peak resident GB and seconds of a process that trains for a step."""
    fields = (f"training.tokens_per_step={rows * LENGTH}", "training.precision=bf16", "data.validation_fraction=0")
    sets = [word for field in (*fields, *overrides) for word in ("--set", field)]
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "--fasta", str(SAMPLE), "--config", "paper-concat", "--out", f"{folder}/run"]
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "protformer", *command, "--max-steps", "1", "--quiet", *sets],
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"training ended with {process.returncode}")
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - start


def materialised_gigabytes(softmax: str) -> float:
    """Peak of a step of one row; the limit if it asked for more."""
    command = [sys.executable, __file__, "materialised", softmax]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def step_with_materialised_weights(softmax: str) -> None:
    """softmax(Q K^T) V, written out; torch's autocast takes the softmax in float32 on CUDA, in bf16 on CPUs."""
    limit_memory(LIMIT_GB)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[softmax]

    class Materialised(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            return logits.softmax(dim=-1, dtype=dtype).to(v.dtype) @ v

    config = paper_concat("model.attention={kind: exact}")
    model = ProteinLanguageModel(config.model, seed=0)
    for block in model.encoder.blocks:
        block.attention = Materialised()
    try:
        step_of(model, config, "bf16")()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(LIMIT_GB)
    else:
        print(memory_bytes(torch.device("cpu"))[1] / 1e9)


def speed() -> Iterator[Promise]:
    require_peer()
    keep_freed_memory(torch.device("cpu"))  # as `protformer train` does; here it speeds up the others as well
    sides = {
        "protformer": lambda precision: ours(precision),
        "protformer, exact attention": lambda precision: ours(precision, "model.attention={kind: exact}"),
        "performer-pytorch": peer,
    }
    medians = measure(sides)
    best = {name: min(seconds.values()) for name, seconds in medians.items()}
    for name, seconds in best.items():
        tell(f"{name}: {LENGTH / seconds:.0f} residues/s")
    own = best["protformer"]
    precision = min(PRECISIONS, key=medians["protformer"].__getitem__)
    rate = matrix_rate(precision)
    operations = operations_of_step(paper_concat().model)
    tell(
        f"matrix products in {precision} run at {rate / 1e9:.0f} GFLOP/s, the step at {operations / own / 1e9:.0f}"
        f" ({operations / 1e12:.2f} TFLOP): {operations / own / rate:.0%} of the rate"
    )
    yield Promise(
        name="residues per second, times those of performer-pytorch's PerformerLM",
        measured=best["performer-pytorch"] / own,
        limit=2.5,
        at_least=True,
    )
    yield Promise(
        name="residues per second, times those with exact attention (SDPA)",
        measured=best["protformer, exact attention"] / own,
        limit=3.0,
        at_least=True,
    )


def measure(sides: dict[str, Callable[[str], Callable[[], None]]]) -> dict[str, dict[str, float]]:
    """Median seconds of a step, by side and precision; one side after the other, again and again."""
    medians: dict[str, dict[str, float]] = {name: {} for name in sides}
    for precision in PRECISIONS:
        steps = {name: build(precision) for name, build in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        in_hardware = precision == "fp32" or multiplies_bf16_in_hardware(torch.device("cpu"))
        for repeat in range(1 + REPEATS if in_hardware else REPEATS_WITHOUT_HARDWARE):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if repeat or not in_hardware:  # the first one is to warm up
                    seconds[name].append(time.perf_counter() - start)
        for name, values in seconds.items():
            medians[name][precision] = statistics.median(values)
            told = f"{medians[name][precision]:.2f} s a step (from {min(values):.2f} to {max(values):.2f})"
            tell(f"{name}, {precision}: {told}")
    return medians


def ours(precision: str, *overrides: str) -> Callable[[], None]:
    config = paper_concat(*overrides)
    return step_of(ProteinLanguageModel(config.model, seed=0).train(), config, precision)


def step_of(model: ProteinLanguageModel, config: RunConfig, precision: str) -> Callable[[], None]:
    optimizer, batch = build_optimizer(model, config.training), one_row()

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss_sum = masked_lm_loss_sum(model, batch)
        (loss_sum / num_asked(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer(precision: str) -> Callable[[], None]:
    """The same step of the same sizes and the same attention (ReLU features, m = 256)."""
    config, batch = paper_concat(), one_row()
    case = Case(
        implementation="performer-pytorch", kind="generalized", direction="bidirectional", dtype="fp32", batch=1,
        heads=config.model.num_heads, length=LENGTH, head_dim=config.model.head_dim, num_features=256,
        passes="forward+backward", device="cpu", model=config.model,
    )  # fmt: skip
    model = peer_model(case).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(batch.inputs)
        F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def paper_concat(*overrides: str) -> RunConfig:
    """Without dropout, which performer-pytorch has none of by default."""
    return load_run_config("paper-concat", ("model.dropout=0.0", *overrides))


def one_row() -> MaskedBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 24, (1, LENGTH), generator=generator)
    asked = torch.rand(tokens.shape, generator=generator) < 0.15
    return MaskedBatch(inputs=tokens, targets=tokens.masked_fill(~asked, IGNORE), segments=torch.ones_like(tokens))


def num_asked(batch: MaskedBatch) -> int:
    return int((batch.targets != IGNORE).sum())


def matrix_rate(precision: str) -> float:
    """Operations a second of the feed-forward's first product, the better of two."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    x, weight = torch.randn(LENGTH, 512, dtype=dtype), torch.randn(512, 2048, dtype=dtype)
    out, seconds = torch.empty(LENGTH, 2048, dtype=dtype), []
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(x, weight, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * LENGTH * 512 * 2048 / statistics.median(seconds[2:])


def operations_of_step(model: ModelConfig) -> float:
    """Of matrix products; the last layer's output projection and feed-forward run at asked positions only.

    Attention has four products of (residues x m) by head_dim a head forward, and eight backward.
    """
    d, inner, layers, asked = model.hidden_size, model.feed_forward_size, model.num_layers, num_asked(one_row())
    behind_attention = d * d + 2 * d * inner
    linear = 6 * (LENGTH * (3 * d * d * layers + behind_attention * (layers - 1)) + asked * (behind_attention + d * d))
    attention = 12 * 2 * LENGTH * 256 * d * layers
    return float(linear + attention)


def tell(line: str) -> None:
    print(f"        {line}", flush=True)


if __name__ == "__main__":
    main()
