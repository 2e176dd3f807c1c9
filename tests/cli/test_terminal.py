"""The terminal: words that people try, what goes where, how much is said, and colours."""

from __future__ import annotations

import io
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runner import PATIENCE, environment, refused, run
from safetensors.torch import save_file

import ckpt_tools
from ckpt_tools.cli import console
from ckpt_tools.cli.tables import Table
from ckpt_tools.cli.words import COMMANDS, MEANT
from ckpt_tools.compute import native


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    for i in (1, 2):
        torch.save({"state_dict": {"w": torch.full((4,), float(i))}, "epoch": i}, f"c-{i}.pth")
    return [Path("c-1.pth"), Path("c-2.pth")]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["ema", "runs dir", "--last", "5"], "ckpt avg 'runs dir' --last 5 --mode ema"),
        (["merge", "a.pth", "b.pth"], "ckpt avg a.pth b.pth"),
        (["SWA", "runs"], "ckpt avg runs"),
        (["compare", "a.pth", "b.pth"], "ckpt diff a.pth b.pth"),
        (["update_bn", "a.pth"], "ckpt recal-bn a.pth"),
        (["ls", "runs"], "ckpt inspect runs"),
    ],
)
def test_a_word_of_another_tool_leads_to_the_line_to_type(typed: list[str], meant: str, tmp_path: Path) -> None:
    message = refused(tmp_path, *typed, code=2)
    assert message == f"Error: No such command '{typed[0]}'. Did you mean '{meant}'? Try 'ckpt --help'."


def test_words_lead_to_commands_that_exist_and_hide_none() -> None:
    assert {meant.split()[0] for meant in MEANT.values()} <= COMMANDS.keys()
    assert not MEANT.keys() & COMMANDS.keys()


@pytest.mark.parametrize(
    ("typed", "names"),
    [("averge", "'avg'"), ("recal_bn", "'recal-bn'"), ("stirp", "'strip'"), ("insepct", "'inspect'")],
)
def test_a_slip_of_a_command_leads_to_it(typed: str, names: str, tmp_path: Path) -> None:
    assert f"Did you mean {names}" in refused(tmp_path, typed, "a.pth", code=2)
    assert "Did you mean" not in refused(tmp_path, "zzz", code=2)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--output", "-o"),
        ("--swa", "--mode uniform"),
        ("--precision", "--dtype"),
        ("-n", "--last"),
    ],
)
def test_an_option_of_another_tool_leads_to_ours(typed: str, meant: str, tmp_path: Path) -> None:
    message = refused(tmp_path, "avg", "a.pth", typed, "x", code=2)
    assert message.startswith(f"Error: No such option: {typed}")
    assert meant in message


def test_help_and_version_are_words_and_options() -> None:
    for words in (["help", "diff"], ["diff", "-h"]):
        assert run(*words) == run("diff", "--help")
    for words in (["help"], ["-h"], ["help", "help"]):
        assert run(*words).out.strip() == run("--help").out.strip()
    for words in (["version"], ["-V"]):
        assert run(*words) == run("--version")
    assert run("help", "averge").code == 2


def test_version_says_on_request_what_ckpt_runs_on() -> None:
    asked = run("version", "-v")
    first, *rest = asked.out.splitlines()
    assert first == f"ckpt-tools {ckpt_tools.__version__}"
    assert {f"torch {torch.__version__.partition('+')[0]}", f"CPython {platform.python_version()}"} <= {*rest}
    assert f"C extension {'no' if native._native is None else 'yes'}" in rest
    assert run("-v", "version") == asked
    assert run("version", "-q") == run("--version")


def test_help_writes_values_as_words(tmp_path: Path) -> None:
    for command in COMMANDS:
        text = run(command, "-h").out
        assert not set("<>{}") & set(text.partition("Arguments:")[0].partition("Example:")[0])
        assert "<" not in text.partition("Arguments:")[2]


def test_reports_go_to_stdout_and_messages_to_stderr(pair: list[Path]) -> None:
    for command in (["inspect", "c-1.pth"], ["diff", *pair], ["look", *pair], ["avg", *pair, "--dry-run"]):
        result = run(*command)
        assert ("c-1.pth" in result.out, result.err) == (True, ""), command
    result = run("avg", *pair)
    assert (result.out, result.err.splitlines()[-1].startswith("Wrote averaged.pth: ")) == ("", True)
    result = run("verify", "averaged.pth", "--json")
    assert json.loads(result.out)["passed"] is True
    assert "Verified: " in result.err


def test_what_the_users_code_prints_is_not_among_results(pair: list[Path]) -> None:
    """Of a process, for file descriptors are at stake."""
    script = (
        "import os, sys\nfrom ckpt_tools.cli import console\nconsole.open_streams()\n"
        "with console.printing_to_stderr():\n"
        "    print('theirs')\n    os.system('echo below')\n    console.show('asked for')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stdout == "asked for\n"
    assert sorted(done.stderr.split()) == ["below", "theirs"]


def test_quiet_says_errors_alone_and_shows_what_is_asked_for(pair: list[Path]) -> None:
    for words in (["-q", "avg"], ["avg", "--quiet"]):
        result = run(*words, *pair, "--force")
        assert (result.code, result.out, result.err) == (0, "", "")
    assert run("-q", "diff", *pair).out == run("diff", *pair).out
    assert run("-q", "avg", "gone.pth").err.startswith("Error: gone.pth")
    assert "--quiet and --verbose do not go together" in refused(Path(), "-q", "avg", *pair, "-v", code=2)
    assert run("avg", *pair, "--force").err  # and the next run is not quiet


def test_verbose_says_what_is_decided_and_how_long_it_takes(pair: list[Path]) -> None:
    usual, verbose = run("avg", *pair), run("-v", "avg", *pair, "--force")
    assert "0.500000" not in usual.err
    assert verbose.err.count("0.500000") == 2
    (took,) = re.findall(r"^Took .* s: (.*)\.$", verbose.err, re.MULTILINE)
    assert [part.rpartition(" ")[0].rpartition(" ")[0] for part in took.split(", ")] == [
        "planning", "reading headers", "other work", "averaging", "syncing to disk",
    ]  # fmt: skip
    assert "Took " not in usual.err


@pytest.mark.parametrize("command", [["look"], ["diff"], ["inspect"], ["verify"]])
def test_verbose_says_how_long_the_steps_of_a_command_without_an_output_take(
    command: list[str], pair: list[Path]
) -> None:
    assert re.search(r"^Took \d+\.\d\d s: planning ", run("-v", *command, *pair).err, re.MULTILINE)
    assert "Took " not in run(*command, *pair).err


def test_colours_are_for_terminals_that_want_them(pair: list[Path]) -> None:
    red, green = "\x1b[31mError:\x1b[0m", "\x1b[32mWrote\x1b[0m"
    assert red in run("avg", "gone.pth", terminal=True, TERM="xterm").err
    assert green in run("avg", *pair, terminal=True, TERM="xterm").err
    for variables in ({"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}):
        for command in (["avg", "gone.pth"], ["inspect", "c-1.pth"]):
            result = run(*command, terminal=True, **variables)
            assert "\x1b" not in result.out + result.err
    assert "\x1b" not in run("diff", *pair, TERM="xterm").out
    assert "\x1b[31mDifferent:\x1b[0m" in run("diff", *pair, FORCE_COLOR="1").out
    assert "\x1b" not in run("diff", *pair, FORCE_COLOR="1", NO_COLOR="1").out


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def stream(kind: type[io.TextIOWrapper] = io.TextIOWrapper) -> io.TextIOWrapper:
    return kind(io.BytesIO(), encoding="utf-8")


def test_a_long_table_is_shortened_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("name", ("number",))
    for i in range(500):
        table.add(f"row-{i}", str(i))
    monkeypatch.setenv("NO_COLOR", "1")
    assert len(table.lines(None, stream())) == 501
    short = table.lines(80, stream(_Terminal))
    assert [short[0], short[1].strip(), short[-1]] == ["name     number", "row-0         0", "row-499     499"]
    assert short[21] == "... 470 more; --all shows them"
    assert len(short) == 1 + 20 + 1 + 10
    monkeypatch.setattr(console.manner, "all", True)
    assert len(table.lines(80, stream(_Terminal))) == 501


@pytest.mark.parametrize("width", [None, 100, 60, 44, 30, 20])
def test_a_table_fits_its_terminal_and_loses_no_letter_of_a_name(width: int | None) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    table = Table("tensor", ("largest absolute", "relative"))
    table.add(name, "0.5", "1.25", bar=0.5)
    table.add("重み", "0.1", "0.01", bar=0.1)
    lines = table.lines(width, stream())
    if width is None:
        assert lines[1].startswith(f"{name}  ")
        assert lines[1].endswith("█" * 20)
    else:
        assert max(len(line.replace("重み", "重み  ")) for line in lines) <= width
        assert sum(line.count("█") for line in lines) == 0 or width > len(name)
    cut = "".join(line[: (width or 200)].split("  ")[0].strip() for line in lines)
    assert name in cut or name in "".join(lines).replace(" ", "")
    assert all(any(figure in line for line in lines) for figure in ("0.5", "1.25", "0.01"))


def test_no_cell_of_a_table_controls_the_terminal() -> None:
    table = Table("name", ("made\x1b[2J",))
    table.add("a\nb", "by \x1b]0;title\x07", drawn="damaged: \x1b[31m\u202e")
    assert table.lines(None, stream()) == [
        r"name          made\x1b[2J",
        r"a\nb  by \x1b]0;title\x07  damaged: \x1b[31m\u202e",
    ]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_has_no_bar_and_leaves_those_of_others(odd: float) -> None:
    table = Table("name", ("value",))
    table.add("a", str(odd), bar=odd)
    table.add("b", "1", bar=1.0)
    first, second = table.lines(80, stream())[1:]
    assert (first.count("█"), second.count("█")) == (0, 20)


def test_a_file_that_says_what_made_it_does_not_control_the_terminal(tmp_path: Path) -> None:
    made = json.dumps({"command": "\x1b]0;title\x07\nWrote it"})
    for name in ("a", "b"):
        save_file({"w": torch.ones(3)}, tmp_path / f"{name}.safetensors", {"ckpt_tools": made})
    shown = run("inspect", tmp_path, terminal=True, TERM="xterm", NO_COLOR="1").out
    assert "\x1b" not in shown
    assert r"by ckpt \x1b]0;title\x07\nWrote it" in shown


def test_a_narrow_terminal_has_the_fault_of_a_checkpoint_too() -> None:
    table = Table("checkpoint", ("optimizer", "size"))
    table.add("step-000001.pth", "1.23 GB", "2.34 GB")
    table.add("step-000002.pth", "", "2.34 GB", drawn="truncated")
    assert "  truncated" in table.lines(24, stream())


@pytest.mark.parametrize("sign", ["\ufe0f", "\u0e34", "\u0301", "\u20dd"])
def test_a_mark_on_a_letter_takes_no_column(sign: str) -> None:
    table = Table("name", ("n",))
    table.add(f"a{sign}", "1")
    table.add("abcd", "2")
    assert table.lines(None, stream())[1:] == [f"a{sign}     1", "abcd  2"]
