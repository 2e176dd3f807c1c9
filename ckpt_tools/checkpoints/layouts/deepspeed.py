"""DeepSpeed: the float32 weights of all ranks, as its format puts them together, or without ZeRO the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...formats.deepspeed_files import MASTERS, Masters
from ...formats.tree import Path
from ...tensors import DTYPES
from .layout import Layout, Names, Sets, read_sets


class DeepSpeed(Layout):
    """With ZeRO, ``module`` has copies of 16 bits, or nothing: it is no set of its own."""

    def read(self, tree: Mapping[Any, Any], names: Names) -> Sets:
        masters = tree.get(MASTERS)
        if isinstance(masters, Masters):
            return self._raw((MASTERS,), masters, dtype=DTYPES["float32"])
        if "ds_version" in tree and tree.get("param_shapes") is None:
            return self._raw(_MODULE, tree.get("module"))
        return {}

    def _raw(self, path: Path, node: Any, **known: Any) -> Sets:
        sets = read_sets(node)
        return {
            which: replace(each.below(path), layout=self.name, set_paths=(path, _MODULE), **known)
            for which, each in sets.items()
        }


_MODULE = ("module",)

DEEPSPEED = DeepSpeed(
    "deepspeed", "DeepSpeed: the weights of all ranks of ZeRO in float32", raw=(MASTERS,), written=False
)
