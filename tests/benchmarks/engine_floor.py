"""What bounds the attention engine's time: `python tests/benchmarks/engine_floor.py`.

Ours at the sizes of `engine_promises`, fp32, beside performer-pytorch and exact attention, and beside nothing but the
products of matrices that linear attention consists of: at the sizes of our blocks, in buffers that stay in cache,
each thread at its heads, with no function applied to any feature and nothing copied. For each, also the processor
time in the kernel, which is that of page faults. Needs the extra `bench`; nothing else should run meanwhile.
"""

import resource
import statistics
import time
from dataclasses import replace
from functools import partial

import torch

from protformer.attention.head_shares import head_shares
from protformer.attention.pieces import features_at_once
from protformer.benchmark.cases import Case
from protformer.benchmark.peers import require_peer
from protformer.benchmark.workloads import Run, prepare
from protformer.device import in_threads

CASE = Case(
    implementation="protformer",
    kind="generalized",
    direction="bidirectional",
    dtype="fp32",
    batch=1,
    heads=8,
    length=8192,
    head_dim=64,
    num_features=256,
    passes="forward",
    device="cpu",
)
ROUNDS = 10


def main() -> None:
    require_peer()
    for kind in ("generalized", "favor"):
        for passes in ("forward", "forward+backward"):
            case = replace(CASE, kind=kind, passes=passes)
            exact = replace(case, kind="exact", num_features=None)
            runs = {
                "ours": prepare(case, {}),
                "performer-pytorch": prepare(replace(case, implementation="performer-pytorch"), {}),
                "exact": prepare(exact, {}),
                "products alone": products_alone(case),
            }
            times = alternate(runs)
            floor = times["products alone"][0]
            print(f"{kind} {passes}: products alone at {num_operations(case) / floor / 1e9:.0f} GFLOP/s")
            for name, (seconds, in_kernel) in times.items():
                print(
                    f"  {name:18} {seconds * 1e3:6.0f} ms, {in_kernel * 1e3:4.0f} ms in the kernel;"
                    f" {seconds / times['ours'][0]:5.2f} times ours, {seconds / floor:5.2f} times the products",
                    flush=True,
                )


def alternate(runs: dict[str, Run]) -> dict[str, tuple[float, float]]:
    """Median seconds of each, and of its threads together in the kernel; the first round does not count."""
    rounds = [{name: timed(run) for name, run in runs.items()} for _ in range(ROUNDS)][1:]
    return {
        name: (statistics.median(one[name][0] for one in rounds), statistics.median(one[name][1] for one in rounds))
        for name in runs
    }


def timed(run: Run) -> tuple[float, float]:
    """Seconds of one call, and processor seconds in the kernel."""
    kernel, start = resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_stime - kernel


def num_products(case: Case) -> int:
    """Of (residue, head_dim) with (head_dim, feature) size: two a pass for queries and for keys; the gradients of
    queries and of keys take four each, the features' own product included."""
    return 4 if case.passes == "forward" else 12


def num_operations(case: Case) -> float:
    return num_products(case) * 2.0 * case.heads * case.length * case.head_dim * (case.num_features or 0)


def products_alone(case: Case) -> Run:
    """A run of them."""
    num_features = case.num_features or 0
    shares = head_shares(torch.empty(1, case.heads, case.length, case.head_dim), num_features=num_features)
    tasks = [partial(multiply, case, share.stop - share.start) for share in shares]

    def run() -> None:
        with torch.inference_mode():
            in_threads(tasks)

    return run


def multiply(case: Case, heads: int) -> None:
    num_features = case.num_features or 0
    size = features_at_once(torch.device("cpu")) // (heads * num_features)
    x = torch.randn(heads, size, case.head_dim)
    products = torch.empty_like(x)
    features = torch.empty(heads, size, num_features)
    matrix = torch.randn(heads, case.head_dim, num_features)
    state = torch.zeros(heads, case.head_dim, num_features)
    for _ in range(case.length // size):
        for _ in range(num_products(case) // 4):
            torch.bmm(x, matrix, out=features)
            torch.bmm(x, matrix, out=features)
            state.baddbmm_(x.transpose(1, 2), features, alpha=1e-6)
            torch.bmm(features, matrix.transpose(1, 2), out=products)


if __name__ == "__main__":
    main()
