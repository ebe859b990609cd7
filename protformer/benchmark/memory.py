"""Peak memory of one case, in a process of its own: peak minus what is held once the inputs are there.

A process's peak never falls, so each case needs a fresh one. It first runs the case at a short length, so that
libraries and threads are there; then allocates the inputs, takes the memory held, runs the case once, and takes the
peak (of the process on a CPU, of the allocator on CUDA). On a CPU small arrays may be reused from what the short run
freed: figures below some MB mean little. The process has a limit, so that a case which needs too much fails by
itself.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

from protformer.benchmark.cases import Case
from protformer.decoding import decode
from protformer.errors import ProtformerError

WARM_UP_RESIDUES = 64
START_UP_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What a fresh process found out about a case."""

    peak_extra_mb: float
    seconds: float
    """Of the one call, the first at this length."""


class TooMuchError(ProtformerError):
    """A case needs more memory or time than it was given."""


def probe(case: Case, *, max_gb: float, max_seconds: float) -> Probe:
    """Run the case once in a fresh process. Raises TooMuchError at either limit."""
    order = json.dumps({"case": asdict(case), "max_gb": max_gb})
    command = [sys.executable, "-m", "protformer.benchmark.memory", order]
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=START_UP_SECONDS + max_seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TooMuchError(f"takes more than {max_seconds:g} s") from error
    if finished.returncode == 0:
        found: Probe = decode(Probe, json.loads(finished.stdout.splitlines()[-1]))
        return found
    complaint = (finished.stderr.strip().splitlines() or ["no message"])[-1]
    if finished.returncode < 0 or "memory" in complaint.lower():
        raise TooMuchError(f"needs more than {max_gb:g} GB")
    raise ProtformerError(f"{case.implementation} {case.kind} at length {case.length:,}: {complaint}")


def main(order: str) -> None:
    """The fresh process: print what was found as JSON."""
    from protformer.benchmark.timing import timed
    from protformer.benchmark.workloads import prepare
    from protformer.device import choose_device, limit_memory, memory_bytes

    fields = json.loads(order)
    case = decode(Case, fields["case"])
    device = choose_device(case.device)
    if device.type == "cpu":
        limit_memory(fields["max_gb"])
    prepare(replace(case, length=min(case.length, WARM_UP_RESIDUES)))()
    run = prepare(case)
    before, _ = memory_bytes(device)
    seconds = timed(run, device)
    _, peak = memory_bytes(device)
    print(json.dumps({"peak_extra_mb": max(peak - before, 0) / 1e6, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1])
