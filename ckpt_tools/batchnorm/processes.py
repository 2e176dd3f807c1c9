"""Processes: the group that torchrun starts, if there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed as dist


@dataclass(frozen=True, slots=True)
class Group:
    """Index of this process, and number of processes."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """True for the process that reports and writes."""
        return self.rank == 0


def local_device(device: torch.device) -> torch.device:
    """Give each process of a machine a GPU of its own."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


@contextmanager
def joined_group(device: torch.device) -> Iterator[Group]:
    """Join the processes that torchrun started, if it did; its environment variables tell.

    After an error the group is not closed: torchrun ends the others when one has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ:
        yield Group()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Group(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()
