"""Oracles: what torch and the safetensors library read in the same file, beside what is read here.

An input that both accept must have the same names, shapes and values: a silent wrong answer is a fault.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from ckpt_tools.compute.payload import read_tensor
from ckpt_tools.errors import CkptError
from ckpt_tools.formats.header import Header
from ckpt_tools.formats.pickle_objects import Inert, TypedStorage
from ckpt_tools.tensors import TensorSpec, UnsupportedTensor
from properties import LARGEST_READ, Fault

_SCALARS = (str, bytes, bytearray, int, float, complex, bool, type(None), torch.dtype, torch.Size, torch.device)


def torch_agrees(header: Header, path: Path) -> None:
    """Compare the tree of a header with what `torch.load` makes of the file, if it accepts it.

    Raises:
        Fault: they differ.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # noqa: BLE001 - it refuses in many ways
        return
    seen: set[tuple[int, int]] = set()
    waiting = [(header.tree, theirs, "")]
    while waiting:
        mine, other, where = waiting.pop()
        if isinstance(mine, (UnsupportedTensor, Inert, TypedStorage)) or (id(mine), id(other)) in seen:
            continue  # told as what is not read
        seen.add((id(mine), id(other)))
        if isinstance(other, torch.Tensor):
            _same_tensor(mine, other, header, where)
        elif isinstance(other, dict):
            if not isinstance(mine, dict) or len(mine) != len(other):
                raise Fault(f"{where}: torch reads a dict of {len(other)}, ckpt-tools {_brief(mine)}")
            for (key, value), (their_key, their_value) in zip(mine.items(), other.items(), strict=True):
                _same_value(key, their_key, f"a key of {where}")
                waiting.append((value, their_value, f"{where}.{str(key)[:50]}"))
        elif isinstance(other, (list, tuple)) and not isinstance(other, torch.Size):
            if type(mine) is not type(other) or len(mine) != len(other):
                raise Fault(f"{where}: torch reads {_brief(other)}, ckpt-tools {_brief(mine)}")
            waiting += [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(mine, other, strict=True))]
        else:
            _same_value(mine, other, where)


def _same_tensor(mine: Any, theirs: torch.Tensor, header: Header, where: str) -> None:
    if not isinstance(mine, TensorSpec):
        raise Fault(f"{where}: torch reads a tensor, ckpt-tools {_brief(mine)}")
    found, wanted = (mine.dtype.name, mine.shape), (str(theirs.dtype).removeprefix("torch."), tuple(theirs.shape))
    if found != wanted:
        raise Fault(f"{where}: torch reads {wanted}, ckpt-tools {found}")
    if mine.nbytes <= LARGEST_READ and not theirs.is_meta:
        try:
            values = read_tensor(mine, header.files)
        except CkptError:
            return
        if _bytes(values) != _bytes(theirs.detach()):
            raise Fault(f"{where}: torch reads {theirs}, ckpt-tools {values}")


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous()
    return flat.as_strided((flat.numel(),), (1,), flat.storage_offset()).view(torch.uint8).numpy().tobytes()


def _same_value(mine: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, _SCALARS) and (type(mine) is not type(theirs) or repr(mine) != repr(theirs)):
        raise Fault(f"{where}: torch reads {_brief(theirs)}, ckpt-tools {_brief(mine)}")


def _brief(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:100]}"


def safetensors_agrees(header: Header, path: Path) -> None:
    """Compare the tensors of a header with what the safetensors library finds in the file.

    Raises:
        Fault: they differ, or the library refuses the file, although all of it is read here.
    """
    try:
        theirs = dict(safetensors.deserialize(path.read_bytes()))
    except safetensors.SafetensorError as error:
        if any(isinstance(each, UnsupportedTensor) for each in header.tree.values()):
            return
        raise Fault(f"the safetensors library refuses a file that ckpt-tools reads: {error}") from error
    # A tie that the metadata record is a name that the library does not know.
    if not theirs.keys() <= header.tree.keys() or not header.tree.keys() - theirs.keys() <= header.metadata.keys():
        raise Fault(f"the library reads {sorted(theirs)}, ckpt-tools {sorted(header.tree)}")
    for name, other in theirs.items():
        mine = header.tree[name]
        if isinstance(mine, UnsupportedTensor):
            continue
        if [*mine.shape] != other["shape"] or mine.dtype.safetensors != other["dtype"]:
            raise Fault(f"{name}: the library reads {other['dtype']} {other['shape']}, ckpt-tools {mine}")
        if mine.nbytes <= LARGEST_READ and _bytes(read_tensor(mine, header.files)) != bytes(other["data"]):
            raise Fault(f"{name}: the library reads other values than ckpt-tools")


def shards_agree(header: Header, index: bytes, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Compare the tensors of a folder with those of the shard that its index names for each.

    Raises:
        Fault: they differ.
    """
    listed = json.loads(index)["weight_map"]
    if header.tree.keys() != listed.keys():
        raise Fault(f"the index lists {sorted(listed)}, ckpt-tools reads {sorted(header.tree)}")
    for name, file in listed.items():
        _same_tensor(header.tree[name], shards[file][name], header, name)
