"""Other names in a file: the pickle, the zip and the header around them, honest ones and others."""

from __future__ import annotations

import errno
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from crafting import PAYLOAD, TENSOR, raw_bytes, records_of, safetensors_file, torch_zip, zeros
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from ckpt_tools import fix_prefix, open_checkpoint
from ckpt_tools.errors import AlignmentError, CkptError, CorruptError, UnsupportedError
from ckpt_tools.formats.file_plan import OutTensor
from ckpt_tools.formats.pickle_edit import trace
from ckpt_tools.formats.zip import NewEntry, end_of
from ckpt_tools.storage import splice
from ckpt_tools.storage.local import LocalFile

Save = Callable[..., Path]
X = {"module.w": torch.arange(4.0), "module.b": torch.ones(2)}


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def check_zip(path: Path) -> None:
    done = subprocess.run(["unzip", "-tq", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def names_of(path: Path) -> list[str]:
    return list(open_checkpoint(path))


# The pickle


def test_rewritten_changes_only_the_opcodes_of_names() -> None:
    """What Python's own disassembler shows of the new pickle is the old one, with other arguments here and there."""
    tree = {"state": {"module.w": 1, "b": (2.5, None)}, "same": ["module.w", b"raw", 1 << 70]}
    for protocol in (0, 1, 2, 3):
        traced = trace(pickle.dumps(tree, protocol), where="test")
        key = next(iter(traced.tree["state"]))
        new = traced.rewritten([(key, "w")])
        old_ops, new_ops = ([(op.name, arg) for op, arg, _ in pickletools.genops(raw)] for raw in (traced.pickled, new))
        assert [a == b for a, b in zip(old_ops, new_ops, strict=True)].count(False) == 2
        assert pickle.loads(new) == {  # noqa: S301 - of this test
            "state": {"w": 1, "b": (2.5, None)},
            "same": ["module.w", b"raw", 1 << 70],
        }


def test_trace_reads_a_text_of_protocol_0_and_imports_no_module_for_it() -> None:
    pickled = b"\x80\2}Vcaf\\u00e9\\u202e\nV\xe9\ns."
    code = (
        "import sys; from ckpt_tools.formats.pickle_edit import trace; before = {*sys.modules}; "
        f"print(ascii(trace({pickled!r}, where='test').tree), {{*sys.modules}} - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{ascii(pickle.loads(pickled))} set()"  # noqa: S301 - of this test


def test_spell_reads_bytearrays() -> None:
    tree = {"module.w": [bytearray(b"raw"), bytearray()]}
    traced = trace(pickle.dumps(tree, 5), where="test")
    assert traced.tree == tree
    assert pickle.loads(traced.rewritten([(next(iter(traced.tree)), "w")])) == {"w": tree["module.w"]}  # noqa: S301


def test_rewritten_without_changes_returns_the_same_bytes() -> None:
    raw = pickle.dumps({"a": "b", "c": ["a", "b"]}, 5)
    assert trace(raw, where="test").rewritten([]) == raw


@pytest.mark.parametrize(
    "key",
    [b"U\x08module.w", b"T\x08\0\0\0module.w", b"S'module.w'\n", b"Vmodule.w\n", b"\x8c\x08module.w", text("module.w")],
)
def test_fix_prefix_renames_texts_of_every_protocol(key: bytes, tmp_path: Path) -> None:
    """Python 2 wrote text in bytes, protocol 0 in lines; used a second time by each of the three ways to refer."""
    for put, get in ((b"p0\n", b"g0\n"), (b"q\0", b"h\0"), (b"r\0\0\0\0", b"j\0\0\0\0")):
        pickled = b"\x80\2}(" + key + put + TENSOR + text("name") + get + text("in") + b"}" + get + TENSOR + b"su."
        path = torch_zip(tmp_path / "c.pth", pickled)
        fix_prefix(path)
        tree = torch.load(path, weights_only=False)
        assert list(tree) == ["w", "name", "in"]
        assert tree["name"] == "module.w"
        assert list(tree["in"]) == ["w"]
        check_zip(path)


def test_fix_prefix_renames_an_ordered_dict_of_python_2(tmp_path: Path) -> None:
    """It was made of a list of pairs."""
    pairs = b"](](" + b"U\x08module.w" + TENSOR + b"ee"
    path = torch_zip(tmp_path / "c.pth", b"\x80\2ccollections\nOrderedDict\n(" + pairs + b"tR.")
    fix_prefix(path)
    assert list(torch.load(path, weights_only=False)) == ["w"]


PAIR = b"](" + text("module.w") + TENSOR + b"eq\2"
ORDERED = b"ccollections\nOrderedDict\n("


def test_fix_prefix_renames_a_key_that_is_set_twice(tmp_path: Path) -> None:
    pickled = (
        b"\x80\2}(" + text("module.w") + TENSOR + text("module.w") + TENSOR + b"u" + text("module.w") + TENSOR + b"s."
    )
    path = torch_zip(tmp_path / "c.pth", pickled)
    fix_prefix(path)
    assert list(torch.load(path)) == ["w"]


def test_fix_prefix_rejects_a_pair_in_two_dicts_of_which_one_changes(tmp_path: Path) -> None:
    """Of which one has another name beside it. No pickler writes this."""
    pickled = b"](" + ORDERED + b"](" + PAIR + b"etR" + ORDERED + b"](h\2](" + text("c") + TENSOR + b"eetRe."
    path = torch_zip(tmp_path / "c.pth", b"\x80\2" + pickled)
    before = path.read_bytes()
    with pytest.raises(UnsupportedError, match=r"c\.pth: .*Load and save it with torch once"):
        fix_prefix(path)
    assert path.read_bytes() == before


@given(st.binary(max_size=60), st.integers(0, 200))
def test_spell_reads_or_rejects_a_damaged_pickle(noise: bytes, at: int) -> None:
    raw = bytearray(pickle.dumps({"module.w": ["module.w"] * 3, "b": {"module.w": 1.5}}, 4))
    raw[at % len(raw) : at % len(raw) + len(noise)] = noise
    try:
        traced = trace(bytes(raw), where="test")
    except CkptError:
        return
    assert traced.rewritten([]) == bytes(raw)


def test_fix_prefix_runs_no_code_of_the_pickle(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    evil = b"cos\nsystem\n(" + text(f"touch {sentinel}") + b"tR"
    path = torch_zip(tmp_path / "c.pth", b"\x80\2}(" + text("evil") + evil + text("module.w") + TENSOR + b"u.")
    fix_prefix(path, strip=["module."])
    assert not sentinel.exists()
    assert names_of(path) == ["w"]
    assert evil in records_of(path)["archive/data.pkl"]


# The zip


def test_fix_prefix_renames_in_a_zip_of_another_writer(tmp_path: Path) -> None:
    pickled = b"\x80\2}(" + text("module.w") + TENSOR + b"u."
    for length in range(1, 40):  # what is left over may be less than a field of padding takes
        path = torch_zip(tmp_path / "c.pth", pickled)
        fix_prefix(path, add=["a" * length + "."])
        check_zip(path)
        assert raw_bytes(torch.load(path)["a" * length + ".module.w"]) == PAYLOAD


def test_fix_prefix_renames_an_object_behind_its_storages(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"kept"
        for name, data in {
            "a/data/0": PAYLOAD,
            "a/data.pkl": b"\x80\2}(" + text("module.w") + TENSOR + b"u.",
            "a/version": b"3\n",
        }.items():
            archive.writestr(name, data)
    fix_prefix(path)
    check_zip(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.comment == b"kept"
    assert raw_bytes(torch.load(path)["w"]) == PAYLOAD


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="older torch always has checksums")
def test_fix_prefix_renames_in_a_file_without_checksums(save: Save) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save("c.pth", X)
    finally:
        torch.serialization.set_crc32_options(True)
    fix_prefix(path)
    assert torch.load(path)["w"].equal(X["module.w"])


def sparse(path: Path, records: list[tuple[str, bytes | OutTensor]]) -> Path:
    """Write a zip whose storages are holes."""
    end, lines = 0, []
    with path.open("wb") as file:
        for name, content in records:
            crc = zlib.crc32(content) if isinstance(content, bytes) else 0
            size = len(content) if isinstance(content, bytes) else content.nbytes
            entry = NewEntry(f"archive/{name}".encode(), size, end)
            file.seek(entry.offset)
            file.write(entry.local_header(crc))
            file.write(content if isinstance(content, bytes) else b"")
            lines.append(entry.line(crc))
            end = entry.end
        file.seek(end)
        directory = b"".join(lines)
        file.write(directory + end_of(end, len(directory), len(lines)))
    return path


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("grown", [0, 64, 4096])
def test_fix_prefix_renames_in_files_above_4_gb(order: str, grown: int, tmp_path: Path) -> None:
    """Offsets and sizes beyond 32 bits; with `grown`, a record that moves across that border. All of it holes."""
    count = (1 << 30) + 7 if grown == 0 else ((1 << 32) - 1 - 2 * grown) // 4
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuJ" + struct.pack("<i", count) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0J" + struct.pack("<i", count) + b"\x85K\1\x85\x89"
    tensor += b"ccollections\nOrderedDict\n)RtR"
    pickled = b"\x80\2}(" + text("module.w") + tensor + text("n") + b"K\1u."
    weights = zeros(tmp_path, "float32", (count,))
    body = [("data.pkl", pickled), ("data/0", weights)]
    path = sparse(
        tmp_path / "c.pth", [*(body if order == "first" else body[::-1]), ("byteorder", b"little"), ("version", b"3\n")]
    )
    fix_prefix(path, strip=["module."], add=["x" * grown + "."] if grown else ["y."])
    assert path.stat().st_blocks * 512 < 1 << 20
    name = "x" * grown + ".w" if grown else "y.w"
    found = torch.load(path, mmap=True, weights_only=True)
    assert list(found) == [name, "n"]
    assert found[name].shape == (count,)
    assert found[name][-1] == 0
    with zipfile.ZipFile(path) as archive:  # of which Python checks the directory against the records
        for info in archive.infolist():
            archive.open(info).close()
        assert archive.read("archive/version") == b"3\n"
    path.unlink()


def head(name: bytes, size: int) -> bytes:
    """What stands before a record."""
    return b"PK\3\4" + struct.pack("<5H3L2H", 20, 0, 0, 0, 0x21, 0, size, size, len(name), 0) + name


def with_directory(blob: bytes, records: dict[bytes, tuple[int, int]]) -> bytes:
    """End a zip with a directory that says where its records are, and how long."""
    lines = [
        b"PK\1\2" + struct.pack("<6H3L5H2L", 20, 20, 0, 0, 0, 0x21, 0, size, size, len(name), 0, 0, 0, 0, 0, at) + name
        for name, (at, size) in records.items()
    ]
    directory = b"".join(lines)
    end = struct.pack("<4H2LH", 0, 0, len(lines), len(lines), len(directory), len(blob), 0)
    return blob + directory + b"PK\5\6" + end


@pytest.mark.parametrize("place", ["inside", "around"])
def test_fix_prefix_rejects_records_that_overlap(place: str, tmp_path: Path) -> None:
    """A storage may be said to stand in the pickle, or to reach into its header; moving bytes would break one."""
    storage = head(b"a/data/0", 16)
    pickled = b"\x80\3}(" + text("module.w") + TENSOR
    if place == "inside":
        pickled += text("hidden") + b"C" + bytes([len(storage) + 16]) + storage + PAYLOAD
    pickled += b"u."
    blob = b"" if place == "inside" else storage
    start = len(blob)
    blob += head(b"a/data.pkl", len(pickled)) + pickled
    at = blob.index(storage)
    path = tmp_path / "c.pth"
    path.write_bytes(with_directory(blob, {b"a/data.pkl": (start, len(pickled)), b"a/data/0": (at, 16)}))
    before = path.read_bytes()
    assert names_of(path) == ["module.w"]
    with pytest.raises(CorruptError, match=r"c\.pth: its entries overlap\. The file is damaged"):
        fix_prefix(path)
    assert path.read_bytes() == before


def test_fix_prefix_rejects_a_zip_behind_something_else(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "c.pth", b"\x80\2}(" + text("module.w") + TENSOR + b"u.")
    path.write_bytes(b"PK\3\4" + bytes(60) + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(CkptError, match="other bytes precede its zip archive"):
        fix_prefix(path)
    assert path.read_bytes() == before


# The format before zip


def test_fix_prefix_renames_in_a_legacy_file(save: Save) -> None:
    whole = torch.arange(6.0)
    tree = {"model": OrderedDict({"module.w": whole[1:3], "module.v": whole, "module.n": torch.tensor(3)}), "epoch": 1}
    path = save("c.pth", tree, _use_new_zipfile_serialization=False)
    fix_prefix(path)
    found = torch.load(path, weights_only=True)
    assert list(found["model"]) == ["w", "v", "n"]
    assert all(found["model"][name].equal(tree["model"][f"module.{name}"]) for name in found["model"])
    assert found["epoch"] == 1
    assert found["model"]["w"].untyped_storage().data_ptr() == found["model"]["v"].untyped_storage().data_ptr()


# safetensors


def test_fix_prefix_keeps_the_data_of_a_safetensors_file_in_place(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file(X, path, metadata={"format": "pt", "license": "module.w"})
    before = path.read_bytes()
    fix_prefix(path)
    after = path.read_bytes()
    assert len(after) == len(before)
    (length,) = struct.unpack("<Q", before[:8])
    assert after[8 + length :] == before[8 + length :]
    assert {name: tensor.tolist() for name, tensor in load_file(path).items()} == {
        name.removeprefix("module."): tensor.tolist() for name, tensor in X.items()
    }
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "license": "module.w"}
    offsets = [
        {
            name.removeprefix("module."): entry.get("data_offsets")
            for name, entry in json.loads(raw[8 : 8 + length]).items()
        }
        for raw in (before, after)
    ]
    assert offsets[0] == offsets[1]


def test_fix_prefix_moves_the_data_by_a_block_for_longer_names(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file(X, path)
    size = path.stat().st_size
    fix_prefix(path, add=["model."])
    assert path.stat().st_size == size + 4096
    fix_prefix(path, add=["model."])
    assert path.stat().st_size == size + 4096
    assert load_file(path)["model.model.module.w"].equal(X["module.w"])


def test_fix_prefix_renames_tied_tensors_on_both_sides(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict(embed=nn.Linear(3, 3, bias=False), head=nn.Linear(3, 3, bias=False)))
    model.head.weight = model.embed.weight
    path = tmp_path / "c.safetensors"
    save_model(nn.DataParallel(model), str(path))
    fix_prefix(path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"head.weight": "embed.weight"}
    assert set(names_of(path)) == {"head.weight", "embed.weight"}
    fresh = nn.Sequential(OrderedDict(embed=nn.Linear(3, 3, bias=False), head=nn.Linear(3, 3, bias=False)))
    fresh.head.weight = fresh.embed.weight
    load_model(fresh, path)
    assert fresh.head.weight.equal(model.head.weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strip": ["x."]}, UnsupportedError, "'__metadata__' cannot name a tensor"),
        ({"strip": ["y."]}, AlignmentError, "a tied tensor would have the name of another entry"),
    ],
)
def test_fix_prefix_rejects_names_that_safetensors_cannot_have(
    options: dict[str, Any], error: type[CkptError], message: str, tmp_path: Path
) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    name = "x.__metadata__" if error is UnsupportedError else "w"
    metadata = {"y.format.a": "w", "format.a": "pt"} if error is AlignmentError else {}
    path = safetensors_file(tmp_path / "c.safetensors", {"__metadata__": metadata, name: entry}, PAYLOAD)
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        fix_prefix(path, **options)
    assert path.read_bytes() == before


# Copying


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, None])
def test_fix_prefix_reads_and_writes_where_the_kernel_does_not_copy(
    reason: int | None, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across file systems, on old kernels, in some containers; and some file systems copy nothing without a word."""
    calls = []

    def refuse(*args: Any) -> int:
        calls.append(args)
        if reason is None:
            return 0
        raise OSError(reason, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    path = save("c.pth", {"module.w": torch.arange(1 << 20)})
    fix_prefix(path)
    assert calls
    assert torch.load(path)["w"].equal(torch.arange(1 << 20))
    check_zip(path)


def test_fix_prefix_leaves_everything_unchanged_after_an_error_of_the_disk(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    path = save("c.pth", X)
    before = path.read_bytes()
    with pytest.raises(CkptError, match=r"copying .* failed \(No space left on device\)"):
        fix_prefix(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_splice_write_rejects_a_source_that_ends_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    (tmp_path / "a").write_bytes(b"short")
    with closing(LocalFile(tmp_path / "a")) as source, (tmp_path / "b").open("wb") as target:
        part = splice.Splice(tmp_path / "a", (splice.Span(0, 9),))
        with pytest.raises(CorruptError, match="is shorter than its header declares"):
            splice.write(part, source, target.fileno())


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9000), st.integers(0, 9000)), max_size=6))
def test_splice_write_keeps_pieces_in_order(pieces: list[tuple[bool, int, int]]) -> None:
    data = os.urandom(9000)
    parts = tuple(splice.Span(min(a, b), max(a, b)) if old else data[:a] for old, a, b in pieces)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").write_bytes(data)
        splicing = splice.Splice(Path(folder) / "a", parts)
        with closing(LocalFile(Path(folder) / "a")) as source, (Path(folder) / "b").open("wb") as target:
            splice.write(splicing, source, target.fileno())
        want = b"".join(data[p.start : p.stop] if isinstance(p, splice.Span) else p for p in parts)
        assert (Path(folder) / "b").read_bytes() == want
        assert splicing.size == len(want)
