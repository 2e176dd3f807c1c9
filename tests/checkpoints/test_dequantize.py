"""`dequantize`: 8-bit floats times their scales, by the rule of the libraries that write them."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load
from crafting import same
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckpt_tools
from ckpt_tools.errors import LayoutError, NumericsError, ReadError, UnsupportedError

FP8 = torch.float8_e4m3fn


def codes(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = FP8) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(100).clamp(-400, 400).to(dtype)


def scales(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)).add(0.1).mul(1e-3).to(dtype)


def products(codes: Tensor, scales: Tensor, block: tuple[int, ...] | None = None) -> Tensor:
    """The published rule: a float32 product, each code with the scale of its block."""
    wide = scales.to(torch.float32)
    for axis, size in enumerate(block or ()):
        wide = wide.repeat_interleave(size, axis).narrow(axis, 0, codes.shape[axis])
    return codes.to(torch.float32) * wide


def rounded(values: Tensor) -> Tensor:
    """Round float64 to bfloat16 once, to nearest, ties to even; torch does it by way of float32."""
    mantissa, exponent = np.frexp(values.numpy())
    return torch.from_numpy(np.ldexp(np.rint(mantissa * 256) / 256, exponent)).to(torch.bfloat16)


def deepseek(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer as DeepSeek-V3 stores it, and what its fp8_cast_bf16.py makes of it."""
    made: dict[str, Tensor] = {"norm.weight": torch.rand(300).add(seed).to(torch.bfloat16)}
    expected = dict(made)
    for name, (m, n) in {"mlp.up": (300, 520), "mlp.down": (128, 256), "attn.q": (7, 130)}.items():
        w, s = codes((m, n), seed), scales((-(-m // 128), -(-n // 128)), seed)
        made |= {f"{name}.weight": w, f"{name}.weight_scale_inv": s}
        expected[f"{name}.weight"] = products(w, s, (128, 128)).to(torch.bfloat16)
    return made, expected


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)


def test_blocks_become_bfloat16_by_the_published_rule(tmp_path: Path) -> None:
    made, expected = deepseek()
    save_file(made, tmp_path / "q.safetensors")
    ckpt_tools.convert(tmp_path / "q.safetensors", dequantize=True, out=tmp_path / "w.safetensors")
    assert equal(load_file(tmp_path / "w.safetensors"), expected)


def test_dtype_chooses_another_one(tmp_path: Path) -> None:
    made, _ = deepseek()
    save_file(made, tmp_path / "q.safetensors")
    ckpt_tools.convert(tmp_path / "q.safetensors", dequantize=True, dtype="float32", out=tmp_path / "w.pth")
    found = load(tmp_path / "w.pth")
    up = products(made["mlp.up.weight"], made["mlp.up.weight_scale_inv"], (128, 128))
    assert same(found["mlp.up.weight"], up)


@pytest.mark.parametrize("mode", ["uniform", "ema"])
def test_averages_sum_the_products_in_float64_and_round_once(mode: str, tmp_path: Path) -> None:
    weights = [0.2, 0.8] if mode == "ema" else [0.5, 0.5]
    states = [deepseek(seed)[0] for seed in (0, 1)]
    for i, state in enumerate(states):
        save_file(state, tmp_path / f"q-{i}.safetensors")
    options: Any = {"mode": "weights", "weights": weights}
    ckpt_tools.average(sorted(tmp_path.glob("q*")), dequantize=True, out=tmp_path / "w.safetensors", **options)
    found = load_file(tmp_path / "w.safetensors")
    for name in ("mlp.up", "attn.q"):
        wide = [products(s[f"{name}.weight"], s[f"{name}.weight_scale_inv"], (128, 128)).double() for s in states]
        assert found[f"{name}.weight"].equal(rounded(wide[0] * weights[0] + wide[1] * weights[1]))
    assert not any("scale" in name for name in found)


def test_one_file_of_codes_and_one_of_weights_are_averaged_together(tmp_path: Path) -> None:
    made, expected = deepseek()
    save_file(made, tmp_path / "q-1.safetensors")
    save_file({name: tensor.float() for name, tensor in expected.items()}, tmp_path / "q-2.safetensors")
    ckpt_tools.average(sorted(tmp_path.glob("q*")), dequantize=True, dtype="bf16", out=tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    want = (
        products(made["mlp.up.weight"], made["mlp.up.weight_scale_inv"], (128, 128)) + expected["mlp.up.weight"]
    ) / 2
    assert torch.allclose(found["mlp.up.weight"].float(), want, rtol=2**-7)


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "shape", "grid", "block"),
    [
        ("weight_scale", (6, 40), (), (6, 40)),
        ("weight_scale", (6, 40), (1,), (6, 40)),
        ("weight_scale", (6, 40), (6, 1), (1, 40)),
        ("scale_weight", (6, 40), (), (6, 40)),
        ("weight_scale_inv", (3, 200, 140), (3, 2, 2), (1, 128, 128)),
        ("weight_scale", (3, 20, 14), (3, 1, 14), (1, 20, 1)),
        ("weight_scale", (3, 20, 14), (3, 1, 1), (1, 20, 14)),
        ("weight_scale", (5,), (1,), (5,)),
    ],
)
def test_scales_of_tensors_rows_and_experts(
    name: str,
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    block: tuple[int, ...],
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    w, s = codes(shape, 3, dtype), scales(grid, 3, scale_dtype)
    torch.save({"model": {"fc.weight": w, f"fc.{name}": s, "fc.bias": torch.ones(2)}}, tmp_path / "q.pth")
    ckpt_tools.average(tmp_path / "q.pth", dequantize=True, out=tmp_path / "w.pth")
    found = load(tmp_path / "w.pth")["model"]
    whole = s.reshape((1,) * len(shape)) if s.numel() == 1 else s
    assert equal(found, {"fc.weight": products(w, whole, block).to(torch.bfloat16), "fc.bias": torch.ones(2)})


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.sampled_from([2, 5, 16, 128]), st.sampled_from([1, 3, 32, 128])),
    st.booleans(),
)
def test_any_block_that_the_configuration_names(
    tmp_path: Path, shape: tuple[int, int], block: tuple[int, int], transposed: bool
) -> None:
    grid = tuple(-(-size // each) for size, each in zip(shape, block, strict=True))
    w, s = codes(shape), scales(grid)
    stored = w.view(torch.uint8).T.contiguous().view(FP8).T if transposed else w
    folder = tmp_path / "in"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.save({"fc.weight": stored, "fc.weight_scale_inv": s}, folder / "pytorch_model.bin")
    config = {"a": 1, "quantization_config": {"quant_method": "fp8", "weight_block_size": [*block]}}
    (folder / "config.json").write_text(json.dumps(config))
    ckpt_tools.convert(folder, dequantize=True, dtype="float32", out=tmp_path / "w.pth", force=True)
    # A grid with one scale for each element of an axis, or with one for all, is that whatever the block is.
    assert same(load(tmp_path / "w.pth")["fc.weight"], products(w, s, block))


def folder_of(path: Path, seed: int) -> Path:
    path.mkdir()
    made, _ = deepseek(seed)
    half = len(made) // 2
    files = {"model-00001-of-00002.safetensors": [*made][:half], "model-00002-of-00002.safetensors": [*made][half:]}
    for name, keys in files.items():
        save_file({key: made[key] for key in keys}, path / name)
    index = {"metadata": {}, "weight_map": {key: name for name, keys in files.items() for key in keys}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "m", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize("job", ["average", "convert"])
def test_a_folder_loses_its_quantization_config(job: str, tmp_path: Path) -> None:
    """The scale of a tensor may be in another shard than its codes."""
    folders = [folder_of(tmp_path / f"step-{i}", i) for i in (0, 1)]
    if job == "average":
        ckpt_tools.average(folders, dequantize=True, out=tmp_path / "out")
    else:
        ckpt_tools.convert(folders[1], dequantize=True, out=tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "m"}
    assert (tmp_path / "out/tokenizer.json").exists()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == deepseek()[1].keys()
    with safe_open(tmp_path / "out" / index["mlp.up.weight"], "pt") as file:
        found = file.get_tensor("mlp.up.weight")
    one, two = (deepseek(i)[0] for i in (0, 1))
    wide = [products(s["mlp.up.weight"], s["mlp.up.weight_scale_inv"], (128, 128)) for s in (one, two)]
    want = wide[1] if job == "convert" else (wide[0].double() + wide[1].double()) / 2
    assert found.equal(rounded(want.double()))
    assert json.loads((folders[0] / "config.json").read_text())["quantization_config"]


def test_scales_of_inputs_and_comfyuis_mark_go_too(tmp_path: Path) -> None:
    state = {"fc.weight": codes((4, 3)), "fc.scale_weight": scales(()), "fc.scale_input": scales(()),
             "scaled_fp8": torch.empty(2).to(FP8), "logit_scale": torch.ones(())}  # fmt: skip
    save_file(state, tmp_path / "q.safetensors")
    report = ckpt_tools.convert(tmp_path / "q.safetensors", dequantize=True, out=tmp_path / "w.safetensors")
    assert set(load_file(tmp_path / "w.safetensors")) == {"fc.weight", "logit_scale"}
    assert {"*.scale_weight", "*.scale_input", "scaled_fp8"} <= set(report.dropped)


def test_the_result_is_the_same_with_any_slices_and_threads(tmp_path: Path) -> None:
    made = {"a.weight": codes((1000, 700)), "a.weight_scale_inv": scales((8, 6))}
    save_file(made, tmp_path / "q.safetensors")
    outs = []
    for threads in (1, 3):
        out = tmp_path / f"w{threads}.safetensors"
        ckpt_tools.convert(tmp_path / "q.safetensors", dequantize=True, threads=threads, out=out)
        outs.append(out.read_bytes())
    assert outs[0] == outs[1]
    assert same(
        load_file(out)["a.weight"],
        products(*made.values(), (128, 128)).to(torch.bfloat16),  # type: ignore[call-arg]
    )


def test_codes_that_are_nan_are_refused(tmp_path: Path) -> None:
    w = codes((4, 300))
    w.view(torch.uint8)[2, 130] = 0x7F
    save_file({"a.weight": w, "a.weight_scale_inv": scales((1, 3))}, tmp_path / "q.safetensors")
    with pytest.raises(NumericsError, match=r"'a\.weight' holds NaN at \[2, 130\]"):
        ckpt_tools.convert(tmp_path / "q.safetensors", dequantize=True, out=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "state",
    [
        {"a.weight": codes((300, 300)), "a.weight_scale_inv": scales((4, 4))},  # no blocks of 128
        {"a.weight": torch.ones(8, 4).to(torch.int8), "a.weight_scale": scales((8, 1))},
        {"a.weight": codes((8, 4)), "a.weight_scale": scales((8, 1)), "a.weight_scale_2": scales(())},
        {"a.weight": codes((8, 4)), "a.weight_scale": scales((8, 1)), "a.weight_scale_inv": scales((1, 1))},
        {"a.weight": codes((300, 400)), "a.weight_scale": scales((300, 400))},  # as many as codes
        {"a.weight": codes((8, 4)), "a.weight_scale": scales((8, 1)), "a.weight_zero_point": scales((8, 1))},
    ],
)
def test_other_codes_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "q.safetensors")
    with pytest.raises(LayoutError, match=r"does not know how 'a\.weight_scale.*' scales 'a\.weight'"):
        ckpt_tools.convert(tmp_path / "q.safetensors", dequantize=True, out=tmp_path / "w.safetensors")


def test_weights_without_codes_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "q.safetensors")
    with pytest.raises(LayoutError, match="nothing to dequantize"):
        ckpt_tools.average(tmp_path / "q.safetensors", dequantize=True, out=tmp_path / "w.safetensors")


def test_refusals_name_the_option(tmp_path: Path) -> None:
    made, _ = deepseek()
    for i in range(2):
        save_file(made, tmp_path / f"q{i}.safetensors")
    with pytest.raises(UnsupportedError, match=r"holds quantized weights.*Add `dequantize=True`"):
        ckpt_tools.average(tmp_path / "q0.safetensors", out=tmp_path / "w.safetensors")
    with pytest.raises(UnsupportedError, match=r"`dtype` would change both. Add `dequantize=True`"):
        ckpt_tools.convert(tmp_path / "q0.safetensors", dtype="float16", out=tmp_path / "w.safetensors")


@pytest.mark.parametrize("given", ["model.safetensors", "inner/model.safetensors", "inner", "."])
@pytest.mark.parametrize("job", ["average", "convert"])
def test_no_configuration_in_the_output_calls_its_weights_quantized(job: str, given: str, tmp_path: Path) -> None:
    made, _ = deepseek()
    run = tmp_path / "run"
    path = run / given
    (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
    save_file(made, path if path.suffix else path / "model.safetensors")
    config = {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}, "hidden_size": 4}
    (run / "config.json").write_text(json.dumps(config))
    getattr(ckpt_tools, job)(path, dequantize=True, out=tmp_path / "out")
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert found == {"model_type": "deepseek_v3", "hidden_size": 4}


@pytest.mark.parametrize("size", [["128", "128"], [-1, 128], [0], [], [True, True], [128.0, 128.0], 128, {}])
def test_blocks_of_no_size_are_refused(size: object, tmp_path: Path) -> None:
    made, _ = deepseek()
    save_file(made, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"weight_block_size": size}}))
    with pytest.raises(LayoutError, match=r"as weight_block_size, which are no sizes of blocks\. Correct it"):
        ckpt_tools.convert(tmp_path / "model.safetensors", dequantize=True, out=tmp_path / "w.safetensors")


@pytest.mark.parametrize("kind", ["pipe", "endless", "huge", "folder", "dangling"])
def test_what_is_no_configuration_is_never_read(kind: str, tmp_path: Path) -> None:
    """A pipe would block, and a device never ends."""
    made, expected = deepseek()
    (tmp_path / "q").mkdir()
    save_file(made, tmp_path / "q/model.safetensors")
    config = tmp_path / "q/config.json"
    if kind == "pipe":
        os.mkfifo(config)
    elif kind == "huge":
        with config.open("wb") as file:
            file.truncate(50 << 30)
    elif kind == "folder":
        config.mkdir()
    else:
        config.symlink_to("/dev/zero" if kind == "endless" else tmp_path / "nothing")
    job = functools.partial(ckpt_tools.average, tmp_path / "q", out=tmp_path / "out")
    if kind == "huge":
        with pytest.raises(ReadError, match=r"config\.json: \d+ bytes are too many"):
            job(dequantize=True)
        return
    job(dequantize=True)
    assert load_file(tmp_path / "out/model.safetensors").keys() == expected.keys()


def test_codes_that_lost_their_scales_are_refused(tmp_path: Path) -> None:
    made, _ = deepseek()
    del made["mlp.down.weight_scale_inv"]
    save_file(made, tmp_path / "q.safetensors")
    with pytest.raises(LayoutError, match=r"'mlp\.down\.weight' has no scales beside it, and other 8-bit floats have"):
        ckpt_tools.convert(tmp_path / "q.safetensors", dequantize=True, out=tmp_path / "w.safetensors")
