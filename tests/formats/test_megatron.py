"""Megatron-LM's torch_dist folders: averaged to one of their own kind, without the optimizer, as torch itself loads it.

They are laid out by torch's DCP, with the names and files that megatron-core 0.16 gives them.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from crafting import raw_bytes
from processes import in_processes
from torch.distributed.device_mesh import init_device_mesh

from ckpt_tools import average, convert, open_checkpoint, strip, verify
from ckpt_tools.errors import CorruptError, UnsupportedError, WriteError
from ckpt_tools.formats import read_header
from ckpt_tools.jobs.diff import diff

STEPS = (1000, 2000, 3000)
EXTRA = "decoder.layers.mlp._extra_state/shard_0_1"


def weights(step: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return {
        "decoder.layers.mlp.linear_fc1.weight": torch.randn(2, 5, 3, generator=g).bfloat16(),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": torch.randn(2, 3, generator=g),
        "embedding.word_embeddings.weight": torch.randn(7, 3, generator=g).bfloat16(),
    }


def mean() -> dict[str, torch.Tensor]:
    """The average by NumPy in float64, rounded once."""
    found = {}
    for name, last in weights(STEPS[-1]).items():
        exact = np.mean([weights(step)[name].double().numpy() for step in STEPS], axis=0)
        found[name] = torch.from_numpy(exact).to(last.dtype)
    return found


def save(rank: int, root: Path) -> None:
    """Save a training in two processes, average it, and load the average in both."""
    from torch.distributed import tensor as placements

    mesh = init_device_mesh("cpu", (2,))

    def shared_out(whole: torch.Tensor) -> Any:
        return placements.distribute_tensor(whole, mesh, [placements.Shard(whole.dim() - 2)])

    for step in STEPS:
        folder = root / "run" / f"iter_{step:07d}"
        own = {name: shared_out(whole) for name, whole in weights(step).items()}
        slots = {
            f"{lead}optimizer.state.{slot}.{name}": shared_out(whole.float())
            for lead, slot in (("", "exp_avg"), ("", "fp32_param"), ("chained_1.", "exp_avg_sq"))
            for name, whole in weights(step).items()
        }
        objects = {
            EXTRA: (io.BytesIO(b"scales" * step),),  # torch takes a list apart
            f"rng_state/shard_0.{rank}_1.2": (torch.get_rng_state(),),
            "optimizer.distributed.param_state/shard_0_1": ({"step": step},),
        }
        dcp.save(own | slots | objects, checkpoint_id=folder)
        if rank == 0:
            common = {"args": Namespace(hidden_size=3), "iteration": step, "checkpoint_version": 3.0}
            torch.save(common | {"optimizer": {"param_groups": [{"lr": 0.1}]}}, folder / "common.pt")
            versions = {"sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
            (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", **versions}))
    if rank == 0:
        (root / "run" / "latest_checkpointed_iteration.txt").write_text(str(STEPS[-1]))
        report = average([root / "run"], out=root / "averaged", threads=1)
        (root / "report.json").write_text(json.dumps(report.to_dict()))
    torch.distributed.barrier()
    loaded = {name: shared_out(torch.zeros_like(whole)) for name, whole in mean().items()}
    dcp.load(loaded, checkpoint_id=root / "averaged" / "iter_0003000")
    whole = {name: tensor.full_tensor() for name, tensor in loaded.items()}
    if rank == 0:
        torch.save(whole, root / "loaded.pth")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    in_processes(2, save, folder)
    return folder


@pytest.fixture
def step(root: Path, tmp_path: Path) -> Path:
    """One iteration, to change."""
    return Path(shutil.copytree(root / "run" / "iter_0001000", tmp_path / "iter_0001000"))


def saved(folder: Path, name: str) -> bytes:
    """Return an entry as the index of torch tells its place."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    (info,) = (info for index, info in metadata.storage_data.items() if index.fqn == name)
    return (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]


def test_two_processes_load_the_average_of_all_iterations(root: Path) -> None:
    loaded, expected = torch.load(root / "loaded.pth"), mean()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_the_average_is_the_folder_of_a_training_with_the_last_iteration(root: Path) -> None:
    folder, last = root / "averaged" / "iter_0003000", root / "run" / "iter_0003000"

    assert (root / "averaged" / "latest_checkpointed_iteration.txt").read_text() == "3000"
    for name in ("common.pt", "metadata.json"):
        assert (folder / name).read_bytes() == (last / name).read_bytes()
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    assert entries.keys() == {*weights(0), EXTRA}
    assert saved(folder, EXTRA) == saved(last, EXTRA)
    report = json.loads((root / "report.json").read_text())
    assert [each["step"] for each in report["inputs"]] == [*STEPS]
    assert {*report["dropped"]} == {"optimizer", "optimizer_objects", "rng_state"}
    assert any("no optimizer and no random states" in note for note in report["notes"])


def test_the_average_is_read_again_and_replaced_only_if_asked(root: Path, tmp_path: Path) -> None:
    inputs = sorted((root / "run").glob("iter_*"))
    out = Path(shutil.copytree(root / "averaged", tmp_path / "averaged"))
    again = average([out / "iter_0003000", inputs[0]], include_outputs=True, out=tmp_path / "again.safetensors")
    assert [each.name for each in again.inputs] == ["iter_0001000", "iter_0003000"]
    with pytest.raises(WriteError, match="exists already"):
        average(inputs[:2], out=out)
    average(inputs[:2], out=out, force=True)
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["iter_0002000"]
    shutil.copytree(inputs[0], out / "iter_0001000")
    with pytest.raises(WriteError, match=r"holds iter_000[12]000.*and a folder of shards would replace"):
        average(inputs[:2], out=out, force=True)


@pytest.mark.parametrize("max_shard_size", [None, "1KB"])
def test_an_average_is_verified_with_its_checksums_and_signed_off(
    max_shard_size: str | None, root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "averaged"
    more: dict[str, Any] = {"write_checksums": True, "sign_off": tmp_path / "s.json", "max_shard_size": max_shard_size}
    average([root / "run"], out=out, **more)
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    subjects = json.loads((tmp_path / "s.json").read_text())["subject"]
    assert {each["name"]: each["digest"]["sha256"] for each in subjects} == {
        name: hashlib.sha256(data).hexdigest() for name, data in files.items()
    }
    report = verify(out, inputs=root / "run")
    results = {check.name: check.result for check in report.checks}
    assert results == {
        **dict.fromkeys(("structure", "crc32", "finite", "checksums", "record", "inputs", "made again"), "ok"),
        "loads": "not checked",
    }


def test_an_average_is_made_again_and_is_the_same(root: Path, tmp_path: Path) -> None:
    average([root / "run"], out=tmp_path / "averaged")
    report = average([root / "run"], replay=tmp_path / "averaged", out=tmp_path / "again")
    assert report.compared == f"It is the same as {tmp_path / 'averaged/iter_0003000'} in every byte."


def test_a_changed_value_of_an_average_is_found(root: Path, tmp_path: Path) -> None:
    average([root / "run"], out=tmp_path / "averaged", write_checksums=True)
    name = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    values = raw_bytes(mean()[name])
    (path,) = (each for each in (tmp_path / "averaged/iter_0003000").glob("*.distcp") if values in each.read_bytes())
    path.write_bytes(path.read_bytes().replace(values, bytes([values[0] ^ 1]) + values[1:]))
    checks = verify(tmp_path / "averaged", inputs=root / "run").checks
    failed = {check.name: check.detail for check in checks if check.result == "failed"}
    assert failed.keys() == {"crc32", "checksums", "made again"}
    assert f"'model.{name}' differs in 1 of 6 values" in failed["made again"]


def test_what_torch_wrote_in_two_processes_passes_until_bytes_are_added(root: Path, step: Path) -> None:
    assert {check.name: check.result for check in verify(step).checks}["crc32"] == "ok"
    path = next(step.glob("*.distcp"))
    path.write_bytes(path.read_bytes() + b"\0")
    (fault,) = (check for check in verify(step).checks if check.result == "failed")
    assert fault.detail.endswith("belongs to no entry")
    assert path.name in fault.detail


def test_convert_strip_and_diff_take_the_weights_of_one_iteration(root: Path, tmp_path: Path) -> None:
    source, expected = root / "run" / "iter_0001000", weights(1000)
    convert(source, to="plain", out=tmp_path / "plain.pth")
    plain = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert {name: tensor.dtype for name, tensor in plain.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(plain[name], tensor) for name, tensor in expected.items())

    report = strip(source, out=tmp_path / "stripped")
    assert {entry.place for entry in report.entries} == {"optimizer", "optimizer_objects", "rng_state"}
    found = tmp_path / "stripped" / "iter_0001000"
    assert {*dcp.FileSystemReader(found).read_metadata().state_dict_metadata} == {*expected, EXTRA}
    assert saved(found, EXTRA) == saved(source, EXTRA)
    assert diff(source, tmp_path / "stripped").verdict == "identical"
    assert diff(source, root / "run" / "iter_0002000").verdict == "different"
    assert open_checkpoint(source).counters == {"iteration": 1000}


def test_an_interrupted_save_and_another_backend_are_refused(step: Path) -> None:
    config = step / "metadata.json"
    config.write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(UnsupportedError, match="the backend 'zarr'; only torch_dist is read"):
        read_header(step)
    config.unlink()
    with pytest.raises(CorruptError, match=r"no metadata\.json, which Megatron-LM writes last"):
        read_header(step)


def test_an_entry_beyond_its_file_is_refused_though_nothing_unpickles_it(step: Path) -> None:
    largest = max(step.glob("*.distcp"), key=lambda path: EXTRA.encode() in path.read_bytes())
    infos = dcp.FileSystemReader(step).read_metadata().storage_data.values()
    end = max(info.offset + info.length for info in infos if info.relative_path == largest.name)
    largest.write_bytes(largest.read_bytes()[: end - 1])
    with pytest.raises(CorruptError, match=f"truncated: .*ends at byte {end}, the file at {end - 1}"):
        read_header(step)


def test_the_iteration_names_the_folder_where_the_input_has_another_name(step: Path, tmp_path: Path) -> None:
    other = step.rename(step.with_name("kept"))
    average([other], out=tmp_path / "out")
    assert (tmp_path / "out" / "iter_0001000" / ".metadata").is_file()
    torch.save({"checkpoint_version": 3.0}, other / "common.pt")
    with pytest.raises(WriteError, match=r"neither its name nor its common\.pt has an iteration"):
        average([other], out=tmp_path / "more")
