"""Two dicts: libraries that keep raw and averaged weights as plain dicts, each under a key of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...formats.tree import Path
from .layout import Layout, Names, Sets, set_at

TIMM = Layout(
    "timm", "timm: state_dict and, where there is one, state_dict_ema",
    ("state_dict",), ("state_dict_ema",), alone="timm",
)  # fmt: skip
TIMM_EMA = Layout("timm-ema", "timm, with the weights as state_dict_ema", ("state_dict",), ("state_dict_ema",))
DEIT = Layout("deit", "DeiT and alike: model and model_ema", ("model",), ("model_ema",), alone="model")
MODEL_STATE_DICT = Layout(
    "model-state-dict", "hand-written loops: model_state_dict and ema_state_dict",
    ("model_state_dict",), ("ema_state_dict",), alone="model-state-dict",
)  # fmt: skip
D2GO = Layout("d2go", "d2go: model and ema_state", ("model",), ("ema_state",))
DIT = Layout("dit", "DiT, guided-diffusion: model and ema", ("model",), ("ema",))
ICEFALL = Layout(
    "icefall", "icefall: model and model_avg", ("model",), ("model_avg",), batches=("batch_idx_train", "average_period")
)
DINO = Layout("dino", "DINO: student and teacher, which is the average", ("student",), ("teacher",), single="ema")


class Fairseq(Layout):
    """Parameters of a float16 average are in float32, too, in another dict."""

    exact: Path = ("extra_state", "ema_fp32_params")

    @property
    def paths(self) -> tuple[Path, ...]:
        return (*super().paths, self.exact)

    def read(self, tree: Mapping[Any, Any], names: Names) -> Sets:
        found = super().read(tree, names)
        exact = set_at(tree, self.exact, "ema", names) if found else None
        if exact is not None and exact.tensors.keys() <= found["ema"].tensors.keys():
            tensors = {**found["ema"].tensors, **exact.tensors}
            found["ema"] = replace(found["ema"], tensors=tensors, keys=None)
        return found


FAIRSEQ = Fairseq("fairseq", "fairseq: model and extra_state.ema", ("model",), ("extra_state", "ema"))
