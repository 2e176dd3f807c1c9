"""Averaged models: torch's AveragedModel and mmengine's, which hold the model as ``module.`` and an update count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...formats.tree import follow
from ...tensors import TensorSpec, UnsupportedTensor
from .layout import Content, Encoding, Layout, Names, Sets, StateDict, Weights, is_scalar, split, state_dict_of

COUNTS = ("n_averaged", "steps")
"""Keys of the update count: torch's, and mmengine's."""


def _encoding(name: str, count: str) -> Encoding:
    """Make the encoding of a class that has its update count under this key."""

    def detect(node: Any) -> bool:
        if not isinstance(node, dict) or not is_scalar(node.get(count), "int64"):
            return False
        tensors = (TensorSpec, UnsupportedTensor)
        names = [key for key, value in node.items() if isinstance(key, str) and isinstance(value, tensors)]
        return len(names) > 1 and all(name.startswith("module.") for name in names if name != count)

    def read(node: Any, names: Names, raw: Names) -> Sets:
        tensors, others = split(node)
        keys = {key.removeprefix("module."): key for key in tensors if key != count}
        weights = {name: tensors[key] for name, key in keys.items()}
        return {"ema": StateDict(weights, keys, others, ema_paths=((count,),), updates=tensors[count])}

    def write(weights: Weights, content: Content) -> dict[str, Any]:
        return state_dict_of({count: content.count()}, {"module.": weights})

    return Encoding(name, detect, read, write, frozenset({"updates"}))


AVERAGED_MODEL_ENCODING = _encoding("averaged-model", COUNTS[0])
MMENGINE_ENCODING = _encoding("mmengine", COUNTS[1])

AVERAGED_MODEL = Layout(
    "averaged-model", "torch's AveragedModel: module.* and n_averaged",
    ema=(), ema_encoding=AVERAGED_MODEL_ENCODING,
)  # fmt: skip
TORCHVISION = Layout(
    "torchvision", "torchvision's reference scripts: model, and model_ema as an AveragedModel",
    ("model",), ("model_ema",), ema_encoding=AVERAGED_MODEL_ENCODING, exponential=True,
)  # fmt: skip


class MMEngine(Layout):
    """The hook swaps the sets on saving: its own dict, with the update count, holds the raw weights."""

    def read(self, tree: Mapping[Any, Any], names: Names) -> Sets:
        return {} if follow(tree, self.updates) is None else super().read(tree, names)


MMENGINE = MMEngine(
    "mmengine", "mmengine's EMAHook: ema_state_dict holds the raw weights, state_dict the average",
    ("ema_state_dict",), ("state_dict",), raw_encoding=MMENGINE_ENCODING, single="ema",
    updates=("ema_state_dict", "steps"), exponential=True,
)  # fmt: skip
