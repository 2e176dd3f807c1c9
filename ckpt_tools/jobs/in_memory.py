"""In memory: an average as a state dict, which no file has."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..compute import engine
from ..compute.payload import torch_dtype
from ..compute.progress import Activity, counted
from ..compute.work_units import OutFile
from ..formats.file_plan import OutTensor
from ..formats.format import Writing
from ..formats.torch_zip import TORCH_ZIP
from ..storage.memory_file import memory_file
from ..storage.source import Stamp
from .options import Summing
from .run import followed


def in_memory(
    tensors: Mapping[str, OutTensor], versions: Any, stamps: Sequence[Stamp], running: Summing, **options: Any
) -> dict[str, torch.Tensor]:
    """Compute tensors into memory, where they stay: no second copy is made of them.

    They are written as to a file, one without a name in memory, and are views of it. What is tied stays tied.

    Args:
        tensors: by name.
        versions: of the modules, as torch keeps them in the ``_metadata`` of a state dict; None if there are none.
        stamps: of the inputs, taken when their headers were read.
        options: of `engine.run`.

    Raises:
        CkptError: see `engine.run`.
    """
    (plan,) = TORCH_ZIP.plan(dict(tensors), Writing(name="the average"))
    total = sum(each.numel * each.terms.width + each.nbytes for each, _ in plan.payloads)
    tell = counted(running.on_progress, Activity("averaging"), total)
    with (
        memory_file(plan.size) as (fd, memory),
        followed(stamps, None, drop_cache=running.drop_cache, **options) as follower,
    ):
        engine.run([OutFile(plan, fd)], stamps=stamps, follower=follower, on_progress=tell, **options)
        if follower is not None:
            follower.finish()
    views = {tensor: _view(memory, offset, tensor) for tensor, offset in plan.payloads}
    found = OrderedDict((name, views[tensor]) for name, tensor in tensors.items())
    if versions is not None:
        found._metadata = versions  # type: ignore[attr-defined]
    return found


def _view(memory: mmap.mmap, offset: int, tensor: OutTensor) -> torch.Tensor:
    """Return the tensor at an offset, which keeps the memory."""
    dtype = torch_dtype(tensor.dtype)
    if not tensor.numel:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=tensor.numel, offset=offset).view(tensor.shape)
