"""Gram matrices and the geometry of a series against NumPy on the whole vectors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.compute import gram as grams
from ckpt_tools.compute import native
from ckpt_tools.compute.gram import gram
from ckpt_tools.formats import read_header
from ckpt_tools.series.geometry import geometry, movement
from ckpt_tools.tensors import DTYPES as ALL_DTYPES
from ckpt_tools.tensors import Chunk, Storage, join, make_spec


def series(n: int, size: int, seed: int, spread: float = 0.01) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal(size) + spread * generator.standard_normal((n, size)).cumsum(axis=0)


def products(rows: np.ndarray) -> Any:
    """As `gram` gives them: of the differences from the last, and of the last."""
    moved = rows.copy()
    moved[:-1] -= moved[-1]
    return (moved @ moved.T).tolist()


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 99))
def test_geometry_is_that_of_the_vectors(n: int, size: int, seed: int) -> None:
    rows = series(n, size, seed)
    found = geometry(products(rows))
    mean = rows.mean(axis=0)
    steps = np.diff(rows, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    assert found.norms == pytest.approx(np.linalg.norm(rows, axis=1), rel=1e-9)
    assert found.to_mean == pytest.approx(np.linalg.norm(rows - mean, axis=1), rel=1e-6, abs=1e-9)
    assert found.steps == pytest.approx(lengths, rel=1e-7, abs=1e-9)
    assert found.mean_norm == pytest.approx(np.linalg.norm(mean) / np.linalg.norm(rows, axis=1).mean(), rel=1e-9)
    cosines = (steps[:-1] * steps[1:]).sum(axis=1) / (lengths[:-1] * lengths[1:])
    assert found.cosines == pytest.approx(cosines, abs=1e-5)
    if size > 10:
        assert found.one_basin


def test_a_checkpoint_of_another_run_is_the_outlier() -> None:
    rows = series(6, 500, 1)
    assert geometry(products(rows)).outlier is None
    rows[2] += 0.5 * np.random.default_rng(9).standard_normal(500)
    found = geometry(products(rows))
    assert found.outlier == 2
    assert found.farthest is not None
    others = np.delete(rows, 2, axis=0)
    between = np.linalg.norm(others[:, None] - others[None], axis=2)[np.triu_indices(5, 1)]
    nearest = np.linalg.norm(others - rows[2], axis=1).min()
    assert found.farthest[1] == pytest.approx(nearest / np.median(between), rel=1e-9)


@pytest.mark.parametrize("n", [3, 4, 9])
def test_a_run_that_slows_down_has_no_outlier(n: int) -> None:
    steps = 0.7 ** np.arange(n)[:, None] * np.random.default_rng(0).standard_normal(300)
    assert geometry(products(10 + steps.cumsum(axis=0))).outlier is None


def test_runs_from_other_starts_are_in_no_basin() -> None:
    rows = np.random.default_rng(2).standard_normal((4, 2000))
    found = geometry(products(rows))
    assert found.mean_norm == pytest.approx(0.5, abs=0.02)
    assert not found.one_basin


def test_equal_checkpoints_are_one_point() -> None:
    rows = np.ones((3, 4))
    found = geometry(products(rows))
    assert found.to_mean == (0, 0, 0)
    assert (found.mean_norm, found.cosines, found.outlier) == (1, (None,), None)


def test_movement_is_relative_to_the_norm() -> None:
    rows = series(5, 40, 3)
    spread = np.sqrt((np.linalg.norm(rows - rows.mean(axis=0), axis=1) ** 2).mean())
    assert movement(products(rows)) == pytest.approx(spread / np.linalg.norm(rows, axis=1).mean(), rel=1e-6)
    assert movement([[0.0] * 3] * 3) == 0


DTYPES = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "complex64"]


@pytest.mark.parametrize("with_c", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (1,), (257, 300)])
def test_gram_is_that_of_numpy(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], with_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_c:
        monkeypatch.setattr(native, "_native", None)
    elif native._native is None:
        pytest.skip("no C extension")
    monkeypatch.setattr(grams, "BLOCK", 1000)
    monkeypatch.setattr(grams, "UNIT", 5000)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    wide = torch.complex64 if dtype == "complex64" else torch.float64
    tensors = [torch.randn(shape, dtype=wide).to(kind) for _ in range(5)]
    for i, tensor in enumerate(tensors):
        torch.save({"w": tensor, "t": tensor.t() if tensor.ndim == 2 else tensor}, tmp_path / f"{i}.pth")
    trees = [read_header(tmp_path / f"{i}.pth").tree for i in range(5)]
    real = [torch.view_as_real(t) if t.is_complex() else t.float() for t in tensors]
    rows = np.stack(
        [t.double().numpy().ravel() if dtype != "float64" else tensors[i].numpy().ravel() for i, t in enumerate(real)]
    )
    expected = np.array(products(rows))
    for threads in (1, 3):
        found, turned = gram([[tree["w"] for tree in trees], [tree["t"] for tree in trees]], threads=threads)
        assert np.asarray(found) == pytest.approx(expected, rel=1e-10, abs=1e-9)
        assert np.asarray(turned) == pytest.approx(expected, rel=1e-10, abs=1e-9)
    again = gram([[tree["w"] for tree in trees]], threads=1)[0]
    assert again.tolist() == found.tolist()


@pytest.mark.parametrize("cuts", [[(10, 30, 20), (60,), (25, 35)], [(5, 55), (5, 55)], [(60,), (59, 1)]])
def test_gram_takes_tensors_in_chunks_without_torch(
    tmp_path: Path, cuts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, specs = [], []
    for i, sizes in enumerate(cuts):
        values = np.random.default_rng(i).standard_normal((60, 7)).astype(np.float32)
        chunks: list[Chunk] = []
        at = 0
        for k, size in enumerate(sizes):
            path = tmp_path / f"{i}-{k}.bin"
            path.write_bytes(b"gap" * 4 + values[at : at + size].tobytes())
            storage = Storage(path, 12, 28 * size)
            chunks.append(((at, 0), make_spec(ALL_DTYPES["float32"], (size, 7), storage)))
            at += size
        specs.append(join(tmp_path, "w", ALL_DTYPES["float32"], (60, 7), chunks))
        rows.append(values.astype(np.float64).ravel())
    if native._native is not None:
        monkeypatch.setitem(sys.modules, "ckpt_tools.compute.torch_gram", None)  # importing it fails
    monkeypatch.setattr(grams, "UNIT", 50)
    (found,) = gram([specs], threads=3)
    assert np.asarray(found) == pytest.approx(np.array(products(np.stack(rows))), rel=1e-12)


def test_gram_lines_up_tensors_of_other_orders_and_dtypes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    values = torch.randn(40, 50).bfloat16()
    torch.save({"w": values.float()}, tmp_path / "a.pth")
    torch.save({"w": values.t().contiguous().t().half()}, tmp_path / "b.pth")
    torch.save({"w": values}, tmp_path / "c.pth")
    trees = [read_header(tmp_path / f"{name}.pth").tree for name in "abc"]
    (found,) = gram([[tree["w"] for tree in trees]])
    half = values.half().double() - values.double()
    assert not np.asarray(found)[0].any()
    assert found[1, 1] == pytest.approx((half**2).sum().item(), abs=1e-12)
    assert found[2, 2] == pytest.approx((values.double() ** 2).sum().item())
