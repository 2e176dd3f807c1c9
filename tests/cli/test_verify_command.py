"""`ckpt verify`: a line for each check, exit codes, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runner import run

from ckpt_tools import average


@pytest.fixture
def averaged(here: Path) -> Path:
    for i in range(3):
        torch.save(
            {"model": {"w": torch.full((3, 4), float(i)), "n": torch.tensor(i)}, "epoch": i}, here / f"c-{i}.pth"
        )
    average("c-*.pth", out="averaged.pth")
    return Path("averaged.pth")


def test_a_line_for_each_check_and_a_verdict(averaged: Path) -> None:
    result = run("verify", averaged)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "averaged.pth:"
    assert lines[-1] == "Verified: 7 checks passed."
    assert [line.split()[0] for line in lines[1:-1]] == ["ok"] * 7
    assert "  ok           made again  the same bit for bit: 2 tensors" in lines


def test_the_worst_of_several_decides(averaged: Path) -> None:
    Path("bad.pth").write_bytes(averaged.read_bytes()[:-30])
    result = run("verify", averaged, "bad.pth", averaged, "--json")
    assert result.code == 1
    found = json.loads(result.out)
    assert found["passed"] is False
    assert [each["passed"] for each in found["checkpoints"]] == [True, False, True]
    assert found["checkpoints"][1]["format"] == ""
    assert found["checkpoints"][1]["checks"][0].keys() == {"name", "result", "detail"}
    assert found["checkpoints"][0].keys() == {"passed", "path", "format", "checks", "sample", "seed"}
    assert "FAILED: 1 check failed." in result.err


def test_a_seed_is_drawn_and_reported(averaged: Path) -> None:
    found = json.loads(run("verify", averaged, "--sample", "50%", "--json").out)["checkpoints"][0]
    assert found["sample"] == 0.5
    assert isinstance(found["seed"], int)
    result = run("verify", averaged, "--sample", "50%", "--seed", str(found["seed"]))
    assert f"50 % of the slices of 2 tensors (seed {found['seed']})" in result.out


def test_wrong_usage_is_told_with_the_options(averaged: Path) -> None:
    for words, said in (
        (["--sample", "2"], "--sample 2: a part of the output"),
        (["--inputs", "nowhere"], "--inputs: nowhere is no folder"),
        (["--expect-sha256", "12"], "--expect-sha256: 64 hexadecimal digits"),
    ):
        result = run("verify", averaged, *words)
        assert result.code == 2, result
        assert said in result.err
    assert run("verify").code == 2


def test_one_digest_for_several_checkpoints_is_refused_at_the_start(averaged: Path) -> None:
    result = run("verify", averaged, "c-0.pth", "--expect-sha256", "0" * 64)
    assert (result.code, result.out) == (2, "")
    assert "--expect-sha256: one SHA-256 cannot be that of 2 checkpoints" in result.err


def test_names_in_a_file_send_nothing_to_the_terminal(here: Path) -> None:
    torch.save({"\x1b[2Jw": torch.tensor([torch.nan])}, "odd.pth")
    result = run("verify", "odd.pth")
    assert result.code == 1
    assert "\x1b" not in result.out
    assert r"'\x1b[2Jw' has 1 NaN, the first at [0]" in result.out
