"""Finding: where the weights stand inside a checkpoint, raw and averaged."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ...formats.header import Header
from ...formats.tree import follow
from ...tensors import Tensor
from . import forms
from .state import StateDict, is_buffer, is_optimizer
from .table import BY_NAME, LAYOUTS, RAW_PLACES, SET_KEYS, Layout

# An EMA in a file of its own, as NeMo and guided-diffusion write it.
_EMA_FILE = re.compile(r".+-EMA\.ckpt|ema_[\d.]+_\d+\.pt")
# By their form, sets in these places are another layout's.
_BY_FORM = {("deit", "averaged-model"): "torchvision", ("dit", "module"): "ultralytics"}
# What is known for certain goes first, then timm's order.
_BY_PLACE = [
    BY_NAME[name]
    for name in (
        "lightning", "mmengine", "timm", "deit", "model-state-dict", "d2go", "dit", "icefall", "dino", "fairseq",
    )
]  # fmt: skip


def states(header: Header, names: Mapping[str, Tensor] | None = None, *, by_name: bool = True) -> dict[str, StateDict]:
    """Return the sets of weights that a checkpoint holds in a known layout: ``raw``, ``ema`` or both.

    Args:
        names: a state dict of the same model, for forms that keep no names (lists) or spoil them (LitEma's).
        by_name: let the name of a file with one set say that it is an EMA.
    """
    tree = header.tree
    whole = {
        which: state_dict(reading, (), which, reading.form, (), ())
        for which, reading in forms.read(tree, names).items()
    }
    found = _in_places(tree, names) if isinstance(tree, dict) else {}
    if whole and found.keys() <= {"ema"}:
        found = whole  # a flat state dict, one of whose modules has such a name
    elif not found and isinstance(tree, dict):
        found = _one_below(tree, names)
    if by_name and list(found) == ["raw"] and is_ema_by_name(header):
        found = {"ema": replace(found["raw"], which="ema", layout=_layout_by_name(header))}
    return found


def _one_below(tree: Mapping[Any, Any], names: Mapping[str, Tensor] | None) -> dict[str, StateDict]:
    """Look into the one entry that is a checkpoint itself, as torch's recipe for FSDP has it: app.model, app.optim."""
    inside = {
        key: found
        for key, value in tree.items()
        if isinstance(value, dict) and not is_optimizer(value) and (found := _in_places(value, names))
    }
    if len(inside) != 1:
        return {}
    ((key, found),) = inside.items()
    return {
        which: replace(
            each, path=(key, *each.path), home=(key, *each.home), places=tuple((key, *place) for place in each.places)
        )
        for which, each in found.items()
    }


def _in_places(tree: Mapping[Any, Any], names: Mapping[str, Tensor] | None) -> dict[str, StateDict]:
    for layout in (*_BY_PLACE, *_swa(tree)):
        if all(follow(tree, place) is not None for place in layout.needs):
            pair = _pair(layout, tree, names)
            if pair:
                return pair
    for path in RAW_PLACES:
        layout = next(layout for layout in LAYOUTS if layout.raw == path and layout.alone)
        readings = forms.read(follow(tree, path), names)
        if readings:
            places = _places(tree, layout)
            return {
                which: state_dict(reading, path, which, _called(reading, layout), path, places)
                for which, reading in readings.items()
            }
    return {}


def _swa(tree: Mapping[Any, Any]) -> list[Layout]:
    """Find Lightning's averaging callback, which may be of a class with another name; none before it began."""
    callbacks = tree.get("callbacks")
    states = callbacks.items() if isinstance(callbacks, Mapping) else ()
    return [
        replace(
            BY_NAME["lightning-swa"],
            ema=("callbacks", key, "average_model_state"),
            updates=("callbacks", key, "n_averaged"),
        )
        for key, state in states
        if isinstance(state, Mapping) and state.get("n_averaged") and isinstance(state.get("average_model_state"), dict)
    ]


def _called(reading: forms.Reading, layout: Layout) -> str:
    # Of one set alone nobody knows whose it is; timm's files are by far the most that say `state_dict`.
    called = "model" if layout.name == "deit" else layout.name
    return called if reading.form == "plain" else reading.form


def _pair(layout: Layout, tree: Mapping[Any, Any], names: Mapping[str, Tensor] | None) -> dict[str, StateDict]:
    """Read averaged weights where the layout has them, and raw ones wherever they stand; empty without an average."""
    if layout.ema is None:
        return {}
    # Where the layout says, or where another one has them; never where the average stands.
    raw_paths = [layout.raw] if layout.raw in layout.needs else [layout.raw, *RAW_PLACES]
    raws = {path: set_at(tree, path, "raw", names) for path in raw_paths if path is not None and path != layout.ema}
    raw_path, raw = next(((path, raw) for path, raw in raws.items() if raw is not None), (layout.ema, None))
    ema = set_at(tree, layout.ema, "ema", names, None if raw is None else raw.tensors)
    if ema is None or (raw is not None and raw_path != layout.raw and not _of_one_model(raw.tensors, ema.tensors)):
        return {}
    if raw is None and ema.form in ("ema-pytorch", "litema"):  # which hold both
        raw = forms.read(follow(tree, layout.ema), names).get("raw")
    name = _BY_FORM.get((layout.name, ema.form), layout.name)
    places = _places(tree, layout)
    found = {"ema": state_dict(ema, layout.ema, "ema", name, layout.home, places)}
    if layout.updates is not None:
        counters = (*found["ema"].counters, layout.updates)
        found["ema"] = replace(found["ema"], updates=follow(tree, layout.updates), counters=counters)
    if layout.parameters and raw is not None and raw.tensors.keys() == ema.tensors.keys():
        mixed = {name: raw.tensors[name] if is_buffer(name, tensor) else tensor for name, tensor in ema.tensors.items()}
        found["ema"] = replace(found["ema"], tensors=mixed, keys=None)
    exact = set_at(tree, layout.exact, "ema", names)
    if exact is not None and exact.tensors.keys() <= ema.tensors.keys():
        found["ema"] = replace(found["ema"], tensors={**ema.tensors, **exact.tensors}, keys=None)
    if raw is not None:
        found["raw"] = state_dict(raw, raw_path, "raw", name, layout.home, places)
    return found


def _of_one_model(raw: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> bool:
    """False if an average cannot be of these weights: a teacher beside the model that learns from it."""
    shapes = {name.removeprefix("module."): getattr(tensor, "shape", None) for name, tensor in raw.items()}
    shared = [
        shapes[name] == getattr(tensor, "shape", None)
        for name, tensor in ((name.removeprefix("module."), tensor) for name, tensor in ema.items())
        if name in shapes
    ]
    return bool(shared) and all(shared)


def set_at(
    tree: Any,
    path: tuple[Any, ...] | None,
    which: str,
    names: Mapping[str, Tensor] | None,
    beside: Mapping[str, Tensor] | None = None,
) -> forms.Reading | None:
    """Read the set at a path, which is what it is called there, unless its form holds both."""
    readings = forms.read(follow(tree, path), names, beside)
    return readings.get(which) or next(iter(readings.values()), None)


def _places(tree: Mapping[Any, Any], layout: Layout) -> tuple[tuple[Any, ...], ...]:
    """Return what stands for weights in this layout, and what of another one stands beside it."""
    others = (place for each in LAYOUTS for place in (each.raw, each.ema) if place and _may_hold_a_set(tree, place))
    return tuple(dict.fromkeys((*layout.places, *others)))


def _may_hold_a_set(tree: Mapping[Any, Any], place: tuple[Any, ...]) -> bool:
    above = follow(tree, place[:-1])
    if not isinstance(above, Mapping) or place[-1] not in above:
        return False
    value = above[place[-1]]
    if isinstance(value, dict):
        direct = any(isinstance(each, Tensor) for each in value.values())
        return direct or "shadow_params" in value or place[-1] in SET_KEYS
    return value is None or forms.module_state(value) is not None


def state_dict(
    reading: forms.Reading,
    path: tuple[Any, ...],
    which: str,
    layout: str,
    home: tuple[Any, ...],
    places: tuple[tuple[Any, ...], ...],
) -> StateDict:
    """Place a reading in its checkpoint."""
    counters = tuple((*path, key) for key in reading.counters)
    return StateDict(
        reading.tensors, reading.keys, reading.extras, path, which, layout, home, places,
        reading.rest, counters, reading.updates, reading.decay, reading.fault,
    )  # fmt: skip


def is_ema_by_name(header: Header) -> bool:
    """True for a file or folder that holds an EMA alone, as its name or its configuration says."""
    return _EMA_FILE.fullmatch(header.path.name) is not None or "optimization_step" in ema_config(header)


def _layout_by_name(header: Header) -> str:
    if "optimization_step" in ema_config(header):
        return "diffusers"
    return "nemo" if header.path.suffix == ".ckpt" else "plain"


def ema_config(header: Header) -> dict[str, Any]:
    """Return the configuration of a folder that diffusers' EMAModel wrote; empty for any other checkpoint."""
    if header.path.is_dir():
        with suppress(OSError, ValueError, RecursionError):
            config = json.loads((header.path / "config.json").read_bytes())
            if isinstance(config, dict) and "optimization_step" in config:
                return config
    return {}
