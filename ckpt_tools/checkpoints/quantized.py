"""Quantized weights: codes that stand for weights only together with the scales beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..tensors import DTYPES, Category, Tensor, TensorSpec

_CODE_DTYPES = frozenset(
    dtype
    for dtype in DTYPES.values()
    if (dtype.category is Category.INTEGER and dtype.name != "bool")
    or (dtype.category is Category.FLOAT and dtype.itemsize == 1)
)
# bitsandbytes' `weight.quant_map` and `weight_scale_inv` of DeepSeek; ComfyUI puts the word first: `scale_weight`.
_SCALE = re.compile(r"(?:(\w*?)_)?(?:scales?(?:_inv|_?\d)?|absmax|SCB|quant_map)|scale_(\w+)")
# Words that tell what kind of tensor it is, not what it belongs to.
_KINDS = frozenset(
    {"weight", "weights", "qweight", "kernel", "w", "W", "q", "quant", "quantized", "packed", "block", "blocks"}
    | {"code", "codes", "data", "qdata", "int", "int4", "int8", "uint4", "uint8", "fp4", "fp8", "nf4"}
)


def quantized(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Find quantized weights by dtype and names.

    Names alone prove nothing: a float weight with a learned scale is none, and neither are indices beside a scale.

    Returns:
        (name of the codes, name of their scales), or None.
    """
    codes = {
        name: tensor.dtype
        for name, tensor in tensors.items()
        if isinstance(tensor, TensorSpec) and tensor.dtype in _CODE_DTYPES and tensor.shape
    }
    owners = {(name.rpartition(".")[0], _owner(name.rpartition(".")[2])): name for name in codes}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if last in ("absmax", "quant_map") and module in tensors:  # whose codes may be stored as bfloat16
            return module, name
        match = _SCALE.fullmatch(last) if codes else None
        if match is None:
            continue
        found = module if module in codes else owners.get((module, _owner(match[1] or match[2] or "")))
        # A scale of the same 8-bit float dtype is that of a model that was cast as a whole.
        cast = found is not None and codes[found].averaged and codes[found] is getattr(tensor, "dtype", None)
        if found is not None and found != name and not cast:
            return found, name
    return None


def _owner(name: str) -> str:
    """Return what a tensor belongs to, by the last component of its name: ``gate_proj`` for ``gate_proj_blocks``."""
    words = name.split("_")
    while words and (not words[-1] or words[-1] in _KINDS):
        words.pop()
    return "_".join(words)
