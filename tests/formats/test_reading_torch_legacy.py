"""Torch's format before 1.6: read as torch.load reads it, and never beyond the end of the file."""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crafting import STORAGE, TENSOR, TORCH_DTYPES, random_tensor, same

from ckpt_tools import fix_prefix, open_checkpoint
from ckpt_tools.compute.payload import read_tensor
from ckpt_tools.errors import CorruptError, NotACheckpointError
from ckpt_tools.formats import read_header
from ckpt_tools.formats.pickle_objects import Inert
from ckpt_tools.formats.tree import tensors_in

pytestmark = pytest.mark.filterwarnings("ignore:B?Complex.* support is experimental")

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


@pytest.fixture
def legacy(save: Callable[..., Path]) -> Callable[[str, Any], Path]:
    return lambda name, obj: save(name, obj, _use_new_zipfile_serialization=False)


def by_hand(path: Path, pickled: bytes, keys: Any, storages: bytes) -> Path:
    """Write a legacy file around any pickle."""
    facts = b"".join(pickle.dumps(fact, protocol=2) for fact in (MAGIC, 1001, SYSTEM))
    path.write_bytes(facts + b"\x80\2" + pickled + b"." + pickle.dumps(keys, protocol=2) + storages)
    return path


def stored(*values: float) -> bytes:
    return struct.pack(f"<q{len(values)}f", len(values), *values)


def assert_reads_as_torch(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.header.format.name == "torch-legacy"
    oracle = torch.load(path, weights_only=True)
    assert list(checkpoint) == list(oracle)
    for name, tensor in oracle.items():
        assert same(checkpoint[name], tensor), name


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_open_checkpoint_reads_every_dtype_of_a_legacy_file_bit_for_bit(
    dtype: str, legacy: Callable[..., Path]
) -> None:
    whole = random_tensor(dtype, (6, 4))
    tensors = {"w": whole, "view": whole[1::2, 1:3], "empty": random_tensor(dtype, (0, 2)), "scalar": whole[1, 2]}

    checkpoint = open_checkpoint(legacy("a.pth", tensors))
    # torch writes, but cannot itself read, the dtypes that it stores untyped; so the originals are the oracle.
    for name, tensor in tensors.items():
        assert same(checkpoint[name], tensor), name


def test_open_checkpoint_reads_views_and_shared_storages_of_a_legacy_file(legacy: Callable[..., Path]) -> None:
    base = torch.arange(60.0)
    path = legacy("a.pth", {
        "base": base, "again": base, "offset": base[7:], "transposed": base.view(6, 10).t(),
        "expanded": base[:3].expand(4, 3), "other": torch.arange(5), "scalar": base[9],
        "empty": torch.empty(0), "last": torch.full((2,), 7.0),
        "channels_last": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    })  # fmt: skip

    assert_reads_as_torch(path)
    specs: Any = open_checkpoint(path).specs
    assert specs["base"] == specs["again"]
    assert specs["base"].storage == specs["transposed"].storage != specs["other"].storage


def test_read_header_keeps_the_metadata_of_a_state_dict_in_a_legacy_file(legacy: Callable[..., Path]) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    path = legacy("a.pth", {"model": state, "epoch": 3, "names": ["a", {"b": (1, None)}]})

    tree = read_header(path).tree
    assert isinstance(tree["model"], OrderedDict)
    assert tree["model"]._metadata == state._metadata
    assert (tree["epoch"], tree["names"]) == (3, ["a", {"b": (1, None)}])


def test_read_header_reads_a_legacy_file_without_tensors(legacy: Callable[..., Path]) -> None:
    assert read_header(legacy("a.pth", {"epoch": 3})).tree == {"epoch": 3}


def test_tensors_in_finds_all_tensors_of_a_legacy_module(legacy: Callable[..., Path]) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    header = read_header(legacy("a.pth", module))

    assert isinstance(header.tree, Inert)
    found = [read_tensor(spec) for _, spec in tensors_in(header.tree)]
    assert len(found) == len(module.state_dict())
    assert all(any(same(tensor, other) for other in found) for tensor in module.state_dict().values())


def test_open_checkpoint_reads_a_storage_view_as_torch_does(tmp_path: Path) -> None:
    # torch 0.3 and before: (view key, offset, size), in elements of the whole storage
    viewed = TENSOR.replace(STORAGE, STORAGE.replace(b"K\4tQ", b"K\6(X\1\0\0\0vK\2K\4ttQ"))
    path = by_hand(tmp_path / "a.pth", b"}X\1\0\0\0w" + viewed + b"s", ["0"], stored(0, 1, 2, 3, 4, 5))

    assert_reads_as_torch(path)
    assert open_checkpoint(path)["w"].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "view", [b"K\3K\4", b"K\0K\7", b"J\xff\xff\xff\xffK\4", b"K\0J\xff\xff\xff\xff", b"NK\4", b"K\0G?\xf0\0\0\0\0\0\0"]
)
def test_read_header_rejects_a_storage_view_beyond_its_storage(view: bytes, tmp_path: Path) -> None:
    viewed = TENSOR.replace(STORAGE, STORAGE.replace(b"K\4tQ", b"K\6(X\1\0\0\0v" + view + b"ttQ"))
    path = by_hand(tmp_path / "a.pth", viewed, ["0"], stored(0, 1, 2, 3, 4, 5))

    with pytest.raises(CorruptError, match="a storage view reaches beyond its storage"):
        read_header(path)


def test_open_checkpoint_reads_a_pickle_of_python_2(tmp_path: Path) -> None:
    # Python 2 wrote its text as SHORT_BINSTRING (U), keys and persistent ids included.
    old = (
        TENSOR.replace(b"X\7\0\0\0storage", b"U\7storage")
        .replace(b"X\1\0\0\x000", b"U\x010")
        .replace(b"X\3\0\0\0cpu", b"U\3cpu")
    )
    path = by_hand(tmp_path / "a.pth", b"}U\1w" + old + b"s", ["0"], stored(0, 1, 2, 3))
    path.write_bytes(path.read_bytes().replace(b"X\1\0\0\x000", b"U\x010"))

    assert open_checkpoint(path)["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("keys", "storages", "message"),
    [
        ([], b"", "its list of storages does not match"),
        (["1"], stored(0, 1, 2, 3), "its list of storages does not match"),
        (["0", "0"], stored(0, 1, 2, 3) * 2, "its list of storages does not match"),
        (["0", "1"], stored(0, 1, 2, 3) * 2, "its list of storages does not match"),
        ([0], stored(0, 1, 2, 3), "its list of storages does not match"),
        ({"0": 1}, stored(0, 1, 2, 3), "its list of storages does not match"),
        (None, stored(0, 1, 2, 3), "its list of storages does not match"),
        (["0"], stored(0, 1, 2), "truncated: storage 0 ends at byte"),
        (["0"], b"\3" + stored(0, 1, 2, 3)[1:], "storage 0 has a different size than in its pickle"),
        (["0"], b"\xff" * 8 + stored(0, 1, 2, 3)[8:], "storage 0 has a different size than in its pickle"),
    ],
)
def test_read_header_rejects_storages_that_do_not_fit_the_object(
    keys: Any, storages: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CorruptError, match=message):
        read_header(by_hand(tmp_path / "a.pth", TENSOR, keys, storages))


@pytest.mark.parametrize("count", [-1, 1 << 40, 1 << 62, 10**2000], ids=["-1", "2^40", "2^62", "10^2000"])
def test_read_header_rejects_a_storage_of_impossible_size(count: int, tmp_path: Path) -> None:
    raw = pickle.encode_long(count)
    lying = TENSOR.replace(b"K\4tQ", b"\x8b" + struct.pack("<i", len(raw)) + raw + b"tQ")

    with pytest.raises(CorruptError, match="storage 0 is larger than the file"):
        read_header(by_hand(tmp_path / "a.pth", lying, ["0"], stored(0, 1, 2, 3)))


def test_read_header_rejects_one_storage_of_two_sizes(tmp_path: Path) -> None:
    other = TENSOR.replace(b"K\4tQ", b"K\5tQ")

    with pytest.raises(CorruptError, match="storage 0 has two sizes"):
        read_header(by_hand(tmp_path / "a.pth", TENSOR + other + b"\x86", ["0"], stored(0, 1, 2, 3)))


def test_read_header_rejects_a_storage_before_the_object(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps(MAGIC, protocol=2) + b"\x80\2" + STORAGE + b".")

    with pytest.raises(CorruptError, match="an unexpected storage"):
        read_header(path)


def test_read_header_rejects_a_legacy_file_cut_anywhere(legacy: Callable[..., Path], tmp_path: Path) -> None:
    raw = legacy("a.pth", {"w": torch.arange(4.0), "n": torch.tensor(3), "lr": 0.1}).read_bytes()
    cut = tmp_path / "cut.pth"
    for length in range(len(raw)):
        cut.write_bytes(raw[:length])
        with pytest.raises((CorruptError, NotACheckpointError), match=r"cut\.pth"):
            read_header(cut)
    cut.write_bytes(raw)
    assert same(open_checkpoint(cut)["w"], torch.arange(4.0))


def test_read_header_accepts_bytes_behind_the_last_storage(legacy: Callable[..., Path]) -> None:
    path = legacy("a.pth", {"w": torch.arange(4.0)})
    torch.save({"second": torch.ones(1)}, buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + buffer.getvalue())  # torch allows several objects in one file

    assert_reads_as_torch(path)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_read_header_accepts_every_protocol_of_torch_save(protocol: int, tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.arange(3)}
    path = tmp_path / "c.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    found = dict(open_checkpoint(path))
    assert found.keys() == state.keys()
    assert all(found[name].equal(tensor) for name, tensor in state.items())
    renamed = fix_prefix(path, add=["m."], out=tmp_path / "new.pt")
    assert renamed.written
    assert torch.load(tmp_path / "new.pt", weights_only=False).keys() == {"m.a.weight", "m.b"}
    path.write_bytes(path.read_bytes()[:12])
    with pytest.raises(CorruptError, match="truncated after 12 bytes"):
        read_header(path)
