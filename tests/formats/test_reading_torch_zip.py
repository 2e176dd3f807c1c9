"""Torch's zip files: whatever torch.save writes reads as torch.load reads it, bit for bit."""

from __future__ import annotations

import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crafting import PAYLOAD, TENSOR, TORCH_DTYPES, random_tensor, raw_bytes, records_of, same, torch_zip, zip_of

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import CorruptError, NotACheckpointError, UnsupportedError
from ckpt_tools.formats import read_header
from ckpt_tools.tensors import TensorSpec, UnsupportedTensor

pytestmark = pytest.mark.filterwarnings("ignore:B?Complex.* support is experimental")


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(240, dtype=torch.float32)
    return {
        "offset": base[17:60],
        "strided": base[5::7],
        "reversed sizes": base.view(4, 5, 12).permute(2, 0, 1),
        "transposed": base.view(12, 20).t(),
        "channels_last": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.arange(3.0).view(3, 1).expand(3, 4),
        "expanded scalar": torch.tensor(2.5).expand(2, 3),
        "overlapping": base.unfold(0, 5, 2),
        "column": base.view(12, 20)[:, 3],
        "block": base.view(12, 20)[3:6, 4:9],
        "diagonal": base.view(12, 20).diagonal(),
        "scalar": torch.tensor(1.25),
        "scalar in a larger storage": base[100],
        "empty": torch.empty(0),
        "empty in the middle": torch.empty(3, 0, 2),
        "empty slice": base[10:10],
        "empty and strided": base.view(12, 20)[::2, 20:],
        "ones": base[7:8].view(1, 1, 1),
    }


def assert_reads_as_torch(path: Path, **options: Any) -> None:
    checkpoint = open_checkpoint(path)
    oracle = torch.load(path, weights_only=True, **options)
    assert list(checkpoint) == list(oracle)
    for name, tensor in oracle.items():
        assert same(checkpoint[name], tensor), name


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_open_checkpoint_reads_every_dtype_bit_for_bit(dtype: str, save: Callable[..., Path]) -> None:
    tensors = {"w": random_tensor(dtype, (3, 5)), "empty": random_tensor(dtype, (0, 2))}
    path = save(
        "a.pth", tensors | {"view": random_tensor(dtype, (6, 4), seed=1)[1::2, 1:3], "scalar": tensors["w"][1, 2]}
    )

    assert_reads_as_torch(path)
    assert open_checkpoint(path).specs["w"].dtype.name == dtype


@pytest.mark.parametrize("dtype", ["bits8", "bits16", "bcomplex32"])
def test_open_checkpoint_rejects_a_dtype_without_arithmetic_by_name(dtype: str, save: Callable[..., Path]) -> None:
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    path = save("a.pth", {"w": torch.ones(2), "odd": torch.empty(4, dtype=getattr(torch, dtype))})

    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint.specs["odd"], UnsupportedTensor)
    assert checkpoint.foreign == {f"torch.{dtype}": 1}
    with pytest.raises(UnsupportedError, match="'odd' is of an unknown dtype, which is not read here"):
        checkpoint["odd"]
    assert same(checkpoint["w"], torch.ones(2))


@pytest.mark.parametrize("name", views())
def test_open_checkpoint_reads_every_view_as_torch_does(name: str, save: Callable[..., Path]) -> None:
    assert_reads_as_torch(save("a.pth", {name: views()[name]}))


def test_read_header_gives_one_spec_to_one_tensor_under_two_names(save: Callable[..., Path]) -> None:
    base = torch.arange(20.0)
    path = save("a.pth", {"all": base, "again": base, "tail": base[15:], "column": base.view(4, 5)[:, 1]})

    specs: Any = open_checkpoint(path).specs
    assert specs["all"] == specs["again"]
    assert specs["all"].storage == specs["tail"].storage == specs["column"].storage
    assert (specs["tail"].start, specs["tail"].shape, specs["tail"].stride) == (15, (5,), (1,))
    assert (specs["column"].start, specs["column"].shape, specs["column"].stride) == (1, (4,), (5,))
    assert_reads_as_torch(path)


def test_read_header_gives_the_offset_of_the_bytes(save: Callable[..., Path]) -> None:
    tensor = random_tensor("float32", (7,))
    path = save("a.pth", {"pad": torch.ones(3), "w": tensor})

    spec: Any = open_checkpoint(path).specs["w"]
    raw = path.read_bytes()[spec.storage.offset : spec.storage.offset + spec.storage.nbytes]
    assert raw == raw_bytes(tensor)


def test_read_header_keeps_parameters_and_the_metadata_of_a_state_dict(save: Callable[..., Path]) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    named = torch.nn.ParameterDict({"p": torch.nn.Parameter(torch.ones(3), requires_grad=False)})
    path = save("a.pth", module.state_dict())
    other = save("b.pth", dict(named.named_parameters()))

    tree = read_header(path).tree
    assert isinstance(tree, OrderedDict)
    assert tree._metadata == module.state_dict()._metadata
    assert_reads_as_torch(path)
    assert_reads_as_torch(other)


def test_open_checkpoint_reads_the_data_of_a_parameter_with_attributes(save: Callable[..., Path]) -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    parameter.tag = "a tag"
    buffer = torch.nn.Buffer(torch.arange(3))
    path = save("a.pth", {"w": parameter, "b": buffer})

    checkpoint = open_checkpoint(path)
    assert same(checkpoint["w"], parameter)
    assert same(checkpoint["b"], buffer)


def test_read_header_keeps_the_shape_of_nested_containers(save: Callable[..., Path]) -> None:
    tree = {
        "model": OrderedDict(a=torch.ones(2), b=[torch.zeros(1), (torch.ones(1), None)]),
        "epoch": 7, 3: "int key", (1, "x"): "tuple key", "flag": True, "lr": 1e-4, "big": 1 << 70, "none": None,
        "text": "ünïcödé 🙂", "raw": b"\0\xff", "array": bytearray(b"ab"), "set": {1, 2}, "frozen": frozenset([3]),
        "complex": 1 - 2j, "size": torch.Size([1, 2]), "dtype": torch.bfloat16, "device": torch.device("cuda:1"),
        "tuple": (1, (2, (3,))), "empty": [{}, [], ()],
    }  # fmt: skip
    header = read_header(save("a.pth", tree))

    def plain(node: Any) -> Any:
        if isinstance(node, (torch.Tensor, TensorSpec)):
            return "tensor", tuple(node.shape)
        if isinstance(node, dict):
            return {key: plain(value) for key, value in node.items()}
        return type(node)(map(plain, node)) if type(node) in (list, tuple) else node

    assert plain(header.tree) == plain(tree)
    assert header.foreign == {}
    assert header.tree["frozen"] == frozenset([3])
    assert type(header.tree["array"]) is bytearray


@pytest.mark.parametrize("saved", [torch.arange(3), [torch.ones(1), torch.zeros(2)], torch.nn.Parameter(torch.ones(2))])
def test_read_header_reads_an_object_that_is_no_dict(saved: Any, save: Callable[..., Path]) -> None:
    tree = read_header(save("a.pth", saved)).tree

    specs = tree if isinstance(saved, list) else [tree]
    assert [spec.shape for spec in specs] == [tuple(t.shape) for t in (saved if isinstance(saved, list) else [saved])]


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_open_checkpoint_reads_a_big_endian_file_in_native_order(
    dtype: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    tensor = random_tensor(dtype, (4, 6))
    little = save(
        "little.pth", {"w": tensor, "view": tensor.t()[1:5, ::2], "empty": tensor[:0], "scalar": tensor[2, 3]}
    )
    word = tensor.dtype.itemsize // (2 if dtype.startswith("complex") else 1)
    records = {
        name: np.frombuffer(raw, f"<u{word}").byteswap().tobytes() if "/data/" in name and "/.data" not in name else raw
        for name, raw in records_of(little).items()
    }
    big = zip_of(
        tmp_path / "big.pth", {name: b"big" if name.endswith("byteorder") else raw for name, raw in records.items()}
    )

    checkpoint = open_checkpoint(big)
    for name, value in torch.load(little, weights_only=True).items():
        assert same(checkpoint[name], value), name
    # torch itself leaves the dtypes that it stores untyped unswapped, so it is no oracle for those.
    if dtype not in ("complex32", "uint16", "uint32", "uint64"):
        assert_reads_as_torch(big)


def test_open_checkpoint_takes_a_file_without_byte_order_as_little_endian(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    records = records_of(save("new.pth", {"w": torch.arange(3.0)}))
    old = zip_of(tmp_path / "old.pth", {name: raw for name, raw in records.items() if not name.endswith("byteorder")})

    assert_reads_as_torch(old)


@pytest.mark.parametrize("name", ["mödel.pth", "a b.ckpt", "model.tar", "no_suffix", "x.safetensors"])
def test_read_header_ignores_the_name_of_a_file(name: str, save: Callable[..., Path]) -> None:
    path = save(name, {"w": torch.arange(3.0)})

    assert read_header(path).format.name == "torch-zip"
    assert same(open_checkpoint(path)["w"], torch.arange(3.0))


def test_open_checkpoint_reads_a_file_without_checksums(save: Callable[..., Path]) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save("a.pth", {"w": torch.arange(3.0)})
    finally:
        torch.serialization.set_crc32_options(True)

    assert same(open_checkpoint(path)["w"], torch.arange(3.0))


def test_open_checkpoint_accepts_a_comment_behind_the_directory(save: Callable[..., Path]) -> None:
    path = save("a.pth", {"w": torch.arange(3.0)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"a remark"

    assert same(open_checkpoint(path)["w"], torch.arange(3.0))


def test_read_header_rejects_a_pickle_of_another_checksum(save: Callable[..., Path]) -> None:
    path = save("a.pth", {"some.weight": torch.arange(3.0)})
    path.write_bytes(path.read_bytes().replace(b"some.weight", b"some.height"))

    with pytest.raises(CorruptError, match=r"the checksum of its data\.pkl does not match"):
        read_header(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "a/data.pkl"


def test_read_header_rejects_a_zip_that_torch_did_not_write(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match=r"no data\.pkl inside"):
        read_header(zip_of(tmp_path / "a.zip", {"word/document.xml": b"<a/>"}))
    with pytest.raises(NotACheckpointError, match=r"no data\.pkl inside"):
        read_header(zip_of(tmp_path / "two.zip", {"a/data.pkl": b"N.", "b/data.pkl": b"N."}))


def test_read_header_names_a_file_of_weights_inside_a_zip_of_something_else(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "agent.zip", {"data": b"{}", "net/actor.pth": b"PK", "version": b"2"})
    with pytest.raises(NotACheckpointError, match=r"a file net/actor\.pth inside; unpack it, and give that"):
        read_header(path)


def test_read_header_rejects_compressed_records(tmp_path: Path) -> None:
    records = {"archive/data.pkl": b"\x80\2" + TENSOR + b".", "archive/data/0": PAYLOAD}

    with pytest.raises(UnsupportedError, match="another program has repacked it"):
        read_header(zip_of(tmp_path / "a.pth", records, compress=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    ("storages", "message"),
    [
        ({}, "storage 0 should have 16 bytes; there is no such entry"),
        ({"0": PAYLOAD[:-1]}, "should have 16 bytes; there is 15 bytes"),
        ({"0": PAYLOAD + b"\0"}, "should have 16 bytes; there is 17 bytes"),
    ],
)
def test_read_header_rejects_a_storage_that_does_not_fit_its_tensors(
    storages: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CorruptError, match=message):
        read_header(torch_zip(tmp_path / "a.pth", b"\x80\2" + TENSOR + b".", storages))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (b"K\0K\5\x85K\1\x85", "reaches beyond its storage"),
        (b"K\1K\4\x85K\1\x85", "reaches beyond its storage"),
        (b"K\0K\2\x85K\4\x85", "reaches beyond its storage"),
        (b"K\0J\xff\xff\xff\xff\x85K\1\x85", "claims shape"),
        (b"K\0K\4\x85J\xff\xff\xff\xff\x85", "claims shape"),
        (b"J\xff\xff\xff\xffK\4\x85K\1\x85", "claims shape"),
        (b"K\0K\4\x85K\1K\1\x86", "claims shape"),
        (b"K\0G?\xf0\0\0\0\0\0\0\x85K\1\x85", "claims shape"),
        (b"K\0\x88\x85K\1\x85", "claims shape"),
        (b"\x88K\3\x85K\1\x85", "claims shape"),
        (b"K\0NK\1\x85", "claims shape"),
        (b"K\0}\x85K\1\x85", "claims shape"),
        (b"NK\4\x85K\1\x85", "claims shape"),
    ],
)
def test_read_header_rejects_a_tensor_with_impossible_numbers(numbers: bytes, message: str, tmp_path: Path) -> None:
    lying = TENSOR.replace(b"K\0K\4\x85K\1\x85", numbers)
    assert lying != TENSOR

    with pytest.raises(CorruptError, match=message):
        read_header(torch_zip(tmp_path / "a.pth", b"\x80\2" + lying + b"."))


def test_read_header_rejects_two_records_of_one_name(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pth", b"\x80\2" + TENSOR + b".")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", PAYLOAD)

    with pytest.raises(CorruptError, match="two entries have the same name"):
        read_header(path)


@pytest.mark.parametrize("offset", [0, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_read_header_rejects_a_zip64_directory_that_points_at_no_record(offset: int, tmp_path: Path) -> None:
    records = {"archive/data.pkl": b"\x80\2" + TENSOR + b".", "archive/byteorder": b"little", "archive/data/0": PAYLOAD}
    path = zip_of(tmp_path / "a.pth", records)
    raw = bytearray(path.read_bytes())
    name = raw.rindex(b"archive/data/0")  # the last entry: its offset moves into an extra field behind its name
    raw[name - 16 : name - 14] = (12).to_bytes(2, "little")
    raw[name - 4 : name] = b"\xff" * 4
    end = raw.rindex(b"PK\5\6")
    raw[end + 12 : end + 16] = (int.from_bytes(raw[end + 12 : end + 16], "little") + 12).to_bytes(4, "little")
    raw[end:end] = struct.pack("<2HQ", 1, 8, offset)
    path.write_bytes(raw)

    with pytest.raises(CorruptError, match="points at no entry"):
        read_header(path)


@pytest.mark.parametrize("where", [0, 7, 1 << 31])
def test_read_header_rejects_a_directory_that_points_at_no_record(where: int, tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pth", b"\x80\2" + TENSOR + b".")
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"archive/data/0")  # its entry in the central directory: the offset is the field before the name
    raw[entry - 4 : entry] = where.to_bytes(4, "little")
    path.write_bytes(raw)

    # Offset 0 is a record, of another name; the one after it is too short for 16 bytes, or its name differs.
    with pytest.raises(CorruptError, match="points at no entry"):
        read_header(path)


def test_read_header_rejects_content_that_is_said_to_be_a_folder(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pth", b"\x80\2" + TENSOR + b".")
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"archive/data/0")
    raw[entry - 8] |= 0x10  # the attribute of DOS; torch.load passes the content over, and returns unset memory
    path.write_bytes(raw)

    with pytest.raises(CorruptError, match="an entry with 16 bytes that it is a folder"):
        read_header(path)
