"""The console: figures as people write them, bars that show, and text that cannot steer the terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from cli_runner import BIN, PATIENCE, environment, run, spawn

from ckpt_tools.cli import console, tables


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
def test_size_has_three_figures_and_a_decimal_unit(nbytes: float, text: str) -> None:
    assert console.size(nbytes) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (17_029, "17k"), (304_326_632, "304M"), (999_999, "1M"), (6_738_415_616, "6.74B")],
)
def test_count_has_three_figures_and_a_short_unit(number: int, text: str) -> None:
    assert console.count(number) == text


@pytest.mark.parametrize(
    ("value", "drawn"),
    [(1.0, "████████"), (0.5, "████"), (-0.5, "████"), (0.02, "▏"), (1e-9, "▏"), (0.0, ""), (1.07 / 8, "█▏")],
)
def test_bar_is_as_long_as_its_value_and_visible_unless_zero(value: float, drawn: str) -> None:
    assert tables.bar(value, 1.0, 8, io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) == drawn


def test_bar_is_plain_without_block_characters(runs: list[Path]) -> None:
    result = run("avg", *runs, "--dry-run", encoding="ascii")
    assert result.code == 0
    assert result.out.isascii()
    assert "\\u" not in result.out
    assert "####################" in result.out


def test_bar_is_empty_if_all_is_zero() -> None:
    assert tables.bar(0.0, 0.0) == ""


def test_say_escapes_control_characters_and_markup_in_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "\x1b[2J\x9b31m[bold]:smile:\r\nerased"
    torch.save({name: torch.zeros(2)}, "[red]:x:.pth")
    shown = run("inspect", "[red]:x:.pth", "--tensors")
    assert shown.code == 0
    assert "\\x1b[2J\\x9b31m[bold]:smile:\\r\\nerased" in shown.out
    assert "[red]:x:.pth: torch-zip" in shown.out
    torch.save({name: torch.ones(3)}, "2.pth")
    refusal = run("avg", "[red]:x:.pth", "2.pth")
    assert refusal.code == 1
    assert "\\x1b[2J" in refusal.err
    for result in (shown, refusal):
        assert not set("\x1b\x9b\r") & set(result.out + result.err)


def test_say_shows_names_that_are_not_unicode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = b"caf\xe9-1.pth".decode(errors="surrogateescape")
    torch.save({"w": torch.zeros(2)}, "plain.pth")
    Path("plain.pth").rename(name)
    assert "caf\\udce9-1.pth" in run("inspect", name).out
    assert run("avg", name).code == 0
    assert json.loads(run("inspect", name, "--json").out)["path"] == "caf\ufffd-1.pth"


def test_print_json_writes_strict_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and infinity are not in JSON, and lone surrogates not in UTF-8: strict parsers refuse both."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"\ud800": torch.zeros(2)}, "metric": float("-inf")}, "c.pth")
    shown = run("inspect", "c.pth", "--json", "--tensors").out
    described = json.loads(shown, parse_constant=lambda word: pytest.fail(word))
    assert described["metric"] is None
    assert described["sets"][0]["tensors"][0]["name"] == "\ufffd"
    json.dumps(described, ensure_ascii=False).encode()


def shell(line: str, folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("end", ["2>&-", "2>/dev/full", "2>&1 | true", "2>&- >&- <&-"])
@pytest.mark.parametrize(("job", "code"), [("$CKPT -o out.pth", 0), ("ckpt avg gone.pth", 1), ("ckpt avg --nope", 2)])
def test_avg_goes_on_if_stderr_cannot_be_written(
    runs: list[Path], tmp_path: Path, job: str, code: int, end: str
) -> None:
    done = shell(f"{job} {end}; exit ${{PIPESTATUS[0]}}", tmp_path, CKPT=f"ckpt avg {runs[0]} {runs[1]}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    if code == 0:
        assert run("avg", *runs[:2], "-o", tmp_path / "same.pth").code == 0
        assert (tmp_path / "out.pth").read_bytes() == (tmp_path / "same.pth").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("end", "reason"), [(">&-", "it is closed"), (">/dev/full", "No space left on device"), ("| true", None)]
)
def test_print_json_fails_if_stdout_cannot_be_written(
    runs: list[Path], tmp_path: Path, end: str, reason: str | None
) -> None:
    for job in (f"avg {runs[0]} --json", f"inspect {runs[0]} --json", "--help", "avg --help", "--version"):
        done = shell(f"ckpt {job} {end}; exit ${{PIPESTATUS[0]}}", tmp_path)
        *before, last = ["", *done.stderr.splitlines()]
        if reason is not None:
            written = " averaged.pth is complete." if job.startswith("avg /") else ""
            assert (done.returncode, last) == (1, f"Error: cannot write to standard output ({reason}).{written}")
        assert "Traceback" not in done.stderr
        assert "ignored" not in done.stderr
        if job.startswith("avg /") and reason is not None:  # it is said that the work was done all the same
            assert before[-1].startswith("Wrote averaged.pth: ")
        (tmp_path / "averaged.pth").unlink(missing_ok=True)


def test_inspect_ends_quietly_on_a_closed_pipe(runs: list[Path], tmp_path: Path) -> None:
    for job in (f"inspect {runs[0]} --json --tensors", f"inspect {runs[0]} --tensors 2>&1"):
        done = shell(f"ckpt {job} | head -1", tmp_path)
        assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


@pytest.mark.parametrize("columns", ["0", "1", "15", "-5", "wide", ""])
def test_commands_show_everything_in_any_width(runs: list[Path], columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli_runner.environment", lambda **_: environment(COLUMNS=columns))
    table = run("avg", *runs, "--dry-run").out
    assert all(path.name in table for path in runs)
    assert table.count("0.083333") == len(runs)
    assert "float32             17   68.1 kB  █" in run("inspect", runs[0]).out
    assert "--max-shard-size" in run("avg", "--help").out
    assert "--nope" in run("avg", "--nope").err


def test_say_wraps_between_words_on_a_terminal(runs: list[Path]) -> None:
    shown = b""
    terminal, other_end = pty.openpty()
    with subprocess.Popen(["ckpt", "inspect", runs[3]], env=environment(COLUMNS="54", NO_COLOR="1"), stdout=other_end):
        os.close(other_end)
        with suppress(OSError):  # when the other end is closed
            while block := os.read(terminal, 65536):
                shown += block
    os.close(terminal)
    lines = shown.decode().splitlines()
    assert max(map(len, lines[2:])) <= 54
    assert lines[-3:-1] == ["  optimizer: SGD with momentum, 67.4 kB (0.99x the", "    weights)"]


def test_module_runs_as_the_script_does(tmp_path: Path) -> None:
    for command in ([sys.executable, "-m", "ckpt_tools"], [str(BIN / "ckpt")]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE)
        assert done.stdout.startswith("ckpt-tools ")
    assert spawn("--version", cwd=tmp_path).returncode == 0


def test_visible_escapes_what_a_terminal_obeys_and_keeps_all_letters() -> None:
    hidden = "\x1b\x9b\x7f\n\u061c\u200b\u200e\u200f\u202a\u202e\u2066\u2069\ufeff\ud800"
    shown = "".join(f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" for c in hidden)
    assert console.visible(hidden) == shown.replace("\\x0a", "\\n")
    assert console.visible("a\U000e0041") == "a\\U000e0041"  # a tag, which Python takes for printable text
    for text in ("layer.0.weight", "größe 重み веса وزن", "[bold]x[/]", "─│▏"):
        assert console.visible(text) == text
