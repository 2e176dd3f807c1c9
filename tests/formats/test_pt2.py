"""torch.export's archives read as the state dict of the loaded program, in all layouts that torch has written."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load
from crafting import PAYLOAD, records_of, same, zip_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ckpt_tools import average, convert, open_checkpoint, strip
from ckpt_tools.errors import CkptError, CorruptError, LayoutError, NotACheckpointError, UnsupportedError
from ckpt_tools.formats import read_header
from ckpt_tools.tensors import UnsupportedTensor

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.export, which has many


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        whole = torch.randn(10)
        self.left, self.right = nn.Parameter(whole[:4]), nn.Parameter(whole[6:])
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        self.register_buffer("mask", torch.ones(4).bfloat16())
        self.register_buffer("passing", torch.full((4,), 9.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(x).mean(1)) * self.mask * self.passing + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return self.head(x + self.left + self.right + self.turned[0])


def exported(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.export.export(Net().eval(), (torch.arange(6).view(2, 3),))


def newest(path: Path, seed: int = 0) -> Path:
    torch.export.save(exported(seed), path)
    return path


def of_torch_2_8(path: Path, seed: int = 0) -> Path:
    """Write the weights as one file of torch.save below data/weights, as torch 2.8 did."""
    records = records_of(newest(path, seed))
    state = io.BytesIO()
    torch.save(exported(seed).state_dict, state)
    (config,) = (name for name in records if name.endswith("_weights_config.json"))
    kept = {name: data for name, data in records.items() if "/data/weights/" not in name}
    return zip_of(path, {**kept, config.replace("_weights_config.json", ".pt"): state.getvalue()})


def of_torch_2_7(path: Path, seed: int = 0) -> Path:
    """Write the zip that torch.export.save made until 2.7, out of the parts that it is made of."""
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch._export.serde.serialize import serialize

    parts = serialize(exported(seed))
    state = io.BytesIO()
    torch.save(exported(seed).state_dict, state)
    records = {
        "version": ".".join(map(str, SCHEMA_VERSION)).encode(),
        "serialized_exported_program.json": parts.exported_program,
        "serialized_state_dict.pt": state.getvalue(),
        "serialized_constants.pt": parts.constants,
        "serialized_example_inputs.pt": parts.example_inputs,
    }
    return zip_of(path, records)


LAYOUTS = [newest, of_torch_2_8, of_torch_2_7]


@pytest.mark.parametrize("write", LAYOUTS)
def test_open_checkpoint_reads_an_exported_program_as_its_state_dict(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.pt2"))
    oracle = torch.export.load(tmp_path / "m.pt2").state_dict
    assert checkpoint.header.format.name == "pt2"
    assert {*checkpoint} == {*oracle} >= {"head.weight", "mask"}
    for name, tensor in oracle.items():
        assert same(checkpoint[name], tensor), name
    assert checkpoint.specs["head.weight"] == checkpoint.specs["embed.weight"]


@pytest.mark.parametrize("write", LAYOUTS)
def test_average_of_exported_programs_is_a_torch_file(write: Callable[[Path, int], Path], tmp_path: Path) -> None:
    paths = [write(tmp_path / f"step_{i}.pt2", i) for i in range(2)]
    average(paths, out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    states = [exported(i).state_dict for i in range(2)]
    for name in ("embed.weight", "turned", "right", "mask"):
        want = torch.stack([state[name].detach().double() for state in states]).mean(0).to(states[0][name].dtype)
        assert torch.equal(found[name], want), name
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    Net().load_state_dict(found)


def test_convert_makes_a_file_that_the_model_loads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    convert(newest(tmp_path / "m.pt2"), to="plain", out=tmp_path / "m.safetensors", untie=True)
    Net().load_state_dict(load_file(tmp_path / "m.safetensors"))


def test_no_output_is_named_as_an_exported_program(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"out\.pt2: pt2 is read, not written"):
        average(newest(tmp_path / "m.pt2"), out=tmp_path / "out.pt2")


def test_open_checkpoint_of_several_programs_asks_for_one(tmp_path: Path) -> None:
    from torch.export.pt2_archive._package import package_pt2

    package_pt2(str(tmp_path / "m.pt2"), exported_programs={"small": exported(1), "large": exported(2)})
    with pytest.raises(LayoutError, match="`state='small'`"):
        open_checkpoint(tmp_path / "m.pt2")
    found = open_checkpoint(tmp_path / "m.pt2", state="large")
    assert same(found["turned"], exported(2).state_dict["turned"])


def test_open_checkpoint_says_that_compiled_code_has_no_weights(tmp_path: Path) -> None:
    records = {"m/archive_format": b"pt2", "m/data/aotinductor/model/c.so": b"\x7fELF"}
    with pytest.raises(UnsupportedError, match=r"AOTInductor.*torch\.export\.save"):
        open_checkpoint(zip_of(tmp_path / "m.pt2", records))


META = {
    "path_name": "weight_0", "use_pickle": False,
    "tensor_meta": {
        "dtype": 7, "layout": 7, "sizes": [{"as_int": 4}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0},
    },
}  # fmt: skip


def crafted(path: Path, config: Any, payload: bytes = PAYLOAD, order: bytes = b"little") -> Path:
    records = {
        "m/archive_format": b"pt2", "m/byteorder": order, "m/data/weights/weight_0": payload,
        "m/data/weights/model_weights_config.json": json.dumps(config).encode(),
    }  # fmt: skip
    return zip_of(path, records)


def changed(**changes: Any) -> dict[str, Any]:
    own = {key: value for key, value in changes.items() if key in META}
    return {"config": {"w": {**META, "tensor_meta": {**META["tensor_meta"], **changes}, **own}}}  # type: ignore[dict-item]


def test_open_checkpoint_reads_big_endian_storages(tmp_path: Path) -> None:
    path = crafted(tmp_path / "m.pt2", changed(), bytes(reversed(PAYLOAD)), b"big")
    assert open_checkpoint(path)["w"].tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("changes", "payload", "reason"),
    [
        ({"use_pickle": True}, PAYLOAD, "a tensor subclass"),
        ({"dtype": 99}, PAYLOAD, "of an unknown dtype"),
        ({"layout": 1}, PAYLOAD, "sparse"),
        ({}, b"", "without values, as a fake tensor is saved"),
    ],
)
def test_read_header_says_why_a_tensor_is_not_read(
    changes: Mapping[str, Any], payload: bytes, reason: str, tmp_path: Path
) -> None:
    found = read_header(crafted(tmp_path / "m.pt2", changed(**changes), payload)).tree["w"]
    assert isinstance(found, UnsupportedTensor)
    assert found.reason == reason


@pytest.mark.parametrize(
    "config",
    [
        None, [], {}, {"config": []}, {"config": {"w": None}}, {"config": {"w": {}}}, changed(dtype=[]),
        changed(sizes=[{"as_expr": "s0"}]), changed(sizes=4), changed(path_name="weight_1"),
        changed(storage_offset={"as_int": 1}), changed(strides=[{"as_int": -1}]), changed(sizes=[{"as_int": 1 << 70}]),
        changed(sizes=[{"as_int": "4"}]), changed(sizes=[{"as_int": 4.0}]), changed(strides=[]),
    ],
)  # fmt: skip
def test_read_header_rejects_a_description_that_does_not_fit(config: Any, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="does not describe weights|claims shape|reaches beyond"):
        read_header(crafted(tmp_path / "m.pt2", config))


def test_open_checkpoint_rejects_a_zip_of_anything_else(tmp_path: Path) -> None:
    for records in ({"a/b/archive_format": b"pt2"}, {"serialized_exported_program.json": b"{}"}):
        with pytest.raises(NotACheckpointError, match="not one that torch.save wrote"):
            open_checkpoint(zip_of(tmp_path / "m.zip", records))


def test_open_checkpoint_rejects_weights_that_are_compressed(tmp_path: Path) -> None:
    records = records_of(of_torch_2_7(tmp_path / "m.pt2"))
    with pytest.raises(UnsupportedError, match="compressed or encrypted"):
        open_checkpoint(zip_of(tmp_path / "packed.pt2", records, compress=zipfile.ZIP_DEFLATED))


@given(data=st.data())
def test_open_checkpoint_reads_or_rejects_a_damaged_archive(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt2"
    raw = bytearray(crafted(path, changed()).read_bytes())
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(300, len(raw) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with suppress(CkptError):
        dict(open_checkpoint(path))


def test_strip_names_its_output_as_the_format_that_it_writes(tmp_path: Path) -> None:
    path = newest(tmp_path / "m.pt2")
    report = strip(path)
    assert report.out == str(tmp_path / "m-stripped.pth")
    if report.written:
        assert same(load(Path(report.out))["embed.weight"], open_checkpoint(path)["embed.weight"])
