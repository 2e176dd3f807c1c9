"""Devices: whether the CPU or GPUs compute the sums, decided without importing torch if possible."""

from __future__ import annotations

import math
import re
from pathlib import Path

from ...errors import UsageError, did_you_mean

AUTO_FROM: float = math.inf
"""Bytes of input from which on `auto` takes the GPUs. Importing torch and starting CUDA takes 3 to 5 seconds, in which
the CPU sums tens of gigabytes; no measurement so far has a GPU ahead."""
GPU_MEMORY = 10**9
"""Bytes that a job takes on each GPU, at most; CUDA itself takes some hundred MB more."""

_DRIVER = (Path("/dev/nvidia0"), Path("/dev/nvidiactl"))


def check_name(device: str) -> None:
    """Refuse an unknown device name.

    Raises:
        UsageError: not one of auto, cpu, cuda, cuda:N.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", str(device), re.ASCII):
        known = f"`device={device!r}`: write auto, cpu, cuda (all GPUs), or cuda:1 (that one)."
        raise UsageError(known + did_you_mean(str(device).lower().replace("gpu", "cuda"), ("auto", "cpu", "cuda")))


def choose(device: str, nbytes: int) -> tuple[str, ...]:
    """Return the names of the GPUs that share a job; none if the CPU does it.

    Args:
        device: a name that `check_name` accepts.
        nbytes: total size of the inputs.

    Raises:
        UsageError: the GPU asked for does not exist.
    """
    if device == "cpu" or (device == "auto" and not _worth_it(nbytes)):
        return ()
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    every = tuple(f"cuda:{i}" for i in range(count))
    if device == "auto" or (device == "cuda" and every):
        return every
    if not every:
        built = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
        lack = "finds no GPU that it can use" if built else "is a build without CUDA"
        advice = "Look at nvidia-smi and CUDA_VISIBLE_DEVICES" if built else "Install one with CUDA"
        raise UsageError(f"`device={device!r}`: torch {torch.__version__} {lack}. {advice}, or say `device='cpu'`.")
    index = int(device.removeprefix("cuda:"))
    if index >= count:
        there = "is 1 GPU, cuda:0" if count == 1 else f"are {count} GPUs, cuda:0 to {every[-1]}"
        raise UsageError(f"`device={device!r}`: there {there}.")
    return (every[index],)


def _worth_it(nbytes: int) -> bool:
    return nbytes >= AUTO_FROM and any(path.exists() for path in _DRIVER)
