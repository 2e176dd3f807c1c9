"""TorchScript archives read as the state dict of the loaded module, bit for bit; none of their code is run."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load
from crafting import records_of, same, zip_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ckpt_tools import average, convert, open_checkpoint
from ckpt_tools.errors import CkptError, CorruptError, SeriesError, UnsupportedError
from ckpt_tools.formats import read_header

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.filterwarnings("ignore:B?Complex.* support is experimental"),
    pytest.mark.filterwarnings("ignore:.*quantiz"),
]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.constant = torch.full((5,), 7.0)  # an attribute, no weight
        self.gain: float = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) * self.gain + self.table + self.constant[0]


class Net(nn.Module):
    """Tied weights, a module in two places, views of one storage, and what is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        self.inner = Inner()
        self.head.weight = self.inner.proj.weight
        self.blocks = nn.ModuleList([nn.BatchNorm1d(3), nn.Linear(3, 3)])
        self.again = self.blocks[1]
        whole = torch.randn(10)
        self.left, self.right = nn.Parameter(whole[:3]), nn.Parameter(whole[7:])
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        self.prompts = {"a": torch.ones(3)}
        self.register_parameter("größe", nn.Parameter(torch.randn(3).bfloat16()))
        self.register_parameter("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.inner(x))
        for block in self.blocks:
            x = block(x)
        return self.again(x) + self.left + self.right + self.turned[:, 0]


def scripted(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    net = Net().eval()
    net.blocks[0].running_mean += seed
    torch.jit.save(torch.jit.script(net), path)
    return path


def assert_reads_as_torch(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    oracle = torch.jit.load(path).state_dict()
    assert list(checkpoint) == list(oracle)
    for name, tensor in oracle.items():
        assert same(checkpoint[name], tensor), name


def test_open_checkpoint_reads_a_scripted_module_as_its_state_dict(tmp_path: Path) -> None:
    path = scripted(tmp_path / "m.pt")
    assert_reads_as_torch(path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.header.format.name == "torchscript"
    assert checkpoint.foreign == {}
    assert checkpoint.specs["head.weight"] == checkpoint.specs["inner.proj.weight"]
    assert not {"inner.constant", "prompts.a"} & {*checkpoint}


def test_open_checkpoint_reads_a_traced_module_and_none_of_its_constants(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net, x = Net().eval(), torch.randn(2, 3)
    torch.jit.save(torch.jit.trace(net, x, check_trace=False), tmp_path / "m.pt")
    assert any(name.startswith("m/constants/") for name in records_of(tmp_path / "m.pt"))
    assert_reads_as_torch(tmp_path / "m.pt")


@pytest.mark.parametrize("dtype", ["float8_e5m2", "uint16", "complex32", "complex64", "bool", "float16"])
def test_open_checkpoint_reads_dtypes_that_torch_save_has_no_storage_for(dtype: str, tmp_path: Path) -> None:
    module = nn.Module()
    module.register_buffer("w", torch.arange(6).to(getattr(torch, dtype))[1:])
    torch.jit.save(torch.jit.script(module), tmp_path / "m.pt")
    assert_reads_as_torch(tmp_path / "m.pt")


def test_open_checkpoint_takes_all_tensors_of_a_module_from_before_buffers_were_marked(tmp_path: Path) -> None:
    records = records_of(scripted(tmp_path / "m.pt"))
    for name, data in records.items():
        if name.endswith(".py"):
            records[name] = b"\n".join(line for line in data.split(b"\n") if b"__buffers__" not in line)
    names = {*open_checkpoint(zip_of(tmp_path / "old.pt", records))}
    assert names == {*torch.jit.load(tmp_path / "m.pt").state_dict(), "inner.constant"}


def test_average_of_scripted_modules_is_a_torch_file_with_tied_weights(tmp_path: Path) -> None:
    paths = [scripted(tmp_path / f"step_{i}.pt", seed=i) for i in range(3)]
    average(paths, out=tmp_path / "out.pth")

    states = [torch.jit.load(path).state_dict() for path in paths]
    found = load(tmp_path / "out.pth")
    for name, last in states[-1].items():
        want = (
            torch.stack([s[name].double() for s in states]).mean(0).to(last.dtype) if last.is_floating_point() else last
        )
        assert torch.equal(found[name], want), name
    assert found["head.weight"].data_ptr() == found["inner.proj.weight"].data_ptr()


def test_convert_makes_a_file_that_the_module_loads(tmp_path: Path) -> None:
    convert(scripted(tmp_path / "m.pt"), to="plain", out=tmp_path / "m.safetensors")
    names = {*open_checkpoint(tmp_path / "m.safetensors")}
    assert names == {*torch.jit.load(tmp_path / "m.pt").state_dict()}
    convert(tmp_path / "m.pt", to="plain", out=tmp_path / "out.pth")
    Net().load_state_dict(load(tmp_path / "out.pth"), strict=False)


def test_average_refuses_the_packed_weights_of_a_quantized_module_by_name(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    for i in range(2):
        torch.jit.save(torch.jit.script(quantized), tmp_path / f"{i}.pt")
    assert "1.weight" in open_checkpoint(tmp_path / "0.pt")
    with pytest.raises(CkptError, match=r"'0\._packed_params\._packed_params' .*packed"):
        average([tmp_path / "0.pt", tmp_path / "1.pt"], out=tmp_path / "out.pth")


def test_open_checkpoint_says_that_a_frozen_module_has_no_weights_with_names(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4)).eval()
    torch.jit.save(torch.jit.freeze(torch.jit.script(net)), tmp_path / "m.pt")
    with pytest.raises(UnsupportedError, match=r"frozen.*before torch\.jit\.freeze"):
        open_checkpoint(tmp_path / "m.pt")


def test_open_checkpoint_refuses_a_frozen_module_that_kept_some_weights(tmp_path: Path) -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.scale = nn.Linear(3, 3), nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x) * self.scale

    module = torch.jit.freeze(torch.jit.script(Kept().eval()), preserved_attrs=["scale"])
    torch.jit.save(module, tmp_path / "m.pt")
    assert list(torch.jit.load(tmp_path / "m.pt").state_dict()) == ["scale"]
    with pytest.raises(UnsupportedError, match=r"frozen.*before torch\.jit\.freeze"):
        open_checkpoint(tmp_path / "m.pt")


def test_average_refuses_an_export_among_the_checkpoints_of_a_run(tmp_path: Path) -> None:
    for i in range(2):
        torch.manual_seed(i)
        torch.save(Net().state_dict(), tmp_path / f"epoch_{i}.pt")
    scripted(tmp_path / "deployed.pt", seed=9)
    with pytest.raises(SeriesError, match=r"deployed\.pt is an export \(torchscript\), and .*Leave it out"):
        average(tmp_path, out=tmp_path / "out.pth")


def test_average_of_a_folder_passes_over_files_named_as_exports(tmp_path: Path) -> None:
    for i in range(2):
        torch.manual_seed(i)
        torch.save(Net().state_dict(), tmp_path / f"epoch_{i}.pt")
    scripted(tmp_path / "best.torchscript", seed=9)
    assert len(average(tmp_path, out=tmp_path / "out.pth", dry_run=True).inputs) == 2


def with_pickle(tmp_path: Path, pickled: bytes, code: Mapping[str, bytes]) -> Path:
    named = {f"m/code/{name}": text for name, text in code.items()}
    return zip_of(
        tmp_path / "m.pt", {"m/data.pkl": b"\x80\2" + pickled + b".", "m/constants.pkl": b"\x80\2).", **named}
    )


MODULE = b"c__torch__\nM\n)\x81"
CODE = {"__torch__.py": b"class M(Module):\n  __parameters__ = []\n  __buffers__ = []\n"}


@pytest.mark.parametrize(
    ("pickled", "code", "error", "message"),
    [
        (b"N", {}, UnsupportedError, "of an object that is no module"),
        (MODULE, {}, CorruptError, r"the code of __torch__\.M is missing"),
        (MODULE, {"__torch__.py": b"class M(Module):\n  __parameters__ = [[]]\n"}, CorruptError, "lists no names"),
        (MODULE, {"__torch__.py": b"class M(Module):\n  __parameters__ = [f()]\n"}, CorruptError, "lists no names"),
        (MODULE + b"q\0}X\1\0\0\0ah\0sb", CODE, CorruptError, "modules inside each other without end"),
    ],
)
def test_open_checkpoint_rejects_a_strange_module(
    pickled: bytes, code: Mapping[str, bytes], error: type[CkptError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        open_checkpoint(with_pickle(tmp_path, pickled, code))


def test_open_checkpoint_rejects_a_module_that_is_in_more_places_than_any(tmp_path: Path) -> None:
    inner = MODULE + b"q\0"
    for i in range(60):  # each has the one before it twice
        inner = b"c__torch__\nM\n)\x81}(X\1\0\0\0a" + inner + b"X\1\0\0\0bh" + bytes([i]) + b"ubq" + bytes([i + 1])
    with pytest.raises(CorruptError, match="modules inside each other without end"):
        open_checkpoint(with_pickle(tmp_path, inner, CODE))


def test_open_checkpoint_rejects_code_that_claims_more_than_it_has(tmp_path: Path) -> None:
    path = with_pickle(tmp_path, MODULE, {})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/code/__torch__.py", b"#" * (65 << 20))
    with pytest.raises(CorruptError, match=r"claims 68157440 bytes, more than such an entry has"):
        open_checkpoint(path)


def test_average_refuses_a_module_that_unpacks_its_state_by_code(tmp_path: Path) -> None:
    records = records_of(scripted(tmp_path / "m.pt"))
    pickled = records["m/data.pkl"]
    at = pickled.index(b"BatchNorm1d\n") + len(b"BatchNorm1d\n")
    begin = pickled.index(b"}(", at)
    end = pickled.index(b"ub", begin)
    records["m/data.pkl"] = pickled[:begin] + b"]" + pickled[begin + 1 : end] + b"eb" + pickled[end + 2 :]
    found: Any = read_header(zip_of(tmp_path / "odd.pt", records)).tree
    assert found["blocks.0"].reason == "unpacked by code of its module"


@given(data=st.data())
def test_open_checkpoint_reads_or_rejects_a_damaged_archive(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    whole = path.with_name("whole.pt")
    raw = bytearray((whole if whole.exists() else scripted(whole)).read_bytes())
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(300, len(raw) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with suppress(CkptError):
        dict(open_checkpoint(path))
