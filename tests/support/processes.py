"""Processes that talk by gloo, for tests of what several of them save together."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

_IMPORTED = ["torch", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.device_mesh"]
"""What a process forks from has imported, so that it takes the time only once."""


def in_processes(count: int, work: Callable[..., None], folder: Path, *args: Any) -> None:
    """Run ``work(rank, folder, *args)`` in processes that form a group; what one of them raises is raised here.

    Args:
        work: a function of a module, as the processes start anew.
        folder: where the processes meet; `work` may use it, too.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED)
    torch.multiprocessing.start_processes(_process, (count, work, folder, args), count, start_method="forkserver")


def _process(rank: int, count: int, work: Callable[..., None], folder: Path, args: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    meeting = folder / f"meeting-{work.__name__}-{count}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    work(rank, folder, *args)  # an exception goes to torch, which ends the others and shows it
    dist.barrier()
    # No teardown: the threads of a group that is destroyed, or still alive at exit, can abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
