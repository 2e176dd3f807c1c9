"""Commands that take many checkpoints, or find them: tables, outputs one by one, and what is proposed."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import contents, refused, run
from series_files import trainer_folder, weights

from ckpt_tools import open_checkpoint

Save = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def series(save: Save) -> list[str]:
    """Twelve checkpoints with a metric and a momentum of 24 bytes."""
    paths = [f"run/checkpoint-{n}.pth" for n in range(1, 13)]
    for n, path in enumerate(paths, 1):
        momentum = {"state": {0: {"momentum_buffer": torch.ones(6)}}, "param_groups": [{"params": [0]}]}
        save(path, {"state_dict": weights(n), "epoch": 2 * n, "metric": 90 + n / 4, "optimizer": momentum})
    return paths


# inspect


def test_inspect_of_a_folder_is_a_table_in_the_order_of_training(series: list[str]) -> None:
    result = run("inspect", "run")
    assert (result.code, result.err) == (0, "")
    title, *rows = [line.split() for line in result.out.splitlines()[:13]]
    assert title == ["checkpoint", "epoch", "metric", "weights", "optimizer", "size"]
    for n, (path, row) in enumerate(zip(series, rows, strict=True), 1):
        size = f"{Path(path).stat().st_size / 1000:.3g}"
        assert row == [Path(path).name, str(2 * n), f"{90 + n / 4:g}", "raw", "24", "B", size, "kB"]
    assert run("inspect", *reversed(series)).out == result.out


def test_inspect_of_many_lists_what_is_broken_and_fails(series: list[str]) -> None:
    Path(series[4]).write_bytes(b"")
    result = run("inspect", "run")
    assert result.code == 1
    assert result.out.splitlines()[12].split() == ["checkpoint-5.pth", "empty", "file"]
    left = run("inspect", "run", "--skip-broken", "--exclude", "checkpoint-1*.pth")
    assert left.code == 0
    listed = [line.split()[0] for line in left.out.splitlines()[1:8]]
    assert listed == [f"checkpoint-{n}.pth" for n in (2, 3, 4, 6, 7, 8, 9)]
    assert "Left out by --skip-broken: run/checkpoint-5.pth (empty file)." in left.out


def test_inspect_of_many_marks_those_of_another_model(save: Save) -> None:
    usual = {"w": torch.ones(2, 3), "b": torch.ones(3)}
    others = {
        5: {f"module.{name}": tensor for name, tensor in usual.items()},  # a wrapper is no difference
        6: usual | {"w": torch.ones(4, 3)},
        7: {"w": torch.ones(2, 3), "bias": torch.ones(3)},
        8: {f"encoder.{name}": tensor for name, tensor in usual.items()},
    }
    for n in range(1, 9):
        save(f"run/c-{n}.pth", {"state_dict": others.get(n, usual), "epoch": n})
    listed = json.loads(run("inspect", "run", "--json").out)["checkpoints"]
    assert {each["name"]: each["differs"] for each in listed if each["differs"]} == {
        "c-6.pth": "'w' has shape [4, 3], and [2, 3] in most",
        "c-7.pth": "no tensor 'b', which most have; 1 more difference",
        "c-8.pth": "another model: it shares 0 of 2 tensor names with most",
    }
    result = run("inspect", "run")
    assert result.code == 0
    assert "'w' has shape [4, 3], and [2, 3] in most" in result.out
    said = "3 of them differ from most in names or shapes of tensors, and cannot be averaged with those; --exclude"
    assert said in result.out


def test_inspect_of_two_models_without_a_majority_says_so(save: Save) -> None:
    save("a.pth", {"w": torch.ones(2)})
    save("b.pth", {"w": torch.ones(3)})
    said = "These are checkpoints of 2 models: names or shapes of their tensors differ."
    assert said in run("inspect", "a.pth", "b.pth").out.splitlines()
    assert json.loads(run("inspect", "a.pth", "b.pth", "--json").out)["notes"] == [said]


@pytest.mark.parametrize(("glob", "said"), [("*", "leaves no checkpoint"), ("x", "matches no checkpoint")])
def test_inspect_of_one_passes_over_no_exclude(series: list[str], glob: str, said: str) -> None:
    message = refused(Path(), "inspect", series[0], "--exclude", glob)
    assert f"--exclude {shlex.quote(glob)} {said}" in message


def test_inspect_of_many_gives_json(series: list[str]) -> None:
    listed = json.loads(run("inspect", *series[:3], "--json").out)
    assert [(each["path"], each["step"], each["optimizer"], each["fault"]) for each in listed["checkpoints"]] == [
        (path, 2 * n, 24, "") for n, path in enumerate(series[:3], 1)
    ]
    assert "goes with one checkpoint" in refused(Path(), "inspect", "run", "--tensors", code=2)


def test_inspect_counts_training_state_beside_the_weights_and_finds_a_metric_by_name() -> None:
    for step in (100, 200):
        folder = trainer_folder(Path(f"run/checkpoint-{step}"), step)
        log = [{"step": step, "eval_loss": 1 / step}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    state = sum(Path("run/checkpoint-100", name).stat().st_size for name in ("optimizer.pt", "scheduler.pt"))
    (first, _) = json.loads(run("inspect", "run", "--metric", "eval_loss", "--json").out)["checkpoints"]
    assert (first["metric"], first["optimizer"]) == (0.01, state)


# strip


def test_strip_of_many_writes_each_where_it_would_be_alone(series: list[str]) -> None:
    result = run("strip", *series[:3], "--json")
    reports = json.loads(result.out)["checkpoints"]
    assert [(each["path"], each["written"]) for each in reports] == [(p, True) for p in series[:3]]
    assert result.err.count("Wrote run/checkpoint-") == 3
    for n, path in enumerate(series[:3], 1):
        stripped = open_checkpoint(path.replace(".pth", "-stripped.pth"))
        assert torch.equal(stripped["w"], weights(n)["w"])
        assert "optimizer" not in stripped.header.tree


def test_strip_of_many_shows_the_entries_of_each_if_asked(series: list[str], save: Save) -> None:
    save("bare.pth", {"w": torch.ones(2)})
    given = ("strip", *series[:2], "bare.pth", "--force")
    assert ["optimizer", "24", "B"] not in [line.split()[:3] for line in run(*given).err.splitlines()]
    lines = run(*given, "-v").err.splitlines()
    assert sum(line.split()[:3] == ["optimizer", "24", "B"] for line in lines) == 2
    assert "bare.pth: nothing to strip, so no file is written." in lines


def test_strip_of_many_says_of_which_checkpoint_a_note_is() -> None:
    for step in (100, 200):
        trainer_folder(Path(f"checkpoint-{step}"), step)
    lines = run("strip", "checkpoint-100", "checkpoint-200").err.splitlines()
    for step in (100, 200):
        assert any(line.startswith(f"checkpoint-{step}: The training state is in files beside") for line in lines)


def test_strip_of_many_writes_into_a_folder(series: list[str]) -> None:
    Path("small").mkdir()
    for out in ("small/", "small"):
        assert run("strip", "run", "-o", out, "--force").code == 0
        assert {path.name for path in Path("small").iterdir()} == {f"{Path(path).stem}-stripped.pth" for path in series}
    assert "12 checkpoints go into a folder" in refused(Path(), "strip", "run", "-o", "a.pth", code=2)
    said = refused(Path(), "strip", "run", "-o", "new/")
    assert said == "Error: -o: there is no folder new. Make it first: mkdir -p new"


def test_strip_of_many_writes_none_if_one_cannot_be_stripped(series: list[str]) -> None:
    Path("run/checkpoint-2-stripped.pth").write_text("precious")
    Path(series[4]).write_bytes(b"")
    message = refused(Path(), "strip", *series)
    assert message.startswith("Error: 2 of 12 checkpoints cannot be stripped, and none was: ")
    assert "run/checkpoint-2-stripped.pth: exists already" in message
    assert "run/checkpoint-5.pth: empty file" in message
    assert "--resume goes with one checkpoint" in refused(Path(), "strip", *series, "--resume", code=2)


def test_strip_of_many_in_two_processes_says_once_what_is_written(series: list[str]) -> None:
    started = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "a", "MASTER_PORT": "1"}
    first, second = (run("strip", *series[:2], RANK=rank, **started) for rank in "01")
    assert (first.code, second.code) == (0, 0), second.err
    assert "Would write" not in first.err
    assert second.err.count("Wrote run/checkpoint-") == 2


def test_strip_of_many_replaces_none_of_them(series: list[str]) -> None:
    other = Path("other/checkpoint-1-stripped.pth")
    other.parent.mkdir()
    other.write_bytes(Path(series[1]).read_bytes())
    message = refused(Path(), "strip", series[0], other, "-o", "other/", "--force")
    assert "other/checkpoint-1-stripped.pth: is one of the inputs, which stay as they are" in message
    assert other.read_bytes() == Path(series[1]).read_bytes()


def test_strip_takes_a_glob_that_matches_one_checkpoint(series: list[str]) -> None:
    assert run("strip", "run/checkpoint-1[2].pth").code == 0
    assert Path("run/checkpoint-12-stripped.pth").exists()


def test_strip_passes_over_no_empty_folder_and_no_second_name(series: list[str]) -> None:
    Path("empty").mkdir()
    for given in (["empty", series[0]], [series[0], "empty"], ["empty", *series]):
        assert "empty: a folder without weights" in refused(Path(), "strip", *given)
    Path("also.pth").hardlink_to(series[0])
    result = run("strip", series[0], "also.pth", series[1])
    assert result.code == 0
    assert f"{series[0]} under another name: counted once." in result.err
    assert result.err.count("Wrote") == 2


def test_strip_names_training_state_in_files_beside_the_weights() -> None:
    trainer_folder(Path("checkpoint-100"), 100)
    before = contents(Path())
    result = run("strip", "checkpoint-100")
    assert "nothing to strip" in result.err
    assert "which you may delete: optimizer.pt (" in result.err
    assert "scheduler.pt (" in result.err
    assert contents(Path()) == before


# convert


def test_convert_takes_a_second_path_as_the_target(series: list[str]) -> None:
    assert run("convert", series[0], "w.safetensors").code == 0
    assert torch.equal(open_checkpoint("w.safetensors")["w"], weights(1)["w"])
    assert "give it with -o" in refused(Path(), "convert", series[0], series[1], code=2)
    assert "Say -o timm, or --to timm." in refused(Path(), "convert", series[0], "timm", code=2)
    assert "one checkpoint at a time" in refused(Path(), "convert", *series[:3], code=2)
    assert "one target, by -o" in refused(Path(), "convert", series[0], "x.pth", "-o", "y.pth", code=2)


@pytest.mark.parametrize("name", ["safetensors", "pth", "SafeTensors"])
def test_convert_says_that_a_format_is_no_layout(series: list[str], name: str) -> None:
    message = refused(Path(), "convert", series[0], "--to", name, "-o", "x.pth", code=2)
    assert message.endswith(
        f"a file format, not a layout. The name of the output chooses it: -o weights.{name.lower()}."
    )


# avg


def test_avg_without_arguments_shows_the_plan_for_the_only_run_and_writes_nothing(series: list[str]) -> None:
    Path("run").rename("work")
    Path("out/train").mkdir(parents=True)
    Path("work").rename("out/train/exp 1")
    before = contents(Path())
    result = run("avg", "--last", "3")
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()[1:4]] == [f"checkpoint-{n}.pth" for n in (10, 11, 12)]
    assert result.err.splitlines()[-1] == "  ckpt avg --last 3 'out/train/exp 1'"
    assert contents(Path()) == before


def test_avg_without_arguments_passes_over_what_linux_keeps_in_each_disk(
    series: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("lost+found").mkdir()
    scandir = os.scandir

    def guarded(folder: str | Path = ".") -> object:
        if Path(folder).name == "lost+found":
            raise PermissionError(13, "Permission denied", "lost+found")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    assert run("avg").err.splitlines()[-1] == "  ckpt avg run"


def test_a_command_that_is_proposed_is_not_broken_on_a_narrow_terminal(series: list[str]) -> None:
    result = run("avg", "--last", "3", "--buffers", "last", "-o", "name.pth", terminal=True, columns=44, TERM="dumb")
    assert "  ckpt avg --last 3 --buffers last -o name.pth run" in result.err.splitlines()


def test_avg_without_arguments_lists_several_runs_and_asks_for_one(series: list[str], save: Save) -> None:
    for n in (1, 2):
        save(f"other/e{n}.pth", weights(n))
    message = refused(Path(), "avg", code=2)
    assert "there are 2 runs here: other, run. Example: ckpt avg other" in message


def test_avg_without_arguments_knows_a_series_by_its_numbers(save: Save) -> None:
    for name in ("averaged.pth", "averaged-bn.pth", "best.pth"):
        save(name, weights())
    assert "no series of checkpoints was found here. Example: ckpt avg runs/*.pth" in refused(Path(), "avg", code=2)


def test_avg_says_what_goes_along_and_what_stays_behind() -> None:
    for step in (100, 200):
        folder = trainer_folder(Path(f"run/checkpoint-{step}"), step)
        for name in ("config.json", "tokenizer.json", "generation_config.json"):
            (folder / name).write_text('{"model_type": "llama"}')
    folder, file = run("avg", "run", "-o", "out/"), run("avg", "run", "-o", "out.safetensors")
    assert "Wrote out/ (1 shard; config, tokenizer and 1 more file carried along): " in folder.err
    assert "stays behind: config.json, generation_config.json, tokenizer.json. For a folder" in file.err
    assert "Wrote out.safetensors: " in file.err


def test_avg_of_one_checkpoint_says_that_it_is_a_copy(series: list[str]) -> None:
    assert "1 checkpoint: checkpoint-1.pth, so this is a copy of its weights." in run("avg", series[0]).err
