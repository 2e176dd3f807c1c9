"""The console: figures as people write them, bars that show, and text that cannot steer the terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runner import BIN, environment, run, spawn

from ckpt_tools.cli import console


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (75_200, "75.2 kB"),
        (999_499, "999 kB"),
        (999_700, "1 MB"),
        (1_210_000_000, "1.21 GB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_sizes_have_three_figures_and_a_decimal_unit(nbytes: float, text: str) -> None:
    assert console.size(nbytes) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (17_029, "17k"), (304_326_632, "304M"), (999_999, "1M"), (6_738_415_616, "6.74B")],
)
def test_counts_are_written_as_the_field_does(number: int, text: str) -> None:
    assert console.count(number) == text


@pytest.mark.parametrize(
    ("value", "drawn"),
    [(1.0, "████████"), (0.5, "████"), (-0.5, "████"), (0.02, "▏"), (1e-9, "▏"), (0.0, ""), (1.07 / 8, "█▏")],
)
def test_a_bar_is_as_long_as_its_value_and_what_is_not_zero_is_seen(
    value: float, drawn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert console.bar(value, 1.0, 8) == drawn


def test_a_terminal_without_block_characters_gets_plain_bars(runs: list[Path]) -> None:
    result = run("avg", *runs, "--dry-run", encoding="ascii")
    assert result.code == 0
    assert result.err.isascii()
    assert "\\u" not in result.err
    assert "####################" in result.err


def test_no_bar_is_drawn_where_all_is_zero() -> None:
    assert console.bar(0.0, 0.0) == ""


def test_names_cannot_steer_the_terminal_or_pass_for_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "\x1b[2J\x9b31m[bold]:smile:\r\nerased"
    torch.save({name: torch.zeros(2)}, "[red]:x:.pth")
    shown = run("inspect", "[red]:x:.pth", "--tensors")
    assert shown.code == 0
    assert "\\x1b[2J\\x9b31m[bold]:smile:\\r\\nerased" in shown.err
    assert "[red]:x:.pth: torch-zip" in shown.err
    torch.save({name: torch.ones(3)}, "2.pth")
    refusal = run("avg", "[red]:x:.pth", "2.pth")
    assert refusal.code == 1
    assert "\\x1b[2J" in refusal.err
    for result in (shown, refusal):
        assert not set("\x1b\x9b\r") & set(result.err)


def test_a_name_that_is_no_unicode_is_shown_somehow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = b"caf\xe9-1.pth".decode(errors="surrogateescape")
    torch.save({"w": torch.zeros(2)}, "plain.pth")
    Path("plain.pth").rename(name)
    assert "caf\\udce9-1.pth" in run("inspect", name).err
    assert run("avg", name).code == 0
    assert json.loads(run("inspect", name, "--json").out)["path"] == name


def test_progress_off_a_terminal_is_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 1.0, 11.0, 11.0, 12.0, 30.0, 30.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.progress("averaging") as show:
        for done in (1, 2, 3, 4):
            show(done * 10**9, 4 * 10**9)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["averaging: 50% of 4 GB", "averaging: 100% of 4 GB"]
    assert captured.out == ""


def test_help_into_a_closed_pipe_and_a_report_to_a_full_disk_end_quietly(runs: list[Path], tmp_path: Path) -> None:
    script = (
        f"ckpt inspect {runs[0]} --json --tensors | head -1; echo ${{PIPESTATUS[1]}}\n"
        f"ckpt inspect {runs[0]} --tensors 2>&1 | head -1\n"
        f"ckpt inspect {runs[0]} | head -1\n"
        f"ckpt inspect {runs[0]} --json > /dev/full; echo $?\n"
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[:2] == ["{", "0"]
    assert done.stdout.splitlines()[2].startswith(f"{runs[0]}: torch-zip")
    assert done.stdout.splitlines()[-1] == "1"
    assert "Error: the report cannot be written to standard output (No space left on device)." in done.stderr
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr


def test_the_module_runs_as_the_script_does(tmp_path: Path) -> None:
    for command in ([sys.executable, "-m", "ckpt_tools"], [str(BIN / "ckpt")]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.startswith("ckpt-tools ")
    assert spawn("--version", cwd=tmp_path).returncode == 0
