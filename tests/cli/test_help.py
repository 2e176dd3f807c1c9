"""Help: quick, in groups, ending in an example that works; and usage errors that point to it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import PATIENCE, environment, run

import ckpt_tools
from ckpt_tools.cli.commands import made
from ckpt_tools.cli.words import COMMANDS

LAST_EXAMPLE = re.compile(r"^Example: (ckpt .+)$", re.MULTILINE)

# Runs `ckpt` with some arguments and says whether torch came in.
PROBE = """
import sys
from ckpt_tools.cli import main
try:
    main()
except SystemExit as end:
    print("exit", end.code or 0, "torch" in sys.modules)
"""


def help_text(command: str) -> str:
    return str(made(command).help)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["avg", "--help"], 0),
        (["avg", "--nope"], 2),
        (["avg", "gone.pth"], 1),
        (["avg", "a.pth", "--decay", "2", "--mode", "ema"], 2),
    ],
)
def test_commands_without_torch_do_not_import_it(tmp_path: Path, arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f"exit {code} False"


@pytest.mark.parametrize(
    ("arguments", "jobs"),
    [
        (["avg", "--help"], set()),
        (["avg", "RUN", "--threads", "two"], set()),
        (["avg", "RUN", "-o", "a.pth", "--force", "--mode", "ema", "--decay", "0.9"], {"average"}),
        (["fix-prefix", "RUN", "-o", "b.pth", "--add", "model."], {"fix_prefix"}),
        (["strip", "RUN", "-o", "c.pth"], {"strip"}),
    ],
)
def test_commands_import_only_what_they_need(
    runs: list[Path], tmp_path: Path, arguments: list[str], jobs: set[str]
) -> None:
    """pydantic alone, which Typer reads values with, takes as long to import as all that an average needs."""
    script = PROBE.replace('"torch" in sys.modules)', "sorted(sys.modules))")
    given = [str(runs[0]) if text == "RUN" else text for text in arguments]
    done = subprocess.run(
        [sys.executable, "-c", script, *given],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("exit"))
    loaded = set(re.findall(r"'([\w.]+)'", line))
    assert not loaded & {"pydantic", "rich", "torch", "numpy"}
    verbs = {"average", "convert", "diff", "fix_prefix", "inspect", "recalibrate", "strip"}
    assert {name for name in verbs if f"ckpt_tools.jobs.{name}" in loaded} == jobs
    assert (
        len([name for name in loaded if re.fullmatch(r"ckpt_tools\.cli\.(avg|convert|diff|fix_prefix|strip)", name)])
        == 1
    )


def test_help_shows_options_in_groups_with_their_defaults() -> None:
    lines = run("avg", "--help").out.splitlines()
    assert "avg [OPTIONS]" in lines[0]
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        "Arguments:",
        "How much each checkpoint counts:",
        "Which checkpoints:",
        "Which weights:",
        "From an average that is there:",
        "Output:",
        "BatchNorm statistics (recal-bn):",
        "A job in parts:",
        "Running:",
        "Options:",
    ]
    text = " ".join(" ".join(lines).split())
    assert "--gpu-memory SIZE Memory to use on each GPU, such as 2GB. [default: (1GB)]" in text
    assert "EMA decay per checkpoint (per training step with --per-step). [default: (such that" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "1.5"], "Invalid value for '--threads'"),
        (["--decay", "much"], "Invalid value for '--decay'"),
        (["--threads", ""], "Invalid value for '--threads'"),
    ],
)
def test_commands_leave_messages_about_bad_values_to_typer(
    arguments: list[str], message: str, runs: list[Path]
) -> None:
    result = run("avg", runs[0], *arguments)
    assert (result.code, message in result.err) == (2, True)


@pytest.mark.parametrize("words", [["--help"], ["avg", "--lats", "5"], ["diff", "a.pth"]])
def test_the_module_speaks_as_the_command_does(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_tools", *words],
        cwd=tmp_path,
        env=environment(COLUMNS="80"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    expected = run(*words)
    assert (done.returncode, done.stdout, done.stderr) == (expected.code, expected.out, expected.err)
    assert "__main__" not in done.stdout + done.stderr


def test_version_is_that_of_the_package() -> None:
    result = run("--version")
    assert (result.code, result.out) == (0, f"ckpt-tools {ckpt_tools.__version__}\n")


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.code == 0
    assert all(re.search(rf"\b{command}\b", result.out) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_ends_in_an_example(command: str) -> None:
    assert LAST_EXAMPLE.fullmatch(help_text(command).strip().splitlines()[-1])
    result = run(command, "--help")
    assert result.code == 0
    assert f"Example: ckpt {command}" in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_docs_have_the_example_of_each_command(command: str) -> None:
    example = LAST_EXAMPLE.findall(help_text(command))[-1]
    docs = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert example in docs


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_narrow_terminal(command: str) -> None:
    result = run(command, "--help", columns=40)
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["look"], "PATH is missing. Example: ckpt look runs/."),
        (["diff", "a.pth"], "B is missing. Example: ckpt diff averaged.pth averaged-bn.pth."),
        (["avg", "a.pth", "--lats", "3"], "No such option: --lats"),
        (["avg", "a.pth", "--threads", "x"], "Invalid value for '--threads'"),
        (["average", "a.pth"], "No such command 'average'"),
        (["diff", "a.pth", "b.pth", "c.pth"], "unexpected extra argument"),
    ],
)
def test_commands_exit_with_2_and_name_the_help_on_bad_usage(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert message in re.sub(r"[\s│]+", " ", result.err)
    assert "--help" in result.err
    assert "Traceback" not in result.err
