"""torchtitan: the average as the state of an optimizer, ``ema.state.NAME.ema_params``, beside bare names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...tensors import Tensor
from .layout import Encoding, Layout, Names, Sets, StateDict

_BEFORE, _BEHIND = "state.", ".ema_params"


def _keys(node: Mapping[Any, Any]) -> dict[str, str]:
    """Return the names of the averages, to their keys."""
    found = (key for key, value in node.items() if isinstance(key, str) and isinstance(value, Tensor))
    return {
        k.removeprefix(_BEFORE).removesuffix(_BEHIND): k for k in found if k.startswith(_BEFORE) and k.endswith(_BEHIND)
    }


def _alike(one: Tensor, other: Tensor) -> bool:
    return getattr(one, "shape", None) == getattr(other, "shape", None)


def _detect(node: Any) -> bool:
    return isinstance(node, dict) and bool(_keys(node))


def _read(node: Any, names: Names, raw: Names) -> Sets:
    keys = _keys(node)
    averages = {name: node[key] for name, key in keys.items()}
    others = {key: value for key, value in node.items() if key not in keys.values()}
    known = raw if raw is not None else names
    if known is None:
        return {"ema": StateDict(averages, keys, others)}
    strange = next((name for name in averages if name not in known), None)
    if strange is not None:
        fault = f"of another model: it has '{strange}', and the raw weights do not. Use `state='raw'`."
        return {"ema": StateDict(averages, keys, others, fault=fault)}
    other = next((name for name, each in averages.items() if not _alike(each, known[name])), None)
    if other is not None:
        fault = f"of another model: '{other}' has another shape than in the raw weights. Use `state='raw'`."
        return {"ema": StateDict(averages, keys, others, fault=fault)}
    # It has no parameters that are frozen, and only the buffers that the run names.
    tensors = {name: averages.get(name, tensor) for name, tensor in known.items()}
    return {"ema": StateDict(tensors, keys if tensors.keys() == keys.keys() else None, others)}


class Torchtitan(Layout):
    """The raw weights are at the top level, under their bare names."""

    def read(self, tree: Mapping[Any, Any], names: Names) -> Sets:
        found = super().read(tree, names)
        if "raw" in found:
            raw = found["raw"]
            others = {key: value for key, value in raw.other_entries.items() if (key,) != self.ema}
            found["raw"] = replace(raw, other_entries=others, other_set=(*raw.other_set, "ema.*"))
        return found


TORCHTITAN = Torchtitan(
    "torchtitan", "torchtitan: bare names, and ema.state.*.ema_params",
    (), ("ema",), ema_encoding=Encoding("torchtitan", _detect, _read), written=False,
)  # fmt: skip
