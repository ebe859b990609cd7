"""The only module that asks about CUDA, MPS, bf16, threads, memory and determinism.

In: what the user asked for. Out: a torch device, a precision, numbers for the log. A request that the machine cannot
honour fails here, before data are read.
"""

import os
import platform
import resource
import sys

import torch

from protformer.errors import ConfigError

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


def is_launched_helper() -> bool:
    """Whether this process is one that Lightning started beside the first one, to drive another device."""
    return int(os.environ.get("LOCAL_RANK", "0")) > 0


def make_deterministic() -> None:
    """Let an operation without a deterministic implementation say so, instead of giving other numbers on a resume."""
    torch.use_deterministic_algorithms(True, warn_only=True)
