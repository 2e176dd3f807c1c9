"""Reading ahead: what comes by requests is there before it is summed, once, in bounded memory."""

from __future__ import annotations

import os
import threading
import tracemalloc
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import MemoryFile, MemoryStore
from safetensors.torch import save_file

from ckpt_tools import average, convert, diff
from ckpt_tools.compute import fetching, native
from ckpt_tools.errors import CorruptError, ReadError
from ckpt_tools.jobs import run
from ckpt_tools.storage import ahead
from ckpt_tools.storage import source as sources
from ckpt_tools.storage.ahead import ReadAhead
from ckpt_tools.storage.remote import Address
from ckpt_tools.storage.source import OpenFiles


class Fetched(bytearray):
    """Bytes that can be watched."""


class RangeStore(MemoryStore):
    """A toy store whose files come by requests, which it counts."""

    def __init__(self) -> None:
        super().__init__({})
        self.requests: list[tuple[str, int, int]] = []
        self.fetched: list[weakref.ref[Fetched]] = []
        self.fails: Callable[[str, int], Exception | None] = lambda name, begin: None

    @property
    def alive(self) -> int:
        """Bytes that were fetched and are still in memory."""
        return sum(len(data) for each in self.fetched if (data := each()) is not None)

    def add(self, local: Path) -> Path:
        path = Path(f"mem://runs/{local.name}")
        for file in [local] if local.is_file() else sorted(local.rglob("*")):
            if file.is_file():
                self.files[path / file.relative_to(local)] = file.read_bytes()
        return path

    def open(self, path: Path) -> RangeFile:
        return RangeFile(path, super().open(path).data, self)


class RangeFile(MemoryFile):
    def __init__(self, path: Path, data: bytes, store: RangeStore) -> None:
        super().__init__(data)
        self.path, self.store = path, store

    def fetch(self, begin: int, end: int) -> bytearray:
        self.store.requests.append((str(self.path), begin, end))
        error = self.store.fails(self.path.name, begin)
        if error is not None:
            raise error
        assert 0 <= begin < end <= len(self.data)
        data = Fetched(self.data[begin:end])
        self.store.fetched.append(weakref.ref(data))
        return data


@pytest.fixture
def store() -> Iterator[RangeStore]:
    sources.STORES["mem"] = found = RangeStore()
    yield found
    del sources.STORES["mem"]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "BLOCK", 64 << 10)
    monkeypatch.setattr(ahead, "_LEAST", 64 << 10)


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {f"layers.{i}.w": torch.randn(300, 200, generator=generator) for i in range(4)}
    found |= {f"layers.{i}.b": torch.randn(30, generator=generator).bfloat16() for i in range(40)}
    return found | {"t": torch.randn(90, 400, generator=generator).t(), "n": torch.tensor(seed)}


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    convert_from = folder.with_suffix(".safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, convert_from)
    convert(convert_from, out=f"{folder}/", max_shard_size="400KB")
    convert_from.unlink()
    return folder


def torch_file(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save({"model": tensors, "step": int(tensors["n"]), "junk": torch.randn(100_000)}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def scaled(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """8-bit floats with scales of blocks, as they are published."""
    codes = {f"{i}.weight": tensors[f"layers.{i}.w"].clamp(-400, 400).to(torch.float8_e4m3fn) for i in range(4)}
    scales = {f"{i}.weight_scale_inv": tensors[f"layers.{i}.w"][:3, :2].abs().contiguous() for i in range(4)}
    save_file(codes | scales, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


LAYOUTS: dict[str, Callable[[Path, dict[str, torch.Tensor]], Path]] = {
    "torch": torch_file,
    "shards": sharded,
    "scaled": scaled,
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_fetched_gives_the_bytes_that_local_files_give(layout: str, store: RangeStore, tmp_path: Path) -> None:
    local = [LAYOUTS[layout](tmp_path / f"step-{n}", weights(n)) for n in (1, 2, 3)]
    remote = [store.add(path) for path in local]
    options: dict[str, Any] = {"dequantize": True} if layout == "scaled" else {}

    average(local, out=tmp_path / "local.safetensors", threads=2, **options)
    average(remote, out=tmp_path / "remote.safetensors", threads=2, **options)

    assert (tmp_path / "remote.safetensors").read_bytes() == (tmp_path / "local.safetensors").read_bytes()
    assert len(store.requests) > 10
    assert len(set(store.requests)) == len(store.requests)  # nothing twice
    if layout == "torch":  # 400 kB of each file are no weights
        payload = sum(tensor.nbytes for tensor in weights(1).values())
        assert sum(end - begin for _, begin, end in store.requests) < 3 * (payload + 20_000)


def read(files: OpenFiles, path: Path, begin: int, end: int) -> bytes:
    found = bytearray(end - begin)
    assert files[path].read_into(begin, memoryview(found)) == end - begin
    return bytes(found)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_in_memory_are_bounded_and_given_back(store: RangeStore, tmp_path: Path) -> None:
    path = Path("mem://runs/a")
    store.files[path] = bytes(range(256)) * 8192  # 2 MB
    size = 64 << 10
    with OpenFiles() as files:
        files.open(path)
        units = [[(path, begin, begin + size)] for begin in range(0, 2 << 20, size)]
        with ReadAhead(files, units.__getitem__, len(units), memory=4 * size) as fetched:
            for number, ((_, begin, end),) in enumerate(units):
                assert fetched.wait(number, threading.Event())
                assert read(files, path, begin, end) == store.files[path][begin:end]
                assert store.alive <= 5 * size  # one may have come, and not be noted
                fetched.done(number)
        assert fetched.most_held == 4 * size
        assert store.alive == 0
    assert len(store.requests) == len(units)


@pytest.mark.usefixtures("small_blocks")
def test_a_unit_that_needs_more_than_the_memory_gets_it(store: RangeStore) -> None:
    path = Path("mem://runs/a")
    store.files[path] = bytes(1 << 20)
    with OpenFiles() as files:
        files.open(path)
        units = [[(path, 0, 1 << 20)], [(path, 5, 9)]]
        with ReadAhead(files, units.__getitem__, 2, memory=1) as fetched:
            for number in range(2):
                assert fetched.wait(number, threading.Event())
                fetched.done(number)
    assert len(store.requests) == 16


@pytest.mark.parametrize(("gap", "requests"), [(300_000, 3), (100, 1)])
def test_ranges_far_apart_are_fetched_without_what_is_between(gap: int, requests: int, store: RangeStore) -> None:
    path = Path("mem://runs/a")
    store.files[path] = bytes(range(250)) * 8000
    unit = [(path, begin, begin + 50) for begin in (2 * gap + 200, 100, gap + 150)]
    with OpenFiles() as files:
        files.open(path)
        with ReadAhead(files, lambda number: unit, 1) as fetched:
            assert fetched.wait(0, threading.Event())
            assert [read(files, path, begin, end) for _, begin, end in unit] == [
                store.files[path][begin:end] for _, begin, end in unit
            ]
    assert len(store.requests) == requests


@pytest.mark.skipif(native._native is None, reason="needs the C extension")
@pytest.mark.parametrize("size", [50, 100_000])
def test_bytes_that_nobody_asked_for_are_refused(
    size: int, store: RangeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a unit said that it needs less than it reads, of a small tensor and of a large one."""
    remote = []
    for number in (1, 2):
        save_file({"w": torch.full((size,), float(number))}, tmp_path / f"{number}.safetensors")
        remote.append(store.add(tmp_path / f"{number}.safetensors"))
    needed = fetching.needed
    monkeypatch.setattr(fetching, "needed", lambda unit: ((path, a, b - 4) for path, a, b in needed(unit)))
    with pytest.raises(ReadError, match=r"1\.safetensors: reading failed"):
        average(remote, out=tmp_path / "out.safetensors")


def test_the_bytes_between_two_ranges_are_no_numbers() -> None:
    first, data = ahead._joined([(100, np.ones(1, np.float32).tobytes()), (112, np.ones(1, np.float32).tobytes())])
    assert first == 100
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        between = torch.frombuffer(data, dtype=dtype)[4 // dtype.itemsize : 12 // dtype.itemsize]
        assert between.float().isnan().all()


def test_the_bytes_between_ranges_count_where_memory_is_bounded(store: RangeStore) -> None:
    path = Path("mem://runs/a")
    store.files[path] = bytes(24 << 20)
    units = [[(path, at, at + 50), (path, at + 900_000, at + 900_050)] for at in range(0, 24 << 20, 1 << 20)]
    with OpenFiles() as files:
        files.open(path)
        tracemalloc.start()
        try:
            with ReadAhead(files, units.__getitem__, len(units), memory=4 << 20) as fetched:
                for number in range(len(units)):
                    assert fetched.wait(number, threading.Event())
                    fetched.done(number)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert most < 6 << 20


def test_a_block_that_is_let_go_while_it_is_read_is_asked_for_again(
    store: RangeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, has = Path("mem://runs/a"), ahead.Block.has
    store.files[path] = bytes(range(1, 251))
    with OpenFiles() as files:
        files.open(path)
        with ReadAhead(files, lambda number: [(path, 0, 100)], 1) as fetched:
            assert fetched.wait(0, threading.Event())

            def then_gone(block: ahead.Block, begin: int, end: int) -> bool:
                found = has(block, begin, end)
                fetched.done(0)
                return found

            monkeypatch.setattr(ahead.Block, "has", then_gone)
            assert read(files, path, 20, 30) == store.files[path][20:30]


def test_a_kept_file_that_another_program_cuts_off_is_refused(store: RangeStore, tmp_path: Path) -> None:
    path = Path("mem://runs/a")
    store.files[path] = bytes(range(1, 251))
    with OpenFiles() as files:
        files.open(path)
        with ReadAhead(files, lambda number: [(path, 0, 250)], 1, keep=tmp_path) as fetched:
            assert fetched.wait(0, threading.Event())
            assert read(files, path, 0, 250) == store.files[path]
            for kept in tmp_path.iterdir():
                os.truncate(kept, 100)
            with pytest.raises(OSError, match="what was kept of it is cut off"):
                read(files, path, 0, 250)


def test_a_job_that_is_stopped_does_not_wait_for_what_is_under_way(store: RangeStore) -> None:
    path, stop = Path("mem://runs/a"), threading.Event()
    store.files[path] = bytes(1000)
    goes_on, ended = threading.Event(), threading.Event()

    def hangs(name: str, begin: int) -> None:
        goes_on.wait(60)
        ended.set()

    store.fails = hangs
    with OpenFiles() as files:
        files.open(path)
        with ReadAhead(files, lambda number: [(path, 0, 1000)], 1) as fetched:
            stop.set()
            assert not fetched.wait(0, stop)
    assert not ended.is_set()
    goes_on.set()


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(5, "the server answered 503"), ReadError, r"step-2\.pth: reading failed \(the server answered 503\)"),
        (CorruptError("step-2.pth: changed while it was read."), CorruptError, "changed while it was read"),
    ],
)
def test_a_range_that_does_not_come_ends_the_job_and_nothing_is_written(
    error: Exception, raised: type[Exception], message: str, store: RangeStore, tmp_path: Path
) -> None:
    remote = [store.add(torch_file(tmp_path / f"step-{n}", weights(n))) for n in (1, 2, 3)]
    store.fails = lambda name, begin: error if name == "step-2.pth" else None
    (tmp_path / "out").mkdir()
    with pytest.raises(raised, match=message):
        average(remote, out=tmp_path / "out" / "average.pth")
    assert [*(tmp_path / "out").iterdir()] == []


@pytest.mark.usefixtures("small_blocks")
def test_with_a_cache_a_second_job_asks_for_nothing_and_a_damaged_range_again(
    store: RangeStore, tmp_path: Path
) -> None:
    remote = [store.add(torch_file(tmp_path / f"step-{n}", weights(n))) for n in (1, 2)]
    cache = tmp_path / "cache" / "kept"
    # The toy's identity is that of the object in memory, so both jobs see one state.
    average(remote, out=tmp_path / "first.pth", cache=cache)
    first = len(store.requests)
    average(remote, out=tmp_path / "second.pth", cache=cache)
    assert len(store.requests) == first > 0

    for kept in cache.iterdir():
        if kept.suffix != ".ranges":
            with kept.open("r+b") as file:
                file.seek(kept.stat().st_size // 2)
                file.write(b"damaged.")
    average(remote, out=tmp_path / "third.pth", cache=cache)
    assert len(store.requests) == first + 2  # one block of each file
    average(remote, out=tmp_path / "plain.pth")
    contents = {(tmp_path / f"{name}.pth").read_bytes() for name in ("first", "second", "third", "plain")}
    assert len(contents) == 1


def test_an_address_is_a_path_that_keeps_its_slashes_and_asks_its_store(store: RangeStore) -> None:
    store.files = {Address("mem://runs/a/x.pth"): b"1", Address("mem://runs/b.pth"): b"2"}
    folder = Address("mem://runs")
    assert str(folder / "a") == f"{folder}/a" == "mem://runs/a"
    assert str((folder / "a").parent) == "mem://runs"
    assert str(folder.with_name("other")) == "mem://other"
    assert repr(folder / "b.pth") == "Address('mem://runs/b.pth')"
    assert (folder / "a" / "x.pth").exists()
    assert (folder / "a").is_dir()
    assert not (folder / "c").exists()
    assert [*folder.iterdir()] == [folder / "a", folder / "b.pth"]
    assert (folder / "a").resolve() == (folder / "a").absolute() == folder / "a"
    assert str((folder / "a").relative_to(folder)) == "a"


def test_whatever_fails_in_a_request_reaches_the_one_who_waits(store: RangeStore) -> None:
    path = Path("mem://runs/a")
    store.files[path] = bytes(1000)

    def fails(name: str, begin: int) -> None:
        raise MemoryError

    store.fails = fails
    with OpenFiles() as files:
        files.open(path)
        with (
            ReadAhead(files, lambda number: [(path, 0, 1000)], 1) as fetched,
            pytest.raises(MemoryError),
        ):
            fetched.wait(0, threading.Event())


def test_a_unit_that_is_passed_over_makes_room_for_the_next_ones(store: RangeStore) -> None:
    path = Path("mem://runs/a")
    store.files[path] = bytes(8 << 20)
    with OpenFiles() as files:
        files.open(path)
        units = [[(path, begin << 20, (begin + 1) << 20)] for begin in range(8)]
        with ReadAhead(files, lambda number: units[number], 8, memory=1 << 20) as fetched:
            for number in range(7):
                fetched.done(number)
            assert fetched.wait(7, threading.Event())
            assert fetched.most_held <= 2 << 20


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kept", [False, True])
def test_without_the_c_extension_blocks_are_read_as_well(
    kept: bool, store: RangeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = [torch_file(tmp_path / f"step-{n}", weights(n)) for n in (1, 2)]
    average(local, out=tmp_path / "local.pth")
    remote = [store.add(path) for path in local]
    monkeypatch.setattr(native, "_native", None)
    average(remote, out=tmp_path / "remote.pth", **({"cache": tmp_path / "cache"} if kept else {}))
    assert (tmp_path / "remote.pth").read_bytes() == (tmp_path / "local.pth").read_bytes()
    assert len(set(store.requests)) == len(store.requests)


@pytest.mark.skipif(native._native is None, reason="needs the C extension")
def test_c_reads_bytes_in_memory_and_no_others() -> None:
    """48 bytes of a file in blocks of 16, of one of which a part is there."""
    numbers = np.arange(1, 13, dtype=np.float32)
    data = [numbers[i : i + 4].tobytes() for i in (0, 4, 8)]
    address = native._native.address

    def squares(count: int, first: int, *entries: tuple[int, int, int]) -> tuple[object, float]:
        table = array("q", [48, 16, *(number for entry in entries for number in entry)])
        sums, scratch = bytearray(16 * 8), bytearray(native.gram_scratch(1))
        places = array("q", [-address(table), 4 * first])
        failure = native._native.gram(("float32",), places, count, sums, scratch)
        return failure and failure[0], float(np.frombuffer(sums)[0])

    whole = [(16 * i, 16 * i + 16, address(data[i])) for i in range(3)]
    for first, count in ((0, 12), (3, 2), (5, 7), (4, 4)):
        assert squares(count, first, *whole) == (None, float((numbers[first : first + count] ** 2).sum()))
    assert squares(2, 11, *whole)[0] == native._native.ENDS_EARLY
    assert squares(12, 0, whole[0], (0, 0, 0), whole[2])[0] == native._native.NOT_READ
    assert squares(4, 8, *whole[:1], (0, 0, 0), whole[2]) == (None, float((numbers[8:] ** 2).sum()))
    part = (20, 28, address(data[1]) + 4)
    assert squares(2, 5, whole[0], part, whole[2]) == (None, float((numbers[5:7] ** 2).sum()))
    for first, count in ((4, 1), (7, 1), (5, 3), (3, 3), (0, 12)):
        assert squares(count, first, whole[0], part, whole[2])[0] == native._native.NOT_READ
    assert squares(1, -1, *whole)[0] == native._native.ENDS_EARLY


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("layout", "out"), [("torch", "out.safetensors"), ("shards", "out")])
def test_copies_are_fetched_several_ranges_at_a_time_and_once(
    layout: str, out: str, store: RangeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = LAYOUTS[layout](tmp_path / "step-1", {name: each for name, each in weights(1).items() if name != "t"})
    for where in ("local", "remote"):
        (tmp_path / where).mkdir()
    convert(local, out=tmp_path / "local" / out)
    remote = store.add(local)
    copied = []
    monkeypatch.setattr(run, "copy", lambda *args, copy=run.copy, **options: copied.append(1) or copy(*args, **options))
    both = threading.Barrier(2)

    def wait(name: str, begin: int) -> None:
        if len(store.requests) <= 2:
            both.wait(60)  # for a second request that is under way

    store.fails = wait
    convert(remote, out=tmp_path / "remote" / out)
    assert copied
    made = [[each for each in sorted((tmp_path / where).rglob("*")) if each.is_file()] for where in ("local", "remote")]
    assert [path.read_bytes() for path in made[1]] == [path.read_bytes() for path in made[0]] != []
    assert len(set(store.requests)) == len(store.requests) > 10


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout", ["torch", "shards"])
def test_a_comparison_is_fetched_ahead_and_once(layout: str, store: RangeStore, tmp_path: Path) -> None:
    local = [LAYOUTS[layout](tmp_path / f"step-{n}", weights(n)) for n in (1, 2)]
    alone = diff(*local).to_dict()
    remote = [store.add(path) for path in local]
    both = threading.Barrier(2)

    def wait(name: str, begin: int) -> None:
        if len(store.requests) <= 2:
            both.wait(60)  # for a second request that is under way

    store.fails = wait
    found = diff(*remote).to_dict()
    assert {key: value for key, value in found.items() if key not in "ab"} == {
        key: value for key, value in alone.items() if key not in "ab"
    }
    assert found["verdict"] == "different"
    assert len(set(store.requests)) == len(store.requests) > 10
