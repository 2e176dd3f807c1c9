"""Megatron-LM's ``torch_dist`` checkpoints: a DCP folder for each iteration, inside the folder of the training.

``iter_0001000/`` has the names of weights, of the optimizer and of objects in one flat dict, as shards of all ranks.
All that no rank splits (arguments, the iteration, the scheduler) is in ``common.pt``, and ``metadata.json`` says how it
was saved. ``latest_checkpointed_iteration.txt`` is beside these folders. From `megatron.core.dist_checkpointing`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UnsupportedError, WriteError
from ..storage.source import stamp_at, store_of
from ..tensors import DTYPES, Storage, make_spec
from .dcp import DCP, METADATA, SUFFIX, Saved, lay_out, read_folder
from .file_plan import FilePlan, OutTensor, Payload, Terms, whole_file
from .format import Writing
from .header import Header
from .json_file import read_json
from .torch_zip import TORCH_ZIP

COMMON, CONFIG = "common.pt", "metadata.json"
TRACKER = "latest_checkpointed_iteration.txt"
_BACKEND = "torch_dist"
_FOLDER = re.compile(r"iter_\d{7,}|release")
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optim.*", re.DOTALL)
_SLOT = re.compile(r"(.*?optimizer\.state)\.(\w+)\.(.+)", re.DOTALL)

_OBJECTS = ("extra_state", "optimizer_objects", "rng_state", "train_state")
"""Groups of entries that are not tensors. Each entry is kept as the bytes that ``torch.save`` made of it."""


class Megatron(DCP):
    """The format of the folder of one iteration."""

    name = "torch-dist"
    keeps_folder = True
    averaged_note = (
        "The average has no optimizer and no random states. Load it into Megatron-LM with its option finetune, or with "
        "no-load-optim and no-load-rng."
    )

    def sniff(self, path: Path, start: bytes) -> bool:
        if start:
            return False
        names = store_of(path).names(path)
        return COMMON in names and any(name.endswith(SUFFIX) for name in names)

    def read(self, path: Path) -> Header:
        """Read the header of a folder.

        The tree has the weights in ``model``, and what the optimizer keeps for them in ``optimizer``. An object is a
        tensor of bytes, which nothing unpickles. Of ``common.pt`` it has the numbers and texts alone.

        Raises:
            CorruptError: incomplete or damaged.
            UnsupportedError: saved by another backend, or see `DCP.read`.
        """
        config = read_json(path / CONFIG)
        if not config:
            raise CorruptError(
                f"{path}: has no {CONFIG}, which Megatron-LM writes last: the save was interrupted, or is under way. "
                "Get a complete copy."
            )
        if config.get("sharded_backend") != _BACKEND:
            raise UnsupportedError(
                f"{path}: saved with the backend {config.get('sharded_backend')!r}; only {_BACKEND} is read. Save it "
                f"again with Megatron-LM's option ckpt-convert-format {_BACKEND}."
            )
        folder, common = read_folder(path, whole_objects=False), TORCH_ZIP.read(path / COMMON)
        groups: dict[str, Any] = {"model": {}}
        for name, value in folder.entries.items():
            groups.setdefault(_group(name, is_object=name in folder.objects), {})[name] = value
        if "optimizer" in groups:  # as torch's optimizers are, so that nobody looks for weights in it
            groups["optimizer"] = {"state": _by_parameter(groups["optimizer"]), "param_groups": []}
        known = common.tree.items() if isinstance(common.tree, dict) else ()
        told = {key: value for key, value in known if isinstance(value, (int, float, str)) and key not in groups}
        return Header(
            path,
            self,
            {**told, **groups},
            (*folder.stamps, *common.files, stamp_at(path / CONFIG)),
            folder.foreign,
            provenance=folder.provenance,
            record_fault=folder.record_fault,
        )

    def plan(self, content: Any, writing: Writing) -> tuple[FilePlan, ...]:
        """Lay out the folder of a training with one iteration: that of `writing.like`.

        Its files are as large as those of `writing.like` unless `max_bytes` is given. ``common.pt`` and
        ``metadata.json`` are copied from there.

        Raises:
            WriteError: there is no such checkpoint, or its iteration is not known.
        """
        like = writing.like
        if like is None or not isinstance(like.format, Megatron):
            raise WriteError(
                f"{writing.name}: a {self.name} folder is written only from checkpoints of this format. Give `out` a "
                "name that ends in .safetensors or .pth."
            )
        folder = _folder_name(like, content)
        largest = max((stamp.nbytes for stamp in like.files if stamp.path.name.endswith(SUFFIX)), default=None)
        max_bytes = largest if writing.max_bytes is None else writing.max_bytes
        plans = [_copied(like, COMMON), *lay_out(_leaves(content), replace(writing, max_bytes=max_bytes))]
        plans.append(_copied(like, CONFIG))
        iteration = folder.removeprefix("iter_")
        tracked = iteration if iteration == "release" else str(int(iteration))
        return (
            *(replace(plan, name=f"{folder}/{plan.name}") for plan in plans),
            whole_file(TRACKER, tracked.encode()),
        )

    def replaced(self, folder: Path, names: Collection[str]) -> Collection[str]:
        """Return the files of an older output: a folder of a training with a single iteration."""
        store = store_of(folder)
        inside = [name for name in store.names(folder) if _FOLDER.fullmatch(name)]
        if TRACKER not in names or len(inside) != 1:
            return ()
        own = store.names(folder / inside[0]) if store.is_folder(folder / inside[0]) else []
        return [
            f"{inside[0]}/{name}" for name in own if name.endswith(SUFFIX) or name in (METADATA, COMMON, CONFIG)
        ] + [TRACKER]


MEGATRON = Megatron()


def _group(name: str, *, is_object: bool) -> str:
    optimizer = _OPTIMIZER.fullmatch(name) is not None
    if not is_object:
        return "optimizer" if optimizer else "model"
    if optimizer:
        return "optimizer_objects"
    base = name.partition("/")[0]
    return {"rng_state": "rng_state", "rerun_state_machine_state": "train_state"}.get(base, "extra_state")


def _by_parameter(optimizer: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Group what an optimizer keeps: ``optimizer.state.exp_avg.NAME`` is exp_avg of (optimizer.state, NAME)."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for key, value in optimizer.items():
        match = _SLOT.fullmatch(key)
        lead, slot, name = match.groups() if match is not None else (*key.rpartition(".")[::2], "")
        found.setdefault((lead, name), {})[slot] = value
    return found


def _leaves(content: Mapping[str, Any]) -> Iterator[tuple[str, None, Any]]:
    yield from ((name, None, value) for name, value in content["model"].items())
    for (lead, name), slots in content.get("optimizer", {}).get("state", {}).items():
        for slot, value in slots.items():
            yield ".".join(part for part in (lead, slot, name) if part), None, value
    for group in _OBJECTS:
        yield from ((name, None, Saved(value)) for name, value in content.get(group, {}).items())


def _folder_name(like: Header, content: Mapping[str, Any]) -> str:
    if _FOLDER.fullmatch(like.path.name):
        return like.path.name
    iteration = content.get("iteration")
    if type(iteration) is not int or iteration < 0:
        raise WriteError(
            f"{like.path}: neither its name nor its {COMMON} has an iteration, which names the folder of the output. "
            "Give the folder a name such as iter_0001000."
        )
    return f"iter_{iteration:07d}"


def _copied(like: Header, name: str) -> FilePlan:
    """Plan a copy of a small file."""
    stamp = next(stamp for stamp in like.files if stamp.path.name == name)
    spec = make_spec(DTYPES["uint8"], (stamp.nbytes,), Storage(stamp.path, 0, stamp.nbytes))
    tensor = OutTensor(spec.dtype, spec.shape, Terms.copy(spec), name, finite=False)
    return FilePlan(name, stamp.nbytes, (Payload(tensor, 0),))
