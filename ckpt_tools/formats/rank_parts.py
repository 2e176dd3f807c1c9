"""Rank parts: what one process saved of a DTensor or a ShardedTensor, and where it is in the whole tensor.

`torch.save` in each process writes its own part. A DTensor (FSDP2, tensor parallelism) is spread over a mesh of
processes, with a placement for each axis of the mesh; a ShardedTensor (FSDP1) is a list of boxes. The objects in a
pickle are told by the names of their classes, which were in other modules before torch 2.5; nothing is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeGuard

from ..tensors import Chunk, DType, RankPart, TensorSpec, UnsupportedTensor

CLASSES = re.compile(r"torch\.distributed\.(_?tensor|_shard|device_mesh|_mesh_layout|remote_device)\b.*")
"""Names of the classes of which rank parts are made."""
_LIMIT = 1 << 63
_MAX_AXES = 64  # torch's own limit


class _UnknownError(Exception):
    """The objects are not as torch writes them; its text is the reason."""


def part_of(cls: Any, dtype: DType | None, shape: tuple[int, ...], state: Any) -> UnsupportedTensor:
    """Read a tensor of a subclass from its pickle.

    Args:
        cls: its class, not imported.
        dtype, shape: of the whole tensor.
        state: of the object.

    Returns:
        A RankPart; another UnsupportedTensor for other subclasses, and for what cannot be put together.
    """
    name = _name(cls)
    what = name.rpartition(".")[2]
    if not CLASSES.fullmatch(name) or what not in ("DTensor", "ShardedTensor"):
        return UnsupportedTensor(f"a tensor subclass ({name or 'unknown'})")
    try:
        if dtype is None or not _are_counts(shape):
            raise _UnknownError("without a dtype or a size")
        chunks, ranks = (_dtensor if what == "DTensor" else _sharded)(shape, state)
        if any(chunk.dtype is not dtype for _, chunk in chunks):
            raise _UnknownError("whose part has another dtype")
    except _UnknownError as error:
        return UnsupportedTensor(f"a {what} {error}")
    return RankPart(f"one rank's part of a {what}, saved by {ranks} ranks", dtype, shape, chunks, ranks)


def _name(thing: Any) -> str:
    """Return the name of a class that was not imported; empty for another object."""
    return str(getattr(thing, "global_name", ""))


def _fields(thing: Any, *names: str) -> dict[str, Any]:
    """Return the fields of an object of one of these classes of torch.distributed, those in slots too."""
    module, _, name = _name(type(thing)).rpartition(".")
    if name not in names or not module.startswith("torch.distributed."):
        raise _UnknownError(f"with no {names[0]} where torch has one")
    return _merged(thing.state)


def _merged(state: Any) -> dict[str, Any]:
    """Return the fields in a state: a dict, or one of attributes and one of slots."""
    found: dict[str, Any] = {}
    for each in state if isinstance(state, tuple) else (state,):
        found.update(each if isinstance(each, dict) else {})
    return found


def _are_counts(values: Any) -> TypeGuard[Sequence[int]]:
    return (
        isinstance(values, (tuple, list))
        and len(values) <= _MAX_AXES
        and all(type(n) is int and 0 <= n < _LIMIT for n in values)
    )


def _dtensor(shape: tuple[int, ...], state: Any) -> tuple[tuple[Chunk, ...], int]:
    """Return the chunk of a DTensor that a process has, and the number of processes that share the tensor."""
    fields = _merged(state)
    local, spec = fields.get("_local_tensor"), _fields(fields.get("_spec"), "DTensorSpec")
    mesh = _fields(spec.get("mesh"), "DeviceMesh")
    sizes = _mesh_sizes(mesh)
    placements = spec.get("placements")
    if not isinstance(placements, (tuple, list)) or len(placements) != len(sizes):
        raise _UnknownError("without a placement for each axis of its mesh")
    order = _order(shape, sizes, [_placement(each) for each in placements], spec)
    at = mesh.get("_coordinate_on_dim")
    if at is None:  # of a process outside the mesh
        return (), math.prod(sizes)
    if not _are_counts(at) or len(at) != len(sizes) or any(n >= size for n, size in zip(at, sizes, strict=True)):
        raise _UnknownError("with an impossible place in its mesh")
    starts, lengths = [0] * len(shape), list(shape)
    for dim, axis in order:  # as torch.chunk: the last parts may be shorter, or empty
        step = -(-lengths[dim] // sizes[axis])
        begin = min(step * at[axis], lengths[dim])
        starts[dim] += begin
        lengths[dim] = min(step, lengths[dim] - begin)
    if not isinstance(local, TensorSpec):
        raise _UnknownError("whose part is no plain tensor")
    if local.shape != tuple(lengths):
        raise _UnknownError(f"whose part has the shape {list(local.shape)}, where its placements give {lengths}")
    return ((tuple(starts), local),), math.prod(sizes)


def _mesh_sizes(mesh: dict[str, Any]) -> tuple[int, ...]:
    """Return the sizes of a mesh: of the tensor of its ranks, or (since torch 2.9) of its layout."""
    ranks = mesh.get("mesh")
    if isinstance(ranks, TensorSpec):
        sizes: Any = ranks.shape
    else:
        layout = _fields(mesh.get("_layout"), "_MeshLayout")
        axes = layout.get("axes", layout.get("shape"))
        axes = axes if isinstance(axes, (tuple, list)) else (axes,)
        sizes = tuple(
            math.prod(_flat(axis if isinstance(axis, (int, tuple)) else _fields(axis, "_FlatLayout").get("shape")))
            for axis in axes[: _MAX_AXES + 1]
        )
    if not _are_counts(sizes) or 0 in sizes:
        raise _UnknownError("of a mesh whose size is not known")
    return tuple(sizes)


def _flat(sizes: Any, depth: int = 0) -> Iterator[int]:
    """Yield the numbers of a size, which may be nested."""
    if type(sizes) is int and 0 <= sizes < 1 << 20:
        yield sizes
    elif isinstance(sizes, tuple) and len(sizes) <= _MAX_AXES and depth < 4:
        for each in sizes:
            yield from _flat(each, depth + 1)
    else:
        raise _UnknownError("of a mesh whose size is not known")


def _placement(placement: Any) -> tuple[int, int] | None:
    """Return (dimension, split factor) of a Shard, None of a Replicate."""
    fields = _fields(placement, "Shard", "_StridedShard", "Replicate", "Partial", "_Partial", "_MaskPartial")
    name = _name(type(placement)).rpartition(".")[2]
    if name == "Replicate":
        return None
    if name.endswith("Partial"):
        raise _UnknownError("of sums that were not added up (a partial placement)")
    dim, factor = fields.get("dim"), fields.get("split_factor", 1)
    if type(dim) is not int or type(factor) is not int:
        raise _UnknownError("with an impossible placement")
    return dim, factor


def _order(
    shape: tuple[int, ...], sizes: Sequence[int], placements: Sequence[tuple[int, int] | None], spec: dict[str, Any]
) -> Iterable[tuple[int, int]]:
    """Return (dimension, axis of the mesh) in the order in which the tensor was split.

    Of several axes that split one dimension, the first splits first. A _StridedShard was split later: by then others
    to its right had split the dimension into `split_factor` parts.
    """
    given = spec.get("shard_order")
    if given is not None:
        order = [(dim, axis) for dim, axes in map(_order_entry, given) for axis in axes]
        if sorted(order) != sorted((p[0], axis) for axis, p in enumerate(placements) if p is not None):
            raise _UnknownError("whose placements contradict the order of its shards")
    else:
        splits: dict[int, list[int]] = {}
        for axis in reversed(range(len(placements))):
            placement = placements[axis]
            if placement is None:
                continue
            axes = splits.setdefault(placement[0], [])
            before = next(
                (n for n in range(len(axes) + 1) if math.prod(sizes[a] for a in axes[:n]) == placement[1]), -1
            )
            if before < 0:
                raise _UnknownError("with a strided placement that no order of its shards gives")
            axes.insert(before, axis)
        order = [(dim, axis) for dim, axes in splits.items() for axis in axes]
    if any(not 0 <= dim < len(shape) for dim, _ in order):
        raise _UnknownError("with an impossible placement")
    return order


def _order_entry(entry: Any) -> tuple[int, Sequence[int]]:
    _fields(entry, "ShardOrderEntry")
    match entry.args:
        case (int(dim), (tuple() | list()) as axes) if _are_counts(axes):
            return dim, axes
    raise _UnknownError("whose order of shards is not known")


def _sharded(shape: tuple[int, ...], state: Any) -> tuple[tuple[Chunk, ...], int]:
    """Return the chunks of a ShardedTensor that a process has, and the number of processes that share the tensor."""
    if not isinstance(state, tuple) or len(state) < 3 or not isinstance(state[0], list):
        raise _UnknownError("without a list of shards")
    group = _merged(getattr(state[2], "state", None))
    ranks = group.get("local_world_size")
    if type(ranks) is not int or not 0 < ranks < _LIMIT:
        raise _UnknownError("without a number of ranks")
    return tuple(_shard(shape, each) for each in state[0]), ranks


def _shard(shape: tuple[int, ...], shard: Any) -> Chunk:
    fields = _fields(shard, "Shard")
    place = _fields(fields.get("metadata"), "ShardMetadata")
    offsets, lengths, tensor = place.get("shard_offsets"), place.get("shard_sizes"), fields.get("tensor")
    if not _are_counts(offsets) or not _are_counts(lengths) or not len(offsets) == len(lengths) == len(shape):
        raise _UnknownError("with an impossible shard")
    if not isinstance(tensor, TensorSpec) or tensor.shape != tuple(lengths):
        raise _UnknownError("with a shard of another size than its own")
    return tuple(offsets), tensor
