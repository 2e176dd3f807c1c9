"""What is no checkpoint, or no longer one: always a ReadError that says so, never another exception."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import socket
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from crafting import bounded_memory, records_of, same, zip_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from ckpt_tools import open_checkpoint
from ckpt_tools.compute.payload import read_tensor
from ckpt_tools.errors import CkptError, CorruptError, NotACheckpointError, ReadError, UnsupportedError
from ckpt_tools.formats import read_header
from ckpt_tools.formats.tree import tensors_in
from ckpt_tools.tensors import TensorSpec

FUZZ = settings(max_examples=60)
TENSORS = {"w": torch.arange(6.0).view(2, 3), "half": torch.ones(3, dtype=torch.float16), "n": torch.tensor(3)}


def torch_bytes(*, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(TENSORS | {"view": TENSORS["w"].t(), "lr": 0.1}, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


WHOLE = {
    "zip": torch_bytes(new=True),
    "legacy": torch_bytes(new=False),
    "safetensors": safetensors_bytes(TENSORS, metadata={"format": "pt", "a": "w"}),
}


def reads_or_is_refused(path: Path, *, named: Path | None = None) -> bool:
    """Read the header and every tensor: True if all are as the header says, or an error names the file.

    Any exception but a CkptError comes through.
    """
    try:
        specs = [spec for _, spec in tensors_in(read_header(path).tree) if isinstance(spec, TensorSpec)]
        tensors = [(spec, read_tensor(spec)) for spec in specs]
    except CkptError as error:
        return str(named or path) in str(error) or "has no dtype" in str(error)  # as an older torch does
    return all((tuple(t.shape), str(t.dtype)) == (spec.shape, f"torch.{spec.dtype.name}") for spec, t in tensors)


def flips(raw: bytes, *, start: int = 0) -> st.SearchStrategy[bytes]:
    """Change one to six bytes, drop some, or put some in."""

    def apply(changes: list[tuple[int, int, str]]) -> bytes:
        damaged = bytearray(raw)
        for at, value, what in changes:
            at %= len(damaged)
            if what == "set":
                damaged[at] = value
            elif what == "bit":
                damaged[at] ^= 1 << value % 8
            elif what == "drop":
                del damaged[at : at + value % 5]
            else:
                damaged[at:at] = bytes([value]) * (value % 5)
        return bytes(damaged)

    change = st.tuples(
        st.integers(start, len(raw) - 1), st.integers(0, 255), st.sampled_from(["set", "bit", "drop", "insert"])
    )
    return st.lists(change, min_size=1, max_size=6).map(apply)


def test_read_header_rejects_a_zip_cut_anywhere(tmp_path: Path) -> None:
    whole, cut = WHOLE["zip"], tmp_path / "cut.pth"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises((CorruptError, NotACheckpointError), match=r"cut\.pth"):
            read_header(cut)
    cut.write_bytes(whole)
    assert all(same(open_checkpoint(cut)[name], tensor) for name, tensor in TENSORS.items())


@FUZZ
@given(flips(WHOLE["zip"]))
def test_read_header_reads_or_rejects_a_damaged_zip(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(raw)
    with bounded_memory():
        assert reads_or_is_refused(tmp_path / "a.pth")


@FUZZ
@given(flips(WHOLE["zip"][-700:]))
def test_read_header_reads_or_rejects_a_damaged_zip_directory(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(WHOLE["zip"][:-700] + raw)
    with bounded_memory():
        assert reads_or_is_refused(tmp_path / "a.pth")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole") / "a.pth"
    path.write_bytes(WHOLE["zip"])
    return records_of(path)


@FUZZ
@given(data=st.data())
def test_read_header_reads_or_rejects_a_damaged_pickle_in_a_sound_zip(
    tmp_path: Path, records: dict[str, bytes], data: st.DataObject
) -> None:
    name = next(name for name in records if name.endswith("data.pkl"))
    path = zip_of(tmp_path / "a.pth", records | {name: data.draw(flips(records[name]))})
    with bounded_memory():
        assert reads_or_is_refused(path)


@FUZZ
@given(flips(WHOLE["legacy"]))
def test_read_header_reads_or_rejects_a_damaged_legacy_file(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(raw)
    with bounded_memory():
        assert reads_or_is_refused(tmp_path / "a.pth")


@FUZZ
@given(flips(WHOLE["safetensors"]))
def test_read_header_reads_or_rejects_a_damaged_safetensors_file(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(raw)
    with bounded_memory():
        assert reads_or_is_refused(tmp_path / "a.safetensors")


@FUZZ
@given(flips(json.dumps({"metadata": {"total_size": 1}, "weight_map": {"w": "a.safetensors", "n": "b.bin"}}).encode()))
def test_read_header_reads_or_rejects_a_damaged_index(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes({"w": torch.ones(1)}))
    torch.save({"n": torch.ones(1)}, tmp_path / "b.bin")
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(raw)
    with bounded_memory():
        assert reads_or_is_refused(index, named=tmp_path)  # some errors name a shard


@FUZZ
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"PK\3\4", WHOLE["legacy"][:19], b"\x40\0\0\0\0\0\0\0{", b"\x80\2", WHOLE["zip"][:64]]),
)
def test_read_header_rejects_any_bytes(tmp_path: Path, raw: bytes, start: bytes) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(start + raw)
    with bounded_memory(), pytest.raises(ReadError, match=r"a\.pth"):
        read_header(path)


def tar_bytes(name: str = "storages", mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


NO_CHECKPOINTS: dict[str, tuple[bytes, type[ReadError], str]] = {
    "an empty file": (b"", CorruptError, "empty file. Get a fresh copy"),
    "a text file": (b"epoch,loss\n1,0.5\n", NotACheckpointError, "not a checkpoint: neither a torch file"),
    "a short text file": (b"x", NotACheckpointError, "not a checkpoint"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", NotACheckpointError,
        r"It is a Git LFS pointer; run git lfs pull\.",
    ),
    "an HDF5 file": (b"\x89HDF\r\n\x1a\n" + bytes(100), NotACheckpointError, r"It is an HDF5 file\."),
    "a plain pickle": (pickle.dumps({"w": [1.0]}), NotACheckpointError, r"a pickle that torch\.save did not write\."),
    "a pickle of protocol 2": (pickle.dumps({"w": 1}, 2), NotACheckpointError, r"a pickle that torch\.save did not"),
    "a tar file": (tar_bytes(), UnsupportedError, r"a tar file with 0 torch files in it"),
    "a compressed tar file": (tar_bytes(mode="w:gz"), NotACheckpointError, "not a checkpoint"),
    "half a gzip file": (gzip.compress(bytes(range(256)) * 9)[:50], NotACheckpointError, "not a checkpoint"),
    "half a bzip2 file": (bz2.compress(bytes(range(256)) * 9)[:50], NotACheckpointError, "not a checkpoint"),
    "half an xz file": (lzma.compress(bytes(range(256)) * 9)[:50], NotACheckpointError, "not a checkpoint"),
    "an empty zip": (b"PK\5\6" + bytes(18), NotACheckpointError, "not a checkpoint"),
    "the start of a zip": (b"PK\3\4", CorruptError, "truncated or damaged: its zip directory cannot be read"),
    "zeros": (bytes(1000), NotACheckpointError, "not a checkpoint"),
    "the start of a legacy file": (WHOLE["legacy"][:10], CorruptError, "truncated after 10 bytes"),
    "a NumPy array": (b"\x93NUMPY\1\0v\0", NotACheckpointError, "not a checkpoint"),
    "a JSON file": (b'{"a": 1, "b": {}}', NotACheckpointError, "not a checkpoint"),
    "a script with a brace": (b"int f() { return 1; }", CorruptError, "truncated: its header is"),
    "a page of HTML": (b"<!DOCTYPE html><html><body>404</body></html>", NotACheckpointError, "not a checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_read_header_says_what_a_file_is_that_is_no_checkpoint(case: str, tmp_path: Path) -> None:
    raw, kind, message = NO_CHECKPOINTS[case]
    path = tmp_path / "model.pth"
    path.write_bytes(raw)

    with pytest.raises(kind, match=message) as raised:
        read_header(path)
    assert type(raised.value) is kind
    assert str(path) in str(raised.value)


def test_read_header_rejects_a_pipe_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")

    with pytest.raises(ReadError, match="neither a file nor a folder"):
        read_header(tmp_path / "pipe.pth")


def test_read_header_rejects_a_device_and_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the names of sockets must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("sock.pth")
        for path in (Path("sock.pth"), Path("/dev/null"), Path("/dev/zero")):
            with pytest.raises(ReadError, match="neither a file nor a folder"):
                read_header(path)


def test_read_header_names_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path / "none" / "none.pth", tmp_path / "x.safetensors.index.json"):
        with pytest.raises(ReadError, match=rf"{path.name}: no such file"):
            read_header(path)


def test_read_header_names_a_link_to_nowhere_and_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "dangling.pth").symlink_to("nowhere")
    (tmp_path / "loop.pth").symlink_to("loop.pth")

    with pytest.raises(ReadError, match=r"dangling\.pth: no such file"):
        read_header(tmp_path / "dangling.pth")
    with pytest.raises(ReadError, match=r"loop\.pth: cannot be read \(Too many levels"):
        read_header(tmp_path / "loop.pth")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_read_header_names_a_file_without_read_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(WHOLE["zip"])
    path.chmod(0)

    with pytest.raises(ReadError, match=r"a\.pth: cannot be read \(Permission denied"):
        read_header(path)


def test_read_header_names_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(WHOLE["zip"])

    with pytest.raises(ReadError, match="cannot be read|no such file"):
        read_header(tmp_path / "a.pth" / "b.pth")


def test_read_header_rejects_a_numpy_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.ones(3))

    with pytest.raises(NotACheckpointError, match=r"no data\.pkl inside"):
        read_header(tmp_path / "a.npz")


def test_open_checkpoint_ignores_a_zip_inside_a_payload(tmp_path: Path) -> None:
    # A payload may itself be a zip; the directory at the end of the file is the one that counts.
    inner = torch.frombuffer(bytearray(WHOLE["zip"]), dtype=torch.uint8)
    make: Callable[..., None] = torch.save
    make({"blob": inner, "w": torch.ones(2)}, tmp_path / "a.pth")

    checkpoint = open_checkpoint(tmp_path / "a.pth")
    assert list(checkpoint) == ["blob", "w"]
    assert same(checkpoint["blob"], inner)
