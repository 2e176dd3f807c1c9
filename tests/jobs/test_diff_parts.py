"""diff in parts: what the parts find, joined, is what one process finds, whatever the cut."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from cli_runner import run

from ckpt_tools import diff
from ckpt_tools.compute import compare as comparing
from ckpt_tools.errors import CkptError, WriteError
from ckpt_tools.storage.kept_stage import stages


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(comparing.compare.__kwdefaults__, "slice_size", 64)


@pytest.fixture
def pair(here: Path, small_slices: None) -> tuple[str, str]:
    """Two checkpoints with tensors that are compared in all ways: slices, tiles, codes, not finite, equal, empty."""
    torch.manual_seed(0)
    for i, name in enumerate("ab"):
        floats = torch.randn(1000)
        floats[300 + i] = float("nan")
        weights = {
            "floats": floats,
            "turned": torch.randn(40, 30).t() if i else torch.randn(30, 40),
            "complex": torch.randn(150, dtype=torch.complex64),
            "codes": torch.randint(0, 255, (300,), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
            "steps": torch.arange(500) + i,
            "same": torch.ones(333),
            "empty": torch.ones(0, 3),
            "wide": torch.ones(3, 3 + i),
            f"only_{name}": torch.ones(2),
        }
        torch.save({"state_dict": weights}, f"{name}.pth")
    return "a.pth", "b.pth"


def hidden() -> list[Path]:
    return [each for each in Path().iterdir() if each.name.startswith(".")]


@pytest.mark.parametrize("tolerance", [{}, {"rtol": 0.3, "atol": 0.5}])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_find_what_one_process_finds(pair: tuple[str, str], count: int, tolerance: dict[str, float]) -> None:
    alone = diff(*pair, **tolerance)
    for index in random.Random(count).sample(range(1, count + 1), count):
        report = diff(*pair, part=f"{index}/{count}", **tolerance)
        assert report.verdict == "incomplete"
        assert (report.compared, report.tensors) == (0, ())
        assert report.part.startswith(f"Part {index} of {count} of the comparison is done. When all parts are, run the")
    assert diff(*pair, finish=True, **tolerance) == alone
    assert alone.verdict == "different"
    assert not hidden()


def test_each_part_compares_its_share(pair: tuple[str, str]) -> None:
    for index in (1, 2, 3):
        diff(*pair, part=f"{index}/3")
    (stage,) = stages(Path("ckpt-diff"))
    lines = [json.loads(path.read_text())["distances"] for path in sorted(stage.path.glob("*.jsonl"))]
    values = [sum(each[1] for each in line) for line in lines]
    assert sum(values) == 1000 + 1200 + 2 * 150 + 300 + 500 + 333
    assert min(values) > 500


def test_a_part_is_not_compared_again(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    diff(*pair, part="1/2")
    monkeypatch.setattr(comparing, "compare", None)
    assert diff(*pair, part="1/2").part.startswith("Part 1 of 2 of the comparison was done before. When all parts")


def test_finish_names_the_missing_parts(pair: tuple[str, str]) -> None:
    with pytest.raises(
        CkptError, match=r"no part of this comparison is in the current folder. First run all parts there"
    ):
        diff(*pair, finish=True)
    diff(*pair, part="2/3")
    with pytest.raises(
        WriteError, match=r"parts 1, 3 of 3 are missing or not complete. Run each, such as `part='1/3'`"
    ):
        diff(*pair, finish=True)
    diff(*pair, part="1/1")  # another division, which is complete
    assert diff(*pair, finish=True) == diff(*pair)


def test_parts_of_other_files_or_options_are_not_joined(pair: tuple[str, str]) -> None:
    diff(*pair, part="1/1")
    for more in ({"rtol": 0.1}, {"state": "raw", "state_b": "state_dict", "atol": 1.0}):
        with pytest.raises(CkptError, match="no part of this comparison is in the current folder"):
            diff(*pair, finish=True, **more)
    os.utime("b.pth", ns=(0, 0))
    with pytest.raises(CkptError, match="no part of this comparison is in the current folder"):
        diff(*pair, finish=True)


def test_a_part_runs_once_at_a_time(pair: tuple[str, str]) -> None:
    diff(*pair, part="1/2")
    (stage,) = stages(Path("ckpt-diff"))
    with (
        stage.journal(2, 2).opened(),
        pytest.raises(WriteError, match="ckpt-diff: part 2 of 2 is at work in another process. Wait until it has"),
    ):
        diff(*pair, part="2/2")


def test_a_part_that_fails_leaves_nothing_to_trust(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(comparing, "in_threads", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            diff(*pair, part="1/1")
    with pytest.raises(WriteError, match="part 1 of 1 is missing or not complete"):
        diff(*pair, finish=True)


def test_the_command_tells_the_result_at_the_end(pair: tuple[str, str]) -> None:
    alone = run("diff", *pair, "--json")
    assert alone.code == 1
    result = run("diff", *pair, "--part", "1/2")
    assert (result.code, result.out) == (0, "")
    assert result.err == (
        "Part 1 of 2 of the comparison is done. When all parts are, run the same command with --finish in place of "
        "--part.\n"
    )
    told = run("clean", ".").err
    assert "job in parts of ckpt-diff" in told
    assert "50% done" in told
    assert f"to go on, in {Path.cwd()}: ckpt diff a.pth b.pth --part I/N, then --finish" in told
    assert json.loads(run("diff", *pair, "--part", "2/2", "--json").out)["verdict"] == "incomplete"
    result = run("diff", *pair, "--finish", "--json")
    assert (result.code, result.out, result.err) == (1, alone.out, alone.err)


def test_the_last_task_of_srun_tells_the_result(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run("diff", *pair, "--json")
    found = []
    for index in (1, 0):
        for name, value in (("PROCID", index), ("STEP_NUM_TASKS", 2), ("TASK_PID", os.getpid())):
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        found.append(run("diff", *pair, "--json"))
    assert (found[0].code, found[0].out) == (0, "")
    assert found[0].err == (
        "Part 2 of 2 of the comparison is done. The process that ends last shows the result. Not begun yet: part 1.\n"
    )
    assert (found[1].code, found[1].out, found[1].err) == (1, alone.out, alone.err)
    assert not hidden()
