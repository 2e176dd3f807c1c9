"""DCP folders whose tensors are serialized as safetensors."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as safetensors_library
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem

from ckpt_tools import open_checkpoint, strip, verify
from ckpt_tools.errors import CorruptError
from ckpt_tools.formats import read_header


@pytest.fixture
def serialized(tmp_path: Path) -> Path:
    """A folder in which the tensors are serialized as safetensors, which torch writes and does not read."""
    if not hasattr(filesystem, "SerializationFormat"):
        pytest.skip("this torch writes no such entries")
    how = filesystem.SerializationFormat.SAFETENSORS
    saved: dict[str, Any] = {
        "model": {"w": torch.arange(6.0).view(2, 3), "v": -torch.arange(6.0), "n": torch.tensor(7)},
        "step": 7,
    }
    saved["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        dcp.save(saved, storage_writer=dcp.FileSystemWriter(tmp_path / "other", serialization_format=how))
    return tmp_path / "other"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_entries_in_safetensors_are_read(serialized: Path, tmp_path: Path) -> None:
    """The oracle is the library of safetensors: it reads what is behind the other objects of the file."""
    raw = (serialized / "__0_0.distcp").read_bytes()
    stored = safetensors_library.load(raw[raw.rindex(b'{"__metadata__"') - 8 :])
    found = open_checkpoint(serialized)
    assert {f"model.{name}" for name in found} == {name for name in stored if name.startswith("model.")}
    assert all(torch.equal(found[name], stored[f"model.{name}"]) for name in found)
    assert found.header.tree["step"] == 7
    strip(serialized, out=tmp_path / "out")
    back = {"model": {name: torch.empty_like(tensor) for name, tensor in found.items()}}
    dcp.load(back, storage_reader=dcp.FileSystemReader(tmp_path / "out"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in back["model"].items())


def test_entries_in_safetensors_have_no_checksum_and_are_not_blamed(serialized: Path) -> None:
    (found,) = (check for check in verify(serialized).checks if check.name == "crc32")
    assert found.result == "not checked"
    assert re.fullmatch(r"1 of \d+ records have no CRC-32", found.detail)


def test_a_chunk_that_the_safetensors_lack_is_an_error(serialized: Path) -> None:
    """torch keeps one chunk of a name in a file, and loses others."""
    path = serialized / "__0_0.distcp"
    raw = path.read_bytes()
    for name in (b'"model.v":{"d', b'model.v\\": {'):  # in the header, and in its record of offsets
        assert raw.count(name) == 1
        raw = raw.replace(name, name.replace(b"v", b"u"))
    path.write_bytes(raw)
    with pytest.raises(CorruptError, match=r"'model\.v' has a chunk of float32 \[6\] .* there is no tensor"):
        read_header(serialized)
