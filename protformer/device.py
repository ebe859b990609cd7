"""The only module that asks about CUDA, MPS, bf16, threads, memory and determinism.

In: what the user asked for. Out: a torch device, a precision, numbers for the log. A request that the machine cannot
honour fails here, before data are read.
"""

import ctypes
import os
import platform
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from protformer.errors import ConfigError

Result = TypeVar("Result")

DEVICE_CHOICES = ("auto", "cpu", "cuda", "mps")


def choose_device(requested: str = "auto") -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU; a named device must exist."""
    if requested == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if requested not in available:
        raise ConfigError(f"device {requested!r} is not one of {', '.join(DEVICE_CHOICES)}")
    if not available[requested]:
        raise ConfigError(
            f"device {requested!r} was asked for, but torch {torch.__version__} sees none on this machine"
        )
    return torch.device(requested)


def multiplies_bf16_in_hardware(device: torch.device) -> bool:
    """Whether bf16 matrix products beat float32 ones: on a CPU without AMX or AVX512-BF16 they are slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        # torch has no public question for this before 2.13's torch.cpu.get_capabilities.
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False


def choose_precision(requested: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: `auto` is bf16 where the hardware multiplies it, float32 elsewhere."""
    if requested == "auto":
        return torch.bfloat16 if multiplies_bf16_in_hardware(device) else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[requested]


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far, in units of 1e9 bytes: of the CUDA allocator, or of this process on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def num_threads(device: torch.device) -> int:
    """Threads of this process that compute: torch's own number on the CPU, one where a device has its own."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def in_threads(tasks: Sequence[Callable[[], Result]], *, level: str = "attention") -> list[Result]:
    """Run tasks at once, the first one here and each other in a thread, with their shares of torch's threads.

    Without autograd. Autocast is off in new threads: callers switch it off here, or tasks set it themselves. The first
    error, by the order of tasks, is raised when all have ended. A task may call this too, under another `level`.
    """
    if len(tasks) == 1:
        return [tasks[0]()]
    of_all, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    share, left = divmod(of_all, len(tasks))
    first, *others = (
        partial(_run_task, task, num_threads=max(1, share + (number < left)), inference=inference)
        for number, task in enumerate(tasks)
    )
    pool = _thread_pool(level, len(others))
    running: list[Future[Result]] = []
    try:
        running += map(pool.submit, others)
        result = first()
    finally:
        try:
            wait(running)
        finally:
            torch.set_num_threads(of_all)  # of this thread, and of those that are started from now on
    return [result, *(task.result() for task in running)]


def _run_task(task: Callable[[], Result], *, num_threads: int, inference: bool) -> Result:
    torch.get_num_threads()  # a thread's own number is set up when it is first asked for
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)
    with torch.inference_mode(inference), torch.no_grad():
        return task()


def _thread_pool(level: str, size: int) -> ThreadPoolExecutor:
    """Threads that stay as long as this thread, for one level, so that no task waits for a thread that waits for it.

    A forked process has none of its parent's, and makes its own.
    """
    key = (os.getpid(), level, size)
    if key not in _own.pools:
        _own.pools[key] = ThreadPoolExecutor(size, thread_name_prefix=level)
    return _own.pools[key]


class _OfThread(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.pools: dict[tuple[int, str, int], ThreadPoolExecutor] = {}


_own = _OfThread()


def launched_rank() -> int:
    """Which of the processes of one job this is; 0 prepares the run folder, writes files, and reports."""
    if launched_size() is not None:
        return int(os.environ["RANK"] if "LOCAL_WORLD_SIZE" in os.environ else os.environ["SLURM_PROCID"])
    # Lightning has started this one beside another, or the user has started one on each node.
    return max(int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "NODE_RANK"))


def launched_size() -> tuple[int, int] | None:
    """Processes a node, and nodes, where torchrun or SLURM's srun has started all processes of the job."""
    env = os.environ
    if "LOCAL_WORLD_SIZE" in env and "RANK" in env:
        devices, of_all = int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"])
        return devices, of_all // devices
    # Outside of srun, in the batch script itself, there are tasks to come but no step; these two names Lightning skips.
    if "SLURM_STEP_ID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        of_all, nodes = int(env.get("SLURM_NTASKS", "1")), int(env.get("SLURM_NNODES", "1"))
        return (of_all // nodes, nodes) if of_all > 1 else None
    return None


def require_compiler(device: torch.device) -> None:
    """Raise ConfigError unless torch.compile works here; takes some seconds."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise ConfigError(f"training.compile: torch.compile does not work on this machine: {reason}") from error


def make_deterministic() -> None:
    """Let an operation without a deterministic implementation say so, instead of giving other numbers on a resume."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def synchronize(device: torch.device) -> None:
    """Wait until all that was asked of the device is done; without this, times are those of asking."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Memory held now, and the most held so far: by the CUDA allocator, or by this process on other devices.

    On Linux the peak is read from /proc: getrusage's also counts what the parent held when it started this process.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        table = status.read_text(encoding="ascii")
        return _kibibytes(table, "VmRSS"), _kibibytes(table, "VmHWM")
    peak = int(peak_memory_gb(device) * 1e9)
    return peak, peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation was refused, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    told = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in told)


def release_cached_memory(device: torch.device) -> None:
    """Give back what torch's allocator keeps of freed memory, so that blocks of other sizes find room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@contextmanager
def memory_refused_in_time(device: torch.device) -> Iterator[None]:
    """Let allocations beyond the memory that is free now fail, where Linux would grant them and end the process later.

    For the CPU under Linux only; other devices refuse by themselves.
    """
    if device.type != "cpu" or sys.platform != "linux":
        yield
        return
    status = Path("/proc/self/status").read_text(encoding="ascii")
    limit = _kibibytes(status, "VmData") + _available_bytes()
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    tightest = min((x for x in (before, hard, limit) if x != resource.RLIM_INFINITY), default=limit)
    resource.setrlimit(resource.RLIMIT_DATA, (tightest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep what it frees, for its next arrays of any size: for work that asks for the same each step.

    glibc takes large arrays anew from Linux each time, which clears them page by page: four times the work of a GELU.
    Only for the CPU under Linux with glibc; the peak grows by what fragments.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        library.mallopt(m_mmap_max, 0)
        library.mallopt(m_trim_threshold, -1)


def limit_memory(gigabytes: float) -> None:
    """Let this process fail when it asks for more than this (1e9 bytes), before the machine runs out of memory."""
    if sys.platform == "linux":
        limit = int(gigabytes * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _available_bytes() -> int:
    """What the machine, or the container where that is less, could still give."""
    available = _kibibytes(Path("/proc/meminfo").read_text(encoding="ascii"), "MemAvailable")
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        available = min(available, int(limit) - used + int(statistics["inactive_file"]))
    return available


def _kibibytes(table: str, name: str) -> int:
    """A field of a file of /proc, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in table.splitlines() if line.startswith(f"{name}:"))


def describe_machine(device: torch.device) -> dict[str, object]:
    """What a measurement depends on, for the record."""
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": cuda or device.type,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "bf16_in_hardware": multiplies_bf16_in_hardware(device),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
