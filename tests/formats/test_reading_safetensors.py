"""Safetensors: read as the library reads it, and refused wherever the header does not fit the data."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from crafting import random_tensor, raw_bytes, safetensors_file, same

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import CkptError, CorruptError, NotACheckpointError, UnsupportedError
from ckpt_tools.formats import read_header
from ckpt_tools.tensors import UnsupportedTensor

CODES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32",
    "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip


def entry(begin: Any = 0, end: Any = 8, *, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("code", CODES)
def test_open_checkpoint_reads_every_dtype_of_the_library_bit_for_bit(code: str, tmp_path: Path) -> None:
    tensors = {
        name: random_tensor(CODES[code], shape) for name, shape in (("w", (3, 5)), ("scalar", ()), ("empty", (0, 2)))
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "x"})

    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    oracle = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert checkpoint.keys() == oracle.keys()
    assert all(same(checkpoint[name], tensor) for name, tensor in oracle.items())
    assert checkpoint.header.metadata == {"format": "pt", "note": "x"}
    assert json.loads((tmp_path / "a.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")["w"]["dtype"] == code


@pytest.mark.parametrize(("code", "nbytes"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("X99", 5)])
def test_open_checkpoint_rejects_a_packed_or_unknown_dtype_by_name(code: str, nbytes: int, tmp_path: Path) -> None:
    header = {"odd": entry(0, nbytes, shape=(8,), dtype=code), "w": entry(nbytes, nbytes + 8)}
    path = safetensors_file(tmp_path / "a.safetensors", header, b"\1" * nbytes + struct.pack("<2f", 1, 2))

    checkpoint = open_checkpoint(path)
    assert checkpoint.specs["odd"] == UnsupportedTensor(f"of dtype {code}")
    with pytest.raises(UnsupportedError, match=f"'odd' is of dtype {code}, which is not read"):
        checkpoint["odd"]
    assert checkpoint["w"].tolist() == [1, 2]


def test_open_checkpoint_reads_a_header_in_another_order_than_the_data(tmp_path: Path) -> None:
    header = {"b": entry(8, 16), "none": entry(8, 8, shape=(0,)), "a": entry(0, 8)}
    path = safetensors_file(tmp_path / "a.safetensors", header, struct.pack("<4f", 1, 2, 3, 4))

    checkpoint = open_checkpoint(path)
    oracle = safetensors.torch.load_file(path)
    assert {name: tensor.tolist() for name, tensor in checkpoint.items()} == {n: t.tolist() for n, t in oracle.items()}


def test_open_checkpoint_reads_tied_tensors_of_save_model_under_all_names(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model[1].bias = model[2].bias
    safetensors.torch.save_model(model, str(tmp_path / "a.safetensors"))

    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.keys() == model.state_dict().keys()
    assert all(same(checkpoint[name], tensor) for name, tensor in model.state_dict().items())
    assert checkpoint.specs["0.weight"] == checkpoint.specs["2.weight"]
    assert checkpoint.specs["1.bias"] == checkpoint.specs["2.bias"]


def test_read_header_makes_no_tensor_of_metadata_that_only_looks_like_a_tie(tmp_path: Path) -> None:
    metadata = {"format": "pt", "author": "nobody", "chain": "author", "w": "pt", "license": "w", "a.b": "author"}
    path = safetensors_file(
        tmp_path / "a.safetensors", {"__metadata__": metadata, "pt": entry(0, 8), "w": entry(8, 16)}, b"\0" * 16
    )

    assert set(open_checkpoint(path)) == {"pt", "w"}


def test_open_checkpoint_reads_unicode_names(tmp_path: Path) -> None:
    tensors = {"gewicht.ä": torch.ones(1), "重み": torch.zeros(2), "🙂": torch.ones(2), 'a"b\\c\n': torch.ones(3)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")

    assert open_checkpoint(tmp_path / "a.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("space", ["", " ", "\n", "\r\n\t"])
def test_read_header_reads_a_header_with_spaces_between_its_parts(space: str, tmp_path: Path) -> None:
    parts = ["{", '"__metadata__"', ":", '{"x":"y"}', ",", '"w"', ":", json.dumps(entry()), "}"]
    path = safetensors_file(tmp_path / "a.safetensors", space.join(parts).encode() + space.encode(), b"\0" * 8)
    only = safetensors_file(tmp_path / "b.safetensors", space.join([*parts[:4], "}"]).encode())

    assert (read_header(path).tree.keys(), read_header(path).metadata) == ({"w"}, {"x": "y"})
    assert (read_header(only).tree, read_header(only).metadata) == ({}, {"x": "y"})
    assert safetensors.torch.load_file(path).keys() == {"w"}


def test_read_header_reads_an_empty_safetensors_file(tmp_path: Path) -> None:
    safetensors.torch.save_file({}, tmp_path / "a.safetensors")

    assert read_header(tmp_path / "a.safetensors").tree == {}


LIES: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, "'b' overlaps the tensor before it"),
    "the same bytes": ({"a": entry(0, 8), "b": entry(0, 8)}, b"\0" * 8, "'b' overlaps the tensor before it"),
    "hole": ({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20, "'b' leaves a gap before it"),
    "hole at the start": ({"a": entry(4, 12)}, b"\0" * 12, "'a' leaves a gap before it"),
    "beyond the end": ({"a": entry(0, 8)}, b"\0" * 7, "truncated: 8 bytes of data declared, 7 found"),
    "data that no tensor has": ({"a": entry(0, 8)}, b"\0" * 9, "longer than its header says"),
    "no data": ({"a": entry(0, 8)}, b"", "truncated: 8 bytes of data declared, 0 found"),
    "negative begin": ({"a": entry(-8, 0)}, b"\0" * 8, "impossible numbers"),
    "end before begin": ({"a": entry(8, 0)}, b"\0" * 8, "impossible numbers"),
    "negative size": ({"a": entry(shape=(-2,))}, b"\0" * 8, "claims shape"),
    "two negative sizes": ({"a": entry(shape=(-2, -1))}, b"\0" * 8, "claims shape"),
    "too few bytes": ({"a": entry(0, 4)}, b"\0" * 4, "reaches beyond its storage of 4 bytes"),
    "too many bytes": ({"a": entry(0, 12)}, b"\0" * 12, "needs 8 bytes, its header gives 12"),
    "bytes for an empty tensor": ({"a": entry(shape=(0, 9))}, b"\0" * 8, "needs 0 bytes, its header gives 8"),
    "overflowing shape": ({"a": entry(shape=(1 << 62, 4))}, b"\0" * 8, "a tensor claims shape"),
    "shape that wraps to fit": ({"a": entry(shape=(1 << 63, 2, 2))}, b"\0" * 8, "a tensor claims shape"),
    "huge numbers": ({"a": entry(shape=(10**4000,))}, b"\0" * 8, "a tensor claims shape"),
    "countless dimensions": ({"a": entry(shape=(10**18,) * 50_000)}, b"\0" * 8, "impossible numbers"),
    "bool as a size": ({"a": entry(shape=(2, True))}, b"\0" * 8, "impossible numbers"),
    "bool as an offset": ({"a": entry(False, 8)}, b"\0" * 8, "impossible numbers"),
    "float as a size": ({"a": entry(shape=(2.0,))}, b"\0" * 8, "impossible numbers"),
    "float as an offset": ({"a": entry(0.0, 8)}, b"\0" * 8, "impossible numbers"),
    "infinity as a size": ({"a": entry(shape=(float("inf"),))}, b"\0" * 8, "impossible numbers"),
    "text as a size": ({"a": entry(shape=("2",))}, b"\0" * 8, "impossible numbers"),
    "texts as sizes": ({"a": entry(shape=(10**12, "ab"))}, b"\0" * 8, "impossible numbers"),
    "null as a size": ({"a": entry(shape=(None,))}, b"\0" * 8, "impossible numbers"),
    "list as a size": ({"a": entry(shape=([2],))}, b"\0" * 8, "impossible numbers"),
    "-0 as an offset": (json.dumps({"a": entry()}).encode().replace(b"[0,", b"[-0,"), b"\0" * 8, "not valid JSON"),
    "sizes whose product is too large": (
        {"a": entry(0, 0, shape=(1 << 32, 1 << 32, 0))}, b"", "a tensor claims shape"
    ),
    "NaN beside a shape": ({"a": entry() | {"x": float("nan")}}, b"\0" * 8, "not valid JSON"),
    "infinity beside a shape": ({"a": entry() | {"x": [float("inf")]}}, b"\0" * 8, "not valid JSON"),
    "too large a number beside a shape": (
        json.dumps({"a": entry() | {"x": 7.5}}).encode().replace(b"7.5", b"1e999"), b"\0" * 8, "not valid JSON"
    ),
    "half a character beside a shape": ({"a": entry() | {"x": ["\ud800"]}}, b"\0" * 8, "not valid JSON"),
    "number as a shape": ({"a": entry(shape=2)}, b"\0" * 8, "impossible numbers"),
    "text as a shape": ({"a": entry(shape="2")}, b"\0" * 8, "impossible numbers"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8, "the entry of 'a' is incomplete"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, "the entry of 'a' is incomplete"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "the entry of 'a' is incomplete"),
    "three offsets": ({"a": entry() | {"data_offsets": [0, 4, 8]}}, b"\0" * 8, "the entry of 'a' is incomplete"),
    "null as an entry": ({"a": None}, b"", "the entry of 'a' is incomplete"),
    "list as an entry": ({"a": [1, 2]}, b"", "the entry of 'a' is incomplete"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__ is not a map of text to text"),
    "metadata as text": ({"__metadata__": "a"}, b"", "__metadata__ is not a map of text to text"),
    "names twice": (b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8, "it has a duplicate name"),
    "half a character": (b'{"\\ud800":%b}' % json.dumps(entry()).encode(), b"\0" * 8, "not valid JSON"),
    "half a character in the metadata": (b'{"__metadata__":{"a":"\\ud800"}}', b"", "not valid JSON"),
    "half a character in a name of late metadata": (
        b'{"a":%b,"__metadata__":{"\\ud800":""}}' % json.dumps(entry()).encode(), b"\0" * 8, "not valid JSON"
    ),
    "half a character in late metadata": (
        b'{"a":%b,"__metadata__":{"a":"\\ud800"}}' % json.dumps(entry()).encode(), b"\0" * 8, "not valid JSON"
    ),
    "bad UTF-8": (b'{"\xff":%b}' % json.dumps(entry()).encode(), b"\0" * 8, "not valid JSON"),
    "UTF-16": (json.dumps({"a": entry()}).encode("utf-16-le"), b"\0" * 8, "not valid JSON"),
    "bad JSON": (b"{'a': 1}", b"", "not valid JSON"),
    "half JSON": (b'{"a":', b"", "not valid JSON"),
    "JSON and more": (b"{} {}", b"", "not valid JSON"),
    "comma and no entry": (b'{"__metadata__":{}, }', b"", "not valid JSON"),
    "no-break space": ('{\u00a0"__metadata__":{}}'.encode(), b"", "not valid JSON"),
    "deep JSON": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "not valid JSON"),
    "long number": (
        json.dumps({"a": entry(shape=(777,))}).encode().replace(b"777", b"7" * 5000), b"", "not valid JSON"
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_read_header_rejects_a_wrong_header(lie: str, tmp_path: Path) -> None:
    header, data, message = LIES[lie]
    path = safetensors_file(tmp_path / "a.safetensors", header, data)

    with pytest.raises(CorruptError, match=message):
        read_header(path)
    if lie != "names twice":  # of which the library takes the last
        with pytest.raises(safetensors.SafetensorError, match="deserializing header"):
            safetensors.torch.load_file(path)


def test_read_header_rejects_a_dtype_that_is_no_text(tmp_path: Path) -> None:
    path = safetensors_file(tmp_path / "a.safetensors", {"a": entry(dtype=["F32"])}, b"\0" * 8)

    with pytest.raises(UnsupportedError, match="of dtype"):
        open_checkpoint(path)["a"]


@pytest.mark.parametrize("length", [3, 1 << 20, 100_000_001, 1 << 62, (1 << 64) - 1])
def test_read_header_rejects_a_wrong_header_length_without_reading_so_much(length: int, tmp_path: Path) -> None:
    path = safetensors_file(tmp_path / "a.safetensors", {"a": entry()}, b"\0" * 8)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    with pytest.raises(CorruptError, match="truncated|not valid JSON"):
        read_header(path)


@pytest.mark.parametrize("header", [b"[]", b"null", b'"text"', b" {}"])
def test_read_header_rejects_a_header_that_is_no_object(header: bytes, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="neither a torch file"):
        read_header(safetensors_file(tmp_path / "a.safetensors", header))


def test_read_header_rejects_a_safetensors_file_cut_anywhere(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(3.0), "half": torch.ones(2, 2, dtype=torch.float16), "n": torch.tensor(3)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(raw)):
        cut.write_bytes(raw[:length])
        with pytest.raises((CorruptError, NotACheckpointError), match=r"cut\.safetensors"):
            read_header(cut)
    cut.write_bytes(raw)
    assert raw_bytes(open_checkpoint(cut)["w"]) == raw_bytes(tensors["w"])


@pytest.mark.parametrize("first", [True, False])
def test_metadata_of_null_are_none_as_for_the_library(first: bool, tmp_path: Path) -> None:
    entries = {"__metadata__": None, "w": entry()} if first else {"w": entry(), "__metadata__": None}
    path = safetensors_file(tmp_path / "a.safetensors", entries, struct.pack("<2f", 1, 2))
    expected = safetensors.torch.load_file(path)["w"]
    assert same(open_checkpoint(path)["w"], expected)
    assert read_header(path).metadata == {}


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"', "\\ud800", "[" * 100_000])
def test_read_header_ignores_provenance_that_is_no_object(text: str, tmp_path: Path) -> None:
    path = safetensors_file(tmp_path / "a.safetensors", {"__metadata__": {"ckpt_tools": text}, "w": entry()}, b"\0" * 8)

    try:
        assert read_header(path).provenance is None
    except CkptError as error:
        pytest.fail(f"the weights are fine, whatever stands beside them: {error}")
