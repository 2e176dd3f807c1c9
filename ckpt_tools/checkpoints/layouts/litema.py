"""LitEma of latent diffusion: the averages of the parameters, their names without dots, among the raw weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...errors import LayoutError
from ...tensors import Tensor, TensorSpec
from .layout import Content, Encoding, Layout, Names, Sets, StateDict, Weights, is_scalar, scalar, split, state_dict_of

_COUNTS = ("decay", "num_updates")


def _prefix(node: Mapping[Any, Any]) -> str | None:
    """Return what is before the names of the averages; None if the dict holds no LitEma."""
    counts = (key for key in node if isinstance(key, str) and key.endswith("num_updates"))
    # Codebooks of quantizers count, too.
    prefixes = (key.removesuffix("num_updates") for key in counts if re.fullmatch(r"([^.]*ema\.)?num_updates", key))
    return next((prefix for prefix in prefixes if all(is_scalar(node.get(prefix + key)) for key in _COUNTS)), None)


def _short_names(tensors: Mapping[Any, Any], prefix: str) -> dict[str, str]:
    """Return the names of the averages without dots, to their keys."""
    keys = {key.removeprefix(prefix): key for key in tensors if isinstance(key, str) and key.startswith(prefix)}
    return {name: key for name, key in keys.items() if name not in _COUNTS}


def _detect(node: Any) -> bool:
    prefix = _prefix(node) if isinstance(node, dict) else None
    if prefix is None:
        return False
    short = [name for name, key in _short_names(node, prefix).items() if isinstance(node[key], Tensor)]
    return bool(short) and not any("." in name for name in short)


def _read(node: Any, names: Names, raw_weights: Names) -> Sets:
    tensors, others = split(node)
    prefix = _prefix(node) or ""
    decay, updates = (tensors[prefix + key] for key in _COUNTS)
    keys = _short_names(tensors, prefix)
    averages = {name: tensors[key] for name, key in keys.items()}
    ema_paths = tuple((prefix + key,) for key in _COUNTS)
    raw = {key: value for key, value in tensors.items() if not key.startswith(prefix)} if prefix else {}
    raw_set = {"raw": StateDict(raw, {name: name for name in raw}, others, (f"{prefix}*",))} if raw else {}
    reference = raw or (names if names is not None else raw_weights) or {}
    short, fault = _undotted(averages, reference, prefix)
    if fault is not None:
        return {"ema": StateDict(averages, keys, others, (), ema_paths, updates, decay, fault=fault), **raw_set}
    weights = {name: averages[short[name]] if name in short else tensor for name, tensor in reference.items()}
    stored = {name: keys[short[name]] if name in short else name for name in weights} if raw else None
    other_set = ("* (raw)",) if raw else ()
    return {"ema": StateDict(weights, stored, others, other_set, ema_paths, updates, decay), **raw_set}


def _undotted(
    averages: Mapping[str, Tensor], reference: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, str], str | None]:
    """Find the names that became these when their dots were deleted.

    Returns:
        (name to the one without dots, what is wrong).
    """
    if not reference:
        return {}, (
            f"a LitEma: its {len(averages)} names have lost their dots, and there are no raw weights with them. "
            "Give `names_from`, or `model`, to `convert(...)`."
        )
    model = prefix.removesuffix("_ema.")
    heads = Counter(name.partition(".")[0] for name in reference)
    leads = {f"{model}.": len(reference), "": len(reference)}  # to the most names that can begin so
    leads = {**{f"{head}.": count for head, count in heads.items()}, **leads}
    order = dict.fromkeys((f"{model}.", "", *leads))
    best: dict[tuple[str, Any], list[str]] = {}
    fewest: list[str] = list(averages)
    for lead in order:
        if len(averages) - leads[lead] >= len(fewest) and best:
            continue
        known: dict[tuple[str, Any], list[str]] = {}
        for name, tensor in reference.items():
            if name.startswith(lead) and isinstance(tensor, TensorSpec):
                known.setdefault((name.removeprefix(lead).replace(".", ""), tensor.shape), []).append(name)
        missing = [name for name, tensor in averages.items() if (name, getattr(tensor, "shape", None)) not in known]
        if len(missing) < len(fewest) or not best:
            best, fewest = known, missing
        if not missing:
            break
    if fewest:
        return {}, (
            f"of another model: '{prefix}{fewest[0]}' is the name of no raw weight of that shape without its dots "
            f"({len(fewest)} of {len(averages)} are not). Is this the right model?"
        )
    mapping: dict[str, str] = {}
    for short, tensor in averages.items():
        found = best[short, getattr(tensor, "shape", None)]
        if len(found) > 1:
            return {}, (
                f"ambiguous: '{prefix}{short}' may be '{found[0]}' or '{found[1]}': without dots both are spelt so. "
                "Rename one of them in the model, or take `state='raw'`."
            )
        mapping[found[0]] = short
    return mapping, None


def _write(weights: Weights, content: Content) -> dict[str, Any]:
    taken = next((name for name in content.raw if name.startswith("model_ema.")), None)
    if taken is not None:
        raise LayoutError(f"'{taken}' has the prefix that LitEma gives its averages. Rename it: `fix_prefix(...)`.")
    # Latent diffusion averages its `model` alone, and leaves that out of the names.
    lead = "model." if any(name.startswith("model.") for name in content.raw) else ""
    short: dict[str, str] = {}
    for name in (name for name in content.parameters if name.startswith(lead)):
        dotless = name.removeprefix(lead).replace(".", "")
        other = short.setdefault(dotless, name)
        if other != name:
            raise LayoutError(
                f"'{other}' and '{name}' are both 'model_ema.{dotless}' without their dots, so LitEma cannot tell them "
                "apart. Choose another layout."
            )
    strange = next((name for name in short.values() if name not in content.raw), None)
    if strange is not None:
        raise LayoutError(
            f"'{strange}' is the name of an averaged weight and of no raw one, so LitEma could not find it. "
            "If they differ by a prefix, take that off first: `fix_prefix(...)`. Or take one set: `state='ema'`."
        )
    taken = next((short[key] for key in _COUNTS if key in short), None)
    if taken is not None:
        raise LayoutError(f"'{taken}' would have a name that LitEma gives an entry of its own. Choose another layout.")
    of_model = " of 'model.'" if lead else ""
    content.note_lost(set(short.values()), f"LitEma averages parameters{of_model}", raw_stays=True)
    updates = -1 if content.updates is None else min(content.updates, (1 << 31) - 1)
    if content.updates is None:
        content.notes.append("EMA update count unknown: num_updates is -1, which LitEma takes for no warm-up.")
    averages = {
        "decay": scalar("float32", "f", content.known_decay()),
        "num_updates": scalar("int32", "i", updates),
        **{name: weights[full] for name, full in short.items()},
    }
    return state_dict_of({}, {"": content.raw, "model_ema.": averages})


LITEMA_ENCODING = Encoding("litema", _detect, _read, _write, frozenset({"updates", "decay"}))
LITEMA = Layout(
    "litema", "LitEma of latent diffusion: raw names, and model_ema.* with the dots deleted",
    ("state_dict",), ("state_dict",), ema_encoding=LITEMA_ENCODING, exponential=True,
)  # fmt: skip
