"""DeepSpeed: a folder with the files of each rank, and its universal checkpoints. Read only.

With ZeRO, each rank has a part of the float32 weights: one flat tensor for each group of the optimizer, in
``[bf16_]zero_pp_rank_<rank>_mp_rank_00_optim_states.pt``. ``*_model_states.pt`` have the names and shapes, as
``param_shapes``, in the order of the flat tensors.

- Stages 1 and 2 put the parameters of a group one behind another and cut the whole into equal partitions, the last ones
  shorter. ``mp_rank_00_model_states.pt`` has the weights of 16 bits, too, as ``module``.
- Stage 3 cuts each parameter into equal parts, the last ones padded; a rank puts its parts one behind another. Each
  rank has a ``zero_pp_rank_<rank>_mp_rank_00_model_states.pt``, with an empty tensor for each parameter in ``module``.

A universal checkpoint has each parameter whole, in ``zero/<name>/fp32.pt``. The weights, and their names and order, are
those that ``zero_to_fp32.py`` of DeepSpeed 0.19 makes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UnsupportedError
from ..storage.source import InputFile
from ..tensors import TensorSpec
from .deepspeed_files import (
    INCOMPLETE,
    LATEST,
    MAKE_UNIVERSAL,
    MASTERS,
    TWO_SAVES,
    Files,
    Loaded,
    carried,
    completed,
    folder_of,
    groups_of,
    is_round_robin,
    load,
    model_states,
    tensor_of,
)
from .deepspeed_universal import universal
from .flat import Flat
from .format import Format, Named
from .header import Header
from .pickle_objects import Inert
from .torch_zip import TORCH_ZIP
from .tree import follow

FLAT_KEYS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""In the optimizer states, the keys of the flat tensors: of stages 1 and 2, and of stage 3."""
_LONGEST_NAME = 4096  # bytes of the file `latest` that are read
_MOST_RANKS = 1 << 24


class DeepSpeed(Format):
    """The folder of a checkpoint, or one with a single such folder and the file ``latest``."""

    name = "deepspeed"
    folder = True
    nests = True
    rewritten = False

    @property
    def written_as(self) -> Format:
        return TORCH_ZIP

    def sniff(self, path: Path, start: bytes) -> bool:
        return not start and folder_of(path) is not None

    def read(self, path: Path) -> Header:
        """Read the headers of all ranks.

        Returns:
            A header whose tree has the float32 weights as `Masters`, what else the model states hold, and the 16-bit
            weights as ``module``; without ZeRO, ``module`` alone.

        Raises:
            CorruptError: a file is missing or damaged, or the ranks do not agree, or do not add up.
            UnsupportedError: the weights are split in another way as well: tensor parallel, pipelines, experts.
        """
        folder = folder_of(path) or path
        if folder != path:
            _check_latest(path, folder)
        found = Files.of(folder)
        tree, loaded = universal(found) if found.universal else _ranks(found)
        stamps = tuple(each.stamp for each in loaded)
        return Header(path, self, tree, stamps, sum((each.foreign for each in loaded), Counter()))

    def rename(self, header: Header) -> Named:
        raise UnsupportedError(
            f"{header.path}: a DeepSpeed checkpoint, with names in many files. Convert it to one file first: "
            "`convert(...)`."
        )


DEEPSPEED = DeepSpeed()


def _check_latest(path: Path, folder: Path) -> None:
    """Refuse a folder of which the file ``latest`` names another checkpoint than the one that is there."""
    with InputFile(path / LATEST) as file:
        named = file.read(0, _LONGEST_NAME).decode("utf-8", "replace").strip()
    if named != folder.name:
        raise CorruptError(
            f"{path}: its file '{LATEST}' names {named[:80]!r}, which is not there, and the only checkpoint in it is "
            f"another one. To take that, give {folder}"
        )


def _ranks(files: Files) -> tuple[dict[Any, Any], list[Loaded]]:
    """Read the files of all ranks: with ZeRO of any stage, or without it."""
    first = model_states(next(iter(files.models.values())))
    stored = first.tree.get("mp_world_size")
    if isinstance(stored, int) and stored > 1:
        raise UnsupportedError(f"{first.path}: says that weights are split ('mp_world_size'). {MAKE_UNIVERSAL}")
    if not files.optims:
        if files.split or first.tree.get("param_shapes") is not None:
            raise CorruptError(
                f"{files.folder}: has no *_optim_states.pt, which have the float32 weights. {INCOMPLETE}"
            )
        first.of_type(dict, "module")
        return carried(first, module=True), [first]
    if first.tree.get("param_shapes") is None:
        raise UnsupportedError(
            f"{first.path}: does not say what is in the partitions of the ranks (its 'param_shapes' are None). "
            "Give this file for the weights as the network computes with them."
        )
    optims = [load(path) for path in files.optims.values()]
    stage, ranks = _agreed(files, optims)
    files.check_ranks(files.optims, ranks, optims[0].path)
    if (stage == 3) != files.split:
        raise CorruptError(
            f"{files.folder}: {optims[0].path.name} is of stage {stage}, and {first.path.name} is of another one. "
            f"{TWO_SAVES}"
        )
    models = [first]
    if stage == 3:
        files.check_ranks(files.models, ranks, optims[0].path)
        models += [model_states(path) for path in [*files.models.values()][1:]]
    groups = groups_of(first)
    _check_same(models, "'global_steps'", [model.tree.get("global_steps") for model in models])
    _check_same(models, "'param_shapes'", [groups_of(model) for model in models])
    _check_same(optims, "learning rates", [_learning_rate(optim) for optim in optims])
    stepped = {optim: step for optim in optims if (step := _optimizer_step(optim)) is not None}
    if stepped:
        _check_same([*stepped], "steps", [*stepped.values()])
    flats = [_flat_tensors(each, stage, files) for each in optims]
    _check_same(optims, "number of flat tensors", [len(flat) for flat in flats])
    parameters = _of_stage_3(files, groups, flats) if stage == 3 else _of_stages_1_and_2(files, groups, flats, optims)
    masters = completed(files, models, parameters, stage=stage)
    return {MASTERS: masters, **carried(first, module=stage != 3)}, [*models, *optims]


def _agreed(files: Files, optims: Sequence[Loaded]) -> tuple[int, int]:
    """Return (stage of ZeRO, number of ranks), which all optimizer states have to say."""
    said = []
    for each in optims:
        state = each.of_type(dict, "optimizer_state_dict")
        stage, count = state.get("zero_stage"), state.get("partition_count")
        if isinstance(stage, Inert):  # an enumeration of DeepSpeed
            stage = stage.args[0] if len(stage.args) == 1 else None
        if stage is None and FLAT_KEYS[0] in state:
            stage = 1  # its optimizer for bf16 with float32 gradients, which has the partitions of stage 1
        if state.get("ds_zero_partition_groups"):
            raise UnsupportedError(
                f"{each.path}: its experts are split over the ranks in another way. Save the whole model from the "
                "code that trained it."
            )
        counts = [n for n in (count if isinstance(count, list) else [count]) if type(n) is int and 0 < n <= _MOST_RANKS]
        if type(stage) is not int or stage not in (1, 2, 3) or not counts:
            raise CorruptError(f"{each.path}: does not say its 'zero_stage' or 'partition_count'. It is damaged.")
        if len({*counts}) > 1:
            raise UnsupportedError(
                f"{each.path}: its groups are split over {min(counts)} and over {max(counts)} ranks, as those of a "
                "mixture of experts. Save the whole model from the code that trained it."
            )
        said.append((stage, counts[0]))
    other = next((i for i, each in enumerate(said) if each != said[0]), None)
    if other is not None:
        raise CorruptError(
            f"{files.folder}: {optims[0].path.name} is of stage {said[0][0]} with {said[0][1]} ranks, and "
            f"{optims[other].path.name} of stage {said[other][0]} with {said[other][1]}. {TWO_SAVES}"
        )
    return said[0]


def _check_same(files: Sequence[Loaded], what: str, values: Sequence[Any]) -> None:
    """Refuse files of several ranks, of which one has another value of what all have in one save."""
    other = next((i for i, value in enumerate(values) if value != values[0]), None)
    if other is not None:
        raise CorruptError(
            f"{files[0].path.parent}: {files[0].path.name} and {files[other].path.name} differ in their {what}. "
            f"{TWO_SAVES}"
        )


def _learning_rate(optim: Loaded) -> float | None:
    """Return that of the first group, if it is a number."""
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        groups = follow(optim.tree, ("optimizer_state_dict", key, "param_groups"))
        rate = groups[0].get("lr") if isinstance(groups, list) and groups and isinstance(groups[0], dict) else None
        if isinstance(rate, (int, float)):
            return rate
    return None


def _optimizer_step(optim: Loaded) -> int | None:
    """Return how often a rank updated its parameters, if its optimizer stores it as a number."""
    found = []
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        stored = follow(optim.tree, ("optimizer_state_dict", key))
        own = stored if isinstance(stored, dict) else {"state": stored}  # `elastic_checkpoint` keeps a list
        for entries in (own.get("param_groups"), own.get("state")):
            each = entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else ()
            found += [entry.get("step") for entry in each if isinstance(entry, dict)]
    return max((step for step in found if type(step) is int), default=None)


def _flat_tensors(optim: Loaded, stage: int, files: Files) -> list[TensorSpec]:
    """Return the flat tensors of one rank, one for each group."""
    key = FLAT_KEYS[stage == 3]
    flats = optim.of_type(list, "optimizer_state_dict", key)
    for flat in flats:
        if not (isinstance(flat, TensorSpec) and len(flat.shape) == 1 and flat.contiguous and flat.dtype.averaged):
            raise CorruptError(f"{optim.path}: its '{key}' are no flat tensors. It is damaged.")
    return flats  # type: ignore[no-any-return]


def _of_stages_1_and_2(
    files: Files,
    groups: Sequence[Mapping[str, tuple[int, ...]]],
    flats: Sequence[Sequence[TensorSpec]],
    optims: Sequence[Loaded],
) -> dict[str, TensorSpec]:
    if len(groups) != len(flats[0]):
        raise CorruptError(
            f"{files.folder}: there are {len(groups)} groups of parameters, and {len(flats[0])} of partitions. "
            f"{TWO_SAVES}"
        )
    paddings = optims[0].tree["optimizer_state_dict"].get("param_alignment_paddings")
    ranks = len(flats)
    found: dict[str, TensorSpec] = {}
    for number, shapes in enumerate(groups):
        partitions = [flat[number] for flat in flats]
        _check_partitions(files, number, partitions)
        whole = Flat(partitions)
        after = _paddings(optims[0], paddings, number, len(shapes))
        # Only the end of a group is padded: to twice the number of ranks, of which later versions store nothing.
        align = 2 * ranks
        needed = sum(map(math.prod, shapes.values())) + sum(after)
        if not needed <= whole.numel <= -(-needed // align) * align:
            raise CorruptError(
                f"{files.folder}: the partitions of group {number} have {whole.numel} elements, and its parameters "
                f"{needed}. {TWO_SAVES}"
            )
        slices = [_slices(each, number) for each in optims]
        size = partitions[0].numel
        at = 0
        for (name, shape), padding in zip(shapes.items(), after, strict=True):
            numel = math.prod(shape)
            _check_slices(files, name, slices, at, at + numel, size)
            found[name] = tensor_of(files.folder, name, shape, whole.ranges(at, at + numel), partitions[0])
            at += numel + padding
    return found


def _check_partitions(files: Files, number: int, partitions: Sequence[TensorSpec]) -> None:
    """Refuse partitions of a group unless they are equal, but for the last one that is filled, and empty ones after it.

    Raises:
        CorruptError: they are not; the parameters behind would be others.
    """
    sizes = [each.numel for each in partitions]
    short = next((i for i, size in enumerate(sizes) if size != sizes[0]), len(sizes))
    if max(sizes) > sizes[0] or any(sizes[short + 1 :]):
        raise CorruptError(
            f"{files.folder}: the partitions of group {number} have {', '.join(map(str, sizes[:8]))} elements, and all "
            f"but the last ones have to be equal. {TWO_SAVES}"
        )


def _paddings(optim: Loaded, stored: Any, number: int, count: int) -> list[int]:
    """Return the padding behind each parameter of a group; 0 unless the file has another."""
    if stored is None:
        return [0] * count
    own = stored[number] if isinstance(stored, list) and number < len(stored) else None
    if not isinstance(own, list) or len(own) != count or any(type(n) is not int or not 0 <= n < 1 << 63 for n in own):
        raise CorruptError(f"{optim.path}: its 'param_alignment_paddings' do not fit its parameters. It is damaged.")
    return own


def _slices(optim: Loaded, number: int) -> Mapping[str, tuple[int, int]] | None:
    """Return where the rank says that the parameters of a group are in its partition: name to (start, numel)."""
    stored = optim.tree["optimizer_state_dict"].get("param_slice_mappings")
    own = stored[number] if isinstance(stored, list) and number < len(stored) else None
    if not isinstance(own, dict) or is_round_robin(optim):
        return None
    states = {name: value.state if isinstance(value, Inert) else None for name, value in own.items()}
    return {n: (s.get("start"), s.get("numel")) for n, s in states.items() if isinstance(s, dict)}  # type: ignore[misc]


def _check_slices(
    files: Files, name: str, slices: Sequence[Mapping[str, Any] | None], start: int, stop: int, size: int
) -> None:
    """Refuse a parameter that is elsewhere than its rank says.

    Args:
        start, stop: where it is in the whole group.
        size: of a partition.
    """
    for rank in range(start // size, -(-stop // size)) if size else ():
        said = slices[rank] if rank < len(slices) else None
        begin, end = max(start, rank * size), min(stop, (rank + 1) * size)
        if said is not None and begin < end and said.get(name) != (begin - rank * size, end - begin):
            raise CorruptError(
                f"{files.folder}: by the shapes, '{name}' has elements {begin - rank * size} to {end - rank * size} of "
                f"the partition of rank {rank}, and by its 'param_slice_mappings' it has not. {TWO_SAVES}"
            )


def _of_stage_3(
    files: Files, groups: Sequence[Mapping[str, tuple[int, ...]]], flats: Sequence[Sequence[TensorSpec]]
) -> dict[str, TensorSpec]:
    ranks = len(flats)
    parts = [sum(-(-math.prod(shape) // ranks) for shape in shapes.values()) for shapes in groups]
    for rank, tensors in enumerate(flats):
        sizes = [each.numel for each in tensors]
        if sizes != parts if len(sizes) == len(parts) else sum(sizes) != sum(parts):
            raise CorruptError(
                f"{files.folder}: the partitions of rank {rank} have {', '.join(map(str, sizes[:8]))} elements, and "
                f"its parts of the parameters {', '.join(map(str, parts[:8]))}. {TWO_SAVES}"
            )
    wholes = [Flat(tensors) for tensors in flats]
    found: dict[str, TensorSpec] = {}
    at = 0
    for name, shape in ((name, shape) for shapes in groups for name, shape in shapes.items()):
        numel = math.prod(shape)
        part = -(-numel // ranks)
        ranges = (
            each
            for rank, whole in enumerate(wholes)
            for each in whole.ranges(at, at + min(part, numel - rank * part))  # the rest of the last parts is padding
        )
        found[name] = tensor_of(files.folder, name, shape, ranges, flats[0][0])
        at += part
    return found
