"""Universal checkpoints of DeepSpeed: each parameter whole, in ``zero/<name>/fp32.pt``, beside the model states."""

from __future__ import annotations

import math
from typing import Any

from ..errors import CorruptError, UnsupportedError
from ..storage.source import store_of
from ..tensors import Storage, TensorSpec, make_spec
from .deepspeed_files import (
    INCOMPLETE,
    MASTERS,
    TWO_SAVES,
    Files,
    Loaded,
    Masters,
    carried,
    completed,
    groups_of,
    is_round_robin,
    load,
    model_states,
)


def universal(files: Files) -> tuple[dict[Any, Any], list[Loaded]]:
    """Read a universal checkpoint.

    Returns:
        (the tree of a header, the files that were read).

    Raises:
        CorruptError: a file is missing or damaged, or of another checkpoint.
        UnsupportedError: DeepSpeed made it wrongly, or not all of it is whole.
    """
    models = [model_states(path) for path in files.models.values()]
    first = models[0]
    shapes = {name: shape for model in models for group in groups_of(model) for name, shape in group.items()}
    store, zero = store_of(files.folder), files.folder / "zero"
    there = {name for name in store.names(zero) if store.is_file(zero / name / "fp32.pt")}
    missing = next((name for name in shapes if name not in there), None)
    if missing is not None:
        raise CorruptError(f"{files.folder}: zero/{missing}/fp32.pt is missing. {INCOMPLETE}")
    # Of what has no master, there are copies: also of buffers (as floats), and of tied parameters (of 16 bits).
    modules = [model.tree["module"] for model in models if isinstance(model.tree["module"], dict)]
    known = {*shapes, *(name for module in modules for name in module)}
    unknown = next((name for name in sorted(there) if name not in known), None)
    if unknown is not None:
        raise CorruptError(f"{files.folder}: zero/{unknown} is of no parameter in its *_model_states.pt. {TWO_SAVES}")
    if not files.split and is_round_robin(first):
        raise UnsupportedError(
            f"{files.folder}: with round_robin_gradients, as here, ds_to_universal.py of DeepSpeed mixes the "
            "parameters up. Give the folder that it was made of."
        )
    whole = not (files.split or files.model_parallel > 1)
    loaded = {name: load(zero / name / "fp32.pt") for name in shapes}
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
        else completed(files, models, parameters, stage=3 if files.split else 2)
    )
    return {MASTERS: masters, **carried(first, module=whole)}, [*models, *loaded.values()]


def _whole(file: Loaded, name: str, shape: tuple[int, ...], *, merged: bool) -> TensorSpec:
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
    raise CorruptError(f"{file.path}: has {has}, and '{name}' has the shape {[*shape]}. {TWO_SAVES}")
