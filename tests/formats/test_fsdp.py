"""Rank files: DTensors and ShardedTensors that each process saved are read as the whole tensors."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crafting import random_tensor, records_of, same, zip_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt_tools import average, convert, open_checkpoint
from ckpt_tools.compute.payload import read_tensor
from ckpt_tools.errors import CorruptError, SeriesError, UnsupportedError
from ckpt_tools.formats import read_header
from ckpt_tools.tensors import ChunkedSpec, TensorSpec, UnsupportedTensor

dtensor = pytest.importorskip("torch.distributed.tensor")  # elsewhere before torch 2.5
placement_types = pytest.importorskip("torch.distributed.tensor.placement_types")
DTensor, Partial, Replicate, Shard = dtensor.DTensor, dtensor.Partial, dtensor.Replicate, dtensor.Shard

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, which marks some of this as a prototype


@contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """Be one of several processes, of which the others do not exist: nothing is sent."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def save_ranks(
    folder: Path,
    mesh: tuple[int, ...],
    state: Callable[[DeviceMesh], Any],
    name: str = "model_world_size_{n}_rank_{r}.pt",
) -> Path:
    """Save what each process of a mesh has, as verl does."""
    folder.mkdir(parents=True, exist_ok=True)
    size = torch.Size(mesh).numel()
    for rank in range(size):
        with as_rank(rank, size):
            made = state(init_device_mesh("cpu", mesh, mesh_dim_names=tuple("abcd"[: len(mesh)])))
            torch.save(made, folder / name.format(n=size, r=rank))
    return folder


def spread(whole: torch.Tensor, mesh: DeviceMesh, placements: list[Any]) -> torch.Tensor:
    return dtensor.distribute_tensor(whole, mesh, placements, src_data_rank=None)


def agree(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = open_checkpoint(folder)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert same(found[name], tensor), name


WHOLE = {
    "rows": random_tensor("float32", (5, 3)),
    "columns": random_tensor("bfloat16", (3, 5)),
    "fewer rows than ranks": random_tensor("float16", (2, 3)),
    "none": torch.empty(0, 3),
    "same": random_tensor("float64", (4,)),
    "scalar": torch.tensor(2.5),
}


def verl(mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    placements = {"columns": [Shard(1)], "same": [Replicate()], "scalar": [Replicate()]}
    return {name: spread(whole, mesh, placements.get(name, [Shard(0)])) for name, whole in WHOLE.items()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_dtensors_of_all_ranks_are_read_as_whole_tensors(size: int, tmp_path: Path) -> None:
    folder = save_ranks(tmp_path / "actor", (size,), verl)

    agree(folder, WHOLE)
    header = read_header(folder)
    assert header.format.name == "fsdp-ranks"
    assert len(header.files) == size
    assert not header.foreign
    chunked = {name for name, spec in header.tree.items() if isinstance(spec, ChunkedSpec)}
    assert chunked == (set() if size == 1 else {"rows", "columns", "fewer rows than ranks"})


@settings(max_examples=20)
@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    mesh=st.sampled_from([(2,), (3,), (2, 2), (1, 3), (2, 1, 2)]),
    data=st.data(),
)
def test_any_placements_give_the_tensor_back(
    shape: list[int], mesh: tuple[int, ...], data: st.DataObject, tmp_path: Path
) -> None:
    kinds = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    placements = [data.draw(st.sampled_from(kinds)) for _ in mesh]
    whole = random_tensor("int16", tuple(shape))
    folder = tmp_path / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    save_ranks(folder, mesh, lambda mesh: {"w": spread(whole, mesh, placements)})

    header = read_header(folder)
    assert same(read_tensor(header.tree["w"], header.files), whole)


@settings(max_examples=20)
@given(rows=st.integers(0, 9), mesh=st.sampled_from([(2, 2), (3, 2), (2, 3), (1, 2), (2, 1)]))
def test_rows_that_another_axis_split_before_give_the_tensor_or_none(
    rows: int, mesh: tuple[int, int], tmp_path: Path
) -> None:
    # FSDP2 with tensor parallelism: the second axis splits first. Where sizes are uneven, torch's own split differs.
    whole = random_tensor("int16", (rows, 2))
    folder = tmp_path / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    strided = placement_types._StridedShard(0, split_factor=mesh[1])
    save_ranks(folder, mesh, lambda mesh: {"w": spread(whole, mesh, [strided, Shard(0)])})

    header = read_header(folder)
    spec = header.tree["w"]
    if rows % (mesh[0] * mesh[1]) == 0:
        assert isinstance(spec, TensorSpec)
    assert isinstance(spec, UnsupportedTensor) or same(read_tensor(spec, header.files), whole)


def test_hybrid_sharding_takes_one_of_the_copies(tmp_path: Path) -> None:
    whole = random_tensor("float32", (5, 3))

    agree(
        save_ranks(tmp_path / "ranks", (2, 2), lambda mesh: {"w": spread(whole, mesh, [Replicate(), Shard(0)])}),
        {"w": whole},
    )


def test_a_tensor_on_a_part_of_the_mesh_is_read_whole(tmp_path: Path) -> None:
    whole = random_tensor("float32", (5, 3))

    agree(
        save_ranks(tmp_path / "ranks", (2, 2), lambda mesh: {"w": spread(whole, mesh["b"], [Shard(1)])}), {"w": whole}
    )


def test_a_process_outside_the_mesh_has_no_part(tmp_path: Path) -> None:
    def state(_: DeviceMesh) -> Any:
        return {"w": spread(WHOLE["rows"], DeviceMesh("cpu", [0]), [Shard(0)])}

    agree(save_ranks(tmp_path / "ranks", (2,), state), {"w": WHOLE["rows"]})


def test_dtensors_are_joined_at_any_depth(tmp_path: Path) -> None:
    whole = random_tensor("float32", (5, 3))

    def state(mesh: DeviceMesh) -> Any:
        tensor = spread(whole, mesh, [Shard(0)])
        return {"model": {"w": tensor}, "shadow": [tensor, (tensor, 3)], "step": 7}

    header = read_header(save_ranks(tmp_path / "ranks", (2,), state))
    tree = header.tree
    for each in (tree["model"]["w"], tree["shadow"][0], tree["shadow"][1][0]):
        assert same(read_tensor(each, header.files), whole)
    assert (tree["step"], tree["shadow"][1][1]) == (7, 3)


def test_plain_tensors_are_those_of_the_first_rank(tmp_path: Path) -> None:
    def state(mesh: DeviceMesh) -> Any:
        rank = dist.get_rank()
        return {
            "w": spread(WHOLE["rows"], mesh, [Shard(0)]),
            "buffer": torch.full((2,), 1.0 + rank),
            f"own {rank}": torch.ones(1),
        }

    found = open_checkpoint(save_ranks(tmp_path / "ranks", (2,), state))
    assert list(found) == ["w", "buffer", "own 0", "own 1"]
    assert found["buffer"].tolist() == [1, 1]


def test_plain_tensors_that_differ_in_shape_are_refused(tmp_path: Path) -> None:
    def state(mesh: DeviceMesh) -> Any:
        return {"w": spread(WHOLE["rows"], mesh, [Shard(0)]), "local": torch.ones(2 + dist.get_rank())}

    with pytest.raises(UnsupportedError, match=r"'local' differs in dtype or shape between ranks.*full state dict"):
        read_header(save_ranks(tmp_path / "ranks", (2,), state))


def test_a_tensor_that_one_rank_saved_oddly_spoils_no_other(tmp_path: Path) -> None:
    def state(mesh: DeviceMesh) -> Any:
        local = torch.ones(3).to_sparse() if dist.get_rank() else torch.ones(3)
        return {"w": spread(WHOLE["rows"], mesh, [Shard(0)]), "odd": local}

    found = open_checkpoint(save_ranks(tmp_path / "ranks", (2,), state))
    assert same(found["w"], WHOLE["rows"])
    with pytest.raises(UnsupportedError, match="'odd' is sparse"):
        found["odd"]


def test_partial_sums_are_no_tensor(tmp_path: Path) -> None:
    def state(mesh: DeviceMesh) -> Any:
        return {"w": torch.ones(2), "sum": DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)}

    found = open_checkpoint(save_ranks(tmp_path / "ranks", (2,), state))
    assert isinstance(found.specs["w"], TensorSpec)
    assert isinstance(found.specs["sum"], UnsupportedTensor)
    with pytest.raises(UnsupportedError, match=r"'sum' is a DTensor of sums that were not added up"):
        found["sum"]


# Names


def test_files_that_differ_in_the_rank_alone_are_ranks_if_they_hold_dtensors(tmp_path: Path) -> None:
    agree(save_ranks(tmp_path / "composer", (2,), verl, "ep1-ba10-rank{r}.pt"), WHOLE)
    plain = tmp_path / "plain"
    plain.mkdir()
    for rank in range(2):
        torch.save({"w": torch.ones(2)}, plain / f"rank_{rank}.pt")
    with pytest.raises(SeriesError, match="differ only in the rank"):
        average([plain], out=tmp_path / "out.pth")


@pytest.mark.parametrize(
    "name", ["ckpt_rank{r}.pt", "model_rank_{r}.pt", "checkpoint-rank={r}-of-{n}.pth", "w.rank{r}.bin"]
)
def test_any_word_may_be_before_the_rank(name: str, tmp_path: Path) -> None:
    agree(save_ranks(tmp_path / "run", (2,), verl, name), WHOLE)


@pytest.mark.parametrize("name", ["mp_rank_{r:02d}.pt", "a_tp_rank_{r}.pt"])
def test_ranks_of_model_parallelism_are_none_of_fsdp(name: str, tmp_path: Path) -> None:
    save_ranks(tmp_path / "run", (2,), verl, name)
    with pytest.raises(SeriesError, match="differ only in the rank"):
        average([tmp_path / "run"], out=tmp_path / "out.pth")


@pytest.mark.parametrize("other", ["rank_01.pt", "rank1.pt", "rank=1.pt"])
def test_two_files_of_one_rank_are_refused(other: str, tmp_path: Path) -> None:
    folder = save_ranks(tmp_path / "run", (2,), verl, "rank_{r}.pt")
    shutil.copy(folder / "rank_1.pt", folder / other)
    with pytest.raises(CorruptError, match=r"rank.?0?1\.pt and rank.?0?1\.pt are of the same rank"):
        read_header(folder)


@pytest.mark.parametrize("key", ["step", "global_steps", "epoch", "iteration", "num_updates"])
def test_ranks_of_two_steps_are_refused(key: str, tmp_path: Path) -> None:
    def state(mesh: DeviceMesh) -> Any:
        return {"model": verl(mesh), key: 100 + dist.get_rank(), "seed": dist.get_rank()}

    with pytest.raises(CorruptError, match=f"rank_0.pt has the {key} 100, and .*rank_1.pt has 101"):
        read_header(save_ranks(tmp_path / "run", (2,), state))


def test_ranks_that_a_save_by_more_of_them_left_are_refused(tmp_path: Path) -> None:
    folder = save_ranks(
        tmp_path / "run", (4,), lambda mesh: {"w": spread(torch.ones(3), mesh, [Replicate()])}, "r-rank{r}.pt"
    )
    save_ranks(folder, (2,), lambda mesh: {"w": spread(torch.zeros(3), mesh, [Replicate()])}, "r-rank{r}.pt")
    with pytest.raises(CorruptError, match="'w' is shared by 2 ranks in one file, and by 4 in another.*two saves"):
        read_header(folder)


def test_plain_tensors_of_several_ranks_are_refused(tmp_path: Path) -> None:
    """They may be parts, of which nothing says how they make the whole."""
    folder = tmp_path / "local"
    folder.mkdir()
    for rank in range(2):
        torch.save({"w": WHOLE["rows"][rank : rank + 2]}, folder / f"model_world_size_2_rank_{rank}.pt")
    with pytest.raises(UnsupportedError, match="no tensor in the files of its 2 ranks is a DTensor.*full state dict"):
        average([folder], out=tmp_path / "out.pth")


def test_a_dict_in_two_places_of_one_rank_alone_is_joined_in_each_place(tmp_path: Path) -> None:
    others = {name: whole + 1 if whole.is_floating_point() else whole for name, whole in WHOLE.items()}

    def state(mesh: DeviceMesh) -> Any:
        one = {"w": spread(WHOLE["columns"], mesh, [Shard(0)])}
        # The first rank has the same rows in both.
        other = one if dist.get_rank() == 0 else {"w": spread(others["columns"], mesh, [Shard(0)])}
        return {"model": one, "other": other}

    folder = save_ranks(tmp_path / "run", (2,), state)
    assert same(open_checkpoint(folder, state="model")["w"], WHOLE["columns"])
    rows = torch.cat([WHOLE["columns"][:2], others["columns"][2:]])
    assert same(open_checkpoint(folder, state="other")["w"], rows)


def test_files_beside_the_weights_are_none_of_them(tmp_path: Path) -> None:
    folder = save_ranks(tmp_path / "actor", (2,), verl)
    for rank in range(2):
        for name in ("optim", "extra_state"):
            (folder / f"{name}_world_size_2_rank_{rank}.pt").write_bytes(b"not read")
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "config.json").write_text("{}")
    agree(folder, WHOLE)


def test_a_rank_alone_is_refused_and_its_folder_named(tmp_path: Path) -> None:
    folder = save_ranks(tmp_path / "actor", (2,), verl)
    (one, other) = sorted(folder.iterdir())
    with pytest.raises(
        UnsupportedError, match=rf"'rows' is one rank's part of a DTensor.*Give the folder .*: {folder}$"
    ):
        open_checkpoint(one)
    for given_ in ([one], [one, other], [folder / "*.pt"]):
        with pytest.raises(SeriesError, match=rf"is the file of one rank.*: {folder}$"):
            average(given_, out=tmp_path / "out.pth")


def test_replicated_dtensors_in_one_file_are_whole(tmp_path: Path) -> None:
    whole = random_tensor("float32", (5, 3))
    save_ranks(tmp_path, (2,), lambda mesh: {"w": spread(whole, mesh, [Replicate()]), "n": 3}, "r{r}.pth")
    agree(tmp_path / "r1.pth", {"w": whole})


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = save_ranks(tmp_path / "actor", (4,), verl)
    (folder / "model_world_size_4_rank_2.pt").unlink()
    with pytest.raises(
        CorruptError, match=r"model_world_size_4_rank_2\.pt is missing, with the part of one of 4 ranks"
    ):
        read_header(folder)
    folder = save_ranks(tmp_path / "other", (4,), verl, "rank{r}.pt")
    (folder / "rank3.pt").unlink()
    with pytest.raises(CorruptError, match=r"rank3\.pt is missing, with the part of one of 4 ranks"):
        read_header(folder)


def test_a_rank_in_the_place_of_another_is_found_out(tmp_path: Path) -> None:
    folder = save_ranks(tmp_path / "actor", (2,), verl)
    shutil.copy(folder / "model_world_size_2_rank_0.pt", folder / "model_world_size_2_rank_1.pt")
    with pytest.raises(CorruptError, match=r"'rows' of shape \[5, 3\].* elements are in no chunk"):
        read_header(folder)


def test_ranks_of_two_models_are_refused(tmp_path: Path) -> None:
    folder = save_ranks(tmp_path / "actor", (2,), verl)
    larger = save_ranks(tmp_path / "other", (2,), lambda mesh: {"rows": spread(torch.ones(6, 3), mesh, [Shard(0)])})
    shutil.copy(larger / "model_world_size_2_rank_1.pt", folder)
    with pytest.raises(
        CorruptError, match=r"'rows' is float32 \[5, 3\] for one rank, and float32 \[6, 3\] for another"
    ):
        read_header(folder)


def test_several_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    save_ranks(tmp_path, (2,), verl)
    save_ranks(tmp_path, (4,), verl)
    with pytest.raises(UnsupportedError, match="has the rank files of several checkpoints"):
        read_header(tmp_path)


def test_flat_parameters_are_refused_by_name(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"layers.0._flat_param": torch.ones(8)}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    with pytest.raises(
        UnsupportedError, match=r"'layers\.0\._flat_param' is a flat parameter of FSDP.*FULL_STATE_DICT"
    ):
        read_header(tmp_path)


# What commands do with them


def test_a_series_of_rank_folders_is_averaged(tmp_path: Path) -> None:
    for step in (9, 10):
        wholes = {"w": torch.full((5, 3), float(step))}
        save_ranks(
            tmp_path / f"global_step_{step}" / "actor",
            (2,),
            lambda mesh, w=wholes: {"w": spread(w["w"], mesh, [Shard(0)])},
        )
    report = average([tmp_path / "global_step_*"], out=tmp_path / "out.safetensors")
    assert [each.step for each in report.inputs] == [9, 10]
    assert same(open_checkpoint(tmp_path / "out.safetensors")["w"], torch.full((5, 3), 9.5))


def test_convert_finds_the_ranks_in_the_folder_of_a_step(tmp_path: Path) -> None:
    save_ranks(tmp_path / "global_step_9" / "actor", (2,), verl)
    convert(tmp_path / "global_step_9", to="plain", out=tmp_path / "whole.pth")
    agree(tmp_path / "whole.pth", WHOLE)


# Hostile numbers


def edited(path: Path, old: bytes, new: bytes) -> None:
    """Change the pickle in a torch file."""
    records = records_of(path)
    (name,) = (each for each in records if each.endswith("/data.pkl"))
    assert old in records[name]
    zip_of(path, records | {name: records[name].replace(old, new)})


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"K\x05K\x03\x86", b"K\x7fK\x03\x86", r"part has the shape \[3, 3\], where its placements give \[64, 3\]"),
        (b"K\x05K\x03\x86", b"K\x05\x85", "with an impossible placement|part has the shape"),
        (b"K\x05K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86", "without a dtype or a size"),
        (b"torch\nfloat32", b"torch\nfloat64", "whose part has another dtype"),
        (b"placement_types\nShard", b"placement_types\nSharx", "no Shard where torch has one"),
        (b"_dtensor_spec\nDTensorSpec", b"_dtensor_spec\nDTensorSpex", "no DTensorSpec where torch has one"),
        (b"_local_tensor", b"_local_tensox", "whose part is no plain tensor"),
    ],
)
def test_objects_that_torch_does_not_write_make_no_tensor(old: bytes, new: bytes, reason: str, tmp_path: Path) -> None:
    folder = save_ranks(tmp_path, (2,), lambda mesh: {"w": spread(WHOLE["rows"], mesh, [Shard(0)])})
    for path in folder.iterdir():
        edited(path, old, new)
    spec = read_header(folder).tree["w"]
    assert isinstance(spec, UnsupportedTensor)
    assert re.search(reason, spec.reason)
