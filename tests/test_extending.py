"""A rule, a layout, a file format and a store from outside the package, each in a few lines, in one average."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import MemoryStore

from ckpt_tools import average, convert, open_checkpoint, sweep
from ckpt_tools.checkpoints.layouts import Layout, register, unregister
from ckpt_tools.errors import UsageError, WriteError
from ckpt_tools.formats import FORMATS
from ckpt_tools.formats.file_plan import FilePlan, Payload, constant, whole_file
from ckpt_tools.formats.format import Format, Writing
from ckpt_tools.formats.header import Header
from ckpt_tools.series import schedules
from ckpt_tools.series.rules.option import Option
from ckpt_tools.storage.source import STORES, InputFile
from ckpt_tools.tensors import DTYPES, Storage, make_spec


class Toy(Format):
    """A toy file format: one line of JSON, padded to 4 kB, then the elements."""

    name, suffixes, usual_suffix, writes = "toy", (".toy",), ".toy", True

    def sniff(self, path: Path, start: bytes) -> bool:
        return start.startswith(b'{"toy"')

    def read(self, path: Path) -> Header:
        with InputFile(path) as file:
            entries, stamp = json.loads(file.read(0, 4096))["toy"], file.stamp
        tensors = {
            name: make_spec(DTYPES[dtype], tuple(shape), Storage(path, offset, stamp.nbytes - offset))
            for name, (dtype, shape, offset) in entries.items()
        }
        return Header(path, self, tensors, (stamp,))

    def plan(self, content: Any, writing: Writing) -> tuple[FilePlan, ...]:
        payloads, entries, end = [], {}, 4096
        for name, tensor in content.items():
            payloads.append(Payload(tensor, end))
            entries[name] = (tensor.dtype.name, tensor.shape, end)
            end += tensor.nbytes
        head = constant(0, json.dumps({"toy": entries}).encode().ljust(4096))
        return (FilePlan(writing.name, end, (head, *payloads)),)


class ToyFolder(Format):
    """A folder with one tensor a file, in the toy format."""

    name, folder, writes = "toys", True, True

    def sniff(self, path: Path, start: bytes) -> bool:
        return (path / "toys").is_file()

    def read(self, path: Path) -> Header:
        files = [Toy().read(path / name) for name in (path / "toys").read_text().split()]
        tensors = {name: spec for file in files for name, spec in file.tree.items()}
        return Header(path, self, tensors, tuple(stamp for file in files for stamp in file.files))

    def plan(self, content: Any, writing: Writing) -> tuple[FilePlan, ...]:
        files = [replace(writing, name=f"{name}.toy") for name in content]
        plans = [Toy().plan({name: content[name]}, file)[0] for name, file in zip(content, files, strict=True)]
        return (*plans, whole_file("toys", " ".join(file.name for file in files).encode()))

    def replaced(self, folder: Path, names: Collection[str]) -> Collection[str]:
        return [path.name for path in folder.glob("*.toy")]


@contextmanager
def a_format(toy: Format | None = None) -> Iterator[None]:
    toy = toy or Toy()
    FORMATS.insert(0, toy)  # before safetensors, which would take its ninth byte for a header
    yield
    FORMATS.remove(toy)


@contextmanager
def a_layout() -> Iterator[None]:
    layout = Layout("toy", "a toy: net and net_avg", raw=("net",), ema=("net_avg",))
    register(layout)
    yield
    unregister(layout)


@contextmanager
def a_rule() -> Iterator[None]:
    """The two ends of the series alone."""
    rule = lambda steps, *, share: [1 - share, *[0.0] * (len(steps) - 2), share]  # noqa: E731
    schedules.register("ends", rule, Option("share", float, 0.5, "ends: the weight of the last checkpoint."))
    yield
    del schedules.SCHEDULES["ends"]


@contextmanager
def a_store(files: dict[Path, bytes]) -> Iterator[None]:
    STORES["mem"] = MemoryStore(files)
    yield
    del STORES["mem"]


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(20, 30, generator=generator), "b": torch.randn(7, generator=generator).double()}


def test_average_takes_a_rule_a_layout_a_format_and_a_store_from_outside(tmp_path: Path) -> None:
    files: dict[Path, bytes] = {}
    for step in (1, 2, 3):
        tree = {"net": weights(10 + step), "net_avg": weights(step), "step": step}
        torch.save(tree, tmp_path / "a.pth")
        files[Path(f"mem://runs/{step}.pth")] = (tmp_path / "a.pth").read_bytes()
    with ExitStack() as extended:
        for each in (a_format(), a_layout(), a_rule(), a_store(files)):
            extended.enter_context(each)
        report = average("mem://runs", mode="ends", share=0.25, out=tmp_path / "out.toy")

        assert [each.state for each in report.inputs] == ["ema (net_avg)"] * 3
        assert [each.coefficient for each in report.inputs] == [0.75, 0, 0.25]
        averaged = open_checkpoint(tmp_path / "out.toy")
        for name, tensor in averaged.items():
            mean = 0.75 * weights(1)[name].double().numpy() + 0.25 * weights(3)[name].double().numpy()
            if tensor.dtype is torch.float64:  # summed as differences from the first: another last bit
                np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-15, atol=1e-16)
            else:
                assert np.array_equal(tensor.numpy(), mean.astype(np.float32))
        convert(tmp_path / "out.toy", to="toy", out=tmp_path / "out.pth")
        assert list(torch.load(tmp_path / "out.pth", weights_only=True)["net"]) == ["w", "b"]


def test_a_rule_from_outside_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        torch.save({"model": {"w": torch.full((2,), float(step))}, "step": step}, f"c-{step}.pth")
    Path("scored.py").write_text("def score(state):\n    return {'error': abs(state['w'][0].item() - 2.4)}\n")
    with a_rule():
        found = sweep("c-*", share=[0.25, 0.75], eval_function="scored.py:score", in_memory=True)
        made = {each.label: each for each in found.candidates}
        assert made["share=0.25"].metrics == {"error": pytest.approx(0.9)}
        assert made["share=0.75"].coefficients == (0.25, 0.75)
        assert found.best == "share=0.75"
        average(found.paths, **found.options, out="best.pth")
    assert open_checkpoint("best.pth")["w"].tolist() == [2.5, 2.5]


def test_average_of_a_format_from_outside_is_named_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with a_format():
        for step in (1, 2):
            torch.save(weights(step), tmp_path / "a.pth")
            convert(tmp_path / "a.pth", to="plain", out=tmp_path / f"run-{step}.toy")
        report = average([tmp_path / "run-1.toy", tmp_path / "run-2.toy"])
        assert report.out == "averaged.toy"
    with pytest.raises(UsageError, match="ends"):
        average([tmp_path / "run-1.toy"], mode="ends")


def test_a_folder_format_from_outside_is_read_written_and_replaced(tmp_path: Path) -> None:
    layout = Layout("toys", "a toy: a folder of toys", raw=(), alone="toys", folder_format=ToyFolder())
    register(layout)
    with a_format(layout.folder_format):
        for step in (1, 2):
            torch.save(weights(step), tmp_path / "a.pth")
            convert(tmp_path / "a.pth", to="toys", out=tmp_path / f"run-{step}")
        average(tmp_path / "run-*", out=tmp_path / "out.pth")
        expected = {name: (tensor + weights(2)[name]) / 2 for name, tensor in weights(1).items()}
        torch.testing.assert_close(torch.load(tmp_path / "out.pth", weights_only=True), OrderedDict(expected))

        convert(tmp_path / "a.pth", to="toys", out=tmp_path / "run-1", force=True)
        assert open_checkpoint(tmp_path / "run-1")["w"].equal(weights(2)["w"])
        torch.save({"other": torch.ones(1)}, tmp_path / "a.pth")
        convert(tmp_path / "a.pth", to="toys", out=tmp_path / "run-1", force=True)
        (tmp_path / "run-1" / "notes.txt").touch()
        with pytest.raises(WriteError, match=r"holds notes\.txt"):
            convert(tmp_path / "a.pth", to="toys", out=tmp_path / "run-1", force=True)
    unregister(layout)
