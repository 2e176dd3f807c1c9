"""ema-pytorch: in one dict, both models under prefixes, ``initted`` and ``step``."""

from __future__ import annotations

from typing import Any

from ...tensors import Tensor
from .layout import Content, Encoding, Layout, Names, Sets, StateDict, Weights, is_scalar, scalar, split, state_dict_of

_PREFIXES = {"ema": "ema_model.", "raw": "online_model."}
_COUNTS = ("initted", "step")
_UPDATE_AFTER_STEP = 100
"""Until its step is above this, the class copies the model over its average."""


def _detect(node: Any) -> bool:
    if not isinstance(node, dict) or not all(is_scalar(node.get(key)) for key in _COUNTS):
        return False
    names = (key for key, value in node.items() if isinstance(key, str) and isinstance(value, Tensor))
    return any(name.startswith(_PREFIXES["ema"]) for name in names)


def _read(node: Any, names: Names, raw: Names) -> Sets:
    tensors, others = split(node)
    prefixes = tuple(_PREFIXES.values())
    others |= {key: value for key, value in tensors.items() if not key.startswith(prefixes) and key not in _COUNTS}
    ema_paths = tuple((key,) for key in _COUNTS)
    found = {}
    for which, prefix in _PREFIXES.items():
        keys = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
        if keys:
            weights = {name: tensors[key] for name, key in keys.items()}
            other_set = tuple(f"{p}*" for p in prefixes if p != prefix and any(key.startswith(p) for key in tensors))
            updates = tensors["step"] if which == "ema" else None
            found[which] = StateDict(weights, keys, others, other_set, ema_paths, updates)
    return found


def _write(weights: Weights, content: Content) -> dict[str, Any]:
    step = content.known_updates("ema-pytorch")
    if step <= _UPDATE_AFTER_STEP:
        content.notes.append(
            f"ema-pytorch replaces the average until its step, {step} here, is above its update_after_step "
            f"({_UPDATE_AFTER_STEP} if you set none): set that lower, or give `updates`."
        )
    counts = {"initted": scalar("bool", "?", True), "step": scalar("int64", "q", step)}
    return state_dict_of(counts, {_PREFIXES["raw"]: content.raw, _PREFIXES["ema"]: weights})


EMA_PYTORCH_ENCODING = Encoding("ema-pytorch", _detect, _read, _write, frozenset({"updates"}))
EMA_PYTORCH = Layout(
    "ema-pytorch", "ema-pytorch: online_model.* and ema_model.*", (), (),
    ema_encoding=EMA_PYTORCH_ENCODING, exponential=True,
)  # fmt: skip
