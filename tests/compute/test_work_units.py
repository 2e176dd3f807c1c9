"""Work units: which tensors are coalesced, and that each is told from the others again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.compute import engine
from ckpt_tools.compute.work_units import (
    CoalescedRange,
    OutFile,
    Slice,
    Target,
    coalesced,
    cut,
    of_tensors,
    to_be_written,
)
from ckpt_tools.formats.file_plan import Computed, FilePlan, GroupKey, OutTensor, Payload, Segment, Terms
from ckpt_tools.tensors import DTYPES, Storage, TensorSpec

A, B = Path("a"), Path("b")


def tensor(
    at: int, n: int, *, dtype: str = "float32", paths: tuple[Path, ...] = (A, B), big: bool = False
) -> OutTensor:
    known = DTYPES[dtype]
    spec = TensorSpec(known, (n,), (1,), 0, Storage(paths[0], at, n * known.itemsize, big))
    return OutTensor(
        known, (n,), Terms((spec,), ((0.5,) * len(paths),), tuple((path, 0) for path in paths)), f"at {at}"
    )


def plan(*slots: tuple[OutTensor, int], needs_crc: bool = False) -> FilePlan:
    segments: list[Segment] = [Payload(*slot) for slot in slots]
    if needs_crc:
        segments.append(Computed(1 << 20, 0, tuple(each for each, _ in slots), lambda crcs: b""))
    return FilePlan("out", 1 << 20, tuple(segments))


def ranges(found: FilePlan) -> list[tuple[OutTensor, Target, GroupKey | None]]:
    (tensors,) = to_be_written([OutFile(found, -1)], 1)
    return [(each, target, key) for each, (target,), key in coalesced(tensors)]


def lengths(found: FilePlan) -> list[tuple[int, int]]:
    return [(target.offset, each.numel) for each, target, _ in ranges(found)]


def test_coalesced_joins_neighbours_in_every_file() -> None:
    found = plan((tensor(100, 3), 8), (tensor(112, 5), 20), (tensor(132, 1), 40))
    ((run, target, kind),) = ranges(found)
    assert (run.shape, target.offset) == ((9,), 8)
    assert kind == run.group_key
    assert [(spec.storage.path, spec.storage.offset) for spec in run.terms] == [(A, 100), (B, 100)]


@pytest.mark.parametrize(
    "second",
    [
        (tensor(113, 5), 20),  # a gap in the inputs
        (tensor(112, 5), 21),  # a gap in the output
        (tensor(100, 3), 20),  # the same again
        (tensor(112, 5, dtype="float16"), 20),
        (tensor(112, 5, paths=(A, Path("c"))), 20),
        (tensor(112, 5, paths=(B, A)), 20),
        (tensor(112, 5, paths=(A,)), 20),
        (tensor(112, 5, big=True), 20),
    ],
)
def test_coalesced_keeps_tensors_apart_that_are_no_neighbours(second: tuple[OutTensor, int]) -> None:
    assert lengths(plan((tensor(100, 3), 8), second)) == [(8, 3), (second[1], second[0].numel)]


def test_coalesced_keeps_tensors_with_checksums_apart() -> None:
    assert lengths(plan((tensor(100, 3), 8), (tensor(112, 5), 20), needs_crc=True)) == [(8, 3), (20, 5)]


@given(sizes=st.lists(st.integers(0, 9), min_size=2, max_size=12), slice_size=st.integers(1, 20))
def test_of_tensors_gives_every_element_of_a_run_once(sizes: list[int], slice_size: int) -> None:
    begins = [4 * sum(sizes[:i]) for i in range(len(sizes))]
    slots = [(tensor(1000 + begin, n), 8 + begin) for begin, n in zip(begins, sizes, strict=True)]
    found = plan(*slots)
    ((run, target, kind),) = ranges(found)
    assert isinstance(run, CoalescedRange)
    assert kind == run.group_key
    seen = []
    for start in range(0, run.numel, slice_size):
        part = Slice(run, (target,), start, min(start + slice_size, run.numel))
        own = list(of_tensors(part))
        assert sum(each.nbytes for each in own) == part.nbytes
        assert own[0].targets[0].offset + own[0].begin == target.offset + part.begin
        seen += [(each.tensor, i) for each in own for i in range(each.start, each.stop)]
    assert seen == [(each, i) for each, _ in slots for i in range(each.numel)]


def test_cut_puts_each_element_in_one_work_unit() -> None:
    slots, at = [], 0
    for n in (70_000, 3, 0, 2_000_000, 5):
        slots.append((tensor(64 + 2 * at, n), at))
        at += 4 * n
    found = plan(*slots)
    parts = [part for unit in cut([OutFile(found, -1)], slice_size=1 << 20, other=1000) for part in unit.slices]
    assert sum(part.stop - part.start for part in parts) == sum(math.prod(each.shape) for each, _ in slots)
    assert len({(id(part.tensor), part.start) for part in parts}) == len(parts)


def test_engine_run_sums_a_run_of_big_endian_tensors(tmp_path: Path) -> None:
    """Big-endian words follow each other like others, and go through torch."""
    values = torch.arange(24, dtype=torch.float32)
    for path, factor in (("a", 1.0), ("b", 3.0)):
        (tmp_path / path).write_bytes((values * factor).numpy().astype(">f4").tobytes())
    paths = (tmp_path / "a", tmp_path / "b")
    slots = [(tensor(4 * begin, 8, paths=paths, big=True), 4 * begin) for begin in (0, 8, 16)]
    with (tmp_path / "out").open("w+b") as file:
        file.truncate(96)
        engine.run([OutFile(FilePlan("out", 96, tuple(Payload(*slot) for slot in slots)), file.fileno())])
        assert file.read() == (values * 2).numpy().tobytes()
