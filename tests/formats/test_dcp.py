"""torch.distributed.checkpoint: what any number of processes saved is read as torch itself puts it together."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import tempfile
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from crafting import same
from processes import in_processes
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh

from ckpt_tools import average, open_checkpoint, strip
from ckpt_tools.compute.payload import read_tensor
from ckpt_tools.errors import CorruptError, ReadError, SeriesError, UnsupportedError, WriteError
from ckpt_tools.formats import pickle_write, read_header
from ckpt_tools.formats.dcp import DCP_FOLDER
from ckpt_tools.formats.file_plan import OutTensor, Terms
from ckpt_tools.formats.format import Writing
from ckpt_tools.formats.pickle_objects import Inert
from ckpt_tools.jobs.assembly import Assembly
from ckpt_tools.jobs.run import write
from ckpt_tools.series.find import find_series
from ckpt_tools.tensors import ChunkedSpec, TensorSpec

PROCESSES = 2


def save(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        dcp.save(state, checkpoint_id=folder)
    return folder


def oracle(folder: Path) -> Any:
    """Everything that a folder holds, as torch reads it."""
    with tempfile.TemporaryDirectory() as elsewhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, Path(elsewhere) / "gathered.pth")
        return torch.load(Path(elsewhere) / "gathered.pth", weights_only=False)


def agree(mine: Any, theirs: Any, stamps: Any) -> None:
    """Hold a tree of ours against what torch read: the same keys, values and bits."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(mine, TensorSpec)
        assert same(read_tensor(mine, stamps), theirs.detach())
    elif isinstance(theirs, dict):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            agree(mine[key], value, stamps)
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs)
        for one, value in zip(mine, theirs, strict=True):
            agree(one, value, stamps)
    else:
        assert mine == theirs or (isinstance(mine, Inert) and type(mine).global_name.endswith(type(theirs).__name__))


def trained(steps: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One process: a model, its optimizer, counters, and tensors of unusual kinds."""
    model, optimizer = trained()
    state = {
        "model": model.state_dict(),
        "optim": optimizer.state_dict(),
        "step": 7,
        "lists": [torch.ones(2), {"deep": [torch.zeros(()), "text"]}, 5],
        "odd": {
            "bfloat16": torch.arange(6.0).bfloat16().view(3, 2),
            "empty": torch.empty(0, 3),
            "transposed": torch.arange(12.0).view(3, 4).t(),
            "view": torch.arange(12.0)[3:9:2],
            "uint16": torch.arange(5).to(torch.uint16),
            "bool": torch.tensor([True, False]),
            "complex": torch.tensor([1 + 2j]),
            "float8": torch.arange(4.0).to(torch.float8_e4m3fn),
        },
        "name": "a text",
        "nothing": None,
        "pair": (1, torch.ones(3)),
        "path": Path("somewhere"),
    }
    return save(state, tmp_path / "single")


def network() -> nn.Module:
    torch.manual_seed(0)
    # No size is even, and the last has a row for one process alone.
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).bfloat16().float()


def kinds() -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Tensors, and how each is shared out over the processes."""
    counted = torch.arange(5 * 7 * 3).view(5, 7, 3)
    return {
        "rows": (counted.float(), ["Shard(0)"]),
        "columns": (counted.bfloat16(), ["Shard(1)"]),
        "last": (counted.int(), ["Shard(2)"]),
        "one row": (counted[:1].double(), ["Shard(0)"]),
        "same": (counted.half(), ["Replicate()"]),
        "scalar": (torch.tensor(3.5), ["Replicate()"]),
        "empty": (torch.empty(0, 3), ["Shard(0)"]),
        "no columns": (torch.empty(3, 0), ["Shard(0)"]),
    }


def save_and_load(rank: int, folder: Path) -> None:
    """Save as FSDP and tensor parallelism do, and load what ckpt-tools wrote."""
    from torch.distributed import tensor as placements

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # before torch 2.6
        from torch.distributed._composable.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = network()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (9, 10):
        torch.manual_seed(rank + step)
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optim": state, "step": step}, checkpoint_id=folder / f"run/step-{step}")
    dcp.save({"app": {"model": weights, "optim": state}}, checkpoint_id=folder / "deep")

    def shared_out(zeros: bool) -> dict[str, Any]:
        return {
            name: placements.distribute_tensor(
                torch.zeros_like(whole) if zeros else whole,
                mesh,
                [placements.Replicate() if how == ["Replicate()"] else placements.Shard(int(how[0][6]))],
            )
            for name, (whole, how) in kinds().items()
        }

    dcp.save(
        {"kinds": shared_out(False), f"rank {rank}": {"list": [torch.ones(rank + 1)]}},
        checkpoint_id=folder / "kinds",
    )
    loaded = {"kinds": shared_out(True), "model": model.state_dict(), "step": 0}
    dcp.load(loaded, checkpoint_id=folder / "written")
    full = {
        "kinds": {name: tensor.full_tensor() for name, tensor in loaded["kinds"].items()},
        "model": {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in loaded["model"].items()
        },
        "step": loaded["step"],
    }
    if rank == 0:
        torch.save(full, folder / "loaded.pth")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes saved, and what they loaded of the folder `written`."""
    folder = tmp_path_factory.mktemp("processes")
    torch.save(
        {"kinds": {name: whole for name, (whole, _) in kinds().items()}, "model": network().state_dict(), "step": 77},
        folder / "source.pth",
    )
    written(folder / "source.pth", folder / "written")
    in_processes(PROCESSES, save_and_load, folder)
    return folder


def written(source: Path, target: Path, **options: Any) -> Path:
    """Write a checkpoint as a DCP folder, as `ckpt convert` does."""
    header = read_header(source)
    copies: dict[TensorSpec, OutTensor] = {}

    def copy(spec: TensorSpec) -> OutTensor:
        return copies.setdefault(spec, OutTensor(spec.dtype, spec.shape, Terms.copy(spec), "w", finite=False))

    tree = pickle_write.plain(header.tree, [], copy)
    write(Assembly(target, DCP_FOLDER.plan(tree, Writing(name=target.name, **options)), folder=True), header.files)
    return target


def test_read_header_reads_a_folder_as_torch_does(single: Path) -> None:
    header = read_header(single)

    theirs = oracle(single)
    pair, mine = theirs.pop("pair"), header.tree.pop("pair")
    assert mine[0] == pair[0]
    assert same(read_tensor(mine[1]), pair[1])
    agree(header.tree, theirs, header.files)
    assert header.format.name == "dcp"
    assert {stamp.path.name for stamp in header.files} == {".metadata", "__0_0.distcp"}
    assert header.nbytes == sum(path.stat().st_size for path in single.iterdir())
    assert {name.rpartition(".")[2] for name in header.foreign} == {"PosixPath"}


def test_open_checkpoint_opens_a_folder_as_a_mapping(single: Path) -> None:
    checkpoint = open_checkpoint(single, state="model")

    assert checkpoint.counters == {"step": 7}
    model = oracle(single)["model"]
    assert list(checkpoint) == list(model)
    assert all(same(checkpoint[name], tensor) for name, tensor in model.items())


def test_open_checkpoint_reads_a_flat_state_dict(tmp_path: Path) -> None:
    model, _ = trained()
    folder = save(model.state_dict(), tmp_path / "flat")

    checkpoint = open_checkpoint(folder)
    assert list(checkpoint) == list(model.state_dict())
    assert all(same(checkpoint[name], tensor) for name, tensor in model.state_dict().items())


def test_read_header_reads_sharded_tensors_as_torch_gathers_them(shared: Path) -> None:
    for folder in (shared / "run" / "step-9", shared / "deep", shared / "kinds"):
        header = read_header(folder)
        agree(header.tree, oracle(folder), header.files)
        assert {stamp.path.name for stamp in header.files} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    tree = header.tree["kinds"]
    for name, (whole, _) in kinds().items():
        assert same(read_tensor(tree[name], header.files), whole)
    chunked = {name for name, spec in tree.items() if isinstance(spec, ChunkedSpec)}
    assert chunked == {"rows", "columns", "last"}


def test_open_checkpoint_keeps_the_order_of_the_model(shared: Path) -> None:
    assert list(open_checkpoint(shared / "run" / "step-9", state="model")) == list(network().state_dict())


@pytest.mark.parametrize("state", ["model", "optim.state.0.weight"])
def test_average_of_sharded_checkpoints_is_that_of_the_whole_ones(shared: Path, state: str, tmp_path: Path) -> None:
    gathered = [oracle(shared / "run" / f"step-{step}") for step in (9, 10)]
    if state == "model":
        trees = [tree["model"] for tree in gathered]
    else:
        trees = [tree["optim"]["state"]["0.weight"] for tree in gathered]

    report = average([shared / "run"], state=state, out=tmp_path / "out.safetensors", threads=2)

    assert [Path(each.path).name for each in report.inputs] == ["step-9", "step-10"]
    assert [each.step for each in report.inputs] == [9, 10]
    found = open_checkpoint(tmp_path / "out.safetensors")
    assert found.keys() == trees[0].keys()
    for name, tensor in found.items():
        first, second = (tree[name].numpy() for tree in trees)
        if first.dtype == np.float32:
            expected = ((first.astype(np.float64) + second.astype(np.float64)) / 2).astype(np.float32)
        else:
            expected = second
        assert np.array_equal(tensor.numpy(), expected)


def test_average_takes_weights_one_level_deeper_by_their_path(shared: Path, tmp_path: Path) -> None:
    average([shared / "deep"], state="app.model", out=tmp_path / "out.pth")

    theirs = oracle(shared / "deep")["app"]["model"]
    mine = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(same(mine[name], tensor) for name, tensor in theirs.items())


def test_find_series_counts_a_checkpoint_and_its_copy_once(shared: Path, tmp_path: Path) -> None:
    for name in ("step-10", "last"):
        shutil.copytree(shared / "run" / "step-10", tmp_path / name)
    shutil.copytree(shared / "run" / "step-9", tmp_path / "step-9")

    assert [member.path.name for member in find_series([tmp_path]).members] == ["step-9", "step-10"]


def test_read_header_keeps_the_places_of_a_list_with_an_empty_dict(tmp_path: Path) -> None:
    folder = save({"list": [{}, torch.ones(2)]}, tmp_path / "gap")

    first, second = read_header(folder).tree["list"]
    assert first is None
    assert same(read_tensor(second), torch.ones(2))


# Finding them


def test_read_header_of_a_part_names_its_folder(single: Path) -> None:
    for name in ("__0_0.distcp", ".metadata"):
        with pytest.raises(UnsupportedError, match=f"one file of the checkpoint.*Give the folder: {single}"):
            read_header(single / name)


def test_find_series_ignores_the_optimizer_that_accelerate_saves_beside_the_model(single: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    shutil.copytree(single, tmp_path / "checkpoint" / "pytorch_model_fsdp_0")
    shutil.copytree(single, tmp_path / "checkpoint" / "optimizer_0")

    (member,) = find_series([tmp_path / "checkpoint"]).members
    assert member.path.name == "pytorch_model_fsdp_0"


def test_find_series_points_at_checkpoints_one_folder_deeper(single: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for step in (2, 10):
        shutil.copytree(single, runs / f"checkpoint-{step}" / "pytorch_model_fsdp_0")
        (runs / f"checkpoint-{step}" / "optimizer_0").mkdir()
    (runs / "logs").mkdir()
    with pytest.raises(SeriesError, match=r"There are some in .*checkpoint-2; use '.*checkpoint-\*'\.$") as caught:
        find_series([runs])
    (pattern,) = re.findall(r"use '(.*)'", str(caught.value))
    assert len(find_series([pattern]).members) == 2


def test_find_series_rejects_a_folder_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SeriesError, match="no checkpoints in this folder"):
        find_series([tmp_path])


# Bad input


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    """Change what `.metadata` says, as somebody who means harm would."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 - written by this test
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_read_header_recognizes_an_interrupted_save(single: Path) -> None:
    (single / ".metadata").unlink()
    with pytest.raises(CorruptError, match=r"no \.metadata, which is written last: the save was interrupted"):
        read_header(single)


def test_read_header_recognizes_a_save_of_each_rank_on_its_own(single: Path) -> None:
    (single / ".metadata").rename(single / "__0.metadata")
    with pytest.raises(UnsupportedError, match=r"each rank saved its own \.metadata"):
        read_header(single)


def test_read_header_rejects_metadata_cut_anywhere(single: Path) -> None:
    path = single / ".metadata"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptError, match="its pickle cannot be read"):
            read_header(single)


@pytest.mark.parametrize("value", [None, 7, [1], {}, torch.Size([1]), Path("x"), b"data", {"state_dict_metadata": {}}])
def test_read_header_rejects_another_pickle_as_metadata(value: Any, single: Path) -> None:
    (single / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(CorruptError, match="in place of a Metadata"):
        read_header(single)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def test_read_header_runs_nothing_that_a_checkpoint_names(single: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    edit(single, lambda metadata: metadata.__dict__.update(evil=Evil(made)))
    assert read_header(single).foreign["posix.system"] == 1
    (single / ".metadata").write_bytes(pickle.dumps(Evil(made)))
    with pytest.raises(CorruptError, match=r"holds a posix\.system in place of a Metadata"):
        read_header(single)
    save({"w": torch.ones(2), "evil": Evil(made)}, tmp_path / "entry")
    header = read_header(tmp_path / "entry")
    assert isinstance(header.tree["evil"], Inert)
    assert header.foreign == {"posix.system": 1}

    assert not made.exists()
    pickle.loads(pickle.dumps(Evil(made)))  # noqa: S301 - shows that the payload is live
    assert made.exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("relative_path", "../single/__0_0.distcp", r"points outside its folder \('\.\./single/__0_0\.distcp'\)"),
        ("relative_path", "/etc/passwd", "points outside its folder"),
        ("relative_path", "..", "points outside its folder"),
        ("relative_path", "", "points outside its folder"),
        ("relative_path", "a\0b", "points outside its folder"),
        ("relative_path", "__7_0.distcp", r"'__7_0\.distcp' is missing"),
        ("relative_path", 7, r"the location of 'step' is invalid"),
        ("offset", -1, r"the location of 'step' is invalid"),
        ("offset", 1 << 62, r"says that an entry ends at byte \d+, the file at \d+"),
        pytest.param("offset", 10**5000, "an integer of too many digits", id="more digits than Python shows"),
        ("offset", 3, r"__0_0\.distcp: the entry at byte 3: "),
        ("length", 1 << 40, r"says that an entry ends at byte \d+, the file at \d+"),
        ("length", True, r"the location of 'step' is invalid"),
        ("length", 0, r"its zip directory cannot be read"),
        ("length", 700, r"its zip directory cannot be read"),
        ("transform_descriptors", ["zstd"], r"'step' is compressed or otherwise transformed"),
    ],
)
def test_read_header_rejects_an_impossible_place(field: str, value: Any, message: str, single: Path) -> None:
    edit(single, lambda metadata: setattr(metadata.storage_data[MetadataIndex("step")], field, value))
    with pytest.raises(ReadError, match=message):
        read_header(single)


def chunks_of(metadata: Any, name: str = "odd.bfloat16") -> Any:
    return metadata.state_dict_metadata[name].chunks


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def drop_places(metadata: Any) -> None:
    metadata.storage_data = {key: value for key, value in metadata.storage_data.items() if key.fqn != "step"}


BAD_PATH = "the key path of 'name' is empty, too long or invalid"
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "overlap": (lambda m: chunks_of(m).append(chunks_of(m)[0]), "overlap"),
    "larger": (
        lambda m: setattr(m.state_dict_metadata["odd.bfloat16"], "size", torch.Size([4, 2])),
        "2 elements are in no chunk",
    ),
    "smaller": (
        lambda m: setattr(m.state_dict_metadata["odd.bfloat16"], "size", torch.Size([2, 2])),
        "reaches beyond it",
    ),
    "other axes": (
        lambda m: setattr(m.state_dict_metadata["odd.bfloat16"], "size", torch.Size([6])),
        "one has the offset",
    ),
    "none": (lambda m: chunks_of(m).clear(), "lists no chunks of 'odd.bfloat16'"),
    "other shape": (
        lambda m: chunks_of(m).__setitem__(0, chunk((0, 0), (2, 3))),
        r"a chunk of bfloat16 \[2, 3\] .* there is bfloat16 \[3, 2\]",
    ),
    "no place": (
        lambda m: chunks_of(m).append(chunk((3, 0), (1, 2))),
        r"has no location for the chunk of 'odd.bfloat16' at \[3, 0\]",
    ),
    "other dtype": (
        lambda m: setattr(m.state_dict_metadata["odd.bfloat16"].properties, "dtype", torch.float16),
        "a chunk of float16 .* there is bfloat16",
    ),
    "no tensor": (
        lambda m: m.storage_data.update({MetadataIndex("odd.bfloat16", (0, 0)): m.storage_data[MetadataIndex("step")]}),
        "there is no tensor",
    ),
    "no place of an object": (drop_places, "has no location for 'step'"),
    "negative": (
        lambda m: setattr(m.state_dict_metadata["odd.bfloat16"], "size", (-3, 2)),
        "a size of 'odd.bfloat16' is invalid",
    ),
    "too large to show": (
        lambda m: setattr(m.state_dict_metadata["odd.bfloat16"], "size", (10**2000, 2)),
        "a size of 'odd.bfloat16' is invalid",
    ),
    "many axes": (
        lambda m: setattr(m.state_dict_metadata["odd.bfloat16"], "size", torch.Size([1] * 100)),
        "a size of 'odd.bfloat16' is invalid",
    ),
    "entries": (lambda m: setattr(m, "state_dict_metadata", []), "has no entries, or no locations"),
    "places": (lambda m: setattr(m, "storage_data", None), "has no entries, or no locations"),
    "name": (
        lambda m: m.state_dict_metadata.update({5: m.state_dict_metadata["step"]}),
        "an entry name that is not text",
    ),
    "entry": (
        lambda m: m.state_dict_metadata.update(step=torch.Size([1])),
        r"holds a torch\.Size in place of a TensorStorageMetadata",
    ),
    "other storage": (
        lambda m: m.storage_data.update({MetadataIndex("step"): ("s3", 1)}),
        "'step' was written by a custom storage writer",
    ),
    "key twice": (lambda m: m.planner_data.update(name=("step",)), "puts two entries at 'step'"),
    "key inside": (lambda m: m.planner_data.update(name=("step", "inner")), "puts two entries at 'step.inner'"),
    "key around": (lambda m: m.planner_data.update(name=("model",)), "puts two entries at 'model'"),
    "no key": (lambda m: m.planner_data.update(name=()), BAD_PATH),
    "strange key": (
        lambda m: m.planner_data.update(name=(None,)),
        BAD_PATH,
    ),
    "deep key": (
        lambda m: m.planner_data.update(name=("x",) * 100_000),
        BAD_PATH,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_read_header_rejects_metadata_that_contradicts_itself(change: str, single: Path) -> None:
    change_it, message = CHANGES[change]
    edit(single, change_it)
    with pytest.raises(ReadError, match=message):
        read_header(single)


def test_read_header_takes_no_memory_for_a_list_with_a_far_index(single: Path) -> None:
    edit(single, lambda metadata: metadata.planner_data.update(name=("far", (1 << 62))))
    assert read_header(single).tree["far"] == {1 << 62: "a text"}


def test_read_header_names_a_missing_or_truncated_file(single: Path) -> None:
    path = single / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptError, match="truncated: .metadata says that an entry ends at byte"):
        read_header(single)
    (single / "__1_0.distcp").touch()
    path.unlink()
    with pytest.raises(CorruptError, match=r"'__0_0\.distcp' is missing"):
        read_header(single)


def test_read_header_rejects_a_link_out_of_the_folder(single: Path, tmp_path: Path) -> None:
    (single / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (single / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match=r"'__0_0\.distcp' is a link out of the folder"):
        read_header(single)


def test_average_changes_nothing_when_it_rejects_a_checkpoint(single: Path, tmp_path: Path) -> None:
    edit(single, lambda metadata: chunks_of(metadata).append(chunks_of(metadata)[0]))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CorruptError, match="overlap"):
        average([single], state="model", out=tmp_path / "out.pth")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# Writing


def test_plan_makes_a_folder_that_torch_reads(single: Path, tmp_path: Path) -> None:
    for max_bytes in (None, 20_000, 1):
        folder = written(single, tmp_path / f"written-{max_bytes}", max_bytes=max_bytes, provenance={"made": "here"})
        theirs, expected = oracle(folder), oracle(single)
        expected.pop("path")  # no plain data
        header = read_header(folder)
        pair = theirs.pop("pair")
        mine = header.tree.pop("pair")
        assert same(read_tensor(mine[1]), pair[1])
        assert same(pair[1], expected.pop("pair")[1])
        agree(header.tree, expected, header.files)
        agree(header.tree, theirs, header.files)
        assert header.provenance == {"made": "here"}
        sizes = [path.stat().st_size for path in folder.glob("*.distcp")]
        assert len(sizes) == 1 if max_bytes is None else len(sizes) > 1
        assert max_bytes in (None, 1) or max(sizes) <= max_bytes
    assert len(sizes) == sum(1 for _ in read_entries(single)) - 1  # each has a file of its own; one was left out


def read_entries(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata  # noqa: S301 - torch wrote it


def test_plan_makes_every_entry_a_sound_zip_at_an_aligned_place(single: Path, tmp_path: Path) -> None:
    import io
    import zipfile

    folder = written(single, tmp_path / "written")
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - written by this test
    data = (folder / "__0_0.distcp").read_bytes()
    for place in metadata.storage_data.values():
        assert place.offset % 64 == 0
        with zipfile.ZipFile(io.BytesIO(data[place.offset : place.offset + place.length])) as archive:
            assert archive.testzip() is None


def test_plan_makes_a_folder_that_one_process_loads(shared: Path) -> None:
    source = torch.load(shared / "source.pth", weights_only=True)
    zeros = {
        "kinds": {name: torch.zeros_like(tensor) for name, tensor in source["kinds"].items()},
        "model": {name: torch.zeros_like(tensor) for name, tensor in source["model"].items()},
        "step": 0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(zeros, checkpoint_id=shared / "written")
    assert_equal(zeros, source)


def test_plan_makes_a_folder_that_two_processes_load_sharded(shared: Path) -> None:
    assert_equal(
        torch.load(shared / "loaded.pth", weights_only=True), torch.load(shared / "source.pth", weights_only=True)
    )


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found["step"] == expected["step"]
    for part in ("kinds", "model"):
        assert found[part].keys() == expected[part].keys()
        assert all(same(found[part][name], tensor) for name, tensor in expected[part].items())


def test_plan_makes_the_same_bytes_every_time(single: Path, tmp_path: Path) -> None:
    # The second is written from another file, whose texts are other objects.
    torch.save(oracle(single), tmp_path / "again.pth")
    first = written(single, tmp_path / "first")
    second = written(tmp_path / "again.pth", tmp_path / "second")
    third = written(first, tmp_path / "third")
    for name in (".metadata", "__0_0.distcp"):
        assert (first / name).read_bytes() == (third / name).read_bytes()
    assert {p.name for p in second.iterdir()} == {p.name for p in first.iterdir()}


def test_plan_stores_tied_tensors_once_under_each_name(tmp_path: Path) -> None:
    shared = torch.arange(100_000.0)
    torch.save({"a": shared, "b": shared, "n": [shared, {"deep": shared}]}, tmp_path / "tied.pth")

    folder = written(tmp_path / "tied.pth", tmp_path / "tied")
    assert (folder / "__0_0.distcp").stat().st_size < 1.1 * shared.nbytes
    theirs = oracle(folder)
    assert all(same(tensor, shared) for tensor in (theirs["a"], theirs["b"], theirs["n"][0], theirs["n"][1]["deep"]))
    tree = read_header(folder).tree
    assert tree["a"] == tree["b"] == tree["n"][0]


def test_strip_writes_a_tensor_also_in_an_entry_of_plain_data(tmp_path: Path) -> None:
    first, second = torch.arange(3.0), torch.arange(5.0)
    args = {"a": first, "b": (second, first), "c": "text", "none": torch.empty(0, 2), "last": ("more", first)}
    optimizer = {"state": {}, "param_groups": []}
    source = save({"model": {"w": second + 1}, "optimizer": optimizer, "args": Namespace(**args)}, tmp_path / "in")

    folder = Path(strip(source, out=tmp_path / "out").out)
    theirs = oracle(folder)["args"]
    assert all(same(tensor, first) for tensor in (theirs["a"], theirs["b"][1], theirs["last"][1]))
    assert same(theirs["b"][0], second)
    assert same(theirs["none"], args["none"])
    tree = read_header(folder).tree
    assert same(read_tensor(tree["args"]["last"][1]), first)


def test_plan_writes_properties_that_older_versions_of_torch_read(single: Path, tmp_path: Path) -> None:
    # Up to 2.13 they are five; torch 2.15 writes six, on which the older ones fail.
    folder = written(single, tmp_path / "written")
    with (folder / ".metadata").open("rb") as file:
        from ckpt_tools.formats import pickle_read as unpickle

        tree, _ = unpickle.load(file, lambda *_: pytest.fail("no storage"), where="here", torch_values=False)
    tensors = [entry for entry in tree.state["state_dict_metadata"].values() if entry.state]
    assert {len(entry.state["properties"].state) for entry in tensors} == {5}


def test_plan_rejects_names_that_torch_cannot_tell_apart() -> None:
    with pytest.raises(WriteError, match=r"two entries would have the name 'a\.b'"):
        DCP_FOLDER.plan({"a.b": 1, "a": {"b": 2}}, Writing(name="out"))


def test_plan_rejects_an_entry_that_is_no_plain_data() -> None:
    with pytest.raises(WriteError, match="a.b: the entries other than weights cannot be written"):
        DCP_FOLDER.plan({"a": {"b": threading.Lock()}}, Writing(name="out"))
