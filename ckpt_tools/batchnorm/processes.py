"""Processes: the group that torchrun starts, if there is one, and what its processes tell one another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import CkptError


@dataclass(frozen=True, slots=True)
class Group:
    """Index of this process, and number of processes."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """True for the process that reports and writes."""
        return self.rank == 0


_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself meanwhile, though it has others beside it, as at the end of their training."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def started_by_torchrun() -> bool:
    """Return True if this is one of several processes that torchrun started; its environment variables tell."""
    return not _ALONE.get() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def local_device(device: torch.device) -> torch.device:
    """Give each process of a machine a GPU of its own."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


@contextmanager
def joined_group(device: torch.device) -> Iterator[Group]:
    """Join the processes that torchrun started, if it did.

    After an error the group is not closed: torchrun ends the others when one has ended.
    """
    if not started_by_torchrun():
        yield Group()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _told_if_lost():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Group(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


def gathered(mine: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, of one shape, in the order of their ranks; that of this one if it is alone.

    Raises:
        CkptError: a process of the group has ended.
    """
    if not _grouped():
        return [mine]
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    with _told_if_lost():
        dist.all_gather(everyone, mine)
    return everyone


def gathered_objects(mine: Any) -> list[Any]:
    """Return the objects of all processes; see `gathered`."""
    if not _grouped():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    with _told_if_lost():
        dist.all_gather_object(everyone, mine)
    return everyone


def _grouped() -> bool:
    return not _ALONE.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def _told_if_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo and NCCL, also after a timeout
        raise CkptError(
            f"another process of this job has ended or cannot be reached ({str(error).splitlines()[0]}). Its own "
            "message says why; if there is none, the system may have ended it for its memory."
        ) from error
