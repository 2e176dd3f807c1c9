"""Replaying an average: the same bytes again, from the inputs and coefficients in its own record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load
from safetensors.torch import save_file
from test_update import facts, series

from ckpt_tools import average, convert, open_checkpoint
from ckpt_tools.errors import LayoutError, SeriesError, UsageError, WriteError
from ckpt_tools.formats import header as headers
from ckpt_tools.jobs.provenance import short_names

RULES = [
    {},
    {"mode": "ema"},
    {"decay": 0.99, "per_step": True},
    {"half_life": "40%"},
    {"shape": "cosine"},
    {"sigma_rel": 0.1},
    {"weights": [3, 1, 4, 1, 5], "normalize": False},
    {"mode": "posthoc", "target": "half-life=80", "allow_misfit": True},
    {"keys": "union", "buffers": "last", "dtype": "bfloat16"},
]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/x.pth", "/a/y.pth"], ["x.pth", "y.pth"]),
        (["/a/x.pth", "/b/a/x.pth"], ["a/x.pth", "b/a/x.pth"]),
        (["/run/here/../x.pth", "/run/here/x.pth"], ["run/x.pth", "here/x.pth"]),
    ],
)
def test_names_in_a_record_are_short_distinct_and_below_the_root(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(path) for path in paths]) == names


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_replay_gives_the_same_bytes(options: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    average(series(tmp_path, 5), **options, out=f"{tmp_path}/averaged{suffix}")
    report = average([], replay=f"{tmp_path}/averaged{suffix}", out=f"{tmp_path}/again{suffix}")
    old, new = tmp_path / f"averaged{suffix}", tmp_path / f"again{suffix}"
    assert report.same is True
    assert report.compared == f"It is the same as {old} in every byte."
    for path in [old] if old.is_file() else old.iterdir():
        assert (new if old.is_file() else new / path.name).read_bytes() == path.read_bytes()


def test_a_replay_of_emas_and_raw_weights_of_the_same_files_finds_both(runs: list[Path], tmp_path: Path) -> None:
    files = [Path(shutil.copy(path, tmp_path)) for path in runs[:5]]
    options: dict[str, Any] = {"mode": "posthoc", "target": "half-life=2", "allow_misfit": True}
    average(files, **options, state=["raw", "ema"], profile=["*.pth=decay:0.5"], out=tmp_path / "averaged.pth")
    assert len(facts(tmp_path / "averaged.pth")["inputs"]) == 10
    assert average([], replay=tmp_path / "averaged.pth").same is True


def test_a_replay_goes_beside_the_average_by_default(tmp_path: Path) -> None:
    average(series(tmp_path, 3), out=tmp_path / "averaged.pth")
    report = average([], replay=tmp_path / "averaged.pth")
    assert Path(report.out) == tmp_path / "averaged-replayed.pth"
    with pytest.raises(WriteError, match="averaged-replayed.pth: exists already"):
        average([], replay=tmp_path / "averaged.pth")


def test_the_average_itself_is_replaced_by_force_alone(tmp_path: Path) -> None:
    out = tmp_path / "averaged.pth"
    average(series(tmp_path, 3), out=out)
    before = out.read_bytes()
    with pytest.raises(WriteError, match="exists already"):
        average([], replay=out, out=out)
    report = average([], replay=out, out=out, force=True)
    assert (out.read_bytes(), report.same) == (before, True)


def test_the_average_is_replaced_through_its_folder_too(tmp_path: Path) -> None:
    paths = series(tmp_path, 3)
    average(paths, out=f"{tmp_path}/averaged.pth")
    before = (tmp_path / "averaged.pth").read_bytes()
    report = average([], replay=tmp_path / "averaged.pth", out=f"{tmp_path}/", force=True)
    assert (report.out, report.same) == (f"{tmp_path}/averaged.pth", True)
    assert (tmp_path / "averaged.pth").read_bytes() == before


def test_an_average_in_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """A file of its usual name is not put beside its shards."""
    average(series(tmp_path, 3), out=tmp_path / "sharded")
    before = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    report = average([], replay=tmp_path / "sharded", out=f"{tmp_path}/sharded/", force=True)
    assert report.same is True
    assert {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()} == before


def test_a_dry_run_of_a_replay_shows_the_coefficients_and_writes_nothing(tmp_path: Path) -> None:
    average(series(tmp_path, 3), weights=[1, 2, 5], hash=True, out=tmp_path / "averaged.pth")
    report = average([], replay=tmp_path / "averaged.pth", dry_run=True)
    assert [i.coefficient for i in report.inputs] == [0.125, 0.25, 0.625]
    assert any("is not checked in a dry run" in note for note in report.notes)
    assert not (tmp_path / "averaged-replayed.pth").exists()


def moved(paths: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in paths:
        path.rename(folder / path.name)


def test_inputs_are_found_at_the_paths_that_are_given(tmp_path: Path, here: Path) -> None:
    paths = series(tmp_path, 4)
    (tmp_path / "out").mkdir()
    average(paths, out="out/averaged.pth")
    moved(paths[:2], tmp_path / "elsewhere" / "deep")
    moved(paths[2:], tmp_path / "other")
    (here / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("work")
        with pytest.raises(SeriesError, match=r"4 of its 4 inputs cannot be taken. c-0.pth is missing; c-1.pth is"):
            average([], replay=tmp_path / "out" / "averaged.pth")
        given = [tmp_path / "elsewhere", tmp_path / "other" / "c-2.pth", f"{tmp_path}/other/c-[3].pth"]
        assert average(given, replay=tmp_path / "out" / "averaged.pth", out="a.pth").same is True
    assert average([], replay="out/averaged.pth", out="b.pth").same is True  # below the current folder


def test_inputs_of_the_same_name_are_told_by_their_folders(tmp_path: Path) -> None:
    paths = []
    for i in range(3):
        folder = tmp_path / "run" / f"step_{i}"
        folder.mkdir(parents=True)
        paths.append(folder / "model.safetensors")
        save_file({"w": torch.full((3,), float(i))}, paths[-1])
    average(paths, out=tmp_path / "averaged.pth")
    assert [i["name"] for i in facts(tmp_path / "averaged.pth")["inputs"]] == [
        f"step_{i}/model.safetensors" for i in range(3)
    ]
    report = average([tmp_path / "run"], replay=tmp_path / "averaged.pth", out=tmp_path / "again.pth")
    assert (report.same, load(tmp_path / "again.pth")["w"].tolist()) == (True, [1.0] * 3)
    report = average(paths, replay=tmp_path / "averaged.pth", out=tmp_path / "again-2.pth")
    assert report.same is True
    lone = tmp_path / "model.safetensors"
    paths[0].rename(lone)
    with pytest.raises(SeriesError, match=r"2 of its 3 inputs .*step_1/model.safetensors is not there: .* is another"):
        average(lone, replay=tmp_path / "averaged.pth", out=tmp_path / "again-3.pth")


def test_folders_are_inputs_of_a_replay(tmp_path: Path) -> None:
    paths = []
    for i in range(3):
        path = tmp_path / f"step_{i}"
        path.mkdir()
        save_file({"w": torch.full((3,), float(i))}, path / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        paths.append(path)
    average(paths, hash=True, out=f"{tmp_path}/averaged")
    report = average([], replay=tmp_path / "averaged", out=f"{tmp_path}/again")
    assert report.same is True
    assert report.compared.endswith("in every byte.")


def test_all_inputs_that_are_missing_or_changed_are_named_at_once(tmp_path: Path) -> None:
    paths = series(tmp_path, 4)
    average(paths, out=tmp_path / "averaged.pth")
    paths[0].unlink()
    torch.save({"model": {"w": torch.zeros(99)}}, paths[1])
    paths[2].write_bytes(b"no checkpoint at all")
    with pytest.raises(SeriesError) as caught:
        average([], replay=tmp_path / "averaged.pth")
    text = str(caught.value)
    assert "averaged.pth: 3 of its 4 inputs cannot be taken. c-0.pth is missing; " in text
    assert "c-1.pth has 1," in text
    assert "c-2.pth: " in text
    assert "c-3.pth" not in text
    assert text.endswith("Give the paths of the right files, or of folders that have them.")


def test_a_changed_input_is_named_once(here: Path) -> None:
    average(series(here, 2), out="averaged.pth")
    torch.save({"model": {"w": torch.zeros(99)}}, "c-0.pth")
    with pytest.raises(SeriesError) as caught:
        average([], replay="averaged.pth")
    assert str(caught.value).count("c-0.pth") == 1


def test_a_changed_input_of_the_same_size_is_found_by_its_hash(tmp_path: Path) -> None:
    paths = series(tmp_path, 3)
    average(paths, hash=True, out=tmp_path / "averaged.pth")
    series(tmp_path, 3, seed=1)
    with pytest.raises(
        SeriesError, match=r"3 of its 3 .*c-0.pth has another SHA-256 than the input had; .*c-1.pth has"
    ):
        average([], replay=tmp_path / "averaged.pth")


def test_a_changed_input_without_hash_is_found_by_the_result(tmp_path: Path) -> None:
    average(series(tmp_path, 3), out=tmp_path / "averaged.pth")
    series(tmp_path, 3, seed=1)
    report = average([], replay=tmp_path / "averaged.pth")
    assert report.same is False
    assert "Its weights are NOT those of" in report.compared


def test_two_files_that_could_be_an_input_are_told_apart_by_hash_or_not_at_all(tmp_path: Path) -> None:
    paths = series(tmp_path, 2)
    for name, hashed in (("plain.pth", False), ("hashed.pth", True)):
        (tmp_path / "out").mkdir(exist_ok=True)
        average(paths, hash=hashed, out=tmp_path / "out" / name)
    moved(paths, tmp_path / "a")
    (tmp_path / "b").mkdir()
    series(tmp_path / "b", 2, seed=1)
    given = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(SeriesError, match=r"c-0.pth is there several times: .*a/c-0.pth, .*b/c-0.pth; c-1.pth is"):
        average(given, replay=tmp_path / "out" / "plain.pth", out=tmp_path / "x.pth")
    assert average(given, replay=tmp_path / "out" / "hashed.pth", out=tmp_path / "x.pth").same is True


def test_an_updated_average_is_replayed_in_one_go(tmp_path: Path) -> None:
    paths = series(tmp_path, 5)
    average(paths[:3], decay=0.7, out=tmp_path / "averaged.pth")
    for path in paths[3:]:
        average(path, update=tmp_path / "averaged.pth", force=True)
    report = average([], replay=tmp_path / "averaged.pth")
    assert report.same is not False
    average(paths, decay=0.7, out=tmp_path / "go.pth")
    assert facts(tmp_path / "averaged-replayed.pth") == facts(tmp_path / "go.pth")
    assert load(tmp_path / "averaged-replayed.pth")["model"]["w"].equal(load(tmp_path / "go.pth")["model"]["w"])
    assert "updates" not in (open_checkpoint(tmp_path / "averaged-replayed.pth").provenance or {})


def test_a_replay_in_another_format_has_the_same_weights(tmp_path: Path) -> None:
    average(series(tmp_path, 3), out=tmp_path / "averaged.pth")
    report = average([], replay=tmp_path / "averaged.pth", out=tmp_path / "again.safetensors")
    assert report.same is True
    assert report.compared.startswith("Its weights are those of")


def test_a_record_of_an_older_version_without_newer_fields_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_tools.jobs import addends as job

    monkeypatch.setattr(job, "_places", lambda member, state: {})
    average(series(tmp_path, 3), out=tmp_path / "averaged.pth")
    monkeypatch.undo()
    assert average([], replay=tmp_path / "averaged.pth").compared.startswith("Its weights are those of")


def test_options_and_files_that_say_something_else_are_refused(tmp_path: Path) -> None:
    paths = series(tmp_path, 4)
    average(paths[:3], out=tmp_path / "averaged.pth")
    with pytest.raises(UsageError, match=r"`last` does not go with `replay`"):
        average([], last=2, replay=tmp_path / "averaged.pth")
    with pytest.raises(UsageError, match=r"`mode='ema'`: .* was made with `mode='uniform'`"):
        average([], mode="ema", replay=tmp_path / "averaged.pth")
    with pytest.raises(UsageError, match=r"c-3.pth: is no input of"):
        average(paths, replay=tmp_path / "averaged.pth")


def test_what_is_no_average_of_ours_cannot_be_replayed(tmp_path: Path) -> None:
    paths = series(tmp_path, 3)
    with pytest.raises(LayoutError, match="has no record of ckpt-tools"):
        average([], replay=paths[0])
    average(paths, out=tmp_path / "averaged.pth")
    convert(tmp_path / "averaged.pth", out=tmp_path / "averaged.safetensors")
    with pytest.raises(LayoutError, match="was written by 'ckpt convert' from averaged.pth"):
        average([], replay=tmp_path / "averaged.safetensors")


def test_an_input_whose_name_no_system_takes_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    average(series(tmp_path, 2), out=tmp_path / "two.pth")
    parse = headers.parse_provenance

    def damaged(text: bytes) -> Any:
        said = parse(text)
        return said and said | {"inputs": [each | {"name": "a" * 300 + ".pth"} for each in said["inputs"]]}

    monkeypatch.setattr("ckpt_tools.formats.torch_zip.parse_provenance", damaged)
    with pytest.raises(SeriesError, match=r"2 of its 2 inputs cannot be taken\. a{300}\.pth is missing"):
        average([], replay=tmp_path / "two.pth", out=tmp_path / "x.pth")


def test_an_updated_average_excuses_rounding_and_no_changed_input(tmp_path: Path) -> None:
    paths = series(tmp_path, 5)
    average(paths[:3], out=tmp_path / "averaged.pth")
    for path in paths[3:]:
        average(path, update=tmp_path / "averaged.pth", force=True)
    report = average([], replay=tmp_path / "averaged.pth")
    assert (report.same, "each update rounds" in report.compared) == (None, True)
    tree = torch.load(paths[1])
    tree["model"]["w"] = tree["model"]["w"] * 1.01
    torch.save(tree, paths[1])
    report = average([], replay=tmp_path / "averaged.pth", force=True)
    assert report.same is False
    assert "While that was updated 2 times, and each update rounds, that does not explain it" in report.compared


def test_a_number_in_the_place_of_nan_is_named(tmp_path: Path) -> None:
    paths = series(tmp_path, 2)
    tree = torch.load(paths[0])
    number = tree["model"]["w"][3].item()
    tree["model"]["w"][3] = torch.nan
    torch.save(tree, paths[0])
    average(paths, allow_nonfinite=True, out=tmp_path / "averaged.pth")
    tree["model"]["w"][3] = number
    torch.save(tree, paths[0])
    report = average([], replay=tmp_path / "averaged.pth")
    assert (report.same, "in 'w', one has NaN or infinity where the other has" in report.compared) == (False, True)


def test_a_shard_of_an_average_is_no_average(tmp_path: Path) -> None:
    average(series(tmp_path, 3), out=tmp_path / "averaged/", max_shard_size=100)
    shard = next((tmp_path / "averaged").glob("*-of-*"))
    for how in ("update", "replay"):
        with pytest.raises(SeriesError, match=r"is a shard, and holds a part .* Give the folder .*/averaged$"):
            average(tmp_path / "c-2.pth", **{how: shard}, out=tmp_path / "x/")


def test_options_that_are_not_recorded_are_said_to_be_decided(save: Any, tmp_path: Path) -> None:
    paths = series(tmp_path, 3)
    average(paths, weights=[1, 2, 3], out=tmp_path / "weighted.pth")
    average(paths[1:], base=paths[0], out=tmp_path / "stock.pth")
    assert average([], mode="weights", replay=tmp_path / "weighted.pth").same is True
    assert average([], mode="stock", replay=tmp_path / "stock.pth").same is True
    with pytest.raises(UsageError, match=r"`weights=\[1, 2, 3\]`: the record of .* has what came of it, and decides"):
        average([], weights=[1, 2, 3], replay=tmp_path / "weighted.pth")
    with pytest.raises(UsageError, match=r"`base=.*: the record of .*stock.pth has what came of it, and decides"):
        average([], base=paths[0], replay=tmp_path / "stock.pth")


def test_nothing_is_written_into_folders_that_are_read(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"hf-{i}").mkdir()
        save_file({"w": torch.randn(4)}, tmp_path / f"hf-{i}" / "model.safetensors")
    average([tmp_path / f"hf-{i}" for i in range(2)], out=tmp_path / "averaged/")
    for inside in ("averaged", "hf-0"):
        out = tmp_path / inside / "x.safetensors"
        with pytest.raises(WriteError, match=f"lies inside the input .*{inside}"):
            average([], replay=tmp_path / "averaged", out=out)
    for inside in ("averaged", "hf-2"):
        out = tmp_path / inside / "x.safetensors"
        with pytest.raises(WriteError, match=f"lies inside the input .*{inside}"):
            average(tmp_path / "hf-2", update=tmp_path / "averaged", out=out)
    assert average(tmp_path / "hf-2", update=tmp_path / "averaged", force=True).written
    assert average([], replay=tmp_path / "averaged", out=tmp_path / "averaged/", force=True).written


def test_an_index_stands_for_its_folder(tmp_path: Path) -> None:
    paths = series(tmp_path, 4)
    average(paths[:2], out=tmp_path / "averaged/", max_shard_size=100)
    index = next((tmp_path / "averaged").glob("*.index.json"))
    assert average([], replay=index, max_shard_size=100).out == str(tmp_path / "averaged-replayed")
    assert average(paths[2], update=index, max_shard_size=100, force=True).out == str(tmp_path / "averaged")
