"""Quantized weights: codes that stand for weights only together with the scales beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import LayoutError
from ..formats.header import Header
from ..formats.json_file import read_json
from ..tensors import DTYPES, Category, ScaledSpec, Tensor, TensorSpec
from .layouts import StateDict

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
# Codes whose partner has no name of a scale: name of the codes, and names beside it.
_PARTNERS = (
    (re.compile(r"(res_|outlier_)?indices"), ("centroids", "res_centroids", "outlier_centroids")),  # VPTQ
    (re.compile(r"Qidxs(_\w+)?"), ("SU", "SV", "Wscale", "codebook_id")),  # QuIP#
    (re.compile(r"dense_weights"), ("row_offsets", "col_vals")),  # SpQR
    (re.compile(r"B"), ("s",)),  # Marlin
    (re.compile(r"weight"), ("a", "dequant_scale", "deq_scale", "quant_scale", "weight_quantizer", "tables")),
    # the last of torch_int (SmoothQuant), AutoSmoothQuant, Ascend, Quark and HIGGS
)

_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
# Scales are read as a whole, so there must be few: one for 16 codes is the most that a library has.
_FEWEST, _FEW = 16, 1 << 16
_USUAL_BLOCK = 128  # of DeepSeek-V3, and of those that follow it
# Scales of activations, which no weights of a wider dtype need, and ComfyUI's mark of scaled weights.
_OF_INPUTS = ("input_scale", "scale_input", "activation_scale", "input_scale_inv", "input_zero_point")
_MARK = "scaled_fp8"
CONFIGURED = ("quantization_config", "compression_config")
"""Entries of a ``config.json`` that say that the weights are quantized."""


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
    owners = {(place, _owner(last)): name for name in codes for place, last in (_place(name),)}
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
    return _with_partner(tensors, codes)


def way_on(tensors: Mapping[str, Tensor], codes: str) -> str:
    """Say how to average quantized weights: the begin of a sentence."""
    if codes in dequantizable(tensors):
        return "Add `dequantize=True` to average the weights that they stand for"
    return "Dequantize the checkpoints, average them"


def _with_partner(tensors: Mapping[str, Tensor], codes: Mapping[str, Any]) -> tuple[str, str] | None:
    likely = [
        (name, partners)
        for name, dtype in codes.items()
        for words, partners in _PARTNERS
        if words.fullmatch(name.rpartition(".")[2]) and dtype.category is Category.INTEGER
    ]
    children: dict[str, str] = {}  # a tensor, or the first one in a module
    for name in tensors if likely else ():
        children[name] = name
        children.setdefault(name.rpartition(".")[0], name)
    for name, partners in likely:
        lead = name.rpartition(".")[0]
        beside = (children.get(f"{lead}.{partner}".lstrip(".")) for partner in partners)
        if (partner := next((each for each in beside if each is not None), None)) is not None:
            return name, partner
    return None


def _place(name: str) -> tuple[str, str]:
    """Return the module of a tensor and its last component; quanto has 4-bit codes in ``weight._data._data``."""
    module, _, last = name.rpartition(".")
    while last == "_data" and module.endswith("._data"):
        module = module.removesuffix("._data")
    return module, last


def _owner(name: str) -> str:
    """Return what a tensor belongs to, by the last component of its name: ``gate_proj`` for ``gate_proj_blocks``."""
    words = name.split("_")
    while words and (not words[-1] or words[-1] in _KINDS):
        words.pop()
    return "_".join(words)


def dequantizable(
    tensors: Mapping[str, Tensor], blocks: tuple[int, ...] | None = None
) -> dict[str, tuple[str, ScaledSpec]]:
    """Find 8-bit floats with scales by which they are to be multiplied: one for a tensor, for each row, or for blocks.

    So have it DeepSeek-V3 (``weight_scale_inv``, for blocks), compressed-tensors, FBGEMM and ModelOpt
    (``weight_scale``), and ComfyUI (``scale_weight``).

    Args:
        blocks: elements of a block along the last axes; 128 each if the checkpoint does not say it.

    Returns:
        Name of the codes to (name of the scales, the products).
    """
    found = {}
    for name, codes in tensors.items():
        if not isinstance(codes, TensorSpec) or codes.dtype.name not in _FLOAT8 or not codes.numel or codes.computed:
            continue
        module, dot, last = name.rpartition(".")
        likely = (f"{name}_scale_inv", f"{name}_scale", f"{module}{dot}scale_{last}")
        beside = [scale for scale in (*likely, f"{name}_zero_point", f"{name}_scale_2") if scale in tensors]
        if len(beside) != 1 or not isinstance(scales := tensors[beside[0]], TensorSpec):
            continue
        block = _block(codes.shape, scales, blocks)
        if block is not None and scales.numel <= max(codes.numel // _FEWEST, _FEW):
            found[name] = beside[0], ScaledSpec.of(codes, scales, block)
    return found


def _block(shape: tuple[int, ...], scales: TensorSpec, blocks: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the elements of a block along each axis; None if a grid of scales does not fit."""
    one = scales.dtype.name == "float8_e8m0fnu" or (scales.dtype.averaged and scales.dtype.itemsize > 1)
    if not one or scales.dtype.category is Category.COMPLEX:
        return None
    if scales.numel == 1:
        return shape
    if len(scales.shape) != len(shape):
        return None
    known = (*(1,) * (len(shape) - len(blocks)), *blocks) if blocks else (_USUAL_BLOCK,) * len(shape)
    found = []
    for size, grid, each in zip(shape, scales.shape, known[-len(shape) :], strict=True):
        own = size if grid == 1 else 1 if grid == size else each
        if -(-size // own) != grid:
            return None
        found.append(own)
    return tuple(found)


def dequantized(header: Header, state: StateDict) -> StateDict:
    """Return the weights that codes and scales of 8-bit floats stand for; scales are no part of them.

    Raises:
        LayoutError: codes without scales that fit, or blocks of no size.
        ReadError: the ``config.json`` beside them cannot be read.
    """
    found = dequantizable(state.tensors, _blocks(header))
    modules = {name.rpartition(".")[0] for name in found}
    gone = {scale for scale, _ in found.values()}
    for name in state.tensors:
        module, _, last = name.rpartition(".")
        if name == _MARK or (module in modules and last.endswith(_OF_INPUTS)):
            gone.add(name)
    tensors = {
        name: found[name][1] if name in found else tensor for name, tensor in state.tensors.items() if name not in gone
    }
    if (other := quantized(tensors)) is not None:
        raise LayoutError(
            f"{header.path}: `dequantize` does not know how '{other[1]}' scales '{other[0]}'. It takes 8-bit floats "
            "with one scale for a tensor, for each row, or for blocks of 128 by 128 or as config.json has it. "
            "Dequantize the checkpoint with its library."
        )
    bare = next((name for name, tensor in tensors.items() if found and _is_code(tensor)), None)
    if bare is not None:
        raise LayoutError(
            f"{header.path}: '{bare}' has no scales beside it, and other 8-bit floats have, so what it stands for is "
            "not certain. Is the checkpoint complete? Else dequantize it with its library."
        )
    words = dict.fromkeys(f"*.{name.rpartition('.')[2]}" if "." in name else name for name in sorted(gone))
    return replace(state, tensors=tensors, other_set=(*state.other_set, *words))


def refuse_without_scales(header: Header, states: Iterable[StateDict]) -> None:
    """Refuse to dequantize what is not quantized.

    Args:
        states: as `dequantized` returns them.

    Raises:
        LayoutError: none of them has codes and scales.
    """
    if not any(type(tensor) is ScaledSpec for state in states for tensor in state.tensors.values()):
        raise LayoutError(
            f"{header.path}: holds no 8-bit floats with scales beside them, so there is nothing to dequantize. "
            "Leave `dequantize` out."
        )


def _is_code(tensor: Tensor) -> bool:
    return isinstance(tensor, TensorSpec) and tensor.dtype.name in _FLOAT8 and len(tensor.shape) > 1


def _blocks(header: Header) -> tuple[int, ...] | None:
    config = configuration(header).get("quantization_config")
    size = config.get("weight_block_size") if isinstance(config, dict) else None
    if size is None:
        return None
    if isinstance(size, list) and size and all(type(each) is int and each > 0 for each in size):
        return tuple(size)
    raise LayoutError(
        f"{header.path}: its config.json has {size!r} as weight_block_size, which are no sizes of blocks. Correct "
        "it: two whole numbers, as the library that made the checkpoint has them."
    )


def configuration(header: Header, name: str = "config.json") -> dict[str, Any]:
    """Return a JSON file beside the weights; empty if there is none.

    Raises:
        ReadError: it is not valid.
    """
    return read_json((header.path if header.in_folder else header.path.parent) / name)


def without_quantization(companions: Iterable[Path]) -> Iterator[tuple[str, bytes | None]]:
    """Yield (name, new content) of the files beside weights that say that these are quantized; None for no file.

    Args:
        companions: the files that an output folder takes over, wherever they are.

    Raises:
        ReadError: one of them is not valid.
    """
    for path in companions:
        if path.name == "config.json":
            config = read_json(path)
            kept = {key: value for key, value in config.items() if key not in CONFIGURED}
            if len(kept) < len(config):
                yield path.name, (json.dumps(kept, indent=2) + "\n").encode()
        elif path.name == "hf_quant_config.json":  # of ModelOpt
            yield path.name, None
