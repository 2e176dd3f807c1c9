"""Averaged networks: the BatchNorm statistics of an average, measured before its output is written.

The sums go to a scratch file beside the target. A network takes its weights from there and is shown the images. What is
written are the tensors of the scratch file, byte for byte, with the measured statistics in the place of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..batchnorm.layers import find_layers
from ..batchnorm.processes import Group, started_by_torchrun
from ..checkpoints.layouts import StateDict
from ..checkpoints.open import Checkpoint
from ..compute import engine
from ..compute.progress import Activity, Progress, counted
from ..compute.work_units import OutFile
from ..errors import UsageError
from ..evaluation.models import load_weights, pick_device
from ..formats import read_header
from ..formats.file_plan import OutTensor
from ..formats.format import Writing
from ..formats.header import Header
from ..formats.torch_zip import TORCH_ZIP
from ..storage.source import Stamp
from ..storage.staged import ScratchFile
from .assembly import Copies
from .options import Images, Measuring, Network, Numerics, Recalibration
from .outputs import named
from .recalibrate import Opened, RecalibrationReport, check, new_buffers, opened, statistics_of
from .run import followed


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """The tensors of an average with measured statistics.

    Attributes:
        tensors: by name, in the order of the output.
        stamps: of the scratch files that most of them are in.
        report: statistics and accuracy.
    """

    tensors: Mapping[str, OutTensor]
    stamps: tuple[Stamp, ...]
    report: RecalibrationReport


@contextmanager
def opened_network(
    base: Header, state: StateDict, recalibration: Recalibration, device: str, on_progress: Progress | None
) -> Iterator[Opened]:
    """Build the network of a series, fill it with the weights of the last checkpoint, and open the images.

    Args:
        base, state: the last checkpoint, and the set of weights in it.
        device: of the sums; several GPUs are one to a network.
        on_progress: called with (what is done, how much of it so far, all of it).

    Raises:
        CkptError: the network or the images cannot be used.
    """
    images, measuring = recalibration.of(Images), recalibration.of(Measuring)
    check(images, measuring)
    if started_by_torchrun():
        raise UsageError(
            "`recal_bn` works in one process, and torchrun has started several. Average in one process, and let "
            "several measure the statistics of what it wrote."
        )
    if base.ranks or state.parts:
        raise UsageError(
            f"{base.path}: its weights are those of several models or ranks, and `recal_bn` needs those of one network."
        )
    on = pick_device("auto" if device == "cuda" else device)
    checkpoint = Checkpoint.of(base, state)
    which, numerics = recalibration.of(Network), recalibration.of(Numerics)
    with (
        named("recal_bn", "data"),  # the option that has the place of `data` here
        opened(checkpoint, which, images, measuring, numerics, on, Group(), on_progress) as network,
    ):
        yield network


def measured(
    network: Opened,
    tensors: Mapping[str, OutTensor],
    scratch: ScratchFile,
    stamps: Sequence[Stamp],
    report: RecalibrationReport,
    *,
    on_progress: Progress | None = None,
    drop_cache: bool = False,
    **options: Any,
) -> Measured:
    """Write the sums to a scratch file, and measure the statistics of a network with them.

    Args:
        tensors: the sums, by name.
        scratch: for the sums; stays until the output is written.
        stamps: of the inputs.
        report: of the plan.
        on_progress: called with (what is done, how much of it so far, all of it): bytes, then images.
        drop_cache: let the system drop the pages of inputs that it had not in memory before.
        options: of `engine.run`.

    Raises:
        CkptError: the sums cannot be written or do not fit the network, or the measurement fails.
    """
    (plan,) = TORCH_ZIP.plan(dict(tensors), Writing(name="sums.pth"))
    total = sum(tensor.numel * tensor.terms.width + tensor.nbytes for tensor, _ in plan.payloads)
    tell = counted(on_progress, Activity("averaging"), total)
    with followed(stamps, None, drop_cache=drop_cache, **options) as follower:
        engine.run([OutFile(plan, scratch.fd)], stamps=stamps, follower=follower, on_progress=tell, **options)
        if follower is not None:
            follower.finish()
    header = read_header(scratch.path)
    sums = Checkpoint.of(header, StateDict(header.tree, which=network.checkpoint.state.which))
    layers, _ = find_layers(network.network, include_frozen=network.measuring.include_frozen)
    loaded = load_weights(network.network, sums, measured=statistics_of(network.network, layers))
    done = network.measured(report, on_progress or (lambda *_: None))
    copies = Copies()
    found = {name: copies[spec] for name, spec in header.tree.items()}
    if done.statistics is not None:
        found |= new_buffers(network.network, done.statistics, loaded, sums.specs)
    return Measured(found, header.files, done)
