"""Parameter names: for averages without names, from another checkpoint or from a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.layouts import select
from ..checkpoints.layouts.layout import AnyOrder
from ..errors import UsageError
from ..formats import read_header
from ..formats.header import Header
from ..series.paths import one_checkpoint
from ..storage.source import Stamp
from ..tensors import DTYPES, Storage, Tensor, TensorSpec, make_spec

_NOWHERE = Path()


@dataclass(frozen=True, slots=True, eq=False)
class Naming:
    """Names for parameters without names.

    Attributes:
        names: a state dict of the model; None if none was given.
        order: names of the parameters, in their order; None if unknown.
        files: of the checkpoint that has the names; its buffers may be used.
        label: description for messages.
    """

    names: Mapping[str, Tensor] | None = None
    order: tuple[str, ...] | None = None
    files: tuple[Stamp, ...] = ()
    label: str = ""


def find_names(header: Header, names_from: str | Path | None, model: str | None, kwargs: Mapping[str, Any]) -> Naming:
    """Read names from where the user asks.

    Args:
        header: of the checkpoint that needs names.
        names_from: another checkpoint of the same model.
        model, kwargs: or a timm name or a factory, and its arguments.

    Raises:
        UsageError: both are given, or no such model.
    """
    if names_from is not None and model is not None:
        raise UsageError("`names_from` and `model` both give names. Leave one of them out.")
    if names_from is not None:
        other = read_header(one_checkpoint(names_from))
        chosen = select(other)
        names = chosen.tensors if other.in_model_order else AnyOrder(chosen.tensors)
        return Naming(names, files=other.files, label=f"{other.path}: {chosen.label}")
    if model is None:
        return Naming()
    from torch.nn import Parameter

    from ..evaluation.models import build_model

    network = build_model(model, header, kwargs, {})
    order = tuple(name for name, _ in network.named_parameters())
    # A storage for each parameter, so that only those that the model ties are tied.
    places: dict[int, int] = {}
    names = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Parameter):
            continue
        dtype, shape = DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)
        storage = Storage(_NOWHERE, places.setdefault(id(tensor), len(places)), tensor.numel() * dtype.itemsize)
        names[name] = make_spec(dtype, shape, storage)
    return Naming(names, order)


def in_files(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out tensors of a model, which are in no file."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (isinstance(tensor, TensorSpec) and tensor.storage.path == _NOWHERE)
    }
