"""Verifying an output against its record: what was changed, in the output or its inputs, is found."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crafting import raw_bytes, records_of, zip_of
from memory_store import MemoryFile, MemoryStore
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_update import series
from test_verify import detail, results

from ckpt_tools import average, convert, fix_prefix, strip, verify
from ckpt_tools.compute.recompute import SAMPLED
from ckpt_tools.errors import UsageError
from ckpt_tools.storage.source import STORES


def training(folder: Path, n: int = 3) -> list[Path]:
    """Checkpoints with raw weights, an EMA and an optimizer, by DDP."""
    generator, paths = torch.Generator().manual_seed(0), []
    for i in range(n):
        raw, ema = (torch.randn(6, 8, generator=generator) for _ in range(2))
        state = {"module.w": raw, "module.n": torch.tensor(i)}
        optimizer = {"state": {0: {"momentum_buffer": raw}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        both = {"state_dict": state, "state_dict_ema": {**state, "module.w": ema}, "epoch": i, "optimizer": optimizer}
        paths.append(folder / f"r-{i}.pth")
        torch.save(both, paths[-1])
    return paths


def renamed(paths: list[Path], out: str, **options: Any) -> None:
    average(paths, out=f"{out}.whole.pth")
    fix_prefix(f"{out}.whole.pth", out=out, **options)


def replaced(paths: list[Path], out: str) -> None:
    convert(paths[0], to="timm", out=f"{out}.whole.pth", write_checksums=True)
    fix_prefix(f"{out}.whole.pth", out=out, strip=["module."], add=["model."])


MADE: dict[str, Callable[[list[Path], str], Any]] = {
    "uniform.pth": lambda paths, out: average(paths, out=out),
    "ema.safetensors": lambda paths, out: average(paths, mode="ema", state="ema", out=out),
    "raw.pth": lambda paths, out: average(
        paths, weights=[3, 1, 4], normalize=False, state="raw", dtype="bf16", out=out
    ),
    "shards/": lambda paths, out: average(paths, max_shard_size=100, out=out),
    "stock.pth": lambda paths, out: average(paths[1:], base=paths[0], out=out),
    "plain.safetensors": lambda paths, out: convert(paths[0], out=out),
    "timm-ema.pth": lambda paths, out: convert(paths[0], to="timm-ema", out=out),
    "averaged-model.pth": lambda paths, out: convert(paths[0], to="averaged-model", dtype="float16", out=out),
    "counted.pth": lambda paths, out: convert(paths[0], to="averaged-model", state="raw", updates=7, out=out),
    "dcp": lambda paths, out: convert(paths[0], to="dcp", out=out),
    "stripped.pth": lambda paths, out: strip(paths[0], out=out),
    "stripped-ema.pth": lambda paths, out: strip(paths[0], state="ema", out=out),
    "added.pth": lambda paths, out: renamed(paths, out, add=["model."]),
    "replaced.pth": lambda paths, out: replaced(paths, out),
}


@pytest.mark.parametrize("name", MADE)
def test_an_output_is_the_same_when_it_is_made_again(name: str, tmp_path: Path) -> None:
    paths = training(tmp_path)
    MADE[name](paths, f"{tmp_path}/{name}")
    report = verify(tmp_path / name)
    assert report.passed, report
    assert results(report)["inputs"] == results(report)["made again"] == "ok", report
    assert results(verify(tmp_path / name, sample="30%", seed=1))["made again"] == "ok"


@pytest.mark.parametrize("name", ["ema.safetensors", "plain.safetensors", "shards/"])
def test_one_changed_value_is_found_where_it_is(name: str, tmp_path: Path) -> None:
    MADE[name](training(tmp_path), f"{tmp_path}/{name}")
    path = tmp_path / name
    path = next(path.glob("*.safetensors")) if path.is_dir() else path
    ((key, values),) = ((key, tensor) for key, tensor in load_file(path).items() if tensor.ndim == 2)
    data = path.read_bytes()
    at = data.index(raw_bytes(values)) + 4 * 19  # row 2, column 3
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    report = verify(tmp_path / name)
    assert not report.passed
    assert f"'{key}' differs in 1 of 48 values, the first at [2, 3]" in detail(report, "made again")


@pytest.mark.parametrize("hash_", [False, True])
def test_one_changed_byte_of_an_input_is_found(hash_: bool, tmp_path: Path) -> None:
    paths = series(tmp_path, 4)
    average(paths, out=tmp_path / "averaged.pth", hash=hash_)
    assert verify(tmp_path / "averaged.pth").passed
    data, values = paths[2].read_bytes(), torch.load(paths[2])["model"]["w"]
    at = data.index(raw_bytes(values)) + 10
    paths[2].write_bytes(data[:at] + bytes([data[at] ^ 32]) + data[at + 1 :])
    report = verify(tmp_path / "averaged.pth")
    assert not report.passed
    assert results(report)["inputs" if hash_ else "made again"] == "failed"


def test_inputs_that_moved_are_found_in_the_folder_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    paths = series(tmp_path / "here", 3)
    average(paths, out="averaged.pth")
    for path in paths:
        shutil.move(path, tmp_path / "elsewhere/deep")
    report = verify("averaged.pth")
    assert report.passed
    assert (results(report)["inputs"], results(report)["made again"]) == ("not checked", "not checked")
    assert results(verify("averaged.pth", inputs=tmp_path / "elsewhere"))["made again"] == "ok"
    (tmp_path / "elsewhere/deep/c-1.pth").unlink()
    report = verify("averaged.pth", inputs=tmp_path / "elsewhere")
    assert "c-1.pth is missing" in detail(report, "inputs")
    assert not report.passed


def test_two_files_that_may_be_an_input_are_no_fault_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs whose files have the same names and sizes, and an average beside neither."""
    monkeypatch.chdir(tmp_path)
    for run in ("a", "b"):
        Path(run).mkdir()
        paths = series(Path(run), 3)
    average(paths, out="averaged.pth")
    report = verify("averaged.pth")
    assert report.passed
    assert "c-0.pth is there several times: " in detail(report, "inputs")
    assert (results(report)["inputs"], results(report)["made again"]) == ("not checked", "not checked")
    assert results(verify("averaged.pth", inputs="b"))["made again"] == "ok"
    average([Path("a/c-0.pth")], out="of_one.pth")
    for run in ("a", "b"):  # of other sizes: none is known to be the input
        torch.save({"w": torch.ones(1000)}, f"{run}/c-0.pth")
    report = verify("of_one.pth")
    assert report.passed
    assert "b/c-0.pth has" in detail(report, "inputs")
    Path("b/c-0.pth").unlink()
    assert results(verify("of_one.pth"))["inputs"] == "not checked"
    assert results(verify("of_one.pth", inputs="a"))["inputs"] == "failed"


def test_a_difference_names_the_input_that_may_be_another_model_below_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, value in (("run", 1.0), ("els/proj", 2.0)):
        (tmp_path / folder).mkdir(parents=True)
        save_file({"w": torch.full((3,), value)}, tmp_path / folder / "model.safetensors")
    convert(tmp_path / "run/model.safetensors", out=tmp_path / "els/made.pth")
    monkeypatch.chdir(tmp_path / "els")
    report = verify("made.pth")
    assert detail(report, "inputs") == "by name and size in proj"
    assert results(report)["made again"] == "failed"
    assert "proj/model.safetensors may be another file of that name and size" in detail(report, "made again")
    report = verify("made.pth", inputs="proj")
    assert detail(report, "made again").endswith("An input has changed, or the output has.")
    save_file({"v": torch.full((3,), 2.0)}, "proj/model.safetensors")  # other names, and the same size
    assert "may be another file" in detail(verify("made.pth"), "made again")
    shutil.copy(tmp_path / "run/model.safetensors", "proj")
    assert results(verify("made.pth"))["made again"] == "ok"


def test_an_input_that_is_known_by_its_digest_is_known_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    average(series(Path("run"), 2), out="averaged.pth", hash=True)
    values = raw_bytes(torch.load("averaged.pth")["model"]["w"])
    records = {name: data.replace(values, values[::-1]) for name, data in records_of(Path("averaged.pth")).items()}
    zip_of(Path("averaged.pth"), records)
    report = verify("averaged.pth")
    assert detail(report, "inputs") == "by name, size and SHA-256 in run"
    assert results(report)["made again"] == "failed"


def test_inputs_whose_digest_is_not_recorded_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = series(tmp_path, 3)
    average(paths[:2], out="averaged.pth")
    average(paths[2], update="averaged.pth", out="averaged.pth", force=True, hash=True)
    assert detail(verify("averaged.pth"), "inputs").startswith("by name and size (1 of 3 by SHA-256, too) in ")
    notes = average([], replay="averaged.pth", out="again.pth").notes
    assert any("found by name and size (1 of 3 by SHA-256, too) in " in note for note in notes)


def with_record(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the record of a torch file, and write it with right checksums."""
    records = records_of(path)
    name = next(each for each in records if each.endswith("ckpt_tools.json"))
    record = json.loads(records[name])
    change(record)
    return zip_of(path, records | {name: json.dumps(record).encode()})


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("/dev/zero", "record"),
        ("../../etc/passwd", "record"),
        ("", "record"),
        ("pipe.pth", "inputs"),
        ("device.pth", "inputs"),
        ("none.pth", "inputs"),
    ],
)
def test_a_record_that_names_no_checkpoint_is_not_followed(name: str, result: str, tmp_path: Path) -> None:
    for number, out in enumerate(("averaged.pth", "stripped.pth")):
        paths = training(tmp_path)
        (average(paths, out=tmp_path / out)) if not number else strip(paths[0], out=tmp_path / out)
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "device.pth").symlink_to("/dev/zero")
    with_record(tmp_path / "averaged.pth", lambda record: record["inputs"][1].update(name=name))
    with_record(tmp_path / "stripped.pth", lambda record: record["input"].update(name=name))
    for out in ("averaged.pth", "stripped.pth"):
        report = verify(tmp_path / out, inputs=tmp_path)
        assert results(report)[result] == "failed", report
        assert results(report).get("made again") in (None, "not checked")


class Asked(MemoryStore):
    """A store that notes what it is asked for."""

    def __init__(self, files: dict[Path, bytes]) -> None:
        super().__init__(files)
        self.paths: set[Path] = set()

    def is_file(self, path: Path) -> bool:
        self.paths.add(path)
        return super().is_file(path)

    def is_folder(self, path: Path) -> bool:
        self.paths.add(path)
        return super().is_folder(path)


@pytest.mark.parametrize("above", ["", "here/"])
def test_a_record_leads_to_no_store(above: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    paths = training(here)
    average(paths, out="averaged.pth")
    secret, given = Path(f"toy:/private/{paths[1].name}"), Path("toy:/public/averaged.pth")
    paths[1].rename(tmp_path / "moved.pth")
    made = with_record(Path("averaged.pth"), lambda record: record["inputs"][1].update(name=f"{above}{secret}"))
    store = Asked({secret: (tmp_path / "moved.pth").read_bytes(), given: made.read_bytes()})
    monkeypatch.setitem(STORES, "toy", store)
    for path in (made, given):
        assert "is missing" in detail(verify(path), "inputs")
    assert not [path for path in store.paths if "private" in path.parts and "public" not in path.parts]


def test_inputs_may_have_moved_to_a_folder_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = training(tmp_path)
    average(paths, out=tmp_path / "averaged.pth")
    files = {Path(f"toy:/runs/{path.name}"): path.read_bytes() for path in paths}
    monkeypatch.setitem(STORES, "toy", MemoryStore(files))
    for path in paths:
        path.unlink()
    report = verify(tmp_path / "averaged.pth", inputs=Path("toy:/runs"))
    assert results(report)["inputs"] == results(report)["made again"] == "ok", report
    with pytest.raises(UsageError, match=r"`inputs`: toy:/none is no folder"):
        verify(tmp_path / "averaged.pth", inputs=Path("toy:/none"))


def test_a_record_that_claims_something_else_is_found(tmp_path: Path) -> None:
    average(training(tmp_path), out=tmp_path / "averaged.pth")
    with_record(tmp_path / "averaged.pth", lambda record: record["inputs"][0].update(coefficient=0.34))
    assert "'state_dict.w' differs in 48 of 48 values" in detail(verify(tmp_path / "averaged.pth"), "made again")
    with_record(tmp_path / "averaged.pth", lambda record: record.update(checksums=[1]))
    report = verify(tmp_path / "averaged.pth")
    assert (results(report)["finite"], results(report)["checksums"]) == ("ok", "failed")


@pytest.mark.parametrize("out", ["a.pth", "a.safetensors", "folder/", "dcp"])
def test_a_record_that_cannot_be_read_is_not_taken_for_none(out: str, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", out=f"{tmp_path}/{out}", **({"to": "dcp"} if out == "dcp" else {}))
    path = tmp_path / {"folder/": "folder/model.safetensors", "dcp": "dcp/.metadata"}.get(out, out)
    if out == "a.pth":
        records = records_of(path)
        zip_of(path, {name: b"{not json" if name.endswith("ckpt_tools.json") else records[name] for name in records})
    else:  # without a comma
        path.write_bytes(re.sub(rb'(tool\\?": \\?"ckpt-tools\\?"),', rb"\1 ", path.read_bytes(), count=1))
    report = verify(tmp_path / out)
    assert results(report)["record"] == "failed", report
    assert "there is a record of ckpt-tools, and it cannot be read" in detail(report, "record")


def test_a_shard_alone_is_checked_as_a_part(tmp_path: Path) -> None:
    average(training(tmp_path), max_shard_size=100, out=f"{tmp_path}/shards/", write_checksums=True)
    (shard, *_) = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    report = verify(shard)
    assert (results(report)["checksums"], results(report)["record"]) == ("ok", "not checked")
    assert "is a shard" in detail(report, "record")
    assert detail(report, "checksums").startswith("SHA-256 of 1 tensor of the 2 that are recorded")
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert results(verify(shard))["checksums"] == "failed"


@pytest.mark.parametrize("key", ["a", 0])
def test_two_tensors_with_one_dotted_path_are_both_looked_at(key: str | int, tmp_path: Path) -> None:
    good, other = torch.ones(3), torch.full((3,), torch.nan)
    save_file({f"{key}.w": good}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", out=tmp_path / "made.pth", write_checksums=True)
    record = next(data for name, data in records_of(tmp_path / "made.pth").items() if name.endswith("ckpt_tools.json"))
    for forged in ({f"{key}.w": other, key: {"w": good}}, {key: {"w": other}, f"{key}.w": good}):
        torch.save(forged, tmp_path / "forged.pth")
        zip_of(tmp_path / "forged.pth", records_of(tmp_path / "forged.pth") | {"forged/ckpt_tools.json": record})
        report = verify(tmp_path / "forged.pth")
        assert detail(report, "finite").startswith(f"'{key}.w' has 3 NaN")
        assert detail(report, "checksums") == f"two tensors have the path '{key}.w'"
        assert detail(report, "made again").startswith(f"two tensors have the path '{key}.w'")
        assert {results(report)[name] for name in ("finite", "checksums", "made again")} == {"failed"}
    torch.save({f"{key}.w": good, key: {"w": good}}, tmp_path / "tied.pth")  # one tensor: nothing is hidden
    zip_of(tmp_path / "tied.pth", records_of(tmp_path / "tied.pth") | {"tied/ckpt_tools.json": record})
    assert verify(tmp_path / "tied.pth").passed


def test_a_whole_file_with_the_name_of_a_shard_has_all_tensors_of_its_record(tmp_path: Path) -> None:
    path = tmp_path / "step-0003-of-0010.safetensors"
    save_file({"v": torch.ones(2), "w": torch.ones(3)}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", out=path, write_checksums=True)
    assert detail(verify(path), "checksums") == "SHA-256 of 2 tensors"
    with safe_open(path, "pt") as file:
        save_file({"v": torch.ones(2)}, path, file.metadata())
    assert detail(verify(path), "checksums") == "it lacks 'w'"


def test_a_recorded_shape_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", out=path, write_checksums=True)
    with safe_open(path, "pt") as file:
        save_file({"w": torch.ones(3, 2)}, path, file.metadata())
    assert detail(verify(path), "checksums") == "'w' is float32 [3, 2], and was float32 [2, 3]"


def test_a_shard_of_another_average_is_found_by_its_record(tmp_path: Path) -> None:
    paths = training(tmp_path)
    for name, some in (("a", paths), ("b", paths[1:])):
        average(some, max_shard_size=100, out=f"{tmp_path}/{name}/")
    for path in paths:
        path.unlink()
    assert results(verify(tmp_path / "a"))["record"] == "ok"
    first, *_, last = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    shutil.copy(tmp_path / "b" / last, tmp_path / "a")
    report = verify(tmp_path / "a")
    assert detail(report, "record") == f"{last} has another record than {first}"
    assert not report.passed


def test_a_rank_of_another_average_is_found_by_its_record(tmp_path: Path) -> None:
    for step in range(3):
        for rank in range(2):
            place = tmp_path / f"iter_{step}/mp_rank_{rank:02d}"
            place.mkdir(parents=True)
            torch.save({"model": {"w": torch.full((3,), float(step + rank))}}, place / "model_optim_rng.pt")
    steps = [tmp_path / f"iter_{step}" for step in range(3)]
    for name, some in (("a", steps), ("b", steps[1:])):
        average(some, out=tmp_path / name)
    assert results(verify(tmp_path / "a"))["record"] == "ok"
    shutil.copytree(tmp_path / "b/mp_rank_01", tmp_path / "a/mp_rank_01", dirs_exist_ok=True)
    assert detail(verify(tmp_path / "a"), "record").startswith("mp_rank_01/model_optim_rng.pt has another record")


def test_an_average_that_was_updated_is_not_compared(tmp_path: Path) -> None:
    paths = series(tmp_path, 4)
    average(paths[:3], out=tmp_path / "averaged.pth")
    average(paths[3], update=tmp_path / "averaged.pth", out=tmp_path / "longer.pth")
    report = verify(tmp_path / "longer.pth")
    assert (results(report)["inputs"], results(report)["made again"]) == ("ok", "not checked")
    assert "was updated 1 time," in detail(report, "made again")


def test_what_needs_images_is_compared_but_for_the_statistics(tmp_path: Path) -> None:
    """What `recal-bn` writes, as the test writes it: its record, and other statistics than those of the input."""
    generator = torch.Generator().manual_seed(0)
    names = ("conv.weight", "bn.weight", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    state = {name: torch.rand(6, generator=generator) for name in names}
    save_file(state, tmp_path / "a.safetensors")
    record = {
        "tool": "ckpt-tools", "version": "0.1.0", "command": "recal-bn", "arguments": {"data": "imagenet/train"},
        "state": "raw (the whole file)",
        "input": {"name": "a.safetensors", "size": (tmp_path / "a.safetensors").stat().st_size, "made": None},
    }  # fmt: skip
    new = state | {name: tensor + 1 for name, tensor in state.items() if "running" in name}
    save_file(new, tmp_path / "b.safetensors", {"ckpt_tools": json.dumps(record)})
    report = verify(tmp_path / "b.safetensors")
    assert results(report)["made again"] == "not checked"
    assert "2 tensors" in detail(report, "made again")
    assert report.passed
    save_file(
        new | {"bn.weight": state["bn.weight"] * 2}, tmp_path / "b.safetensors", {"ckpt_tools": json.dumps(record)}
    )
    assert "'bn.weight' differs in 6 of 6" in detail(verify(tmp_path / "b.safetensors"), "made again")


PARTS = 20


def large(folder: Path) -> Path:
    """An average of two files of one tensor, whose inputs would take as many slices of a sample as `PARTS`."""
    for i in range(2):
        values = torch.randn(PARTS * SAMPLED, generator=torch.Generator().manual_seed(i))
        save_file({"w": values}, folder / f"step_{i}.safetensors")
    average([folder / f"step_{i}.safetensors" for i in range(2)], out=folder / "averaged.safetensors")
    return folder / "averaged.safetensors"


def test_a_sample_finds_a_changed_value_with_its_share(tmp_path: Path) -> None:
    path = large(tmp_path)
    data = bytearray(path.read_bytes())
    data[-4 * 7 * SAMPLED] ^= 1
    path.write_bytes(data)
    found = [not verify(path, sample="30%", seed=seed, threads=1).passed for seed in range(40)]
    assert found == [not verify(path, sample="30%", seed=seed, threads=1).passed for seed in range(40)]
    # Binomial with n = 40 and p = 6 / 20: four standard deviations are 11.6.
    assert abs(sum(found) - 12) <= 11
    assert not verify(path, sample="100%").passed


def test_a_sample_reads_no_more_than_its_share_of_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large(tmp_path)
    read: list[int] = []

    class Counted(MemoryFile):
        def read_into(self, offset: int, view: memoryview) -> int:
            read.append(len(view))
            return super().read_into(offset, view)

    class Store(MemoryStore):
        def open(self, path: Path) -> MemoryFile:
            return Counted(super().open(path).data) if path.name.startswith("step") else super().open(path)

    files = {Path("mem:/run") / path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setitem(STORES, "mem", Store(files))
    report = verify("mem://run/averaged.safetensors", sample="10%", seed=0)
    assert results(report)["made again"] == "ok", report
    assert results(report)["loads"] == "not checked"
    share = 2 * 4 * SAMPLED * 2  # files, bytes, elements of a slice, slices
    assert share <= sum(read) <= share + 100_000  # and headers


def test_the_spec_of_a_tensor_is_compared_before_its_values(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    convert(training(tmp_path)[0], out=path)
    stored = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**stored, "module.w": stored["module.w"].half()}, path, metadata)
    assert "'module.w' is float16 [6, 8], and would be float32 [6, 8]" in detail(verify(path), "made again")
    del stored["module.n"]
    save_file(stored, path, metadata)
    assert "it lacks 'module.n'" in detail(verify(path), "made again")
    save_file(stored | {"module.n": torch.tensor(0), "new": torch.ones(1)}, path, metadata)
    assert "'new' should not be in it" in detail(verify(path), "made again")
