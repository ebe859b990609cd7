"""What the attention engine promises, measured side by side in one run: `python tests/benchmarks/engine_promises.py`.

Needs the extra `bench`; takes some ten minutes on two cores; prints a line for each promise; exits with
1 if one is missed.
Sizes: batch 1, 8 heads, length 8192, head_dim 64, m = 256, unless said otherwise. Times are medians of alternating
repeats, so only ratios are promised; nothing else should run on the machine meanwhile.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from protformer.benchmark.analysis import crossovers
from protformer.benchmark.cases import Case, Row
from protformer.benchmark.measure import Limits, measure
from protformer.benchmark.peers import require_peer

BASE = Case(
    implementation="protformer",
    kind="favor",
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
LONG = 131_072
LIMITS = Limits(repeats=9, with_memory=True, max_seconds=120.0, max_gb=16.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """A ratio and the limit that it keeps."""

    name: str
    measured: float
    limit: float
    at_least: bool

    @property
    def is_kept(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def main() -> None:
    require_peer()
    missed = 0
    for promise in itertools.chain(against_peer(), causal(), against_exact(), scaling()):
        sign = ">=" if promise.at_least else "<="
        verdict = "kept" if promise.is_kept else "MISSED"
        print(f"{verdict:7} {promise.name:75} {promise.measured:8.2f} {sign} {promise.limit:g}", flush=True)
        missed += not promise.is_kept
    sys.exit(missed > 0)


def against_peer() -> Iterator[Promise]:
    for dtype in ("fp32", "bf16"):
        for kind in ("favor", "generalized"):
            for passes in ("forward", "forward+backward"):
                case = replace(BASE, kind=kind, dtype=dtype, passes=passes)
                ours, theirs = run([case, replace(case, implementation="performer-pytorch")])
                name = f"{kind} {dtype} {passes}: times faster than performer-pytorch"
                yield Promise(name=name, measured=theirs.seconds / ours.seconds, limit=3.0, at_least=True)
                if passes == "forward+backward":
                    yield Promise(
                        name=f"{kind} {dtype} {passes}: share of performer-pytorch's peak memory",
                        measured=peak(ours) / peak(theirs),
                        limit=0.25,
                        at_least=False,
                    )


def causal() -> Iterator[Promise]:
    """The peer takes some 17 GB at 8192 residues, linear in their number as its time is; so 4096 are compared."""
    for kind in ("favor", "generalized"):
        both = replace(BASE, kind=kind, passes="forward+backward")
        short = replace(both, direction="unidirectional", length=4096)
        ours, theirs = run([short, replace(short, implementation="performer-pytorch")])
        name = f"{kind} causal forward+backward at 4096: times faster than performer-pytorch"
        yield Promise(name=name, measured=theirs.seconds / ours.seconds, limit=10.0, at_least=True)
        one, other = run([replace(short, length=8192), both])
        name = f"{kind} causal forward+backward: times the bidirectional one"
        yield Promise(name=name, measured=one.seconds / other.seconds, limit=2.5, at_least=False)


def against_exact() -> Iterator[Promise]:
    for dtype, limit in (("fp32", 12.0), ("bf16", 7.0)):
        favor, exact = (replace(BASE, kind=kind, dtype=dtype) for kind in ("favor", "exact"))
        exact = replace(exact, num_features=None)
        ours, theirs = run([favor, exact])
        name = f"favor {dtype} forward: times faster than exact attention"
        yield Promise(name=name, measured=theirs.seconds / ours.seconds, limit=limit, at_least=True)
        lengths = (512, 1024, 2048, 4096)
        rows = run([replace(case, length=length) for length in lengths for case in (favor, exact)])
        (crossing,) = crossovers(rows)
        name = f"favor {dtype} forward: crossover with exact attention, residues ({crossing.relation})"
        yield Promise(name=name, measured=crossing.length, limit=2048, at_least=False)


def scaling() -> Iterator[Promise]:
    for kind in ("favor", "generalized"):
        short, long = run([replace(BASE, kind=kind), replace(BASE, kind=kind, length=LONG)])
        name = f"{kind} forward: time a residue at {LONG:,} over that at 8,192"
        ratio = (long.seconds / LONG) / (short.seconds / 8192)
        yield Promise(name=name, measured=ratio, limit=1.2, at_least=False)


def run(cases: list[Case]) -> list[Row]:
    """Rows in the order of the cases; a case left out is an error here."""
    by_case = {
        row.case: row for row in measure(cases, LIMITS, tell=lambda line: print(line, file=sys.stderr), advance=str)
    }
    return [by_case[case] for case in cases]


def peak(row: Row) -> float:
    assert row.peak_extra_mb is not None
    return row.peak_extra_mb


if __name__ == "__main__":
    main()
