"""`ckpt avg --update` and `--replay`: what people type, and what they see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runner import refused, run


@pytest.fixture
def paths(here: Path) -> list[str]:
    names = [f"c-{i}.pth" for i in range(1, 5)]
    for i, name in enumerate(names, 1):
        torch.save({"state_dict": {"w": torch.full((4,), float(i))}, "epoch": i}, name)
    assert run("avg", *names[:3]).code == 0
    return names


def mean(path: str) -> float:
    return torch.load(path, weights_only=True)["state_dict"]["w"].mean().item()


def test_update_shows_all_coefficients_and_writes_the_average_of_all(paths: list[str]) -> None:
    shown = run("avg", "--update", "averaged.pth", "c-4.pth", "-o", "four.pth", "--dry-run")
    assert [shown.out.count(name) for name in paths] == [1, 1, 1, 1]
    assert shown.out.count("0.250000") == 4
    assert "averaged.pth counts 0.75 of the sum, for its 3 inputs, which are not read again." in " ".join(
        shown.out.split()
    )
    assert not Path("four.pth").exists()
    done = run("avg", "--update", "averaged.pth", "c-4.pth", "-o", "four.pth", "--json")
    assert done.code == 0
    assert [i["name"] for i in json.loads(done.out)["inputs"]] == paths
    assert (mean("four.pth"), mean("averaged.pth")) == (2.5, 2.0)


def test_update_in_place_needs_force(paths: list[str]) -> None:
    message = refused(Path(), "avg", "--update", "averaged.pth", "c-4.pth")
    assert message == (
        "Error: averaged.pth: exists already. Pass --force to replace it, or choose another name with -o."
    )
    assert run("avg", "--update", "averaged.pth", "c-4.pth", "--force").code == 0
    assert mean("averaged.pth") == 2.5


def test_update_in_place_takes_the_folder_of_the_average(paths: list[str]) -> None:
    Path("e").mkdir()
    Path("averaged.pth").rename("e/averaged.pth")
    assert run("avg", "--update", "e/averaged.pth", "c-4.pth", "-o", "e/", "--force").code == 0
    assert mean("e/averaged.pth") == 2.5


def test_messages_of_update_name_options(paths: list[str]) -> None:
    assert refused(Path(), "avg", "--update", "averaged.pth", "c-3.pth", "-o", "x.pth") == (
        "Error: c-3.pth: averaged.pth has an input at the same epoch, 3, so it is in it already. "
        "Give newer checkpoints alone."
    )
    run("avg", *paths[:3], "--weights", "1,2,3", "-o", "weighted.pth")
    assert refused(Path(), "avg", "--update", "weighted.pth", "c-4.pth", "-o", "x.pth") == (
        "Error: weighted.pth: cannot be extended: --mode weights gives new checkpoints no weight by itself. Average "
        "its inputs and the new checkpoints together; ckpt inspect lists them, and --replay with --dry-run finds them."
    )
    run("avg", *paths[:3], "--mode", "decay", "--shape", "cosine", "-o", "decay.pth")
    assert "with more checkpoints, --mode decay (--shape cosine) weighs its inputs otherwise" in refused(
        Path(), "avg", "--update", "decay.pth", "c-4.pth", "-o", "x.pth"
    )


def test_replay_says_that_the_bytes_are_the_same(paths: list[str]) -> None:
    done = run("avg", "--replay", "averaged.pth", "--json")
    assert done.code == 0
    assert "It is the same as averaged.pth in every byte." in done.err
    assert json.loads(done.out)["same"] is True
    assert Path("averaged-replayed.pth").read_bytes() == Path("averaged.pth").read_bytes()


def test_replay_ends_with_1_if_the_weights_differ(paths: list[str]) -> None:
    torch.save({"state_dict": {"w": torch.full((4,), 7.0)}, "epoch": 2}, "c-2.pth")
    done = run("avg", "--replay", "averaged.pth")
    assert done.code == 1
    assert "Its weights are NOT those of averaged.pth: they differ by up to 1.67, in 'w'." in " ".join(done.err.split())


def test_replay_lists_all_inputs_that_are_missing(paths: list[str]) -> None:
    Path("c-1.pth").unlink()
    Path("c-2.pth").unlink()
    assert refused(Path(), "avg", "--replay", "averaged.pth") == (
        "Error: averaged.pth: 2 of its 3 inputs cannot be taken. c-1.pth is missing; c-2.pth is missing. Give "
        "the paths of the right files, or of folders that have them."
    )


def test_replay_shows_the_recorded_coefficients_in_a_dry_run(paths: list[str]) -> None:
    shown = run("avg", "--replay", "averaged.pth", "--dry-run")
    assert shown.out.count("0.333333") == 3
    assert not Path("averaged-replayed.pth").exists()


def test_only_a_replay_goes_without_paths(paths: list[str]) -> None:
    result = run("avg", "--update", "averaged.pth")
    assert (result.code, "PATH is missing: the checkpoints to add" in result.err) == (2, True)
