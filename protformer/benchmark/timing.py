"""Times that can be compared: repeats alternate between the things compared, and medians are taken.

On a machine that others use too, and whose clock changes with its temperature, one thing measured to the end before the
next is begun compares the machine at two moments. Here every round runs each thing once.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from protformer.benchmark.workloads import DTYPES, Run
from protformer.device import synchronize

SHORTEST_SECONDS = 0.02
"""What is faster is run several times at a stretch, so that the clock and the call do not count."""
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}


def alternate(runs: Sequence[Run], device: torch.device, *, repeats: int) -> list[float]:
    """Median seconds of each run over `repeats` rounds, behind one round that is not counted."""
    stretches = [max(1, round(SHORTEST_SECONDS / max(timed(run, device), 1e-6))) for run in runs]
    rounds = [[timed(run, device, calls) for run, calls in zip(runs, stretches, strict=True)] for _ in range(repeats)]
    return [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def timed(run: Run, device: torch.device, calls: int = 1) -> float:
    """Seconds a call, over `calls` of them."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def matrix_rate(dtype: str, device: torch.device, *, repeats: int = 5) -> float:
    """Operations a second (multiply-add counts as two) of a large square matrix product: the best seen."""
    size = MATRIX_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    product: Callable[[], object] = lambda: left @ right  # noqa: E731
    timed(product, device)
    return 2 * size**3 / min(timed(product, device) for _ in range(repeats))
