"""Paths: files, globs and folders lead to whole checkpoints, or the message says where to look."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_store import MemoryStore
from series_files import names, sharded, trainer_folder, weights

from ckpt_tools.errors import NotACheckpointError, SeriesError, UnsupportedError, UsageError
from ckpt_tools.series.find import find_series
from ckpt_tools.series.paths import expand, is_address, shown
from ckpt_tools.storage.source import STORES

Save = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("here")


def test_expand_leaves_out_optimizers_hidden_files_and_dangling_links(save: Save) -> None:
    for name in ("model-1.pt", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", ".model-1.pt.77.partial.pt"):
        save(f"out/{name}", weights())
    Path("out/gone.pt").symlink_to("nowhere.pt")
    sharded(Path("out/.averaged.77.partial"), 0.0)
    assert [path.name for path in expand(["out"])] == ["model-1.pt"]


def test_find_series_takes_a_sharded_folder_as_one_checkpoint() -> None:
    for i in (2, 10):
        sharded(Path(f"all/step-{i}"), i)
    one = find_series(["all/step-2"])
    assert names(one) == ["step-2"]
    assert set(one.members[0].header.tree) == {"a", "b"}
    assert names(find_series(["all"])) == names(find_series(["all/*"])) == ["step-2", "step-10"]


@pytest.mark.parametrize("argument", ["out", "ou?"])
def test_find_series_rejects_the_final_model_next_to_a_series_in_folders(argument: str) -> None:
    trainer_folder(Path("out"), 1000)
    for step in (500, 1000):
        trainer_folder(Path(f"out/checkpoint-{step}"), step)
    with pytest.raises(SeriesError, match=r"use 'out/checkpoint-\*'\. To take the one alone, give out/model\.safetens"):
        find_series([argument])
    assert len(find_series(["out/checkpoint-*"]).members) == 2
    assert names(find_series(["out/model.safetensors"])) == ["model.safetensors"]


def test_find_series_notes_the_series_in_each_of_several_folders() -> None:
    for run in ("a", "b"):
        trainer_folder(Path(run), 1000)
        trainer_folder(Path(f"{run}/step_500"), 500)
        Path(f"{run}/step_500/global_step500").mkdir()
        torch.save(weights(), f"{run}/step_500/global_step500/mp_rank_00_model_states.pt")
    assert find_series(["a", "b"], order="given").notes[:2] == tuple(
        f"{run} is one checkpoint itself. For those in its folder, use '{run}/step_*'." for run in ("a", "b")
    )
    assert names(find_series(["a/step_500"])) == ["step_500"]


@pytest.mark.parametrize(
    ("alone", "series", "glob"),
    [
        ("run/pytorch_model.bin", ["run/step-1.safetensors", "run/step-2.safetensors"], "run/step-*.safetensors"),
        ("run/net.pt", ["run/epochs/1.pt", "run/epochs/2.pt"], "run/epochs"),
        ("run/net.pt", ["run/it_100/w.pt", "run/it_200/w.pt"], "run/it_*"),
        ("rank_0/run/net.pt", ["rank_0/run/all/1.pt", "rank_0/run/all/2.pt"], "rank_0/run/all"),
    ],
)
def test_find_series_rejects_one_file_next_to_a_series_unless_it_is_given_by_its_path(
    plain: Callable[..., list[Path]], alone: str, series: list[str], glob: str
) -> None:
    plain(alone, *series)
    for argument in (str(Path(alone).parent), f"{alone[:-1]}?"):
        advice = f"To average the series, use '{glob}'. To take the one alone, give {alone}."
        with pytest.raises(SeriesError, match=re.escape(advice)):
            find_series([argument])
    assert names(find_series([alone])) == [Path(alone).name]
    assert len(find_series([glob]).members) == 2


def test_find_series_takes_a_folder_with_other_files_of_one_checkpoint(plain: Callable[..., list[Path]]) -> None:
    plain("run/model.safetensors", "run/model.fp16.safetensors", "run/consolidated.00.pth", "run/consolidated.01.pth")
    Path("run/logs").mkdir()
    series = find_series(["run"])
    assert (names(series), series.notes) == (["run"], ())


@pytest.mark.parametrize("further", ["model_1.safetensors", "pytorch_model_1.bin"])
def test_find_series_rejects_folders_with_several_models_but_takes_the_files_of_one(
    plain: Callable[..., list[Path]], further: str
) -> None:
    first = further.replace("_1", "")
    plain(*(f"ckpt_{step}/{name}" for step in (5, 10) for name in (first, further)))
    for paths in (["ckpt_5"], ["ckpt_*"]):
        with pytest.raises(
            UnsupportedError, match=rf"ckpt_5: has several models: {first}, {further}\. Give one by the"
        ):
            find_series(paths)
    for name in (first, further):
        assert [member.step for member in find_series([f"ckpt_*/{name}"]).members] == [5, 10]


def test_find_series_rejects_loose_shards() -> None:
    sharded(Path("model"), 0.0)
    with pytest.raises(SeriesError, match="are shards of one checkpoint, not two. Give the folder"):
        find_series(["model/*.safetensors"])


@pytest.mark.parametrize(
    "pattern",
    [
        "consolidated.0{}.pth",
        "mp_rank_0{}_model_states.pt",
        "bf16_zero_pp_rank_{}_mp_rank_00_model_states.pt",
        "mp_rank_00_00{}/model_optim_rng.pt",
        "tp_rank_00_pp_rank_00{}/model_optim_rng.pt",
        "model_rank_{}.pt",
        "rank{}.pt",
        "pytorch_model_fsdp_{}.bin",
        "layer_0{}-model_00-model_states.pt",
    ],
)
def test_find_series_rejects_several_ranks_of_one_checkpoint(plain: Callable[..., list[Path]], pattern: str) -> None:
    paths = plain(*(f"{folder}/{pattern.format(rank)}" for folder in ("iter_9", "iter_10") for rank in (0, 1)))
    with pytest.raises(SeriesError, match="differ only in the rank, so they are shards of one checkpoint"):
        find_series(paths)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"),
        ("mp_rank_01_000/model_optim_rng.pt", "mp_rank_00_000/model_optim_rng.pt"),
        ("consolidated.00.pth", "consolidated.01.pth"),
        ("layer_03-model_00-model_states.pt", "layer_04-model_00-model_states.pt"),
        ("layer_03-model_states.pt", "layer_04-model_states.pt"),
        ("checkpoint_1_100-model_part-0.pt", "checkpoint_1_100-model_part-1.pt"),
        ("checkpoint_last-shard1.pt", "checkpoint_last-shard0.pt"),
    ],
)
def test_find_series_rejects_one_rank_of_several(
    plain: Callable[..., list[Path]], one: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = one.startswith(("mp_rank", "consolidated", "layer"))
    advice = (
        r"Give the folder of all ranks: .*run/iter_\d+, or '.*run/iter_\*'" if together else "Merge the ranks first"
    )
    paths = plain(*(f"run/iter_{i}/{rank}" for i in (9, 10) for rank in (one, other)))
    message = rf"{re.escape(one)} is one rank of several, .*; .*{re.escape(other)} holds another\. {advice}"
    with pytest.raises(SeriesError, match=message):
        find_series([paths[2], paths[0]])
    with pytest.raises(SeriesError, match=message):
        find_series([f"run/iter_*/{one}"])
    monkeypatch.chdir(paths[0].parent)
    with pytest.raises(SeriesError, match="is one rank of several"):
        find_series([Path(one).name])


@pytest.mark.parametrize(
    ("one", "others"),
    [
        ("mp_rank_00/model_optim_rng.pt", ["mp_rank_00/distrib_optim.pt", "rng_state/mp_rank_01/rng.pt"]),
        (
            "mp_rank_00_model_states.pt",
            ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"],
        ),
        ("consolidated.00.pth", ["consolidated.pth", "params.pth"]),
        ("lora_rank_8/model.pt", ["lora_rank_16/model.pt", "lora_rank_4/model.pt"]),
        ("pytorch_model_fsdp_0/model.pt", ["pytorch_model_fsdp_1/model.pt"]),
        ("ranking0.pt", ["ranking1.pt"]),
    ],
)
def test_find_series_takes_the_only_rank_and_what_is_named_alike(
    plain: Callable[..., list[Path]], one: str, others: list[str]
) -> None:
    plain(*(f"step_{i}/{name}" for i in (9, 10) for name in (one, *others)))
    assert [member.path for member in find_series([f"step_*/{one}"]).members] == [
        Path(f"step_{i}/{one}") for i in (9, 10)
    ]


def test_find_series_rejects_one_rank_of_several_in_another_store() -> None:
    data = io.BytesIO()
    torch.save(weights(1), data)
    files = {Path(f"memory:/run/iter_1/mp_rank_0{i}/m.pt"): data.getvalue() for i in (0, 1)}
    STORES["memory"] = MemoryStore(files)
    try:
        with pytest.raises(
            SeriesError, match=r"mp_rank_00/m\.pt is one rank of several.*mp_rank_01/m\.pt holds another"
        ):
            find_series(["memory://run/iter_1/mp_rank_00/m.pt"])
    finally:
        del STORES["memory"]


def test_find_series_says_what_it_looked_for_in_a_folder_without_checkpoints() -> None:
    Path("logs").mkdir()
    Path("logs/events.txt").touch()
    with pytest.raises(SeriesError, match=r"logs: no checkpoints in this folder \(looked for \*\.pth"):
        find_series(["logs"])


# Globs and names


def test_find_series_expands_a_quoted_glob(plain: Callable[..., list[Path]]) -> None:
    plain("runs/a-1.pth", "runs/a-2.pth", "runs/a-10.pth", "runs/b-1.pth")
    assert names(find_series(["runs/a-*.pth"])) == ["a-1.pth", "a-2.pth", "a-10.pth"]
    assert names(find_series([f"{Path.cwd()}/runs/a-[12].pth"])) == ["a-1.pth", "a-2.pth"]
    assert names(find_series(["runs/?-1.pth"], order="natural")) == ["a-1.pth", "b-1.pth"]


def test_find_series_expands_two_stars_into_folders_but_not_hidden_ones(plain: Callable[..., list[Path]]) -> None:
    plain("runs/a-1.pth", "runs/deep/er/a-2.pth", "runs/.old/a-3.pth")
    assert names(find_series(["runs/**/*.pth"])) == ["a-1.pth", "a-2.pth"]


def test_find_series_ignores_links_in_circles(plain: Callable[..., list[Path]]) -> None:
    """Two of them made 2^40 paths."""
    plain("runs/one/a-1.pth", "runs/two/a-2.pth")
    for run in ("one", "two"):
        Path(f"runs/{run}/root").symlink_to("..")
    for pattern in ("runs/**/*.pth", "**/a-?.pth", "**/runs/**/a-*"):
        series = find_series([pattern])
        assert (names(series), series.notes) == (["a-1.pth", "a-2.pth"], ())


def test_find_series_expands_two_stars_at_the_end_to_all_files_below(plain: Callable[..., list[Path]]) -> None:
    plain("runs/a-1.pth", "runs/deep/a-2.pth")
    assert names(find_series(["runs/**"])) == ["a-1.pth", "a-2.pth"]


def test_find_series_takes_brackets_in_a_name_literally(plain: Callable[..., list[Path]]) -> None:
    plain("lr=[1]/run[1].pth", "lr=[1]/run[2].pth", "run1.pth")
    assert names(find_series(["lr=[1]/run[1].pth"])) == ["run[1].pth"]
    assert names(find_series(["lr=[1]/*.pth"])) == ["run[1].pth", "run[2].pth"]


def test_find_series_says_where_to_look_for_a_glob_that_matches_nothing() -> None:
    Path("runs").mkdir()
    with pytest.raises(SeriesError, match=r"no file matches 'runs/\*\.pth'. Look at the folder: ls runs"):
        find_series(["runs/*.pth"])
    Path("runs.pth").touch()
    for pattern in ("rums/*.pth", "rums/sub/*.pth", "rums/**/*.pth", "rums/c-1.pth"):
        with pytest.raises(SeriesError, match=r"The folder rums does not exist\. Did you mean runs\?$"):
            find_series([pattern])
    with pytest.raises(SeriesError, match=r"The folder runs/sub does not exist\.$"):
        find_series(["runs/sub/*.pth"])
    with pytest.raises(SeriesError, match=r"no file matches 'r\*/gone/\*\.pth'. Look at the folder: ls \."):
        find_series(["r*/gone/*.pth"])
    with pytest.raises(SeriesError, match=r"no file matches 'runs\.pth/\*\.pth'. Look at the folder: ls \."):
        find_series(["runs.pth/*.pth"])


def test_find_series_names_other_files_that_a_glob_matches(plain: Callable[..., list[Path]]) -> None:
    plain("runs/a-1.pth")
    Path("runs/summary.csv").write_text("epoch,loss\n1,0.5\n")
    with pytest.raises(NotACheckpointError, match=r"runs/summary\.csv: not a checkpoint"):
        find_series(["runs/*"])


def test_find_series_suggests_a_name_for_a_missing_file(plain: Callable[..., list[Path]]) -> None:
    plain("runs/checkpoint-12.pth")
    with pytest.raises(SeriesError, match=r"no such file or folder\. Did you mean runs/checkpoint-12\.pth\?"):
        find_series(["runs/checkpont-12.pth"])
    with pytest.raises(SeriesError, match=r"no such file or folder\. The folder rums does not exist\."):
        find_series(["rums/checkpoint-12.pth"])


def test_find_series_expands_home(plain: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    plain("runs/a-1.pth", "runs/a-2.pth")
    assert names(find_series(["~/runs/*.pth"])) == names(find_series(["~/runs"])) == ["a-1.pth", "a-2.pth"]
    with pytest.raises(SeriesError, match="~nobody-of-this-name/a.pth: no such file or folder"):
        find_series(["~nobody-of-this-name/a.pth"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "an empty path. Is a variable of the shell unset"),
        ("x" * 300 + ".pth", "File name too long"),
        ("gone.pth", r"gone\.pth: a broken link to nowhere\.pth"),
        ("go*.pth", r"gone\.pth: a broken link to nowhere\.pth"),
        ("loop.pth", r"loop\.pth: a broken link to loop\.pth"),
        ("a-1.pth/b.pth", "no such file or folder"),
    ],
)
def test_find_series_rejects_a_path_that_leads_nowhere(
    plain: Callable[..., list[Path]], path: str, message: str
) -> None:
    plain("a-1.pth")
    Path("gone.pth").symlink_to("nowhere.pth")
    Path("loop.pth").symlink_to("loop.pth")
    with pytest.raises(SeriesError, match=message):
        find_series([path])


def test_find_series_rejects_no_arguments() -> None:
    nothing: Sequence[Path] = []
    with pytest.raises(SeriesError, match="no checkpoint given"):
        find_series(nothing)


@pytest.mark.parametrize("paths", [None, [None], [b"x"], b"x", "a.pth", 3])
def test_find_series_rejects_what_is_no_path(paths: Any) -> None:
    with pytest.raises(UsageError, match="paths is a list of paths, not|a path is text, not"):
        find_series(paths)


def test_find_series_names_a_file_where_each_folder_has_several_kinds_of_files(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / f"CKPT+{step}"
        folder.mkdir()
        for name in ("counter.ckpt", "my_model.ckpt", "normalizer.ckpt", "optimizer.ckpt"):
            torch.save({"w": torch.ones(2) * step}, folder / name)
    with pytest.raises(SeriesError, match=r"several in .*CKPT\+1; if my_model\.ckpt .*'.*CKPT\+\*/my_model\.ckpt'\.$"):
        find_series([tmp_path])
    assert len(find_series([tmp_path / "CKPT+*" / "my_model.ckpt"]).members) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("https://h/run/a.pth?X-Amz-Signature=secret&b=a b", "https://h/run/a.pth"),
        ("--out=http://user:secret@h/a.pth#secret", "--out=http://h/a.pth"),
        ("run/step_?.pth", "run/step_?.pth"),
        ("s3://bucket/step_?.pth", "s3://bucket/step_?.pth"),
    ],
)
def test_a_url_is_shown_without_query_and_password(given: str, said: str) -> None:
    assert shown(given) == said


def test_addresses_are_told_from_local_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [is_address(each) for each in ("s3://b/a.json", "ftp://h/a", "a.json", "C:/a", "a://b", "/s3/b", "")] == [
        True, True, False, False, False, False, False,
    ]  # fmt: skip
    monkeypatch.setitem(STORES, "toy", MemoryStore({}))
    assert is_address(Path("toy://a"))


def test_urls_that_differ_in_their_queries_alone_are_refused() -> None:
    with pytest.raises(SeriesError, match="^https://h/x: given with several queries") as told:
        expand(["https://h/x?id=secret", "https://h/y", "https://h/x?id=2"])
    assert "secret" not in str(told.value)


def test_an_address_with_one_slash_is_refused_with_the_right_one() -> None:
    for given in ("s3:/bucket/run", Path("s3://bucket/run")):
        with pytest.raises(SeriesError, match="has two slashes, such as s3://bucket/run, and is given as text"):
            find_series([given])
