"""Sources and stores: every byte of an input comes through them, on any system and from any place."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_store import MemoryStore
from safetensors.torch import load_file, save_file

import ckpt_tools
from ckpt_tools import strip
from ckpt_tools.errors import CorruptError, ReadError, SeriesError, WriteError
from ckpt_tools.series.find import find_series
from ckpt_tools.storage import source as sources
from ckpt_tools.storage.local import LocalFile, write_once
from ckpt_tools.storage.source import InputFile, OpenFiles, read_file, sha256


@pytest.fixture
def memory() -> Iterator[dict[Path, bytes]]:
    files: dict[Path, bytes] = {}
    sources.STORES["mem"] = MemoryStore(files)
    yield files
    del sources.STORES["mem"]


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(40, 30, generator=generator), "b": torch.randn(7, generator=generator).bfloat16()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_average_reads_a_series_from_a_store_of_its_own(suffix: str, memory: dict[Path, bytes], tmp_path: Path) -> None:
    for step in (1, 2, 10):
        local = tmp_path / f"step-{step}{suffix}"
        torch.save(weights(step), local) if suffix == ".pth" else save_file(weights(step), local)
        memory[Path(f"mem://runs/step-{step}{suffix}")] = local.read_bytes()
        local.unlink()
    out = tmp_path / "out.safetensors"

    report = ckpt_tools.average(["mem://runs"], out=out)

    assert [each.name for each in report.inputs] == [f"step-{step}{suffix}" for step in (1, 2, 10)]
    found = load_file(out)
    for name, tensor in found.items():
        mean = sum(weights(step)[name].double() for step in (1, 2, 10)) / 3
        assert torch.equal(tensor, mean.to(tensor.dtype)), name


def test_average_finds_files_of_a_store_by_a_pattern(memory: dict[Path, bytes], tmp_path: Path) -> None:
    for step in (1, 2):
        save_file(weights(step), tmp_path / "a.safetensors")
        memory[Path(f"mem://runs/step-{step}.safetensors")] = (tmp_path / "a.safetensors").read_bytes()
    report = ckpt_tools.average("mem://runs/step-*.safetensors", out=tmp_path / "out.safetensors")
    assert len(report.inputs) == 2
    with pytest.raises(SeriesError, match="no file matches"):
        ckpt_tools.average("mem://runs/epoch-*.pth", out=tmp_path / "other.pth")


def test_a_folder_whose_name_begins_like_a_scheme_is_local(memory: dict[Path, bytes]) -> None:
    assert sources.store_of(Path("memo/step_1.pth")) is sources.LOCAL
    assert sources.store_of(Path("mem:/step_1.pth")) is not sources.LOCAL


def test_convert_strip_and_diff_read_from_a_store(memory: dict[Path, bytes], tmp_path: Path) -> None:
    tree = {"state_dict": weights(1), "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}
    torch.save(tree, tmp_path / "a.pth")
    memory[Path("mem://a.pth")] = (tmp_path / "a.pth").read_bytes()

    ckpt_tools.convert("mem://a.pth", to="plain", out=tmp_path / "plain.safetensors")
    strip("mem://a.pth", out=tmp_path / "small.pth")

    assert ckpt_tools.diff("mem://a.pth", tmp_path / "plain.safetensors").verdict == "identical"
    assert torch.load(tmp_path / "small.pth", weights_only=True)["epoch"] == 3
    assert torch.equal(ckpt_tools.open_checkpoint("mem://a.pth")["w"], weights(1)["w"])


def test_fix_prefix_writes_a_checkpoint_of_a_store_elsewhere(memory: dict[Path, bytes], tmp_path: Path) -> None:
    save_file({f"module.{name}": tensor for name, tensor in weights(1).items()}, tmp_path / "a.safetensors")
    memory[Path("mem://run/model.safetensors")] = (tmp_path / "a.safetensors").read_bytes()
    memory[Path("mem://run/config.json")] = b"{}"

    report = ckpt_tools.fix_prefix("mem://run", out=tmp_path / "out/")

    assert report.written
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == ["b", "w"]
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"


def test_jobs_that_need_local_files_reject_those_of_a_store(memory: dict[Path, bytes], tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "a.safetensors")
    memory[Path("mem://a.safetensors")] = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(WriteError, match="is not a local file, so it cannot be replaced. Give `out`"):
        ckpt_tools.fix_prefix("mem://a.safetensors", add=["m."])
    with pytest.raises(SeriesError, match="is not a local file, so `order='mtime'` cannot place it"):
        ckpt_tools.average("mem://a.safetensors", order="mtime", out=tmp_path / "b.safetensors")


def test_find_series_orders_a_store_by_the_step_of_the_trainer(memory: dict[Path, bytes], tmp_path: Path) -> None:
    for name, step in (("a", 20), ("b", 10)):
        save_file(weights(step), tmp_path / "a.safetensors")
        memory[Path(f"mem://{name}/model.safetensors")] = (tmp_path / "a.safetensors").read_bytes()
        memory[Path(f"mem://{name}/trainer_state.json")] = b'{"global_step": %d}' % step
    series = find_series(["mem://a", "mem://b"])
    assert [member.step for member in series.members] == [10, 20]


def test_open_checkpoint_names_a_file_that_a_store_lacks(memory: dict[Path, bytes]) -> None:
    with pytest.raises(ReadError, match=r"mem:/gone\.pth: no such file"):
        read_file(Path("mem://gone.pth"))


# The calls of the system that others than Linux lack, each taken away in turn.
MACOS = "fallocate posix_fadvise copy_file_range sched_getaffinity O_TMPFILE O_PATH"


@pytest.fixture(
    params=[
        "nothing",
        "preadv",
        "preadv pread",
        "pwrite",
        "copy_file_range",
        "fallocate",
        "posix_fadvise",
        "link",
        "fchown fchmod",
        MACOS,
    ]
)
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in request.param.split():
        if name == "fallocate":  # of the C library
            monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
        elif name != "nothing":
            monkeypatch.delattr(os, name)
    return str(request.param)


def test_jobs_write_the_same_bytes_where_calls_are_missing(without: str, tmp_path: Path) -> None:
    for step in (1, 2):
        tree = {"state_dict": {f"module.{name}": tensor.t() if tensor.dim() > 1 else tensor
                               for name, tensor in weights(step).items()}, "epoch": step}  # fmt: skip
        torch.save(tree, tmp_path / f"step-{step}.pth")
    out = tmp_path / "avg.pth"
    ckpt_tools.average(tmp_path.glob("step-*.pth"), out=out)
    ckpt_tools.convert(tmp_path / "step-1.pth", to="plain", out=tmp_path / "plain.safetensors")
    ckpt_tools.fix_prefix(tmp_path / "step-2.pth")

    averaged = torch.load(out, weights_only=True)["state_dict"]
    for name, tensor in averaged.items():
        mean = (weights(1)[name].double() + weights(2)[name].double()) / 2
        assert torch.equal(tensor, (mean.t() if mean.dim() > 1 else mean).to(tensor.dtype)), name
    assert torch.equal(load_file(tmp_path / "plain.safetensors")["module.w"], weights(1)["w"].t())
    assert list(torch.load(tmp_path / "step-2.pth", weights_only=True)["state_dict"]) == ["w", "b"]


@pytest.mark.parametrize("missing", [[], ["preadv"], ["preadv", "pread"]])
def test_read_into_fills_a_buffer_as_far_as_the_file_goes(
    missing: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    for name in missing:
        monkeypatch.delattr(os, name)
    with closing(LocalFile(tmp_path / "a")) as file:
        for offset, count, expected in ((0, 10, 10), (95, 10, 5), (100, 10, 0), (3, 0, 0)):
            buffer = bytearray(count)
            assert file.read_into(offset, memoryview(buffer)) == expected
            assert buffer[:expected] == bytes(range(100))[offset : offset + expected]


@pytest.mark.parametrize("missing", [False, True])
def test_write_once_writes_at_an_offset(missing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if missing:
        monkeypatch.delattr(os, "pwrite")
    with (tmp_path / "a").open("w+b") as file:
        file.truncate(8)
        assert write_once(file.fileno(), memoryview(b"abc"), 4) == 3
        file.seek(0)
        assert file.read() == b"\0\0\0\0abc\0"


def test_window_reads_like_a_file(tmp_path: Path) -> None:
    data = bytes(range(200))
    (tmp_path / "a").write_bytes(data)
    with InputFile(tmp_path / "a") as file, file.as_file(50, 100) as window:
        assert window.read(3) == data[50:53]
        assert window.seek(-4, 2) == 96
        assert window.read() == data[146:150]
        with pytest.raises(OSError, match="before the start"):
            window.seek(-1)


def test_sha256_is_that_of_the_whole_file(tmp_path: Path) -> None:
    import hashlib

    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_open_files_refuse_a_file_that_is_another_by_now(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    with InputFile(path) as file:
        stamp = file.stamp
    path.write_bytes(b"other")
    with OpenFiles([stamp]) as files, pytest.raises(CorruptError, match="changed while it was read"):
        files.open(path)


def test_only_storage_asks_the_system_for_files() -> None:
    """Outside storage, `os` serves the environment, paths as text, random bytes, processes and the console alone."""
    import ast

    package = Path(ckpt_tools.__file__).parent
    allowed = {
        "environ",
        "path",
        "strerror",
        "PathLike",
        "fspath",
        "sched_getaffinity",
        "cpu_count",
        "name",
        "devnull",
        "urandom",
        "killpg",
        "getpid",
    }
    found: dict[str, set[Any]] = {}
    for path in package.rglob("*.py"):
        place = path.relative_to(package)
        if place.parts[0] in ("storage", "cli"):
            continue
        names = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
        }
        if names - allowed:
            found[str(place)] = names - allowed
    assert found == {}
