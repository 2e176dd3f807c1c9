"""Files whose headers are identical are averaged as one checkpoint in several files, by the rules of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckpt_tools import average
from ckpt_tools.errors import AlignmentError, LayoutError, NumericsError
from ckpt_tools.formats import read_header

FILES = 4


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"layers.{i}.weight" for i in range(7)]
    made = {name: torch.randn(3 + i, 5, generator=generator) for i, name in enumerate(names)}
    half = torch.randn(9, generator=generator).bfloat16()
    return made | {"half": half, "bn.running_var": torch.rand(6, generator=generator), "n": torch.tensor(seed)}


def saved(folder: Path, suffix: str, make: Callable[[int], Any] = tensors) -> list[Path]:
    paths = [folder / f"step_{i}{suffix}" for i in range(FILES)]
    for i, path in enumerate(paths):
        save_file(make(i), path) if suffix == ".safetensors" else torch.save(make(i), path)
    headers = [read_header(path) for path in paths]
    assert len({header.template for header in headers}) == 1
    assert headers[0].template is not None
    return paths


def loaded(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    return found


def mean(name: str, weights: list[float]) -> Tensor:
    rows = [tensors(i)[name] for i in range(FILES)]
    total = sum(row.double() * weight for row, weight in zip(rows, weights, strict=True))
    assert isinstance(total, Tensor)
    return total.to(rows[0].dtype)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("weights", [[0.25] * 4, [0.5, 0.0, 0.375, 0.125], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
def test_average_sums_files_with_identical_headers(suffix: str, weights: list[float], tmp_path: Path) -> None:
    paths, out = saved(tmp_path, suffix), tmp_path / f"out{suffix}"
    report = average(paths, mode="weights", weights=weights, normalize=False, buffers="last", out=out)
    found = loaded(out)
    assert found.keys() == tensors(0).keys()
    for name, tensor in found.items():
        kept = name in ("n", "bn.running_var")
        expected = tensors(FILES - 1)[name] if kept else mean(name, weights)
        torch.testing.assert_close(tensor, expected, rtol=2**-23 if tensor.dtype == torch.float32 else 0, atol=0)
    assert [i.coefficient for i in report.inputs] == weights
    assert set(report.averaged) == (set(found) - {"n", "bn.running_var"} if 1.0 not in weights else set())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_average_writes_the_same_with_a_file_whose_header_differs(suffix: str, tmp_path: Path) -> None:
    """The same weights, once in equal files, once with the names of one file in another order."""
    paths = saved(tmp_path, suffix)
    average(paths, out=tmp_path / f"identical{suffix}")
    state = dict(reversed(tensors(1).items()))
    if suffix == ".pth":
        torch.save(state, paths[1])
    else:
        save_file(state, paths[1], metadata={"another": "header"})
    assert read_header(paths[1]).template is not read_header(paths[0]).template
    report = average(paths, out=tmp_path / f"others{suffix}")
    identical, others = loaded(tmp_path / f"identical{suffix}"), loaded(tmp_path / f"others{suffix}")
    assert all(torch.equal(identical[name], others[name]) for name in (*identical, *others))
    assert report.inputs[1].prefixes == ()


def test_average_takes_wrapped_tied_and_strided_tensors_of_identical_headers(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        tied = torch.randn(4, 3)
        return {"module.a": tied, "module.b": tied, "module.t": torch.randn(3, 2).t(), "module.e": torch.empty(0)}

    paths, out = saved(tmp_path, ".pth", make), tmp_path / "out.pth"
    report = average(paths, out=out)
    found = torch.load(out)
    assert list(found) == ["a", "b", "t", "e"]
    assert report.tied == ("b",)
    assert all(i.prefixes == ("module.",) for i in report.inputs)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    for name, tensor in found.items():
        expected = torch.stack([make(i)[f"module.{name}"].double() for i in range(FILES)]).mean(0).float()
        torch.testing.assert_close(tensor, expected, rtol=2**-23, atol=0)


def test_average_rejects_identical_headers_of_which_one_is_an_average_by_its_name(tmp_path: Path) -> None:
    for i, name in enumerate(["ema_0.999_1.pt", "model_2.pt"]):
        torch.save(tensors(i), tmp_path / name)
    with pytest.raises(LayoutError, match=r"ema_0\.999_1\.pt holds EMA weights, model_2\.pt does not"):
        average(sorted(tmp_path.glob("*.pt")), out=tmp_path / "out.pth")


def test_average_rejects_unsupported_tensors_of_identical_headers(tmp_path: Path) -> None:
    paths = saved(tmp_path, ".pth", lambda i: {"w": torch.ones(2), "s": torch.ones(2).to_sparse()})
    with pytest.raises(AlignmentError, match=r"step_\d\.pth: 's' is .*sparse.*cannot be averaged"):
        average(paths, out=tmp_path / "out.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_average_names_tensor_and_file_of_a_value_that_is_not_finite(suffix: str, tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Tensor]:
        made = tensors(seed)
        if seed == 2:
            made["layers.4.weight"][1, 2] = torch.nan
        return made

    paths, out = saved(tmp_path, suffix, make), tmp_path / f"out{suffix}"
    with pytest.raises(
        NumericsError, match=rf"'layers\.4\.weight'.*step_2{suffix}|step_2{suffix}.*'layers\.4\.weight'"
    ):
        average(paths, out=out)
    assert not out.exists()
    average(paths, out=out, allow_nonfinite=True)
    found = loaded(out)
    for name in (f"layers.{i}.weight" for i in range(7)):
        expected = torch.stack([make(i)[name].double() for i in range(FILES)]).mean(0).float()
        torch.testing.assert_close(found[name], expected, rtol=2**-23, atol=0, equal_nan=True)
