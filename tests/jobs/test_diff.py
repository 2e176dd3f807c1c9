"""Diffing: what differs is found and measured, against NumPy in float64; what is said to be the same is the same."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ckpt_tools
from ckpt_tools.compute import compare as comparing
from ckpt_tools.errors import LayoutError, ReadError, UsageError

Save = Callable[..., Path]
NAN, INF = float("nan"), float("inf")


def only(report: ckpt_tools.DiffReport) -> Any:
    (tensor,) = report.tensors
    return tensor


def oracle(a: np.ndarray, b: np.ndarray, rtol: float, atol: float) -> tuple[int, int, float, float]:
    """Differing, beyond the tolerance, largest absolute and largest relative difference."""
    gap = np.abs(a - b)
    scale = np.maximum(np.abs(a), np.abs(b))
    relative = np.divide(gap, scale, out=np.zeros_like(gap), where=scale > 0)
    return int((gap > 0).sum()), int((gap > atol + rtol * np.abs(b)).sum()), float(gap.max()), float(relative.max())


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(("rtol", "atol"), [(0.0, 0.0), (0.05, 0.0), (0.0, 0.01), (0.02, 0.003)])
def test_diff_equals_numpy_in_float64(save: Save, dtype: str, rtol: float, atol: float) -> None:
    a = torch.randn(300, 7)
    b = torch.where(torch.rand(300, 7) < 0.5, a, a * (1 + 0.1 * torch.randn(300, 7)))
    a[0], b[1] = 0.0, 0.0
    a, b = (x.to(getattr(torch, dtype)) for x in (a, b))
    found = only(ckpt_tools.diff(save("a.pth", {"w": a}), save("b.pth", {"w": b}), rtol=rtol, atol=atol))
    want = oracle(a.double().numpy(), b.double().numpy(), rtol, atol)
    assert (found.differing, found.beyond, found.max_abs, found.max_rel) == want
    assert (found.values, found.nonfinite, found.dtype) == (2100, 0, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float8_e5m2"])
def test_distance_and_angle_equal_numpy_whatever_is_the_same_in_both(save: Save, dtype: str) -> None:
    kind = getattr(torch, dtype)
    a = {"w": torch.randn(70, 7).to(kind), "same": torch.randn(40).to(kind), "turned": torch.randn(20, 30).to(kind)}
    a["same"][3] = NAN if dtype != "float64" else INF
    b = {"w": (a["w"].float() + 0.1 * torch.randn(70, 7)).to(kind), "same": a["same"].clone()}
    b["turned"] = torch.randn(30, 20).to(kind).t()
    report = ckpt_tools.diff(save("a.pth", a | {"n": torch.arange(9)}), save("b.pth", b | {"n": torch.arange(9) * 7}))
    x, y = (
        np.concatenate([each[name].double().nan_to_num(0, 0, 0).numpy().ravel() for name in a]).astype(np.longdouble)
        for each in (a, b)
    )
    want = (np.linalg.norm(x - y), np.linalg.norm(x), np.linalg.norm(y))
    assert report.norms is not None
    assert (report.norms.distance, report.norms.a, report.norms.b) == pytest.approx(want, rel=1e-14)
    assert report.norms.relative == pytest.approx(want[0] / max(want[1:]), rel=1e-14)
    assert report.norms.cosine == pytest.approx(x @ y / (want[1] * want[2]), rel=1e-14)
    order = {each.name: each.norms.relative for each in report.tensors if each.norms is not None}
    assert list(order) == sorted(order, key=lambda name: -order[name]) == ["turned", "w"]


@pytest.mark.parametrize("scale", [1e-10, -1e-13, 1e-17])
def test_the_angle_of_vectors_of_very_different_lengths_is_exact(save: Save, scale: float) -> None:
    a = torch.randn(1000, dtype=torch.float64)
    norms = ckpt_tools.diff(save("a.pth", {"w": a}), save("b.pth", {"w": scale * a})).norms
    assert norms is not None
    assert norms.cosine == pytest.approx(math.copysign(1.0, scale), rel=1e-12)


def test_vectors_without_a_length_or_beyond_float64_have_no_angle(save: Save) -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    norms = ckpt_tools.diff(save("a.pth", {"w": zero}), save("b.pth", {"w": one})).norms
    assert norms is not None
    assert (norms.relative, norms.cosine) == (1.0, None)
    huge = ckpt_tools.diff(save("a.pth", {"w": zero.double() + 1e200}), save("b.pth", {"w": one.double()}))
    assert huge.norms is None
    large = torch.full((1,), 1.2e154, dtype=torch.float64)  # whose square is finite, and the sum of two is not
    two = ckpt_tools.diff(
        save("a.pth", {"v": large, "w": large.clone()}), save("b.pth", {"v": -large, "w": large + 1e140})
    )
    assert two.norms is None
    assert [each.norms and (each.norms.a, each.norms.cosine) for each in two.tensors] == [None, (1.2e154, 1.0)]
    tiny = torch.full((3,), 1e-170, dtype=torch.float64)  # whose squares are less than the smallest float64
    assert ckpt_tools.diff(save("a.pth", {"w": tiny}), save("b.pth", {"w": 2 * tiny})).norms is None
    counters = ckpt_tools.diff(save("a.pth", {"n": torch.arange(3)}), save("b.pth", {"n": torch.arange(3) + 1}))
    assert counters.norms is None


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("slice_size", [7, 64, 100_000])
def test_diff_does_not_depend_on_slices_or_threads(save: Save, threads: int, slice_size: int) -> None:
    a, b = {"w": torch.randn(50, 33), "n": torch.arange(99)}, {"w": torch.randn(50, 33), "n": torch.arange(99) * 3}
    files = [ckpt_tools.open_checkpoint(save(f"{n}.pth", s)) for n, s in (("a", a), ("b", b))]
    pairs = [(files[0].specs[name], files[1].specs[name]) for name in a]
    w, n = comparing.compare(pairs, threads=threads, slice_size=slice_size)  # type: ignore[arg-type]
    assert (w.differing, w.max_abs, w.max_rel) == tuple(
        oracle(a["w"].double().numpy(), b["w"].double().numpy(), 0, 0)[i] for i in (0, 2, 3)
    )
    assert (n.values, n.differing, n.max_abs) == (99, 98, 2 * 98)


def test_diff_compares_complex_values_by_their_parts(save: Save) -> None:
    a, b = torch.randn(40, dtype=torch.complex64), torch.randn(40, dtype=torch.complex64)
    found = only(ckpt_tools.diff(save("a.pth", {"w": a}), save("b.pth", {"w": b})))
    want = oracle(torch.view_as_real(a).double().numpy(), torch.view_as_real(b).double().numpy(), 0, 0)
    assert (found.differing, found.beyond, found.max_abs, found.max_rel) == want
    assert found.values == 80


@pytest.mark.parametrize(
    ("a", "b", "dtype", "gap"),
    [
        (2**60, 2**60 + 1, "int64", 1.0),
        (-(2**63), 2**63 - 1, "int64", 2.0**64 - 1),
        (2**63, 2**64 - 1, "uint64", 2.0**63 - 1),
        (0, 2**64 - 1, "uint64", 2.0**64 - 1),
        (-128, 127, "int8", 255.0),
        (0, 2**32 - 1, "uint32", 2.0**32 - 1),
        (False, True, "bool", 1.0),
    ],
)
def test_diff_compares_integers_exactly_whatever_the_tolerance(
    save: Save, a: int, b: int, dtype: str, gap: float
) -> None:
    tensors = [torch.from_numpy(np.array([5, v], dtype=dtype)) for v in (a % 2 if dtype == "bool" else a, b)]
    paths = [save(f"{i}.pth", {"n": t}) for i, t in enumerate(tensors)]
    report = ckpt_tools.diff(*paths, rtol=10.0, atol=1e30)
    assert (only(report).differing, only(report).beyond, only(report).max_abs) == (1, 1, gap)
    assert report.verdict == "different"


@pytest.mark.parametrize(
    ("a", "b", "nonfinite", "gap"),
    [
        ([NAN, 1.0], [NAN, 1.5], 0, 0.5),
        ([NAN, 1.0], [2.0, 1.0], 1, 0.0),
        ([INF, -INF, 1.0], [INF, INF, 1.25], 1, 0.25),
        ([INF, 3.0], [7.0, INF], 2, 0.0),
    ],
)
def test_diff_counts_nonfinite_values_apart_and_outside_the_tolerance(
    save: Save, a: list[float], b: list[float], nonfinite: int, gap: float
) -> None:
    paths = [save(f"{i}.pth", {"w": torch.tensor(v)}) for i, v in enumerate((a, b))]
    report = ckpt_tools.diff(*paths, rtol=0.9, atol=1e9)
    assert (only(report).nonfinite, only(report).beyond, only(report).max_abs) == (nonfinite, nonfinite, gap)
    assert report.nonfinite == nonfinite
    assert report.verdict == ("different" if nonfinite else "within tolerance")


def test_diff_caps_differences_at_the_largest_float64(save: Save) -> None:
    a, b = torch.tensor([1.7e308, 0.0], dtype=torch.float64), torch.tensor([-1.7e308, 1.0], dtype=torch.float64)
    report = ckpt_tools.diff(save("a.pth", {"w": a}), save("b.pth", {"w": b}), rtol=0.9)
    assert (only(report).differing, only(report).beyond, only(report).nonfinite) == (2, 2, 0)
    assert only(report).max_abs == np.finfo(np.float64).max


def test_diff_names_the_first_of_equally_large_differences(save: Save) -> None:
    zeros, ones = ({name: torch.full((2,), value) for name in ("a", "b")} for value in (0.0, 1.0))
    report = ckpt_tools.diff(save("a.pth", zeros), save("b.pth", ones))
    assert (report.max_abs, report.max_rel) == ((1.0, report.tensors[0].name),) * 2


def test_diff_calls_signs_of_zero_and_bits_of_nan_equal_but_not_identical(save: Save) -> None:
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    a, b = torch.cat([torch.tensor([0.0, NAN]), other_nan]), torch.tensor([-0.0, NAN, NAN])
    report = ckpt_tools.diff(save("a.pth", {"w": a, "v": a}), save("b.pth", {"w": b, "v": b.clone()}))
    assert (report.verdict, report.compared, report.identical) == ("equal", 2, 0)
    assert [t.differing for t in report.tensors] == [0, 0]
    same = ckpt_tools.diff(save("a.pth", {"w": a}), save("c.pth", {"w": a}))
    assert (same.verdict, same.tensors) == ("identical", ())


def test_diff_reports_another_dtype_as_different_without_a_tolerance(save: Save) -> None:
    a = torch.randn(64)
    paths = save("a.pth", {"w": a}), save("b.pth", {"w": a.bfloat16()})
    strict, loose, tight = (ckpt_tools.diff(*paths, rtol=rtol) for rtol in (0.0, 2**-8, 2**-20))
    assert [r.verdict for r in (strict, loose, tight)] == ["different", "within tolerance", "different"]
    assert [(c.name, c.a, c.b) for c in strict.dtypes] == [("w", "float32", "bfloat16")]
    assert only(strict).max_abs == (a.double() - a.bfloat16().double()).abs().max().item()
    exact = save("c.pth", {"w": torch.ones(3)}), save("d.pth", {"w": torch.ones(3).half()})
    assert [ckpt_tools.diff(*exact, atol=atol).verdict for atol in (0.0, 1e-9)] == ["different", "within tolerance"]


def test_diff_reports_names_and_shapes_whatever_the_tolerance(save: Save) -> None:
    a = save("a.pth", {"w": torch.ones(2), "x": torch.ones(2), "s": torch.ones(2, 3)})
    b = save("b.pth", {"y": torch.ones(2), "w": torch.ones(2), "s": torch.ones(3, 2)})
    report = ckpt_tools.diff(a, b, rtol=1, atol=1)
    assert (report.only_a, report.only_b, report.verdict) == (("x",), ("y",), "different")
    assert [(c.name, c.a, c.b) for c in report.shapes] == [("s", "[2, 3]", "[3, 2]")]
    assert (report.compared, report.identical) == (1, 1)


def test_diff_compares_formats_layouts_and_wrapped_names(tmp_path: Path, save: Save) -> None:
    weights = {"a.w": torch.randn(4, 5), "a.b": torch.randn(5)}
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    timm = save("a.pth", {"state_dict": weights, "state_dict_ema": wrapped, "epoch": 3})
    save_file(weights, tmp_path / "b.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    for other in (tmp_path / "b.safetensors", folder):
        report = ckpt_tools.diff(timm, other)
        assert report.verdict == "identical"
        assert (report.a.state, report.a.prefixes, report.b.prefixes) == ("ema (state_dict_ema)", ("module.",), ())
        assert any("Comparing ema weights (a.pth) with raw weights (" in note for note in report.notes)
    assert ckpt_tools.diff(timm, folder, state="raw").notes == ()
    assert ckpt_tools.diff(timm, timm, state="raw", state_b="state_dict_ema").verdict == "identical"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_diff_compares_a_dcp_folder_with_a_file(tmp_path: Path, save: Save) -> None:
    from torch.distributed import checkpoint as dcp

    w = torch.randn(64, 50)
    dcp.save({"model": {"w": w}}, checkpoint_id=tmp_path / "d", no_dist=True)
    assert ckpt_tools.diff(tmp_path / "d", save("a.pth", {"w": w})).verdict == "identical"
    found = only(ckpt_tools.diff(tmp_path / "d", save("b.pth", {"w": w.half()}), atol=1e-9))
    assert found.max_abs == (w.double() - w.half().double()).abs().max().item()


def test_diff_compares_the_values_of_views(save: Save) -> None:
    base = torch.randn(40, 60)
    view = base.t()[3:50, ::3]
    assert ckpt_tools.diff(save("a.pth", {"w": view}), save("b.pth", {"w": view.contiguous()})).verdict == "identical"
    changed = view.contiguous()
    changed[7, 5] += 1
    found = only(ckpt_tools.diff(save("a.pth", {"w": view}), save("b.pth", {"w": changed})))
    assert (found.differing, found.max_abs) == (1, (view.double() - changed.double()).abs().max().item())


def test_diff_does_not_read_one_file_under_two_names(tmp_path: Path, save: Save) -> None:
    a = save("a.pth", {"w": torch.randn(9), "s": torch.eye(3).to_sparse()})
    (tmp_path / "b.pth").hardlink_to(a)
    (tmp_path / "c.pth").symlink_to(a)
    for other in (a, tmp_path / "b.pth", tmp_path / "c.pth"):
        report = ckpt_tools.diff(a, other)
        assert (report.verdict, report.compared, report.bytes_read) == ("identical", 2, 0)


def test_diff_reads_tied_tensors_once_and_reports_them_together(save: Save) -> None:
    a, b = torch.randn(10), torch.randn(10)
    report = ckpt_tools.diff(save("a.pth", {"x": a, "y": a}), save("b.pth", {"x": b, "y": b}))
    assert (report.bytes_read, report.compared) == (80, 2)
    assert (only(report).name, only(report).tied) == ("x", ("y",))
    untied = ckpt_tools.diff(save("a.pth", {"x": a, "y": a}), save("b.pth", {"x": a, "y": b}))
    assert (only(untied).name, untied.identical) == ("y", 1)


def test_diff_names_tensors_that_cannot_be_compared_and_calls_them_different(tmp_path: Path, save: Save) -> None:
    sparse = {"w": torch.ones(2), "s": torch.eye(3).to_sparse(), "c": torch.ones(2)}
    a = save("a.pth", sparse)
    b = save("b.pth", sparse | {"c": torch.ones(2, dtype=torch.complex64)})
    report = ckpt_tools.diff(a, b, rtol=1.0)
    assert (report.not_compared, report.verdict) == ({"s": "sparse", "c": "float32 and complex64"}, "different")
    shutil.copy(a, tmp_path / "copy.pth")
    assert ckpt_tools.diff(a, tmp_path / "copy.pth").not_compared == {"s": "sparse"}


def test_diff_compares_packed_codes_as_bytes(save: Save) -> None:
    a, b = (torch.tensor(v, dtype=torch.uint8).view(torch.float8_e8m0fnu) for v in ([1, 2, 3], [1, 9, 9]))
    found = only(ckpt_tools.diff(save("a.pth", {"w": a}), save("b.pth", {"w": b}), rtol=1, atol=1e9))
    assert (found.differing, found.beyond, found.max_abs, found.max_rel) == (2, 2, None, None)


def test_diff_sorts_by_difference_with_weights_before_counters(save: Save) -> None:
    a = {"small": torch.tensor([1.0]), "steps": torch.tensor(7), "nan": torch.tensor([NAN]), "big": torch.tensor([1.0])}
    b = {"small": torch.tensor([1.1]), "steps": torch.tensor(900), "nan": torch.tensor([1.0]), "big": torch.tensor([3])}
    b["big"] = b["big"].float()
    report = ckpt_tools.diff(save("a.pth", a), save("b.pth", b))
    assert [t.name for t in report.tensors] == ["nan", "big", "small", "steps"]
    assert (report.max_abs, report.max_rel[1]) == ((893.0, "steps"), "steps")
    loose = ckpt_tools.diff(save("a.pth", a), save("b.pth", b), atol=0.5)
    assert [t.name for t in loose.tensors] == ["nan", "big", "steps", "small"]


def test_diff_compares_empty_and_scalar_tensors(save: Save) -> None:
    a = {"none": torch.empty(0, 3), "one": torch.tensor(2.0)}
    report = ckpt_tools.diff(save("a.pth", a), save("b.pth", a))
    assert (report.verdict, report.compared) == ("identical", 2)


def test_diff_reports_progress_in_bytes_of_both(save: Save) -> None:
    seen: list[tuple[int, int]] = []
    paths = [save(f"{i}.pth", {"w": torch.randn(1000)}) for i in range(2)]
    ckpt_tools.diff(*paths, on_progress=lambda _, done, total: seen.append((done, total)))
    assert seen[-1] == (8000, 8000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, r"`rtol=-1\.0`: must be a number, 0 or more"),
        ({"atol": NAN}, r"`atol=nan`: must be a number"),
        ({"threads": 0}, r"`threads=0`: must be a whole number from 1"),
    ],
)
def test_diff_rejects_bad_tolerances_and_threads(save: Save, options: dict[str, Any], message: str) -> None:
    path = save("a.pth", {"w": torch.ones(2)})
    with pytest.raises(UsageError, match=message):
        ckpt_tools.diff(path, path, **options)


def test_diff_names_the_file_without_the_chosen_weights(tmp_path: Path, save: Save) -> None:
    a, b = save("a.pth", {"state_dict": {"w": torch.ones(2)}}), save("b.pth", {"epoch": 3})
    with pytest.raises(LayoutError, match=r"b\.pth: no tensor inside"):
        ckpt_tools.diff(a, b)
    with pytest.raises(LayoutError, match=r"a\.pth: has no ema weights"):
        ckpt_tools.diff(a, a, state="ema")
    with pytest.raises(ReadError, match=r"gone\.pth: no such file"):
        ckpt_tools.diff(a, tmp_path / "gone.pth")
