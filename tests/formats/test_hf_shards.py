"""HuggingFaceStorageWriter's shards: chunks of several processes in safetensors files are read as whole tensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from crafting import random_tensor, same
from safetensors.torch import save_file

from ckpt_tools import average, convert, open_checkpoint
from ckpt_tools.errors import CorruptError, UnsupportedError
from ckpt_tools.formats import read_header
from ckpt_tools.formats.safetensors import SAFETENSORS

WHOLE = {"w": random_tensor("bfloat16", (5, 3)), "columns": random_tensor("float32", (2, 5)), "n": torch.tensor(7)}


def shard(
    folder: Path,
    process: int,
    chunks: Mapping[str, tuple[list[int], torch.Tensor]],
    *,
    file: str = "00001-of-00001",
    info: Any = None,
) -> Path:
    """Write what one process saves: tensors, and the offset of each."""
    folder.mkdir(exist_ok=True)
    path = folder / f"shard-{process:05d}-model-{file}.safetensors"
    info = {name: {"saved_offsets": offsets} for name, (offsets, _) in chunks.items()} if info is None else info
    metadata = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
    save_file({name: tensor.contiguous() for name, (_, tensor) in chunks.items()}, path, metadata)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two processes; the first has two files."""
    made = tmp_path / "parts"
    shard(made, 1, {"w": ([0, 0], WHOLE["w"][:3])}, file="00001-of-00002")
    shard(made, 1, {"columns": ([0, 0], WHOLE["columns"][:, :3])}, file="00002-of-00002")
    others = {"w": ([3, 0], WHOLE["w"][3:]), "columns": ([0, 3], WHOLE["columns"][:, 3:]), "n": ([], WHOLE["n"])}
    shard(made, 2, others, file="00001-of-00002")
    return made


def test_chunks_of_all_processes_are_read_as_whole_tensors(folder: Path) -> None:
    found = open_checkpoint(folder)

    assert list(found) == list(WHOLE)
    assert all(same(found[name], tensor) for name, tensor in WHOLE.items())
    assert found.header.format.name == "hf-shards"
    assert len(found.header.files) == 3
    assert found.header.metadata == {"format": "pt"}


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth", "out"])
def test_average_and_convert_write_whole_tensors(name: str, folder: Path, tmp_path: Path) -> None:
    average([folder], out=tmp_path / name)
    convert(folder, to="plain", out=tmp_path / f"converted-{name}")
    for path in (tmp_path / name, tmp_path / f"converted-{name}"):
        found = open_checkpoint(path)
        assert all(same(found[key], tensor) for key, tensor in WHOLE.items())
        assert not any(key.startswith("DCP") for key in found.header.metadata)


def test_a_file_alone_is_refused_and_its_folder_named(folder: Path) -> None:
    for path in folder.iterdir():
        with pytest.raises(
            UnsupportedError, match=f"holds the tensor chunks of one process.*Give the folder.*: {folder}$"
        ):
            open_checkpoint(path)


def test_a_missing_process_is_named(folder: Path) -> None:
    for path in folder.glob("shard-00001*"):
        path.unlink()
    with pytest.raises(CorruptError, match=r"the files of process 1 \(shard-00001-\*\) are missing"):
        read_header(folder)


def test_files_of_two_saves_are_refused(folder: Path) -> None:
    shard(folder, 3, {"x": ([0], torch.ones(2))}, file="00001-of-00003")
    with pytest.raises(CorruptError, match="has the files of several saves"):
        read_header(folder)


@pytest.mark.parametrize("name", ["w", "n"])
def test_a_chunk_of_two_processes_is_refused(name: str, folder: Path) -> None:
    """torch saves replicas once, so these are what a save by more processes left."""
    left = {"w": {"w": ([3, 0], WHOLE["w"][3:] + 1)}, "n": {"n": ([], WHOLE["n"] + 1)}}
    shard(folder, 3, left[name], file="00001-of-00002")
    with pytest.raises(CorruptError, match=f"two processes have the same chunk of '{name}'.*several saves"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"w": {"saved_offsets": [2, 0]}}, "'w'.* overlap"),
        ({"w": {"saved_offsets": [4, 0]}}, r"'w' of shape \[6, 3\].* 3 elements are in no chunk"),
        ({"w": {"saved_offsets": [1 << 70, 0]}}, "elements are in no chunk"),
        ({"w": {"saved_offsets": [-3, 0]}}, r"one has the offset \[-3, 0\]"),
        ({"w": {"saved_offsets": [3]}}, "the chunks of 'w' differ in dtype or dimensions"),
        ({"w": {"saved_offsets": [3.0, 0]}}, "its DCP_SHARDING_INFO holds impossible numbers"),
        ({"w": {"saved_offsets": [True, 0]}}, "its DCP_SHARDING_INFO holds impossible numbers"),
        ({"w": {"saved_offsets": None}}, "its DCP_SHARDING_INFO is not a map"),
        ({"w": {}}, "its DCP_SHARDING_INFO is not a map"),
        ([], "its DCP_SHARDING_INFO is not a map"),
        ({"v": {"saved_offsets": [3, 0]}}, "its DCP_SHARDING_INFO does not list the tensors of the file"),
    ],
)
def test_impossible_offsets_are_refused(info: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    shard(folder, 1, {"w": ([0, 0], WHOLE["w"][:3])})
    shard(folder, 2, {"w": ([3, 0], WHOLE["w"][3:])}, info=info)
    with pytest.raises(CorruptError, match=message):
        read_header(folder)


def test_chunks_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    shard(tmp_path, 1, {"w": ([0], torch.ones(2))})
    shard(tmp_path, 2, {"w": ([2], torch.ones(2).half())})
    with pytest.raises(CorruptError, match="the chunks of 'w' differ in dtype or dimensions"):
        read_header(tmp_path)


def test_a_save_of_one_process_is_read_with_its_index(tmp_path: Path) -> None:
    if not hasattr(dcp, "HuggingFaceStorageWriter"):
        pytest.skip("this torch does not write it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(WHOLE, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path), {"w": 1, "columns": 2, "n": 2}))
    found = open_checkpoint(tmp_path)
    assert found.header.format.name == "sharded"
    assert all(same(found[name], tensor) for name, tensor in WHOLE.items())


def test_a_part_under_another_name_is_refused(folder: Path, tmp_path: Path) -> None:
    first = tmp_path / "renamed.safetensors"
    next(folder.glob("shard-00001-model-00001*")).rename(first)
    with pytest.raises(UnsupportedError, match="holds the tensor chunks of one process"):
        SAFETENSORS.read(first)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("where", [".", "sharded"])
def test_what_torch_consolidates_is_averaged_so_that_torch_reads_it(where: str, tmp_path: Path) -> None:
    hf_storage = pytest.importorskip("torch.distributed.checkpoint.hf_storage")
    values = []
    for step in range(2):
        values.append({"a": random_tensor("float32", (4, 3)), "b": random_tensor("bfloat16", (5,))})
        files = {"a": 1, "b": 2}
        writer = hf_storage.HuggingFaceStorageWriter(
            tmp_path / f"step-{step}", files, save_distributed=True, enable_consolidation=True
        )
        dcp.save(dict(values[-1]), storage_writer=writer)
    average([tmp_path / f"step-{step}" / where for step in range(2)], out=tmp_path / "out/")
    found = {name: torch.empty_like(tensor) for name, tensor in values[0].items()}
    dcp.load(found, storage_reader=hf_storage.HuggingFaceStorageReader(tmp_path / "out"))
    for name, tensor in found.items():
        mean = (values[0][name].double() + values[1][name].double()) / 2
        assert same(tensor, mean.to(tensor.dtype))
