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
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UnsupportedError
from ..storage.source import InputFile, Stamp, store_of
from ..tensors import Storage, Tensor, TensorSpec, make_spec
from .flat import Flat, Range, from_ranges
from .format import Format, Named, read_single
from .header import Header
from .pickle_read import Inert
from .torch_zip import TORCH_ZIP, read_archive
from .tree import follow
from .zip import Archive

STATES = ("model_states.pt", "optim_states.pt")
"""How the names of the files end."""
MASTERS = "fp32"
"""Key of the float32 weights in the tree of a header."""
FLAT_KEYS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""In the optimizer states, the keys of the flat tensors: of stages 1 and 2, and of stage 3."""
_FILE = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d{1,9})_)?mp_rank_(\d{1,9})(_\d+)?_(model|optim)_states\.pt")
_EXPERTS = re.compile(r"(?:layer_\d+_)?expert_\d+_.*_model_states\.pt|expp_rank_.*_optim_states\.pt")
_LAYER = re.compile(r"layer_\d+-model_.*_states\.pt")
_LATEST = "latest"
# Of the model states, what describes the partitions, or is in the weights.
_NOT_CARRIED = {
    "module", "optimizer", "param_shapes", "buffer_names", "frozen_param_shapes", "frozen_param_fragments",
    "shared_params", "ds_config", "universal_checkpoint_info", MASTERS,
}  # fmt: skip
_MOST_DIMENSIONS = 64  # of torch
_LONGEST_NAME = 4096  # bytes of the file `latest` that are read
_MOST_RANKS = 1 << 24
_UNIVERSAL = "Make a universal checkpoint of it with DeepSpeed's ds_to_universal.py, and give its folder."


class Masters(dict[str, Tensor]):
    """The float32 weights of a checkpoint, by name: in the tree of a header, at `MASTERS`."""


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
        found = _Files.of(folder)
        tree, loaded = _universal(found) if found.universal else _ranks(found)
        stamps = tuple(each.stamp for each in loaded)
        return Header(path, self, tree, stamps, sum((each.foreign for each in loaded), Counter()))

    def rename(self, header: Header) -> Named:
        raise UnsupportedError(
            f"{header.path}: a DeepSpeed checkpoint, with names in many files. Convert it to one file first: "
            "`convert(...)`."
        )


DEEPSPEED = DeepSpeed()


def folder_of(path: Path) -> Path | None:
    """Return the folder with the files of the ranks: this one, or the only such one beside the file ``latest``."""
    store = store_of(path)
    names = store.names(path)
    if _has_ranks(names):
        return path
    if _LATEST not in names:
        return None
    inside = [path / name for name in names if store.is_folder(path / name) and _has_ranks(store.names(path / name))]
    return inside[0] if len(inside) == 1 else None


def _check_latest(path: Path, folder: Path) -> None:
    """Refuse a folder of which the file ``latest`` names another checkpoint than the one that is there."""
    with InputFile(path / _LATEST) as file:
        named = file.read(0, _LONGEST_NAME).decode("utf-8", "replace").strip()
    if named != folder.name:
        raise CorruptError(
            f"{path}: its file '{_LATEST}' names {named[:80]!r}, which is not there, and the only checkpoint in it is "
            f"another one. To take that, give {folder}"
        )


def _has_ranks(names: Iterable[str]) -> bool:
    return any(name.endswith(STATES) and any(p.fullmatch(name) for p in (_FILE, _EXPERTS, _LAYER)) for name in names)


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a folder, by rank; of one rank, the file of all.

    Attributes:
        folder: of them.
        models, optims: by rank; without ZeRO there are no `optims`.
        split: each rank has model states of its own, as in stage 3.
        universal: the parameters are in the folder ``zero``.
        model_parallel: ranks that each hold a part of every parameter, but for a universal checkpoint.
    """

    folder: Path
    models: Mapping[int, Path]
    optims: Mapping[int, Path]
    split: bool
    universal: bool
    model_parallel: int

    @classmethod
    def of(cls, folder: Path) -> _Files:
        """Sort the files of a folder.

        Raises:
            CorruptError: a rank has two files, or none.
            UnsupportedError: there are ranks of tensor parallelism, layers of a pipeline, or experts.
        """
        store = store_of(folder)
        names = [name for name in store.names(folder) if name.endswith(STATES)]
        expert = next(filter(_EXPERTS.fullmatch, names), None)
        if expert is not None:
            raise UnsupportedError(
                f"{folder}: a mixture of experts, whose experts are in files of their own ({expert}). "
                "Save the whole model from the code that trained it."
            )
        found: dict[str, dict[tuple[int | None, int], Path]] = {"model": {}, "optim": {}}
        for name in names:
            match = _FILE.fullmatch(name)
            if _LAYER.fullmatch(name) or (match is not None and match[3]):
                raise UnsupportedError(f"{folder}: has the layers of a pipeline, in {name}. {_UNIVERSAL}")
            if match is None or (match[4] == "optim" and match[1] is None):
                raise UnsupportedError(f"{folder}: {name} is no file that DeepSpeed writes. Move it out of there.")
            key = (None if match[1] is None else int(match[1]), int(match[2]))
            other = found[match[4]].setdefault(key, folder / name)
            if other.name != name:
                raise CorruptError(
                    f"{folder}: {other.name} and {name} are of the same rank. One is of another save: remove it."
                )
        models, optims = found["model"], found["optim"]
        universal = not optims and store.is_folder(folder / "zero")
        parallel = {mp for _, mp in (*models, *optims)}
        if parallel != {0} and not universal:
            split_over = next(path.name for (_, mp), path in (*models.items(), *optims.items()) if mp)
            raise UnsupportedError(
                f"{folder}: weights are split over model-parallel ranks ({split_over}). {_UNIVERSAL}"
            )
        split = any(rank is not None for rank, _ in models)
        if split and any(rank is None for rank, _ in models):
            raise CorruptError(f"{folder}: has the model states of stage 3, and those of another stage. {_TWO_SAVES}")
        if not models:
            raise CorruptError(f"{folder}: has no *_model_states.pt, which say the names and shapes. {_INCOMPLETE}")
        return cls(
            folder,
            _by_rank(models, single=parallel == {0}),
            _by_rank(optims, single=True),
            split,
            universal,
            len(parallel),
        )

    def check_ranks(self, files: Mapping[int, Path], ranks: int, said_by: Path) -> None:
        """Check that there is a file for each rank.

        Raises:
            CorruptError: one is missing, or there are more.
        """
        says = f"{said_by.name} is of {ranks} rank{'s' * (ranks != 1)}"
        missing = next((rank for rank in range(min(ranks, len(files) + 1)) if rank not in files), None)
        if missing is not None:
            like = next(iter(files.values())).name
            lacking = re.sub(r"(?<=zero_pp_rank_)\d+", str(missing), like)
            raise CorruptError(f"{self.folder}: {lacking} is missing; {says}. {_INCOMPLETE}")
        if len(files) > ranks:
            raise CorruptError(f"{self.folder}: {says}, and there is {files[max(files)].name}. {_TWO_SAVES}")


def _by_rank(files: Mapping[tuple[int | None, int], Path], *, single: bool) -> dict[int, Path]:
    """Return files by rank, or if they are not of a single model-parallel rank, by position."""
    ordered = sorted((-1 if rank is None else rank, mp, path) for (rank, mp), path in files.items())
    return {max(rank, 0) if single else i: path for i, (rank, _, path) in enumerate(ordered)}


_INCOMPLETE = "Was the save interrupted? Get a complete copy."
_TWO_SAVES = "The folder has files of two saves: give one that has those of one."


@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    """A file: the object in it, without its payload."""

    path: Path
    tree: Any
    stamp: Stamp
    foreign: Counter[str] = field(default_factory=Counter)

    def of_type(self, kind: type, *keys: str) -> Any:
        """Return an entry.

        Raises:
            CorruptError: it is missing, or of another type.
        """
        value = self.tree
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise CorruptError(f"{self.path}: has no '{'.'.join(keys)}' as DeepSpeed writes it. {_INCOMPLETE}")
        return value


def _load(path: Path) -> _Loaded:
    with InputFile(path) as file:
        if TORCH_ZIP.sniff(path, file.read(0, 4)):
            # Sizes stay inert: to make one, torch would have to be imported.
            archive = Archive(file, where=str(path))
            _, tree, foreign = read_archive(archive, path, where=str(path), torch_values=False)
            return _Loaded(path, tree, file.stamp, Counter({k: n for k, n in foreign.items() if k != "torch.Size"}))
    header = read_single(path)
    return _Loaded(path, header.tree, header.files[0], header.foreign)


def _size(value: Any) -> tuple[int, ...] | None:
    """Return a ``torch.Size``, which is inert here; None if it is none."""
    if isinstance(value, Inert) and type(value).global_name == "torch.Size" and len(value.args) == 1:
        (value,) = value.args
    if not isinstance(value, (tuple, list)) or len(value) > _MOST_DIMENSIONS:
        return None
    return tuple(value) if all(type(size) is int and 0 <= size < 1 << 63 for size in value) else None


def _shapes(file: _Loaded, value: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters by name.

    Raises:
        CorruptError: they are none.
    """
    shapes = {name: _size(size) for name, size in value.items()} if isinstance(value, dict) else {None: None}
    for name, shape in shapes.items():
        if not isinstance(name, str) or shape is None:
            raise CorruptError(
                f"{file.path}: its 'param_shapes' or 'frozen_param_shapes' are no shapes. The file is damaged."
            )
    return shapes  # type: ignore[return-value]


def _groups(model: _Loaded) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of the parameters, for each group of the optimizer; of early versions, for all of them."""
    stored = model.tree.get("param_shapes")
    groups = [_shapes(model, group) for group in (stored if isinstance(stored, (list, tuple)) else [stored])]
    names = Counter(name for group in groups for name in group)
    twice = next((name for name, times in names.items() if times > 1), None)
    if twice is not None:
        raise CorruptError(f"{model.path}: '{twice}' is twice in its 'param_shapes'. It is damaged.")
    return groups


def _ranks(files: _Files) -> tuple[dict[Any, Any], list[_Loaded]]:
    """Read the files of all ranks: with ZeRO of any stage, or without it."""
    first = _model_states(next(iter(files.models.values())))
    stored = first.tree.get("mp_world_size")
    if isinstance(stored, int) and stored > 1:
        raise UnsupportedError(f"{first.path}: says that weights are split ('mp_world_size'). {_UNIVERSAL}")
    if not files.optims:
        if files.split or first.tree.get("param_shapes") is not None:
            raise CorruptError(
                f"{files.folder}: has no *_optim_states.pt, which have the float32 weights. {_INCOMPLETE}"
            )
        first.of_type(dict, "module")
        return _carried(first, module=True), [first]
    if first.tree.get("param_shapes") is None:
        raise UnsupportedError(
            f"{first.path}: does not say what is in the partitions of the ranks (its 'param_shapes' are None). "
            "Give this file for the weights as the network computes with them."
        )
    optims = [_load(path) for path in files.optims.values()]
    stage, ranks = _agreed(files, optims)
    files.check_ranks(files.optims, ranks, optims[0].path)
    if (stage == 3) != files.split:
        raise CorruptError(
            f"{files.folder}: {optims[0].path.name} is of stage {stage}, and {first.path.name} is of another one. "
            f"{_TWO_SAVES}"
        )
    models = [first]
    if stage == 3:
        files.check_ranks(files.models, ranks, optims[0].path)
        models += [_model_states(path) for path in [*files.models.values()][1:]]
    groups = _groups(first)
    _check_same(models, "'global_steps'", [model.tree.get("global_steps") for model in models])
    _check_same(models, "'param_shapes'", [_groups(model) for model in models])
    _check_same(optims, "learning rates", [_learning_rate(optim) for optim in optims])
    stepped = {optim: step for optim in optims if (step := _optimizer_step(optim)) is not None}
    if stepped:
        _check_same([*stepped], "steps", [*stepped.values()])
    flats = [_flat_tensors(each, stage, files) for each in optims]
    _check_same(optims, "number of flat tensors", [len(flat) for flat in flats])
    parameters = _of_stage_3(files, groups, flats) if stage == 3 else _of_stages_1_and_2(files, groups, flats, optims)
    masters = _completed(files, models, parameters, stage=stage)
    return {MASTERS: masters, **_carried(first, module=stage != 3)}, [*models, *optims]


def _model_states(path: Path) -> _Loaded:
    model = _load(path)
    if not isinstance(model.tree, dict) or "module" not in model.tree:
        raise CorruptError(f"{path}: has no 'module', so DeepSpeed did not write it, or not whole. {_INCOMPLETE}")
    if model.tree.get("ds_autoep_layers") or model.tree.get("autoep_layers"):
        raise UnsupportedError(
            f"{path}: its experts are split over the ranks in another way. Save the whole model from the code that "
            "trained it."
        )
    return model


def _carried(model: _Loaded, *, module: bool) -> dict[Any, Any]:
    """Return what of the model states stands beside the weights: counters, what the script added."""
    return {key: value for key, value in model.tree.items() if key not in _NOT_CARRIED or (module and key == "module")}


def _agreed(files: _Files, optims: Sequence[_Loaded]) -> tuple[int, int]:
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
            f"{optims[other].path.name} of stage {said[other][0]} with {said[other][1]}. {_TWO_SAVES}"
        )
    return said[0]


def _check_same(files: Sequence[_Loaded], what: str, values: Sequence[Any]) -> None:
    """Refuse files of several ranks, of which one has another value of what all have in one save."""
    other = next((i for i, value in enumerate(values) if value != values[0]), None)
    if other is not None:
        raise CorruptError(
            f"{files[0].path.parent}: {files[0].path.name} and {files[other].path.name} differ in their {what}. "
            f"{_TWO_SAVES}"
        )


def _learning_rate(optim: _Loaded) -> float | None:
    """Return that of the first group, if it is a number."""
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        groups = follow(optim.tree, ("optimizer_state_dict", key, "param_groups"))
        rate = groups[0].get("lr") if isinstance(groups, list) and groups and isinstance(groups[0], dict) else None
        if isinstance(rate, (int, float)):
            return rate
    return None


def _optimizer_step(optim: _Loaded) -> int | None:
    """Return how often a rank updated its parameters, if its optimizer stores it as a number."""
    found = []
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        stored = follow(optim.tree, ("optimizer_state_dict", key))
        own = stored if isinstance(stored, dict) else {"state": stored}  # `elastic_checkpoint` keeps a list
        for entries in (own.get("param_groups"), own.get("state")):
            each = entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else ()
            found += [entry.get("step") for entry in each if isinstance(entry, dict)]
    return max((step for step in found if type(step) is int), default=None)


def _flat_tensors(optim: _Loaded, stage: int, files: _Files) -> list[TensorSpec]:
    """Return the flat tensors of one rank, one for each group."""
    key = FLAT_KEYS[stage == 3]
    flats = optim.of_type(list, "optimizer_state_dict", key)
    for flat in flats:
        if not (isinstance(flat, TensorSpec) and len(flat.shape) == 1 and flat.contiguous and flat.dtype.averaged):
            raise CorruptError(f"{optim.path}: its '{key}' are no flat tensors. It is damaged.")
    return flats  # type: ignore[no-any-return]


def _of_stages_1_and_2(
    files: _Files,
    groups: Sequence[Mapping[str, tuple[int, ...]]],
    flats: Sequence[Sequence[TensorSpec]],
    optims: Sequence[_Loaded],
) -> dict[str, TensorSpec]:
    if len(groups) != len(flats[0]):
        raise CorruptError(
            f"{files.folder}: there are {len(groups)} groups of parameters, and {len(flats[0])} of partitions. "
            f"{_TWO_SAVES}"
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
                f"{needed}. {_TWO_SAVES}"
            )
        slices = [_slices(each, number) for each in optims]
        size = partitions[0].numel
        at = 0
        for (name, shape), padding in zip(shapes.items(), after, strict=True):
            numel = math.prod(shape)
            _check_slices(files, name, slices, at, at + numel, size)
            found[name] = _tensor(files.folder, name, shape, whole.ranges(at, at + numel), partitions[0])
            at += numel + padding
    return found


def _check_partitions(files: _Files, number: int, partitions: Sequence[TensorSpec]) -> None:
    """Refuse partitions of a group unless they are equal, but for the last one that is filled, and empty ones after it.

    Raises:
        CorruptError: they are not; the parameters behind would be others.
    """
    sizes = [each.numel for each in partitions]
    short = next((i for i, size in enumerate(sizes) if size != sizes[0]), len(sizes))
    if max(sizes) > sizes[0] or any(sizes[short + 1 :]):
        raise CorruptError(
            f"{files.folder}: the partitions of group {number} have {', '.join(map(str, sizes[:8]))} elements, and all "
            f"but the last ones have to be equal. {_TWO_SAVES}"
        )


def _paddings(optim: _Loaded, stored: Any, number: int, count: int) -> list[int]:
    """Return the padding behind each parameter of a group; 0 unless the file has another."""
    if stored is None:
        return [0] * count
    own = stored[number] if isinstance(stored, list) and number < len(stored) else None
    if not isinstance(own, list) or len(own) != count or any(type(n) is not int or not 0 <= n < 1 << 63 for n in own):
        raise CorruptError(f"{optim.path}: its 'param_alignment_paddings' do not fit its parameters. It is damaged.")
    return own


def _slices(optim: _Loaded, number: int) -> Mapping[str, tuple[int, int]] | None:
    """Return where the rank says that the parameters of a group are in its partition: name to (start, numel)."""
    stored = optim.tree["optimizer_state_dict"].get("param_slice_mappings")
    own = stored[number] if isinstance(stored, list) and number < len(stored) else None
    if not isinstance(own, dict) or _is_round_robin(optim):
        return None
    states = {name: value.state if isinstance(value, Inert) else None for name, value in own.items()}
    return {n: (s.get("start"), s.get("numel")) for n, s in states.items() if isinstance(s, dict)}  # type: ignore[misc]


def _is_round_robin(file: _Loaded) -> bool:
    """True if the parameters of a group are in another order than ``param_slice_mappings`` of DeepSpeed 0.19 says."""
    config = file.tree.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return isinstance(zero, dict) and bool(zero.get("round_robin_gradients"))


def _check_slices(
    files: _Files, name: str, slices: Sequence[Mapping[str, Any] | None], start: int, stop: int, size: int
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
                f"the partition of rank {rank}, and by its 'param_slice_mappings' it has not. {_TWO_SAVES}"
            )


def _of_stage_3(
    files: _Files, groups: Sequence[Mapping[str, tuple[int, ...]]], flats: Sequence[Sequence[TensorSpec]]
) -> dict[str, TensorSpec]:
    ranks = len(flats)
    parts = [sum(-(-math.prod(shape) // ranks) for shape in shapes.values()) for shapes in groups]
    for rank, tensors in enumerate(flats):
        sizes = [each.numel for each in tensors]
        if sizes != parts if len(sizes) == len(parts) else sum(sizes) != sum(parts):
            raise CorruptError(
                f"{files.folder}: the partitions of rank {rank} have {', '.join(map(str, sizes[:8]))} elements, and "
                f"its parts of the parameters {', '.join(map(str, parts[:8]))}. {_TWO_SAVES}"
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
        found[name] = _tensor(files.folder, name, shape, ranges, flats[0][0])
        at += part
    return found


def _tensor(folder: Path, name: str, shape: tuple[int, ...], ranges: Iterable[Range], like: TensorSpec) -> TensorSpec:
    if 0 in shape:
        return make_spec(like.dtype, shape, like.storage)
    return from_ranges(folder, name, shape, ranges)


def _completed(
    files: _Files, models: Sequence[_Loaded], parameters: Mapping[str, TensorSpec], *, stage: int
) -> Masters:
    """Add buffers, frozen parameters and tied ones, in the order of zero_to_fp32."""
    first = models[0]
    module = first.of_type(dict, "module")
    names = first.of_type(list, "buffer_names")
    buffers = {*(name for name in names if isinstance(name, str))}
    masters = Masters((name, value) for name, value in module.items() if name in buffers and isinstance(value, Tensor))
    masters.update(_frozen(files, models, stage=stage))
    stored = first.tree.get("shared_params")
    tied: dict[Any, Any] = stored if isinstance(stored, dict) else {}
    if stage != 3 and parameters.keys() <= module.keys():
        # Stage 1 keeps frozen parameters in the module alone, from where zero_to_fp32 does not take them.
        elsewhere = masters.keys() | parameters.keys() | tied.keys()
        masters.update(
            (name, value)
            for name, value in module.items()
            if isinstance(name, str) and isinstance(value, Tensor) and name not in elsewhere
        )
    masters.update(parameters)
    for name, other in tied.items():
        if isinstance(name, str) and isinstance(other, str) and other in masters:
            masters[name] = masters[other]
    return masters


def _frozen(files: _Files, models: Sequence[_Loaded], *, stage: int) -> Iterator[tuple[str, TensorSpec]]:
    """Yield the frozen parameters: whole, or in stage 3 in one part for each rank."""
    stored = models[0].tree.get("frozen_param_shapes")
    ranks = len(models)
    for name, shape in _shapes(models[0], stored).items() if stored else ():
        fragments = []
        for model in models:
            own = model.tree.get("frozen_param_fragments")
            fragment = own.get(name) if isinstance(own, dict) else None
            if not isinstance(fragment, TensorSpec):
                raise CorruptError(f"{model.path}: lacks the frozen parameter '{name}'. {_INCOMPLETE}")
            fragments.append(fragment)
        numel = math.prod(shape)
        part = -(-numel // ranks)
        if fragments[0].shape == shape:  # not split; every rank has it
            yield name, fragments[0]
            continue
        if stage != 3 or any(each.shape != (part,) or not each.contiguous for each in fragments):
            raise CorruptError(
                f"{files.folder}: the frozen parameter '{name}' of shape {list(shape)} has parts of shapes "
                f"{', '.join(str([*each.shape]) for each in fragments[:8])}. {_TWO_SAVES}"
            )
        ranges = ((each, 0, max(min(part, numel - i * part), 0)) for i, each in enumerate(fragments))
        yield name, _tensor(files.folder, name, shape, (each for each in ranges if each[2]), fragments[0])


def _universal(files: _Files) -> tuple[dict[Any, Any], list[_Loaded]]:
    """Read a universal checkpoint."""
    models = [_model_states(path) for path in files.models.values()]
    first = models[0]
    shapes = {name: shape for model in models for group in _groups(model) for name, shape in group.items()}
    store, zero = store_of(files.folder), files.folder / "zero"
    there = {name for name in store.names(zero) if store.is_file(zero / name / "fp32.pt")}
    missing = next((name for name in shapes if name not in there), None)
    if missing is not None:
        raise CorruptError(f"{files.folder}: zero/{missing}/fp32.pt is missing. {_INCOMPLETE}")
    # Of what has no master, there are copies: also of buffers (as floats), and of tied parameters (of 16 bits).
    modules = [model.tree["module"] for model in models if isinstance(model.tree["module"], dict)]
    known = {*shapes, *(name for module in modules for name in module)}
    unknown = next((name for name in sorted(there) if name not in known), None)
    if unknown is not None:
        raise CorruptError(f"{files.folder}: zero/{unknown} is of no parameter in its *_model_states.pt. {_TWO_SAVES}")
    if not files.split and _is_round_robin(first):
        raise UnsupportedError(
            f"{files.folder}: with round_robin_gradients, as here, ds_to_universal.py of DeepSpeed mixes the "
            "parameters up. Give the folder that it was made of."
        )
    whole = not (files.split or files.model_parallel > 1)
    loaded = {name: _load(zero / name / "fp32.pt") for name in shapes}
    parameters = {
        name: _whole(each, name, shapes[name], merged=files.model_parallel > 1) for name, each in loaded.items()
    }
    if files.model_parallel > 1 and any(
        model.tree.get("module") is None or model.tree.get("buffer_names") or model.tree.get("frozen_param_shapes")
        for model in models
    ):
        raise UnsupportedError(
            f"{files.folder}: its buffers or frozen parameters are still in the parts of {files.model_parallel} ranks. "
            "Save them from the code that trained it."
        )
    masters = (
        Masters(parameters)
        if files.model_parallel > 1
        else _completed(files, models, parameters, stage=3 if files.split else 2)
    )
    return {MASTERS: masters, **_carried(first, module=whole)}, [*models, *loaded.values()]


def _whole(file: _Loaded, name: str, shape: tuple[int, ...], *, merged: bool) -> TensorSpec:
    """Return a parameter of a universal checkpoint: with its shape, or flat if it comes from stage 3.

    Args:
        merged: `shape` is that of one part of it.

    Raises:
        CorruptError: there is no tensor, or one of another shape.
    """
    tensor = file.tree.get("param") if isinstance(file.tree, dict) else file.tree
    cut = isinstance(file.tree, dict) and file.tree.get("vocab_tensor") is True  # padding of the vocabulary is off
    if isinstance(tensor, TensorSpec):
        if tensor.shape == shape or ((merged or cut) and len(tensor.shape) == len(shape)):
            return tensor
        if tensor.shape == (math.prod(shape),) and tensor.contiguous and not isinstance(file.tree, dict):
            at = tensor.storage
            storage = Storage(at.path, at.offset, at.nbytes, at.big_endian)
            return make_spec(tensor.dtype, shape, storage, start=tensor.start)
    has = f"a tensor of shape {[*tensor.shape]}" if isinstance(tensor, TensorSpec) else "no tensor"
    raise CorruptError(f"{file.path}: has {has}, and '{name}' has the shape {[*shape]}. {_TWO_SAVES}")
