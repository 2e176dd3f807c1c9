"""Alignment: match the tensors of a series by name."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checkpoints.quantized import quantized, way_on
from ..errors import AlignmentError, UnsupportedError, unknown_word
from ..tensors import Category, Tensor, TensorSpec, UnsupportedTensor
from .usable import of_other_models

KEYS = ("strict", "intersection", "union")
MATCHES = ("name", "order")


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """The tensors to sum.

    Attributes:
        aligned: output name to one tensor per checkpoint; None if a checkpoint lacks it (``union``).
        left_out: names of some checkpoints that the output lacks.
        differing: names that are copied from the last checkpoint, and have another shape or dtype in others.
    """

    aligned: dict[str, tuple[TensorSpec | None, ...]]
    left_out: tuple[str, ...]
    differing: tuple[str, ...]


def align(
    states: Sequence[Mapping[str, Tensor]],
    files: Sequence[str],
    *,
    keys: str = "strict",
    match: str = "name",
    mixed_dtypes: bool = False,
) -> KeyPlan:
    """Match the tensors of N state dicts.

    Args:
        states: names (already unwrapped) to tensors, oldest checkpoint first. The output has the
            order and names of the last.
        files: name of each checkpoint in messages.
        keys: ``strict``: all have the same names; ``intersection``: names in all checkpoints;
            ``union``: each tensor is averaged over the checkpoints that have it.
        match: ``name``, or ``order``: by position, like timm's ModelEmaV2.
        mixed_dtypes: allow floating-point dtypes to differ.

    Raises:
        AlignmentError: names, shapes or dtypes differ, or no name is left; names tensor and file.
        UnsupportedError: quantized weights.
        UsageError: an unknown value of `keys` or `match`.
    """
    for name, value, known in (("keys", keys, KEYS), ("match", match, MATCHES)):
        if value not in known:
            raise unknown_word(name, value, known)
    for state, file in zip(states, files, strict=True):
        if (found := quantized(state)) is not None:
            raise UnsupportedError(
                f"{file}: '{found[0]}' holds quantized weights, with their scales in '{found[1]}'. Averages of codes "
                f"and scales are no average of the weights. {way_on(state, found[0])}, then quantize the average."
            )
    if match == "order":
        states = _by_order(states, files)
    counts: Counter[str] = Counter()
    for state in states:
        counts.update(list(state))
    names = [*states[-1], *(name for name in counts if name not in states[-1])]
    partial = [name for name in names if counts[name] < len(states)]
    if partial and keys == "strict":
        raise AlignmentError(_other_models(states, files) or _missing(partial, counts, states, files))
    if keys == "intersection":
        names = [name for name in names if counts[name] == len(states)]
        if not names and any(states):
            advice = _prefix_advice(states, files) or "Look at them with ckpt inspect."
            raise AlignmentError(f"the checkpoints share no tensor name. {advice}")
    columns = [map(state.get, names) for state in states]
    differing: list[str] = []
    aligned = {
        name: _checked(name, tensors, files, differing if match == "name" else None, mixed_dtypes=mixed_dtypes)
        for name, tensors in zip(names, zip(*columns, strict=True), strict=True)
    }
    return KeyPlan(aligned, tuple(partial) if keys == "intersection" else (), tuple(differing))


def is_copied(name: str, last: TensorSpec) -> bool:
    """True for what is copied from the last checkpoint: integers, and the extra state of modules, which has no meaning
    but for them."""
    return last.dtype.category is Category.INTEGER or name.rsplit(".", 1)[-1] == "_extra_state"


def _by_order(states: Sequence[Mapping[str, Tensor]], files: Sequence[str]) -> list[dict[str, Tensor]]:
    last = list(states[-1])
    for state, file in zip(states, files, strict=True):
        if len(state) != len(last):
            raise AlignmentError(
                f"`match='order'`: {file} holds {len(state)} tensors, {files[-1]} {len(last)}. "
                "The counts must be equal."
            )
        if [*state] != last and state.keys() == states[-1].keys():
            raise AlignmentError(
                f"`match='order'`: {file} holds the same names as {files[-1]}, in another order. Leave `match` out."
            )
    return [dict(zip(last, state.values(), strict=True)) for state in states]


def _missing(
    partial: Sequence[str], counts: Mapping[str, int], states: Sequence[Mapping[str, Tensor]], files: Sequence[str]
) -> str:
    name = partial[0]
    lacking = [file for file, state in zip(files, states, strict=True) if name not in state]
    more = f" ({len(partial) - 1} more names differ.)" if len(partial) > 1 else ""
    advice = "Use `keys='intersection'` to average what all files share."
    if len(partial) == len(counts):
        advice = "No name is in all files, so they are of different models: give the files of one."
    return f"{lacking[0]} has no tensor '{name}' ({counts[name]} of {len(states)} files have it).{more} " + (
        _prefix_advice(states, files) or advice
    )


def _other_models(states: Sequence[Mapping[str, Tensor]], files: Sequence[str]) -> str | None:
    """Name the files whose tensors have other names than those of most; None if there are no such files."""
    others = of_other_models([[*state] for state in states])
    if not others:
        return None
    said = "; ".join(f"{files[i]} ({reason})" for i, reason in others.items())
    names = [glob.escape(files[i]) for i in others]
    them = "it" if len(names) == 1 else "them"
    return (
        f"{len(names)} of {len(files)} checkpoints cannot be averaged: {said}. Leave {them} out: `exclude={names!r}`."
    )


def _prefix_advice(states: Sequence[Mapping[str, Tensor]], files: Sequence[str]) -> str | None:
    """Say which prefix to take off where the names of two checkpoints differ in nothing else; None elsewhere."""
    last = states[-1]
    for state, file in zip(states[:-1], files[:-1], strict=True):
        for one, other, name_of_one, name_of_other in ((state, last, file, files[-1]), (last, state, files[-1], file)):
            first = next(iter(other), "")
            name = next((name for name in one if name.endswith(f".{first}")), None)
            lead = "" if name is None else name.removesuffix(first)
            if lead and one.keys() == {lead + each for each in other}:
                return (
                    f"The names in {name_of_one} are those in {name_of_other} with '{lead}' before them. "
                    f"Take it off first: `fix_prefix(strip={lead!r})`."
                )
    return None


def _checked(
    name: str,
    tensors: tuple[Tensor | None, ...],
    files: Sequence[str],
    differing: list[str] | None,
    *,
    mixed_dtypes: bool,
) -> tuple[TensorSpec | None, ...]:
    model = tensors[0]
    if isinstance(model, TensorSpec) and all(
        type(tensor) is TensorSpec and tensor.dtype is model.dtype and tensor.shape == model.shape for tensor in tensors
    ):
        return tensors  # type: ignore[return-value]
    last = tensors[-1]
    if differing is not None and isinstance(last, TensorSpec) and is_copied(name, last):
        known = [tensor for tensor in tensors if isinstance(tensor, TensorSpec)]
        if last.dtype.averaged or {each.dtype.category for each in known} == {last.dtype.category}:
            if any((each.shape, each.dtype) != (last.shape, last.dtype) for each in known):
                differing.append(name)
            return tensors  # type: ignore[return-value]
    first: tuple[TensorSpec, str] | None = None
    for tensor, file in zip(tensors, files, strict=True):
        if isinstance(tensor, UnsupportedTensor):
            raise AlignmentError(
                f"{file}: '{name}' is {tensor.reason}, which cannot be averaged. "
                "Save it as a dense tensor with data first."
            )
        if tensor is None:
            continue
        first = first or (tensor, file)
        model, where = first
        if tensor.shape != model.shape:
            raise AlignmentError(
                f"'{name}' has shape {list(model.shape)} in {where} but {list(tensor.shape)} in {file}. "
                "These are not checkpoints of one model."
            )
        both_float = tensor.dtype.averaged and tensor.dtype.category is model.dtype.category
        if tensor.dtype is not model.dtype and not (mixed_dtypes and both_float):
            choose = "Choose the dtype of the average, such as `dtype='float32'`."
            advice = choose if both_float else "They cannot be averaged."
            raise AlignmentError(
                f"'{name}' is {model.dtype.name} in {where} but {tensor.dtype.name} in {file}. {advice}"
            )
    return tensors  # type: ignore[return-value]
