"""Usable checkpoints: what cannot be averaged is named at once, and left out if that is asked for."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import refused, run
from series_files import names, trainer_folder, weights

from ckpt_tools import average, look
from ckpt_tools.errors import AlignmentError, CorruptError, LayoutError, SeriesError
from ckpt_tools.formats import read_header
from ckpt_tools.series.find import find_series

Save = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("here")
FILES = [f"run/checkpoint-{n}.pth" for n in range(1, 7)]
BROKEN = ["run/broken.pth", "run/empty.pth", "run/losses.pth", "run/moments.pth"]


@pytest.fixture
def mixed(save: Save) -> Path:
    """A folder of six checkpoints, and a file of each kind that is none of the series."""
    Path("run").mkdir()
    for n, name in enumerate(FILES, 1):
        save(name, {"state_dict": weights(n), "epoch": n})
    whole = Path(FILES[0]).read_bytes()
    Path("run/broken.pth").write_bytes(whole[: len(whole) // 2])
    Path("run/empty.pth").touch()
    save("run/losses.pth", [0.5, 0.4])
    save("run/moments.pth", {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]})
    return Path("run")


def test_all_unusable_files_are_in_one_message_with_the_way_on(mixed: Path, save: Save) -> None:
    save("run/pretrained.pth", {f"encoder.{n}": torch.ones(2) for n in range(5)})
    message = refused(Path(), "avg", "run")
    assert message.startswith("Error: 5 of 11 checkpoints cannot be averaged: ")
    for name in (*BROKEN, "run/pretrained.pth"):
        assert message.count(f"{name} (") == 1
    assert not any(name in message for name in FILES)
    assert message.endswith(". Leave them out: name 'run/checkpoint-*.pth'.")
    assert names(find_series(["run/checkpoint-*.pth"])) == [Path(name).name for name in FILES]


def test_the_way_on_leaves_out_what_has_brackets_in_its_name_and_nothing_else(save: Save) -> None:
    for name in ("a-1.pth", "a-1[2].pth", "a-12.pth"):
        save(name, {"state_dict": weights(1), "epoch": int(name[2])})
    Path("a-1[2].pth").write_bytes(b"PK")
    message = refused(Path(), "avg", ".")
    glob = shlex.split(message.partition("--exclude ")[2].partition(" or ")[0])
    assert names(find_series(["."], exclude=glob)) == ["a-1.pth", "a-12.pth"]


def test_one_unusable_file_keeps_its_own_error(mixed: Path) -> None:
    Path("run/empty.pth").unlink()
    with pytest.raises(
        CorruptError, match=r"broken\.pth: truncated .*Leave it out: `exclude=\['broken.pth'\]` or `skip"
    ):
        find_series(["run"], exclude=["losses.pth", "moments.pth"])
    with pytest.raises(LayoutError, match=r"moments\.pth: the state of an optimizer alone.*Leave it out"):
        find_series(["run"], exclude=["[bl]*.pth"])


def test_skip_broken_leaves_out_what_is_unusable_before_anything_is_selected(mixed: Path) -> None:
    series = find_series(["run"], skip_broken=True, last=2)
    assert names(series) == ["checkpoint-5.pth", "checkpoint-6.pth"]
    assert [each.path for each in series.skipped] == BROKEN
    assert [each.kind for each in series.skipped] == ["damaged", "damaged", "no weights", "no weights"]
    (note,) = (note for note in series.notes if "skip_broken" in note)
    assert all(f"{each.path} ({each.reason})" in note for each in series.skipped)


def test_skip_broken_does_not_decide_which_model_is_meant(mixed: Path, save: Save) -> None:
    save("run/pretrained.pth", {f"encoder.{n}": torch.ones(2) for n in range(5)})
    with pytest.raises(
        AlignmentError, match=r"1 of 7 .* pretrained\.pth \(another model: it shares 0 of 5 .*`exclude="
    ):
        average("run", skip_broken=True, dry_run=True)


def test_a_fine_tuned_checkpoint_with_another_head_is_of_the_same_model(save: Save) -> None:
    """It shares most names, so the message says what it lacks."""
    body = {f"layer.{n}": torch.ones(2) for n in range(4)}
    for n in range(3):
        save(f"e{n}.pth", body | {"head": torch.ones(2)})
    save("e3.pth", body | {"classifier": torch.ones(2)})
    with pytest.raises(AlignmentError, match=r"e0\.pth has no tensor 'classifier' \(1 of 4"):
        average(["e*.pth"], dry_run=True)


@pytest.mark.parametrize("glob", ["checkpoint-[1-4].pth", "run/checkpoint-[1-4].pth"])
def test_exclude_matches_a_name_or_the_end_of_a_path(mixed: Path, glob: str) -> None:
    series = find_series(["run/checkpoint-*"], exclude=[glob])
    assert names(series) == ["checkpoint-5.pth", "checkpoint-6.pth"]
    assert {each.kind for each in series.skipped} == {"excluded"}
    with pytest.raises(SeriesError, match="matches none of the 6 checkpoints"):
        find_series(["run/checkpoint-*"], exclude=[f"other/{glob}"])


@pytest.mark.parametrize(
    ("glob", "hint"),
    [
        ("x*", "The first is checkpoint-1.pth"),
        ("chekpoint-3.pth", "Did you mean checkpoint-3.pth"),
        ("point", "It must match a whole name, as `exclude='\\*point\\*'` does"),
    ],
)
def test_exclude_of_nothing_is_refused_as_what_it_names_would_be_averaged(mixed: Path, glob: str, hint: str) -> None:
    with pytest.raises(SeriesError, match=f"matches none of the 6 checkpoints. {hint}"):
        find_series(FILES, exclude=["checkpoint-2.pth", glob])


def test_exclude_of_everything_is_refused(mixed: Path) -> None:
    with pytest.raises(SeriesError, match="leaves none of the 6 checkpoints"):
        find_series(FILES, exclude=["*.pth"])


def test_what_is_left_out_is_in_the_report_and_the_record(mixed: Path) -> None:
    result = run("avg", "run", "--skip-broken", "--exclude", "checkpoint-1.pth", "--json")
    said = {each["path"]: each["kind"] for each in json.loads(result.out)["skipped"]}
    assert said == {"run/checkpoint-1.pth": "excluded"} | {
        name: kind for name, kind in zip(BROKEN, ["damaged", "damaged", "no weights", "no weights"], strict=True)
    }
    made = read_header(Path("averaged.pth")).provenance or {}
    assert {f"run/{each['name']}": each["reason"] for each in made["skipped"]} == said
    assert [each["name"] for each in made["inputs"]] == [Path(name).name for name in FILES[1:]]
    replayed = average(["run"], replay="averaged.pth", out="again.pth")
    assert replayed.same is True
    assert Path("again.pth").read_bytes() == Path("averaged.pth").read_bytes()


def test_an_average_of_whole_checkpoints_records_nothing_as_left_out(mixed: Path) -> None:
    average(FILES)
    assert "skipped" not in (read_header(Path("averaged.pth")).provenance or {})


def test_look_leaves_out_the_same(mixed: Path, save: Save) -> None:
    for n, name in enumerate(FILES):
        save(name, {"state_dict": {"weight": torch.full((2, 3), n + 1.0)}, "epoch": n})
    report = look("run", skip_broken=True)
    assert [each.name for each in report.checkpoints] == [Path(name).name for name in FILES]
    assert [each.path for each in report.skipped] == BROKEN


def test_a_missing_shard_and_an_empty_folder_are_told_alike(save: Save) -> None:
    for step in (100, 200, 300, 400):
        trainer_folder(Path(f"run/checkpoint-{step}"), step)
    shutil.rmtree("run/checkpoint-400")
    Path("run/checkpoint-400").mkdir()
    Path("run/checkpoint-400/config.json").write_text("{}")
    Path("run/checkpoint-300/model.safetensors").write_bytes(b"\x10")
    Path("run/logs").mkdir()
    for given in (["run"], ["run/checkpoint-*"], sorted(Path("run").glob("checkpoint-*"))):
        with pytest.raises(
            SeriesError, match=r"2 of 4 .*checkpoint-300 \(.*checkpoint-400 \(a folder without weights\)"
        ):
            find_series(given, last=2)
        series = find_series(given, last=2, skip_broken=True)
        assert names(series) == ["checkpoint-100", "checkpoint-200"]
    shutil.rmtree("run/checkpoint-300")
    with pytest.raises(SeriesError, match=r"a folder without weights\. Is it still being written\? Leave it out: `exc"):
        find_series(["run"], last=2)


def test_all_checkpoints_with_one_fault_give_its_full_message(save: Save) -> None:
    for n in (1, 2):
        save(f"e{n}.pth", {"net": {"deep": {"a": torch.ones(2)}}, "epoch": n})
    with pytest.raises(LayoutError, match=r"e\d\.pth: in no known layout.*Choose with `state='net.deep'`"):
        average(["e*.pth"], skip_broken=True, dry_run=True)
    assert len(average(["e*.pth"], state="net.deep", dry_run=True).inputs) == 2


def test_a_hint_finds_checkpoints_some_folders_below(save: Save) -> None:
    Path("out/train/exp").mkdir(parents=True)
    for n in (1, 2):
        save(f"out/train/exp/e{n}.pth", weights(n))
    with pytest.raises(SeriesError, match=r"There are some in out/train/exp; use 'out/train/exp'\."):
        find_series(["out"])
