"""The files of a DeepSpeed checkpoint: which rank each is of, and what the model states say and hold."""

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
from ..tensors import Tensor, TensorSpec, make_spec
from .flat import Range, from_ranges
from .format import read_single
from .pickle_objects import Inert
from .torch_zip import TORCH_ZIP, read_archive
from .zip import Archive

STATES = ("model_states.pt", "optim_states.pt")
"""How the names of the files end."""
MASTERS = "fp32"
"""Key of the float32 weights in the tree of a header."""
_FILE = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d{1,9})_)?mp_rank_(\d{1,9})(_\d+)?_(model|optim)_states\.pt")
_EXPERTS = re.compile(r"(?:layer_\d+_)?expert_\d+_.*_model_states\.pt|expp_rank_.*_optim_states\.pt")
_LAYER = re.compile(r"layer_\d+-model_.*_states\.pt")
LATEST = "latest"
"""The file beside the folders of checkpoints that names the last one."""
# Of the model states, what describes the partitions, or is in the weights.
_NOT_CARRIED = {
    "module", "optimizer", "param_shapes", "buffer_names", "frozen_param_shapes", "frozen_param_fragments",
    "shared_params", "ds_config", "universal_checkpoint_info", MASTERS,
}  # fmt: skip
_MOST_DIMENSIONS = 64  # of torch
MAKE_UNIVERSAL = "Make a universal checkpoint of it with DeepSpeed's ds_to_universal.py, and give its folder."
"""Advice, where weights are split in another way as well."""


class Masters(dict[str, Tensor]):
    """The float32 weights of a checkpoint, by name: in the tree of a header, at `MASTERS`."""


def folder_of(path: Path) -> Path | None:
    """Return the folder with the files of the ranks: this one, or the only such one beside the file ``latest``."""
    store = store_of(path)
    names = store.names(path)
    if _has_ranks(names):
        return path
    if LATEST not in names:
        return None
    inside = [path / name for name in names if store.is_folder(path / name) and _has_ranks(store.names(path / name))]
    return inside[0] if len(inside) == 1 else None


def _has_ranks(names: Iterable[str]) -> bool:
    return any(name.endswith(STATES) and any(p.fullmatch(name) for p in (_FILE, _EXPERTS, _LAYER)) for name in names)


@dataclass(frozen=True, slots=True)
class Files:
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
    def of(cls, folder: Path) -> Files:
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
                raise UnsupportedError(f"{folder}: has the layers of a pipeline, in {name}. {MAKE_UNIVERSAL}")
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
                f"{folder}: weights are split over model-parallel ranks ({split_over}). {MAKE_UNIVERSAL}"
            )
        split = any(rank is not None for rank, _ in models)
        if split and any(rank is None for rank, _ in models):
            raise CorruptError(f"{folder}: has the model states of stage 3, and those of another stage. {TWO_SAVES}")
        if not models:
            raise CorruptError(f"{folder}: has no *_model_states.pt, which say the names and shapes. {INCOMPLETE}")
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
            raise CorruptError(f"{self.folder}: {lacking} is missing; {says}. {INCOMPLETE}")
        if len(files) > ranks:
            raise CorruptError(f"{self.folder}: {says}, and there is {files[max(files)].name}. {TWO_SAVES}")


def _by_rank(files: Mapping[tuple[int | None, int], Path], *, single: bool) -> dict[int, Path]:
    """Return files by rank, or if they are not of a single model-parallel rank, by position."""
    ordered = sorted((-1 if rank is None else rank, mp, path) for (rank, mp), path in files.items())
    return {max(rank, 0) if single else i: path for i, (rank, _, path) in enumerate(ordered)}


INCOMPLETE = "Was the save interrupted? Get a complete copy."
"""Advice, where something is missing."""
TWO_SAVES = "The folder has files of two saves: give one that has those of one."
"""Advice, where files contradict each other."""


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
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
            raise CorruptError(f"{self.path}: has no '{'.'.join(keys)}' as DeepSpeed writes it. {INCOMPLETE}")
        return value


def load(path: Path) -> Loaded:
    """Read the object in a file, without torch where it is a zip file."""
    with InputFile(path) as file:
        if TORCH_ZIP.sniff(path, file.read(0, 4)):
            # Sizes stay inert: to make one, torch would have to be imported.
            archive = Archive(file, where=str(path))
            _, tree, foreign = read_archive(archive, path, where=str(path), torch_values=False)
            return Loaded(path, tree, file.stamp, Counter({k: n for k, n in foreign.items() if k != "torch.Size"}))
    header = read_single(path)
    return Loaded(path, header.tree, header.files[0], header.foreign)


def _size(value: Any) -> tuple[int, ...] | None:
    """Return a ``torch.Size``, which is inert here; None if it is none."""
    if isinstance(value, Inert) and type(value).global_name == "torch.Size" and len(value.args) == 1:
        (value,) = value.args
    if not isinstance(value, (tuple, list)) or len(value) > _MOST_DIMENSIONS:
        return None
    return tuple(value) if all(type(size) is int and 0 <= size < 1 << 63 for size in value) else None


def _shapes(file: Loaded, value: Any) -> dict[str, tuple[int, ...]]:
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


def groups_of(model: Loaded) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of the parameters, for each group of the optimizer; of early versions, for all of them.

    Raises:
        CorruptError: they are none, or a name is there twice.
    """
    stored = model.tree.get("param_shapes")
    groups = [_shapes(model, group) for group in (stored if isinstance(stored, (list, tuple)) else [stored])]
    names = Counter(name for group in groups for name in group)
    twice = next((name for name, times in names.items() if times > 1), None)
    if twice is not None:
        raise CorruptError(f"{model.path}: '{twice}' is twice in its 'param_shapes'. It is damaged.")
    return groups


def model_states(path: Path) -> Loaded:
    """Read model states.

    Raises:
        CorruptError: they are none.
        UnsupportedError: the experts are split in another way.
    """
    model = load(path)
    if not isinstance(model.tree, dict) or "module" not in model.tree:
        raise CorruptError(f"{path}: has no 'module', so DeepSpeed did not write it, or not whole. {INCOMPLETE}")
    if model.tree.get("ds_autoep_layers") or model.tree.get("autoep_layers"):
        raise UnsupportedError(
            f"{path}: its experts are split over the ranks in another way. Save the whole model from the code that "
            "trained it."
        )
    return model


def carried(model: Loaded, *, module: bool) -> dict[Any, Any]:
    """Return what of the model states stands beside the weights: counters, what the script added."""
    return {key: value for key, value in model.tree.items() if key not in _NOT_CARRIED or (module and key == "module")}


def is_round_robin(file: Loaded) -> bool:
    """True if the parameters of a group are in another order than ``param_slice_mappings`` of DeepSpeed 0.19 says."""
    config = file.tree.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return isinstance(zero, dict) and bool(zero.get("round_robin_gradients"))


def completed(files: Files, models: Sequence[Loaded], parameters: Mapping[str, TensorSpec], *, stage: int) -> Masters:
    """Add buffers, frozen parameters and tied ones, in the order of zero_to_fp32.

    Args:
        models: one of each rank in stage 3, else the first counts.

    Raises:
        CorruptError: the parts of a frozen parameter are missing, or do not make it.
    """
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


def _frozen(files: Files, models: Sequence[Loaded], *, stage: int) -> Iterator[tuple[str, TensorSpec]]:
    """Yield the frozen parameters: whole, or in stage 3 in one part for each rank."""
    stored = models[0].tree.get("frozen_param_shapes")
    ranks = len(models)
    for name, shape in _shapes(models[0], stored).items() if stored else ():
        fragments = []
        for model in models:
            own = model.tree.get("frozen_param_fragments")
            fragment = own.get(name) if isinstance(own, dict) else None
            if not isinstance(fragment, TensorSpec):
                raise CorruptError(f"{model.path}: lacks the frozen parameter '{name}'. {INCOMPLETE}")
            fragments.append(fragment)
        numel = math.prod(shape)
        part = -(-numel // ranks)
        if fragments[0].shape == shape:  # not split; every rank has it
            yield name, fragments[0]
            continue
        if stage != 3 or any(each.shape != (part,) or not each.contiguous for each in fragments):
            raise CorruptError(
                f"{files.folder}: the frozen parameter '{name}' of shape {list(shape)} has parts of shapes "
                f"{', '.join(str([*each.shape]) for each in fragments[:8])}. {TWO_SAVES}"
            )
        ranges = ((each, 0, max(min(part, numel - i * part), 0)) for i, each in enumerate(fragments))
        yield name, tensor_of(files.folder, name, shape, (each for each in ranges if each[2]), fragments[0])


def tensor_of(folder: Path, name: str, shape: tuple[int, ...], ranges: Iterable[Range], like: TensorSpec) -> TensorSpec:
    """Build the spec of a parameter as `from_ranges` does; an empty one has the dtype of `like`."""
    if 0 in shape:
        return make_spec(like.dtype, shape, like.storage)
    return from_ranges(folder, name, shape, ranges)
