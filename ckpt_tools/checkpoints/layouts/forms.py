"""Forms: how a set of weights is written down, wherever it stands.

Read from the classes that write them: torch's AveragedModel, mmengine's BaseAveragedModel, ema-pytorch's EMA,
latent diffusion's LitEma, the parameter lists of diffusers' EMAModel and of torch_ema, and a pickled nn.Module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...formats.pickle_read import Inert
from ...tensors import Tensor, TensorSpec, UnsupportedTensor
from .state import is_buffer

MOST_NAMES = 300_000
"""A pickled module may hold one child a thousand times, and that one another: its names have no end."""


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A set of weights as its form gives it; the attributes are those of StateDict."""

    form: str
    tensors: dict[str, Tensor]
    keys: Mapping[str, str] | None
    extras: dict[Any, Any]
    rest: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    updates: Any = None
    decay: Any = None
    fault: str | None = None


Readings = dict[str, Reading]
"""``raw``, ``ema`` or both."""


def read(node: Any, names: Mapping[str, Tensor] | None = None, beside: Mapping[str, Tensor] | None = None) -> Readings:
    """Read the sets of weights that an object is, or holds by its form.

    Args:
        node: of the object tree.
        names: a state dict of the same model, for forms that keep no names, or spoil them.
        beside: the raw weights beside it, which have names, too, and what an average leaves out.
    """
    if isinstance(node, Inert):
        return _module(node)
    if not isinstance(node, dict):
        return {}
    if isinstance(node.get("shadow_params"), (list, tuple)):
        return _parameter_list(node, names if names is not None else beside, beside if beside is not None else names)
    kinds = (TensorSpec, UnsupportedTensor)  # a union takes longer to look into
    tensors = {key: value for key, value in node.items() if isinstance(key, str) and isinstance(value, kinds)}
    if not tensors:
        return {}
    extras = {key: value for key, value in node.items() if key not in tensors} if len(tensors) < len(node) else {}
    plain = Reading("plain", tensors, dict(zip(tensors, tensors, strict=True)), extras)
    return (
        _averaged_model(tensors, extras)
        or _ema_pytorch(tensors, extras)
        or _lit_ema(tensors, extras, names if names is not None else beside)
        or {"raw": plain}
    )


def is_scalar(value: Any, *dtypes: str) -> bool:
    """True for a tensor of one element (of one of these dtypes)."""
    return isinstance(value, TensorSpec) and value.numel == 1 and (not dtypes or value.dtype.name in dtypes)


def _averaged_model(tensors: dict[str, Tensor], extras: dict[Any, Any]) -> Readings:
    """torch's AveragedModel and mmengine's: the model as ``module.``, and a counter."""
    counter = next((key for key in ("n_averaged", "steps") if is_scalar(tensors.get(key), "int64")), None)
    if counter is None:
        return {}
    keys = {key.removeprefix("module."): key for key in tensors if key != counter}
    if not keys or not all(key.startswith("module.") for key in keys.values()):
        return {}
    weights = {name: tensors[key] for name, key in keys.items()}
    form = "averaged-model" if counter == "n_averaged" else "mmengine"
    return {"ema": Reading(form, weights, keys, extras, counters=(counter,), updates=tensors[counter])}


def _ema_pytorch(tensors: dict[str, Tensor], extras: dict[Any, Any]) -> Readings:
    """ema-pytorch's EMA: both models under prefixes, ``initted`` and ``step``."""
    prefixes, counters = {"ema": "ema_model.", "raw": "online_model."}, ("initted", "step")
    if not all(is_scalar(tensors.get(key)) for key in counters):
        return {}
    stray = {k: v for k, v in tensors.items() if not k.startswith(tuple(prefixes.values())) and k not in counters}
    readings = {}
    for which, prefix in prefixes.items():
        keys = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
        if keys:
            weights = {name: tensors[key] for name, key in keys.items()}
            others = tuple(f"{other}*" for other in prefixes.values() if other != prefix)
            updates = tensors["step"] if which == "ema" else None
            readings[which] = Reading("ema-pytorch", weights, keys, {**extras, **stray}, others, counters, updates)
    return readings if "ema" in readings else {}


def _lit_ema(tensors: dict[str, Tensor], extras: dict[Any, Any], names: Mapping[str, Tensor] | None) -> Readings:
    """LitEma: the averages of the parameters, their names without dots, as buffers of a module beside the model."""
    prefix = next(
        (
            key.removesuffix("num_updates")
            for key in tensors
            if key.endswith("num_updates")
            and re.fullmatch(r"([^.]*ema\.)?num_updates", key)  # codebooks of quantizers count, too
            and is_scalar(tensors[key])
            and is_scalar(tensors.get(key.removesuffix("num_updates") + "decay"))
        ),
        None,
    )
    if prefix is None:
        return {}
    decay, updates = (tensors[prefix + key] for key in ("decay", "num_updates"))
    keys = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    spoilt = {name: tensors[key] for name, key in keys.items() if name not in ("decay", "num_updates")}
    if not spoilt or any("." in name for name in spoilt):
        return {}
    raw = {key: value for key, value in tensors.items() if not key.startswith(prefix)} if prefix else {}
    counters = (f"{prefix}decay", f"{prefix}num_updates")
    readings = {"raw": Reading("litema", raw, {name: name for name in raw}, extras, (f"{prefix}*",))} if raw else {}
    reference = raw or names or {}
    mapping, fault = _undotted(spoilt, reference, prefix)
    if fault is not None:
        return {"ema": Reading("litema", spoilt, keys, extras, (), counters, updates, decay, fault), **readings}
    weights = {name: spoilt[mapping[name]] if name in mapping else tensor for name, tensor in reference.items()}
    stored = {name: keys[mapping[name]] if name in mapping else name for name in weights} if raw else None
    rest = ("* (raw)",) if raw else ()
    return {"ema": Reading("litema", weights, stored, extras, rest, counters, updates, decay), **readings}


def _undotted(
    spoilt: Mapping[str, Tensor], reference: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, str], str | None]:
    """Find the names that became these when their dots were deleted.

    Returns:
        (name to spoilt name, what is wrong).
    """
    if not reference:
        return {}, (
            f"a LitEma: its {len(spoilt)} names have lost their dots, and no raw weights stand beside them. "
            "Give `names_from`, or `model`."
        )
    model = prefix.removesuffix("_ema.")
    heads = [f"{model}.", "", *(f"{head}." for head in dict.fromkeys(name.partition(".")[0] for name in reference))]
    best: dict[tuple[str, Any], list[str]] = {}
    fewest: list[str] = list(spoilt)
    for head in heads:
        spelt: dict[tuple[str, Any], list[str]] = {}
        for name, tensor in reference.items():
            if name.startswith(head) and isinstance(tensor, TensorSpec):
                spelt.setdefault((name.removeprefix(head).replace(".", ""), tensor.shape), []).append(name)
        missing = [name for name, tensor in spoilt.items() if (name, getattr(tensor, "shape", None)) not in spelt]
        if len(missing) < len(fewest) or not best:
            best, fewest = spelt, missing
        if not missing:
            break
    if fewest:
        return {}, (
            f"of another model: '{prefix}{fewest[0]}' is the name of no raw weight of that shape without its dots "
            f"({len(fewest)} of {len(spoilt)} are not). Is this the right model?"
        )
    mapping: dict[str, str] = {}
    for short, tensor in spoilt.items():
        found = best[short, getattr(tensor, "shape", None)]
        if len(found) > 1:
            return {}, (
                f"ambiguous: '{prefix}{short}' may be '{found[0]}' or '{found[1]}': without dots both are spelt so. "
                "Rename one of them in the model, or take `state='raw'`."
            )
        mapping[found[0]] = short
    return mapping, None


def _parameter_list(
    node: Mapping[Any, Any], names: Mapping[str, Tensor] | None, others: Mapping[str, Tensor] | None
) -> Readings:
    """diffusers' EMAModel and torch_ema: the averages of ``model.parameters()`` in a list."""
    shadow = [value for value in node["shadow_params"] if isinstance(value, Tensor)]
    if len(shadow) != len(node["shadow_params"]) or not shadow:
        return {}
    form = "diffusers" if "optimization_step" in node else "pytorch-ema"
    updates = node.get("optimization_step", node.get("num_updates"))
    extras = {key: value for key, value in node.items() if key not in LIST_KEYS}
    counters = tuple(key for key in LIST_KEYS[3:] if node.get(key) is not None)
    rest = tuple(key for key in LIST_KEYS[1:3] if node.get(key) is not None)  # raw weights put by
    matched, fault = name_list(shadow, names)
    if fault is not None:
        unnamed = {f"shadow_params.{i}": tensor for i, tensor in enumerate(shadow)}
        return {"ema": Reading(form, unnamed, None, extras, rest, counters, updates, node.get("decay"), fault)}
    weights = {**(others or {}), **matched}
    return {"ema": Reading(form, weights, None, extras, rest, counters, updates, node.get("decay"))}


LIST_KEYS = (
    "shadow_params", "collected_params", "temp_stored_params", "decay", "num_updates", "min_decay", "optimization_step",
    "update_after_step", "use_ema_warmup", "inv_gamma", "power",
)  # fmt: skip


def parameters(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what ``model.parameters()`` would give, as far as a state dict tells: no buffers, tied ones once."""
    unique: dict[Any, str] = {}
    for name, tensor in names.items():
        if not is_buffer(name, tensor):
            empty = isinstance(tensor, TensorSpec) and not tensor.numel  # all alike, and tied to nothing
            unique.setdefault(name if empty else tensor, name)
    return {name: names[name] for name in unique.values()}


def name_list(shadow: Sequence[Tensor], names: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], str | None]:
    """Give the tensors of a list the names of a state dict's parameters.

    Returns:
        (every name that the tensor goes by, to it; what is wrong).
    """
    if names is None:
        return {}, f"a list of {len(shadow)} tensors without names. Give `names_from`, or `model`."
    own = parameters(names)
    if len(own) != len(shadow):
        return {}, (
            f"a list of {len(shadow)} tensors; the model whose names it should get has {len(own)} parameters. "
            "Give `names_from`, a checkpoint of the same model, or `model`."
        )
    for (name, tensor), averaged in zip(own.items(), shadow, strict=True):
        want, have = (list(getattr(each, "shape", ())) for each in (tensor, averaged))
        if want != have:
            return {}, (
                f"a list, in which a tensor of shape {have} would be '{name}', which has shape {want}. "
                "Give `names_from`, a checkpoint of the same model, or `model`."
            )
    given = dict(zip(own.values(), shadow, strict=True))
    return {name: given[tensor] for name, tensor in names.items() if tensor in given}, None


def _module(node: Inert) -> Readings:
    """A pickled nn.Module: its ``__dict__`` as BUILD would have got it. Its class is neither imported nor run."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in _module_tensors(node, "", (), set()):
        tensors[name] = tensor
        if len(tensors) > MOST_NAMES:
            return {"raw": Reading("module", {}, None, {}, fault=f"a pickled module of over {MOST_NAMES} tensors.")}
    return {"raw": Reading("module", tensors, None, {})} if tensors else {}


def module_state(node: Any) -> dict[Any, Any] | None:
    """Return the attributes of a pickled nn.Module, as its ``__dict__`` had them; None for anything else."""
    state = node.state if isinstance(node, Inert) else None
    if isinstance(state, tuple) and len(state) == 2:  # (attributes, slots)
        state = state[0]
    parts = ("_parameters", "_buffers", "_modules")
    return state if isinstance(state, dict) and all(isinstance(state.get(part), dict) for part in parts) else None


def _module_tensors(node: Any, lead: str, above: tuple[int, ...], barren: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Walk as ``state_dict`` does: parameters, persistent buffers, then children in order.

    Args:
        above: modules that this one is part of, which none contains in earnest.
        barren: modules known to hold no tensor, so that they are passed through once.
    """
    state = module_state(node)
    if state is None or id(node) in above or id(node) in barren or len(above) > 200:
        return
    passing = state.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, (set, frozenset)) else ()
    found = False
    for part in ("_parameters", "_buffers"):
        for name, tensor in state[part].items():
            if isinstance(name, str) and isinstance(tensor, Tensor) and not (part == "_buffers" and name in passing):
                found = True
                yield f"{lead}{name}", tensor
    for name, child in state["_modules"].items():
        if isinstance(name, str):
            for pair in _module_tensors(child, f"{lead}{name}.", (*above, id(node)), barren):
                found = True
                yield pair
    if not found:
        barren.add(id(node))
