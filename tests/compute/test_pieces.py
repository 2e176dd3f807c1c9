"""Pieces: a tensor in chunks is summed range by range, without torch, and gives the same bytes as in one piece."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zero_files import arrays, save_zero

from ckpt_tools import average
from ckpt_tools.compute import native
from ckpt_tools.compute.work_units import Piece, pieces
from ckpt_tools.errors import NumericsError
from ckpt_tools.formats.file_plan import OutTensor, Terms
from ckpt_tools.tensors import DTYPES, Chunk, Storage, TensorSpec, c_strides, join, make_spec

FLOAT32 = DTYPES["float32"]


def flat(name: str, numel: int, at: int = 0) -> TensorSpec:
    return make_spec(FLOAT32, (numel,), Storage(Path(name), 0, 4 * (at + numel)), start=at)


def chunked(sizes: Sequence[int], name: str = "f", gap: int = 1) -> TensorSpec:
    """A tensor of one dimension; between its chunks are gaps of some elements in its file."""
    chunks: list[Chunk] = []
    at = 0
    for number, size in enumerate(sizes):
        chunks.append(((at,), flat(name, size, at + gap * number)))
        at += size
    return join(Path("folder"), "w", FLOAT32, (at,), chunks)


def out(*specs: TensorSpec) -> OutTensor:
    return OutTensor(FLOAT32, specs[0].shape, Terms(specs, ((1 / len(specs),) * len(specs),)), "w")


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(SIZES, SIZES, st.integers(0, 2))
def test_pieces_are_all_elements_of_every_input_in_order(one: list[int], other: list[int], gap: int) -> None:
    other = [*other, sum(one)]  # as many elements
    while sum(other) > sum(one):
        other[-1] -= 1
        other = [size for size in other if size]
    whole = out(chunked(one, "one", gap), chunked(other, "other", gap))
    found = pieces(whole)
    if len(found) == 1 and found[0] is whole:
        assert all(type(spec) is TensorSpec for spec in whole.terms.specs)
        return
    for term, sizes in enumerate((one, other)):
        begins = [4 * (at + gap * number) for number, size in enumerate(sizes) for at in [sum(sizes[:number])]]
        expected = [begin + 4 * i for begin, size in zip(begins, sizes, strict=True) for i in range(size)]
        specs = [piece.terms.specs[term] for piece in found]
        assert [spec.begin + 4 * i for spec in specs for i in range(spec.numel)] == expected
    assert [piece.before for piece in found if isinstance(piece, Piece)] == [
        sum(piece.numel for piece in found[:i]) for i in range(len(found))
    ]
    assert all(piece.group_key is not None for piece in found)


def test_chunks_that_are_neighbours_in_a_file_are_one_piece() -> None:
    (piece,) = pieces(out(chunked([3, 4, 5], gap=0)))
    assert piece.shape == (12,)


def test_chunks_in_another_order_and_big_endian_ones_stay_in_one_piece() -> None:
    halves = [((0, 0), make_spec(FLOAT32, (2, 2), Storage(Path("a"), 0, 16)))]
    halves.append(((0, 2), make_spec(FLOAT32, (2, 2), Storage(Path("b"), 0, 16))))
    columns = out(join(Path("folder"), "w", FLOAT32, (2, 4), halves))
    assert [*pieces(columns)] == [columns]
    big = [((i,), make_spec(FLOAT32, (1,), Storage(Path(str(i)), 0, 4, big_endian=True))) for i in (0, 1)]
    swapped = out(join(Path("folder"), "w", FLOAT32, (2,), big))
    assert [*pieces(swapped)] == [swapped]
    transposed = TensorSpec(FLOAT32, (2, 4), (1, 2), 0, Storage(Path("c"), 0, 32))
    rows = [((i, 0), make_spec(FLOAT32, (1, 4), Storage(Path(f"{i}"), 0, 16))) for i in (0, 1)]
    mixed = out(join(Path("folder"), "w", FLOAT32, (2, 4), rows), transposed)
    assert [*pieces(mixed)] == [mixed]
    assert c_strides((2, 4)) != transposed.stride


GROUPS = [{"big.weight": (301, 211), "middle.weight": (40, 33), "small.bias": (13,), "one": (1,)}, {"last.bias": (99,)}]


@pytest.fixture
def run(here: Path) -> list[dict[str, np.ndarray]]:
    steps = []
    for step in (1, 2, 3):
        groups = [arrays(group, step) for group in GROUPS]
        # Cut in other ways, so that pieces end where any of the chunks does.
        save_zero(Path(f"run/global_step{step}"), groups, stage=step, ranks=2 + step, step=step)
        steps.append({name: each for group in groups for name, each in group.items()})
    return steps


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("slice_size", [None, 1000])
def test_sums_of_pieces_are_those_of_torch(
    run: list[dict[str, np.ndarray]], suffix: str, slice_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slice_size is not None:
        monkeypatch.setattr(native, "SLICE", slice_size)
    average("run", out=f"c{suffix}", threads=2)
    monkeypatch.setattr(native, "_native", None)
    average("run", out=f"torch{suffix}", threads=1)
    digests = [hashlib.sha256(Path(f"{way}{suffix}").read_bytes()).digest() for way in ("c", "torch")]
    assert digests[0] == digests[1]
    if suffix == ".pth":
        with zipfile.ZipFile("c.pth") as archive:
            assert archive.testzip() is None  # its checksums are right
        found = torch.load("c.pth", weights_only=True)
        for name in run[0]:
            expected = sum(step[name].astype(np.float64) for step in run) / 3
            assert np.array_equal(found[name].numpy(), expected.astype(np.float32))


def test_nan_in_a_piece_is_refused_by_its_index(here: Path) -> None:
    for step in (1, 2):
        groups = [arrays(group, step) for group in GROUPS]
        if step == 2:
            groups[0]["big.weight"][200, 7] = np.nan
        save_zero(Path(f"run/global_step{step}"), groups, stage=3, ranks=4, step=step)
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(NumericsError, match=r"'big\.weight' holds NaN at \[200, 7\]"):
            average("run", out=f"o{suffix}")
        average("run", out=f"o{suffix}", allow_nonfinite=True)


@pytest.mark.skipif(native._native is None, reason="installed without a C compiler")
def test_torch_is_not_imported_for_pieces(tmp_path: Path) -> None:
    folder = tmp_path
    save_zero(folder / "step", [arrays(group) for group in GROUPS], stage=3, ranks=3)
    code = f"""
import sys, ckpt_tools
ckpt_tools.average({str(folder / "step")!r}, out={str(folder / "a.pth")!r})
ckpt_tools.convert({str(folder / "step")!r}, to="plain", out={str(folder / "b.safetensors")!r})
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
