"""Quantized weights, with the names and dtypes of the libraries, are refused by `avg`; what only looks so is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ckpt_tools import average
from ckpt_tools.errors import UnsupportedError

FP8 = torch.float8_e4m3fn

# Codes and scales of one layer: names below the layer, dtypes and shapes as the library saves them.
LIBRARIES = {
    "bitsandbytes int8": {"weight": (torch.int8, 8, 4), "SCB": (torch.float32, 8), "bias": (torch.float16, 8)},
    "bitsandbytes nf4": {
        "weight": (torch.uint8, 16, 1),
        "weight.absmax": (torch.uint8, 4),
        "weight.quant_map": (torch.float32, 16),
        "weight.nested_absmax": (torch.float32, 1),
        "weight.quant_state.bitsandbytes__nf4": (torch.uint8, 90),
    },
    "bitsandbytes in bfloat16": {"weight": (torch.bfloat16, 8, 1), "weight.absmax": (torch.float32, 4)},
    "GPTQ and AWQ": {
        "qweight": (torch.int32, 4, 8),
        "qzeros": (torch.int32, 1, 2),
        "scales": (torch.float16, 1, 8),
        "g_idx": (torch.int32, 32),
    },
    "DeepSeek": {"weight": (FP8, 8, 4), "weight_scale_inv": (torch.float32, 1, 1)},
    "ComfyUI": {"weight": (FP8, 8, 4), "scale_weight": (torch.float32,)},
    "compressed-tensors": {"weight_packed": (torch.int32, 8, 4), "weight_scale": (torch.bfloat16, 8, 1)},
    "compressed-tensors fp8": {"weight": (FP8, 8, 4), "weight_scale": (torch.bfloat16, 8, 1)},
    "ModelOpt nvfp4": {
        "weight": (torch.uint8, 8, 4),
        "weight_scale": (FP8, 8, 1),
        "weight_scale_2": (torch.float32,),
        "input_scale": (torch.float32,),
    },
    "gpt-oss": {"gate_up_proj_blocks": (torch.uint8, 2, 8, 4), "gate_up_proj_scales": (torch.uint8, 2, 8)},
    "fused experts": {"w13_weight": (torch.int8, 2, 8, 4), "w13_weight_scale": (torch.float32, 2, 8)},
    "HQQ": {"W_q": (torch.uint8, 8, 4), "scale": (torch.float16, 8, 1), "zero": (torch.float16, 8, 1)},
    "quanto": {"weight._data": (torch.int8, 8, 4), "weight._scale": (torch.float32, 8, 1)},
    "quanto int4": {
        "weight._data._data": (torch.uint8, 8, 4),
        "weight._scale": (torch.float32, 8, 1),
        "weight._shift": (torch.float32, 8, 1),
    },
    "VPTQ": {
        "indices": (torch.int32, 1, 8, 4),
        "centroids.weight": (torch.float16, 1, 64),
        "weight_scale": (torch.float16, 8),
        "perm": (torch.uint16, 8),
    },
    "VPTQ without a norm": {"indices": (torch.int16, 1, 8, 4), "res_centroids.weight": (torch.float16, 1, 64)},
    "torch_int (SmoothQuant)": {"weight": (torch.int8, 8, 4), "bias": (torch.float32, 8), "a": (torch.float32,)},
    "AutoSmoothQuant": {"weight": (torch.int8, 8, 4), "dequant_scale": (torch.float32,)},
    "Ascend W8A8": {"weight": (torch.int8, 8, 4), "deq_scale": (torch.float32, 8), "quant_bias": (torch.int32, 8)},
    "EETQ": {"weight": (torch.int8, 8, 4), "weight_scales": (torch.float16, 4)},
    "Quark": {"weight": (torch.int8, 8, 4), "weight_quantizer.scale": (torch.float32, 8)},
    "HIGGS": {"weight": (torch.int16, 8, 4), "tables": (torch.float16, 16), "tables2": (torch.float32, 16, 16)},
    "QuIP#": {"Qidxs": (torch.int64, 8, 4), "SU": (torch.float16, 4), "Wscale": (torch.float32,)},
    "SpQR": {"dense_weights": (torch.int64, 8, 4), "row_offsets": (torch.int32, 9), "col_vals": (torch.int32, 4)},
    "Marlin": {"B": (torch.int32, 8, 4), "s": (torch.float16, 1, 8), "workspace": (torch.int32, 16)},
    "bitsandbytes fp4": {
        "weight": (torch.uint8, 16, 1),
        "weight.absmax": (torch.float32, 4),
        "weight.quant_state.bitsandbytes__fp4": (torch.uint8, 90),
    },
    "AQLM": {"codes": (torch.int16, 8, 4, 1), "codebooks": (torch.float16, 1, 16, 1), "scales": (torch.float16, 8)},
}


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.rand(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def layer(library: str, seed: int) -> dict[str, Tensor]:
    made = {f"enc.3.fc.{name}": filled(dtype, shape, seed) for name, (dtype, *shape) in LIBRARIES[library].items()}  # type: ignore[arg-type]
    return {"enc.norm.weight": torch.ones(8), **made}


@pytest.mark.parametrize("mode", ["uniform", "ema"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_average_rejects_quantized_weights(library: str, mode: str, tmp_path: Path) -> None:
    for i in range(2):
        save_file(layer(library, i), tmp_path / f"q{i}.safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(UnsupportedError, match=r"q\d\.safetensors: 'enc\.3\.fc\..*' holds quantized.*[Dd]equantize"):
        average([tmp_path / "q0.safetensors", tmp_path / "q1.safetensors"], mode=mode, out=out)
    assert not out.exists()


def test_average_rejects_quantized_weights_in_one_of_two_checkpoints(tmp_path: Path) -> None:
    """Codes without their scales are still codes: `keys` must not leave the evidence out."""
    one, other = layer("DeepSeek", 0), layer("DeepSeek", 1)
    del other["enc.3.fc.weight_scale_inv"]
    for i, state in enumerate((one, other)):
        torch.save({"model": state}, tmp_path / f"q{i}.pth")
    with pytest.raises(UnsupportedError, match=r"q0\.pth: 'enc\.3\.fc\.weight' holds quantized"):
        average(sorted(tmp_path.glob("q*")), keys="intersection", out=tmp_path / "out.pth")


def mean(states: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([state[name].double() for state in states]).mean(0).to(states[0][name].dtype)


def averaged(folder: Path, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    for i, state in enumerate(states):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / f"s{i}.safetensors")
    average(sorted(folder.glob("s*.safetensors")), out=folder / "out.safetensors", force=True)
    return load_file(folder / "out.safetensors")


def swin(seed: int) -> dict[str, Tensor]:
    """Its attention has a learned `logit_scale` beside the integers of `relative_position_index`."""
    torch.manual_seed(seed)
    model = timm.create_model("swinv2_cr_tiny_ns_224", img_size=32, window_size=4, embed_dim=8, num_heads=(1, 1, 1, 1))
    return dict(model.state_dict())


def fake_quantized(seed: int) -> dict[str, Tensor]:
    """Quantization-aware training: float weights, and scales and zero points of what they will be."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    fake = torch.ao.quantization.FakeQuantize.with_args(
        observer=torch.ao.quantization.MovingAveragePerChannelMinMaxObserver,
        qscheme=torch.per_channel_symmetric,
        dtype=torch.qint8,
        quant_min=-128,
        quant_max=127,
        ch_axis=0,
    )
    model[0].weight_fake_quant = fake()
    model[0].weight_fake_quant(model[0].weight)
    return dict(model.state_dict())


def cast_to_fp8(seed: int) -> dict[str, Tensor]:
    state = {"head.logit_scale": (), "attn.weight": (4, 4), "attn.scale": (4,), "attn.weight_scale": (4,)}
    return {name: filled(FP8, shape, seed) for name, shape in state.items()}


def with_indices(seed: int) -> dict[str, Tensor]:
    attention = {"relative_position_index": filled(torch.int64, (4, 4), 0), "mask": filled(torch.uint8, (4, 4), 0)}
    floats = {
        "logit_scale": (2, 1, 1),
        "scale": (2,),
        "weight": (4, 4),
        "weight_scale": (4,),
        "scale_shift_table": (2,),
    }
    learned = {name: filled(torch.float32, shape, seed) for name, shape in floats.items()}
    return {f"blocks.0.attn.{name}": tensor for name, tensor in (attention | learned).items()}


def batch_norm(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    layer = nn.BatchNorm2d(3)
    layer(torch.randn(4, 3, 2, 2))
    return dict(layer.state_dict())


@pytest.mark.parametrize("make", [swin, fake_quantized, cast_to_fp8, with_indices, batch_norm])
def test_average_takes_scales_that_are_not_of_codes(make: Callable[[int], dict[str, Tensor]], tmp_path: Path) -> None:
    states = [make(seed) for seed in (0, 1)]
    found = averaged(tmp_path, states)
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        floating = tensor.dtype.is_floating_point
        torch.testing.assert_close(tensor.float(), (mean(states, name) if floating else states[-1][name]).float())


WORDS = st.sampled_from(["q_proj", "fc", "w", "0", "attn", "experts", "down", "scale_mlp"])


@given(st.lists(WORDS, min_size=1, max_size=4).map(".".join), st.sampled_from([torch.int8, torch.uint8, FP8]))
def test_average_rejects_codes_by_dtype_and_scale_in_any_module(
    tmp_path: Path, module: str, dtype: torch.dtype
) -> None:
    """Codes are refused, the same names in float16 are averaged."""
    for number_format, refused in ((dtype, True), (torch.float16, False)):
        states = [
            {
                f"{module}.weight": filled(number_format, (4, 4), seed),
                f"{module}.weight_scale": filled(torch.float32, (4, 1), seed),
            }
            for seed in (0, 1)
        ]
        if refused:
            with pytest.raises(UnsupportedError, match="holds quantized weights"):
                averaged(tmp_path, states)
        else:
            found = averaged(tmp_path, states)
            assert all(torch.equal(found[name], mean(states, name)) for name in found)
