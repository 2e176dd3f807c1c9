"""Lightning: its two averaging callbacks, and NeMo, which is built on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from ...formats.header import Header
from ...formats.tree import follow, put
from .layout import Content, Layout, Names, Sets, is_buffer

# Without these Lightning does not resume, or resumes without the average.
_NEEDED = {"pytorch-lightning_version": "2.6.0", "optimizer_states": [], "lr_schedulers": [], "callbacks": {}}


class WeightAveraging(Layout):
    """The callback swaps the sets on saving."""

    def read(self, tree: Mapping[Any, Any], names: Names) -> Sets:
        complete = follow(tree, ("averaging_state",)) is not None and follow(tree, self.raw) is not None
        return super().read(tree, names) if complete else {}

    def write(self, content: Content) -> dict[Any, Any]:
        return put({**_NEEDED, **super().write(content)}, self.updates or (), content.count())  # type: ignore[no-any-return]


class StochasticWeightAveraging(Layout):
    """The average, of parameters alone, is in the state of the callback, which may be of a class with another name."""

    def read(self, tree: Mapping[Any, Any], names: Names) -> Sets:
        callbacks = tree.get("callbacks")
        for key, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
            # There is no average before it began.
            if not isinstance(state, Mapping) or not state.get("n_averaged"):
                continue
            if isinstance(state.get("average_model_state"), dict):
                ema, updates = ("callbacks", key, "average_model_state"), ("callbacks", key, "n_averaged")
                found = Layout.read(replace(self, ema=ema, updates=updates), tree, names)
                if found:
                    return _with_raw_buffers(found)
        return {}


def _with_raw_buffers(found: Sets) -> Sets:
    """Take the raw buffers: those of the average are stale."""
    raw, ema = found.get("raw"), found["ema"]
    if raw is not None and raw.tensors.keys() == ema.tensors.keys():
        mixed = {name: raw.tensors[name] if is_buffer(name, tensor) else tensor for name, tensor in ema.tensors.items()}
        found["ema"] = replace(ema, tensors=mixed, keys=None)
    return found


class NeMo(Layout):
    """Two files, raw weights and average; the name tells which it is."""

    def ema_file(self, header: Header) -> Mapping[str, Any] | None:
        name = header.path.name
        return {} if name.endswith("-EMA.ckpt") and name != "-EMA.ckpt" else None

    def ema_file_of(self, path: FilePath) -> FilePath:
        return path.with_name(f"{path.stem}-EMA{path.suffix}")


LIGHTNING = WeightAveraging(
    "lightning", "Lightning's WeightAveraging: current_model_state, and the average as state_dict",
    ("current_model_state",), ("state_dict",), single="ema", updates=("averaging_state", "n_averaged"),
)  # fmt: skip
LIGHTNING_SWA = StochasticWeightAveraging(
    "lightning-swa", "Lightning's StochasticWeightAveraging: the average in the callback's state",
    ("state_dict",), ("callbacks", "StochasticWeightAveraging", "average_model_state"),
    updates=("callbacks", "StochasticWeightAveraging", "n_averaged"), written=False,
)  # fmt: skip
NEMO = NeMo("nemo", "NeMo: X.ckpt, and the EMA in X-EMA.ckpt beside it", ("state_dict",), written=False)
