"""Targets: which are refused before any work, and why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from series_files import trainer_folder

from ckpt_tools import average, convert, fix_prefix, open_checkpoint, strip
from ckpt_tools.errors import UsageError, WriteError
from ckpt_tools.jobs.outputs import Target, check_target

NEW = ["model.safetensors", "config.json"]
"""Files of a new folder."""


def check(
    target: str, *, inputs: tuple[str, ...] = (), nbytes: int = 0, force: bool = False, folder: bool = False
) -> None:
    check_target(Path(target), map(Path, inputs), nbytes=nbytes, force=force, names=NEW if folder else None)


def add_index(folder: Path) -> None:
    shards = {name: name for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def test_check_target_needs_force_for_an_older_output_folder(here: Path, old_folder: Callable[..., Path]) -> None:
    add_index(old_folder())
    with pytest.raises(WriteError, match="out: exists already. Pass `force=True`"):
        check("out", folder=True)
    check("out", folder=True, force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("stranger", ["train.py", "notes.txt", "other.pth", "runs", ".git"])
def test_check_target_rejects_a_folder_with_other_files(
    here: Path, old_folder: Callable[..., Path], stranger: str, force: bool
) -> None:
    """It is not offered to be replaced either."""
    folder = old_folder()
    add_index(folder)
    check("out", folder=True, force=True)
    if "." in stranger[1:]:
        (folder / stranger).write_text("precious")
    else:
        (folder / stranger).mkdir()
    with pytest.raises(WriteError, match=rf"out: is a folder that also holds {re.escape(stranger)}, and a folder"):
        check("out", folder=True, force=force)


def test_check_target_rejects_a_folder_with_a_bad_index(here: Path, old_folder: Callable[..., Path]) -> None:
    index = old_folder() / "model.safetensors.index.json"
    index.write_text("no JSON")
    with pytest.raises(WriteError, match="out: cannot be a target .*not the index of a sharded checkpoint"):
        check("out", folder=True, force=True)
    index.unlink()
    index.mkdir()
    with pytest.raises(WriteError, match="out: cannot be a target .*Is a directory"):
        check("out", folder=True, force=True)


def test_check_target_accepts_an_empty_folder(here: Path) -> None:
    Path("out").mkdir()
    check("out", folder=True)


def test_check_target_rejects_a_file_for_a_folder_and_a_folder_for_a_file(here: Path) -> None:
    Path("file").touch()
    Path("folder.pth").mkdir()
    with pytest.raises(WriteError, match="file: is a file already"):
        check("file", folder=True, force=True)
    with pytest.raises(WriteError, match=r"folder\.pth: is a folder already"):
        check("folder.pth", force=True)


def test_check_target_rejects_a_device(here: Path) -> None:
    for folder in (False, True):
        with pytest.raises(WriteError, match="/dev/null: is not a regular file"):
            check("/dev/null", folder=folder, force=True)


def test_check_target_rejects_an_input_through_any_link(here: Path) -> None:
    Path("a.pth").touch()
    Path("hard.pth").hardlink_to("a.pth")
    Path("soft.pth").symlink_to("hard.pth")
    for one, other in (("a.pth", "soft.pth"), ("soft.pth", "a.pth"), ("hard.pth", "soft.pth")):
        with pytest.raises(WriteError, match="is one of the inputs, which are never changed"):
            check(one, inputs=(other,), force=True)


def test_check_target_rejects_a_folder_in_or_around_an_input(here: Path, old_folder: Callable[..., Path]) -> None:
    old_folder("in")
    with pytest.raises(WriteError, match="in/new: lies inside the input in"):
        check("in/new", inputs=("in",), folder=True)
    Path("all").mkdir()
    Path("in").rename("all/in")
    with pytest.raises(WriteError, match="all: holds the input all/in"):
        check("all", inputs=("all/in",), folder=True, force=True)
    check("all/new", inputs=("all/in",), folder=True)


def test_check_target_rejects_the_current_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    for target in (".", "..", "../empty", "/", str(here)):
        with pytest.raises(WriteError, match="is the folder you are in, or around it"):
            check(target, folder=True, force=True)


def test_check_target_rejects_a_zero_byte(here: Path) -> None:
    with pytest.raises(WriteError, match=r"cannot be a target \(embedded null byte\)"):
        check("a\0b.pth")


def test_check_target_asks_the_disk_of_the_target_for_free_space(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(path), usage._replace(free=10))[1])
    Path("there").mkdir()
    check("there/a.pth", nbytes=10)
    with pytest.raises(WriteError, match=r"there/a\.pth: needs 11 bytes, and .*/there has 10 left"):
        check("there/a.pth", nbytes=11)
    assert asked == [here / "there"] * 2


@pytest.mark.parametrize(
    ("out", "folder"),
    [
        ("Llama-3.1-8B-avg", True),
        ("run.v2", True),
        ("averaged.npz", True),
        ("averaged.pth/", True),
        ("averaged.pth/.", True),
        ("averaged", True),
        ("runs.old/averaged.pth", False),
        ("model.safetensors", False),
        ("last.pth.tar", False),
        (Path("run.v2"), True),
    ],
)
def test_target_is_a_folder_unless_its_suffix_is_a_known_one(out: str | Path, folder: bool) -> None:
    assert Target.of(out) == Target(Path(out), folder=folder)


@pytest.mark.parametrize(
    ("out", "meant"),
    [("a.pht", ".pt or .pth"), ("a.safetensor", ".safetensors"), ("a.ptx", ".pt or .pth"), ("a.PTH", ".pth or .pt")],
)
def test_target_rejects_a_slip_in_a_suffix(here: Path, out: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"not a known suffix\. Did you mean {re.escape(meant)}\?.* slash: {out}/"):
        Target.of(out)
    assert Target.of(f"{out}/").folder
    Path(out).mkdir()
    assert Target.of(out).folder


def test_a_slash_puts_a_file_into_a_folder_under_its_usual_name(here: Path, runs: list[Path]) -> None:
    with pytest.raises(WriteError, match=r"res/averaged\.pth: there is no folder .*mkdir -p"):
        average(runs[:2], out="res/")
    Path("res").mkdir()
    Path("res/notes.txt").write_text("precious")
    strip(runs[0], out="res/")
    average(runs[:2], out="res/")
    assert fix_prefix(runs[0], out="res/").out == f"res/{runs[0].name}"
    assert {path.name for path in Path("res").iterdir()} == {
        "notes.txt", "averaged.pth", f"{runs[0].stem}-stripped.pth", runs[0].name,
    }  # fmt: skip
    with pytest.raises(WriteError, match=r"res/averaged\.pth: exists already\. Pass `force=True`"):
        average(runs[:2], out="res/")


def test_a_slash_means_the_folder_where_that_is_asked_for(here: Path, runs: list[Path]) -> None:
    average(runs[:2], out="shards/", max_shard_size="1GB")
    assert Path("shards/model.safetensors").is_file()
    for step in (1, 2):
        trainer_folder(Path(f"run/checkpoint-{step}"), step)
    average(["run"], out="averaged/")
    assert Path("averaged/model.safetensors").is_file()


def test_target_rejects_standard_output() -> None:
    with pytest.raises(UsageError, match="`out='-'`: checkpoints are not written to standard output.* Name a file"):
        Target.of("-")
    assert Target.of("./-") == Target(Path("./-"), folder=True)


def test_target_rejects_a_path_without_a_name() -> None:
    with pytest.raises(UsageError, match="`out=''`: there is no name in it"):
        Target.of("")


@pytest.mark.parametrize("out", ["Llama-3.1-8B-avg", "run.v2", "averaged.pth/"])
def test_average_and_convert_write_shards_into_a_folder_whose_name_has_a_dot(
    here: Path, runs: list[Path], out: str
) -> None:
    average(runs[:2], out="reference")
    average(runs[:2], out=out)
    assert [path.name for path in Path(out).iterdir()] == ["model.safetensors"]
    assert (Path(out) / "model.safetensors").read_bytes() == Path("reference/model.safetensors").read_bytes()
    convert(runs[0], out=f"converted-{out}")
    assert dict(open_checkpoint(f"converted-{out}").specs).keys() == dict(open_checkpoint("reference").specs).keys()
