"""Notes on an average: what who uses it may not expect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..formats.file_plan import OutTensor
from ..formats.header import Header
from ..series.weighted_sums import is_running
from .assembly import Assembly
from .companions import companions


def of_output(base: Header, assembly: Assembly) -> Iterator[str]:
    """Report what the files of an output have, and what they leave out.

    Args:
        base: the last checkpoint.
        assembly: the output.
    """
    if assembly.kept:
        sets = ", ".join(f"{place} ({n} tensor{'s' * (n > 1)})" for place, n in assembly.kept.items())
        yield f"Copied from the last checkpoint, not averaged: {sets}."
    names = [path.name for path in companions(base, []) if path.parent == base.path]
    if base.in_folder and not assembly.folder and names:
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        yield (
            f"A single file has no place for what is beside the weights, which stays behind: {shown}. For a folder "
            "with all of it, give `out` a name without suffix."
        )
    if assembly.folder and base.format.averaged_note:
        yield base.format.averaged_note


def of_statistics(tensors: Mapping[str, OutTensor], *, averaged: bool) -> Iterator[str]:
    """Report BatchNorm statistics that are not those of the weights beside them; names and shapes tell.

    Args:
        tensors: of an average of two checkpoints or more, by name.
        averaged: False if the statistics are those of the last checkpoint.
    """
    leads = dict.fromkeys(name.removesuffix("running_mean") for name in tensors if is_running(name))
    layers = sum(_is_layer(tensors, lead) for lead in leads)
    if layers:
        what = "averaged statistics" if averaged else "the statistics of the last checkpoint"
        which = f"{layers} BatchNorm layer{'s have' if layers > 1 else ' has'}"
        yield f"{which} {what}, which do not fit the averaged weights. Measure them on training images with `recal_bn`."


def _is_layer(tensors: Mapping[str, OutTensor], lead: str) -> bool:
    mean, variance = (tensors.get(f"{lead}running_{each}") for each in ("mean", "var"))
    return mean is not None and variance is not None and len(mean.shape) == 1 and mean.shape == variance.shape
