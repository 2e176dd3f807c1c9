"""Sharded checkpoints and folders: the shards make one mapping, and an index is believed only as far as it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from ckpt_tools import open_checkpoint
from ckpt_tools.compute.payload import read_tensor
from ckpt_tools.errors import CorruptError, NotACheckpointError, ReadError
from ckpt_tools.formats import read_header

STATE = {"a.weight": torch.arange(6.0), "a.bias": torch.ones(2), "b.weight": torch.zeros(4), "n": torch.tensor(3)}
SHARDS = {
    "one": {"a.weight": STATE["a.weight"], "n": STATE["n"]},
    "two": {"a.bias": STATE["a.bias"], "b.weight": STATE["b.weight"]},
}


@pytest.fixture(params=[".safetensors", ".bin"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of two shards and their index."""
    return sharded(tmp_path / "model", request.param)


def sharded(folder: Path, suffix: str) -> Path:
    folder.mkdir()
    weight_map = {}
    for name, tensors in SHARDS.items():
        if suffix == ".bin":
            torch.save(tensors, folder / f"{name}.bin")
        else:
            save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{name}{suffix}")
    stem = "pytorch_model" if suffix == ".bin" else "model"
    write_index(folder / f"{stem}{suffix}.index.json", {name: weight_map[name] for name in STATE})
    return folder


def write_index(path: Path, weight_map: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 56}, "weight_map": weight_map}))


def index_of(folder: Path) -> Path:
    (index,) = folder.glob("*.index.json")
    return index


def point(folder: Path, name: str, file: Any) -> None:
    """Let the index say that a tensor stands in a file."""
    index = index_of(folder)
    write_index(index, json.loads(index.read_text())["weight_map"] | {name: file})


def test_open_checkpoint_reads_shards_in_the_order_of_the_index(folder: Path) -> None:
    for path in (folder, index_of(folder)):
        checkpoint = open_checkpoint(path)
        assert checkpoint.header.format.name == "sharded"
        assert list(checkpoint) == list(STATE)
        assert all(torch.equal(checkpoint[name], tensor) for name, tensor in STATE.items())
    assert {stamp.path.name for stamp in checkpoint.header.files} == {path.name for path in folder.iterdir()}
    assert checkpoint.header.nbytes == sum(path.stat().st_size for path in folder.iterdir())


def test_open_checkpoint_reads_shards_of_hugging_face(tmp_path: Path) -> None:
    state = {f"layer.{i}.weight": torch.full((50, 10), float(i)) for i in range(12)}
    save_torch_state_dict(state, tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.keys() == state.keys()
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in state.items())


def test_open_checkpoint_reads_the_single_file_of_a_folder(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    header = read_header(tmp_path)
    assert (header.path, header.format.name) == (tmp_path, "safetensors")
    assert open_checkpoint(tmp_path).keys() == STATE.keys()


def test_read_header_rejects_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")

    with pytest.raises(NotACheckpointError, match=r"the folder has no model\.safetensors, index\.json or \*\.distcp"):
        read_header(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/inside.safetensors",
        "/etc/passwd",
        "",
        ".",
        "..",
        "one.safetensors/",
        "a\0b",
        "\ud800",
    ],
)
def test_read_header_rejects_an_index_that_points_outside_its_folder(name: str, folder: Path) -> None:
    save_file(STATE, folder.parent / "outside.safetensors")
    point(folder, "n", name)

    with pytest.raises(CorruptError, match="points outside its folder"):
        read_header(folder)


@pytest.mark.parametrize("absolute", [True, False])
def test_read_header_rejects_a_link_out_of_the_folder(absolute: bool, folder: Path) -> None:
    save_file(STATE, folder.parent / "outside.safetensors")
    target = folder.parent / "outside.safetensors" if absolute else Path("../outside.safetensors")
    (folder / "link.safetensors").symlink_to(target)
    point(folder, "n", "link.safetensors")

    with pytest.raises(CorruptError, match="is a link out of the folder"):
        read_header(folder)


def test_read_header_follows_a_link_within_the_folder(folder: Path) -> None:
    shard = next(folder.glob("one.*"))
    shard.rename(folder / "real")
    shard.symlink_to("real")

    assert list(open_checkpoint(folder)) == list(STATE)


def test_read_header_follows_the_links_of_the_hugging_face_cache(tmp_path: Path) -> None:
    (tmp_path / "models--x" / "snapshots").mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    folder = sharded(tmp_path / "models--x" / "snapshots" / "0123abc", ".safetensors")
    for file in list(folder.iterdir()):
        file.rename(tmp_path / "models--x" / "blobs" / f"hash-{file.name}")
        file.symlink_to(f"../../blobs/hash-{file.name}")

    assert list(open_checkpoint(folder)) == list(STATE)


def test_read_header_takes_a_link_to_itself_as_a_missing_shard(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    point(folder, "n", "loop")

    with pytest.raises(CorruptError, match="its shard 'loop' is missing"):
        read_header(folder)


def test_read_header_names_a_missing_shard(folder: Path) -> None:
    shard = next(folder.glob("two.*"))
    shard.unlink()

    with pytest.raises(CorruptError, match=f"its shard '{shard.name}' is missing. Get a complete copy"):
        read_header(folder)


def test_read_header_rejects_a_shard_of_an_impossible_name(folder: Path) -> None:
    point(folder, "n", "x" * 5000)

    with pytest.raises(ReadError, match="cannot be read|is missing"):
        read_header(folder)


def test_read_header_names_a_shard_that_lacks_a_tensor(folder: Path) -> None:
    two = next(folder.glob("two.*"))
    point(folder, "c.weight", two.name)

    with pytest.raises(CorruptError, match=rf"says that {two.name} holds 'c\.weight'; it does not"):
        read_header(folder)


def test_read_header_rejects_an_index_that_does_not_list_a_tensor(folder: Path) -> None:
    index = index_of(folder)
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["n"]
    write_index(index, weight_map)

    with pytest.raises(CorruptError, match=r"does not list 'n', which is in one\.[a-z]+\. The index is stale"):
        read_header(folder)


def test_read_header_rejects_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", ".safetensors")
    save_file(SHARDS["two"] | {"n": torch.tensor(4)}, folder / "two.safetensors")

    with pytest.raises(CorruptError, match="The index is stale"):
        read_header(folder)


def test_read_header_names_a_damaged_shard(folder: Path) -> None:
    shard = next(folder.glob("two.*"))
    shard.write_bytes(shard.read_bytes()[:-20])

    with pytest.raises(CorruptError, match=f"{shard.name}: truncated"):
        read_header(folder)


def test_read_header_rejects_a_shard_that_is_no_checkpoint(folder: Path) -> None:
    (folder / "notes.txt").write_text("some notes, long enough")
    point(folder, "n", "notes.txt")

    with pytest.raises(NotACheckpointError, match=r"notes\.txt: not a checkpoint"):
        read_header(folder)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "3", '"x"', "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": ["a"]}',
        '{"weight_map": null}', '{"weight_map": 3}', '{"weight_map": "x"}', '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}', '{"weight_map": {"a": ["x"]}}', "[" * 100_000, "\x00\xff", '{"weight_map": NaN}',
    ],
    ids=range(19),
)  # fmt: skip
def test_read_header_rejects_an_invalid_index(text: str, folder: Path) -> None:
    index_of(folder).write_text(text)

    with pytest.raises(CorruptError, match="not the index of a sharded checkpoint"):
        read_header(folder)


def test_open_checkpoint_reads_tied_tensors_that_the_index_does_not_list(tmp_path: Path) -> None:
    # transformers lists the kept name alone; the shard's metadata tells the other
    folder = sharded(tmp_path / "model", ".safetensors")
    save_file(SHARDS["two"], folder / "two.safetensors", metadata={"format": "pt", "head.bias": "a.bias"})

    assert list(open_checkpoint(folder)) == list(STATE)
    point(folder, "head.bias", "two.safetensors")
    assert torch.equal(open_checkpoint(folder)["head.bias"], STATE["a.bias"])


def test_open_checkpoint_reads_shards_whose_headers_are_those_of_another_index(tmp_path: Path) -> None:
    """The template of an index may have been parsed from shards that are moved against the templates of the shards."""
    kept, saved = [], {}
    for name, index, length in [("a", "1", 9), ("b", "2", 99), ("c", "2", 9), ("d", "2", 99), ("e", "2", 200)]:
        (tmp_path / name).mkdir()
        weight_map = {}
        for file in ("one", "two"):
            tensors = {f"{file}.w": torch.randn(5), f"{file}.b": torch.randn(3)}
            saved |= {(name, key): tensor for key, tensor in tensors.items()}
            save_file(tensors, tmp_path / name / f"{file}.safetensors", metadata={"x": "y" * length})
            weight_map |= dict.fromkeys(tensors, f"{file}.safetensors")
        (tmp_path / name / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"version": index}, "weight_map": weight_map})
        )
        kept.append(read_header(tmp_path / name))

    for header in kept:
        for key, spec in header.tree.items():
            assert torch.equal(read_tensor(spec), saved[header.path.name, key])
