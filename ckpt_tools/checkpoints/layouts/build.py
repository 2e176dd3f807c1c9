"""Building: the object that a layout's library would have saved, from one or two sets of weights."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import LayoutError
from ...formats.file_plan import OutTensor
from ...tensors import DTYPES
from ..tree import put
from .table import Layout

Weights = Mapping[str, OutTensor]


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What goes into a checkpoint.

    Attributes:
        raw, ema: the sets, by the names of the bare model; of one alone, both are that one.
        pair: there are two sets, and not one in both places.
        parameters: names of what is averaged by libraries that average parameters alone.
        updates: how often the average was updated; None where nobody knows.
        decay: of the EMA, likewise.
        settings: of diffusers' EMAModel, as the checkpoint has them.
        rest: what stands beside the weights, by key.
        notes: receives what is lost or made up, in words.
    """

    raw: Weights
    ema: Weights
    pair: bool
    parameters: tuple[str, ...]
    updates: int | None = None
    decay: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[Any, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build(layout: Layout, content: Content) -> dict[Any, Any]:
    """Make the tree of a checkpoint in this layout: dicts, plain values, and OutTensors.

    Raises:
        LayoutError: the layout needs what the content lacks, or two names become one in it.
    """
    raw = _write(layout.raw_form, content.raw, content)
    if layout.raw is None or layout.raw == layout.ema or layout.ema is None:
        # One dict, with one set in it or both.
        whole = raw if layout.ema is None else _write(layout.ema_form, content.ema, content)
        return put(content.rest, layout.home, whole)  # type: ignore[no-any-return]
    tree: dict[Any, Any] = put(content.rest, layout.raw, raw)
    if content.pair or not layout.alone:
        tree = put(tree, layout.ema, _write(layout.ema_form, content.ema, content))
        if layout.name == "lightning":
            tree = put({**_LIGHTNING, **tree}, layout.updates or (), _count(content))
    return tree


def keeps(layout: Layout, counter: str) -> bool:
    """True if a layout has a place for what says how often an average was updated, or how (by its usual key)."""
    forms = {layout.raw_form, layout.ema_form}
    if counter in SETTINGS:
        return "diffusers" in forms
    if counter == "decay":
        return bool(forms & {"litema", "diffusers", "pytorch-ema"})
    return forms != {"plain"} or layout.updates is not None


# Without these Lightning does not resume, or resumes without the average.
_LIGHTNING = {"pytorch-lightning_version": "2.6.0", "optimizer_states": [], "lr_schedulers": [], "callbacks": {}}


def _write(form: str, weights: Weights, content: Content) -> dict[str, Any]:
    if form == "plain":
        return OrderedDict(weights)
    if form in ("averaged-model", "mmengine"):
        counter = "n_averaged" if form == "averaged-model" else "steps"
        return OrderedDict({counter: _count(content), **{f"module.{name}": t for name, t in weights.items()}})
    if form == "ema-pytorch":
        return OrderedDict(
            {
                "initted": scalar("bool", "?", True),
                "step": scalar("int64", "q", _step(content)),
                **{f"online_model.{name}": tensor for name, tensor in content.raw.items()},
                **{f"ema_model.{name}": tensor for name, tensor in weights.items()},
            }
        )
    if form == "litema":
        return _lit_ema(weights, content)
    return _parameter_list(form, weights, content)


def _lit_ema(weights: Weights, content: Content) -> dict[str, Any]:
    taken = next((name for name in content.raw if name.startswith("model_ema.")), None)
    if taken is not None:
        raise LayoutError(f"'{taken}' stands where LitEma keeps its averages. Rename it: ckpt fix-prefix.")
    # Latent diffusion averages its `model` alone, and leaves that out of the names.
    head = "model." if any(name.startswith("model.") for name in content.raw) else ""
    short: dict[str, str] = {}
    for name in content.parameters:
        if name.startswith(head):
            other = short.setdefault(name.removeprefix(head).replace(".", ""), name)
            if other != name:
                raise LayoutError(
                    f"'{other}' and '{name}' are both 'model_ema.{name.removeprefix(head).replace('.', '')}' without "
                    "their dots, so LitEma cannot tell them apart. Choose another layout."
                )
    strange = next((name for name in short.values() if name not in content.raw), None)
    if strange is not None:
        raise LayoutError(
            f"'{strange}' is the name of an averaged weight and of no raw one, so LitEma could not find it. "
            "If they differ by a prefix, take that off first: ckpt fix-prefix. Or take one set: `state='ema'`."
        )
    counter = next((short[key] for key in ("decay", "num_updates") if key in short), None)
    if counter is not None:
        raise LayoutError(f"'{counter}' would stand where LitEma keeps its counters. Choose another layout.")
    kept = set(short.values())
    _note_lost(content, kept, "LitEma averages parameters" + (" of 'model.'" if head else ""), raw_stays=True)
    updates = -1 if content.updates is None else min(content.updates, (1 << 31) - 1)
    if content.updates is None:
        content.notes.append("The number of updates is not known: num_updates is -1, LitEma's sign for no warm-up.")
    return OrderedDict(
        {
            **content.raw,
            "model_ema.decay": scalar("float32", "f", _decay(content)),
            "model_ema.num_updates": scalar("int32", "i", updates),
            **{f"model_ema.{name}": weights[full] for name, full in short.items()},
        }
    )


def _parameter_list(form: str, weights: Weights, content: Content) -> dict[str, Any]:
    _note_lost(content, set(content.parameters), "the list holds parameters", raw_stays=False)
    shadow = [weights[name] for name in content.parameters]
    if form == "pytorch-ema":
        counters = {"decay": _decay(content), "num_updates": content.updates}
        return {**counters, "shadow_params": shadow, "collected_params": None}
    return {**ema_settings(content), "shadow_params": shadow}


def ema_settings(content: Content) -> dict[str, Any]:
    """Return what diffusers' EMAModel keeps beside the parameters, in its state dict and in ``config.json``."""
    counters = {"decay": _decay(content), "optimization_step": _needed(content, "diffusers")}
    return {**SETTINGS, **content.settings, **counters}


SETTINGS = {"min_decay": 0.0, "update_after_step": 0, "use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3}
"""What diffusers' EMAModel starts with."""


def _note_lost(content: Content, kept: set[str], why: str, *, raw_stays: bool) -> None:
    """Say which averages have no place: those that nothing keeps, under their own or another name."""
    written = {content.ema[name] for name in kept} | (set(content.raw.values()) if raw_stays else set())
    lost = [name for name, tensor in content.ema.items() if tensor not in written]
    if lost:
        what = "are lost, their raw values stay" if raw_stays else "are lost"
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        content.notes.append(f"The averages of '{lost[0]}'{more} {what}: {why} alone.")


def _count(content: Content) -> OutTensor:
    if content.updates is None:
        note = "The number of updates is not known: the counter is 1, so that a further update averages."
        if note not in content.notes:
            content.notes.append(note)
    elif content.updates == 0:
        content.notes.append("The counter is 1: with 0 the next update would replace the average.")
    return scalar("int64", "q", content.updates or 1)


def _step(content: Content) -> int:
    step = _needed(content, "ema-pytorch")
    if step <= _UPDATE_AFTER_STEP:
        content.notes.append(
            f"ema-pytorch replaces the average until its step, {step} here, is above its update_after_step "
            f"({_UPDATE_AFTER_STEP} if you set none): set that lower, or give `updates`."
        )
    return step


_UPDATE_AFTER_STEP = 100


def _needed(content: Content, who: str) -> int:
    if content.updates is None:
        raise LayoutError(
            f"{who} counts its updates (with a count of 0 the next one replaces the average), and the checkpoint "
            "does not say how many there were. Give `updates`."
        )
    return content.updates


def _decay(content: Content) -> float:
    if content.decay is None:
        note = "The decay is not known: 0.9999, the default of these classes, is written. `decay` sets another."
        if note not in content.notes:
            content.notes.append(note)
        return 0.9999
    return content.decay


def scalar(dtype: str, code: str, value: float) -> OutTensor:
    """Make a tensor without dimensions of a number of our own."""
    return OutTensor(DTYPES[dtype], (), (), "a counter", finite=False, data=struct.pack(f"<{code}", value))
