"""Shell completion: in real shells, with the script that `--show-completion` gives them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runner import PATIENCE, environment, run

from ckpt_tools.jobs.option_groups import Options
from ckpt_tools.jobs.options import AveragedOutput, ConvertedOutput, Matching, Recalibration, Selection, Summing
from ckpt_tools.series.rules.option import Option
from ckpt_tools.series.schedules import Schedule

IN_BASH = """
eval "$(ckpt --show-completion)"
complete -p ckpt > /dev/null || exit 1
for line in "ckpt avg --mode e" "ckpt re" "ckpt diff --sta"; do
    COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _ckpt_completion ckpt; echo "${COMPREPLY[@]}"
done
"""
# zsh's own functions for completion work only while a person types.
IN_ZSH = """
compdef() { }
_arguments() { print -r -- ${(Q)${(z)1}} }
eval "$(ckpt --show-completion)"
for line in "ckpt avg --mode e" "ckpt re" "ckpt diff --sta"; do
    words=(${=line}); CURRENT=${#words}; _ckpt_completion
done
"""
IN_FISH = """
ckpt --show-completion | source
for line in "ckpt avg --mode e" "ckpt re" "ckpt diff --sta"; complete -C $line; end
"""


@pytest.mark.parametrize(("shell", "script"), [("bash", IN_BASH), ("zsh", IN_ZSH), ("fish", IN_FISH)])
def test_a_shell_completes_commands_options_and_values(shell: str, script: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    plain = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [shell, *plain, "-c", script],
        cwd=tmp_path,
        env=environment(HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for offered in ("ema", "recal-bn", "--state"):
        assert offered in done.stdout
    assert "uniform" not in done.stdout
    assert "inspect" not in done.stdout


def test_the_module_completes_as_the_command_does(tmp_path: Path) -> None:
    variables = {"_CKPT_COMPLETE": "complete_bash", "COMP_WORDS": "ckpt avg --mode e", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_tools"],
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout.split() == ["ema"]


def test_completion_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom ckpt_tools.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules)\n"
    )
    variables = {"_CKPT_COMPLETE": "complete_bash", "COMP_WORDS": "ckpt avg --dtype ", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys\nsys.argv[0] = 'ckpt'\n" + script],
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout.split()[-1] == "False"
    assert "bfloat16" in done.stdout.split()


def offering(*groups: type[Options | Schedule]) -> dict[str, Option]:
    """Return the options that offer words, by name."""
    return {option.name: option for group in groups for option in group.options() if option.words}


OF_AVG = offering(Schedule, Selection, Matching, AveragedOutput, Recalibration, Summing)
LATER = {"device", "dtype", "estimator"}  # what they take depends on more than the option


@pytest.mark.parametrize("name", sorted({*OF_AVG} - LATER))
def test_every_value_that_is_offered_is_taken(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is refused for itself; that it does not go with these files or other options is another matter."""
    monkeypatch.chdir(tmp_path)
    for i in (1, 2):
        torch.save({"state_dict": {"w": torch.full((2,), float(i))}, "epoch": i}, f"c-{i}.pth")
    option = f"--{name.replace('_', '-')}"
    mode = {"shape": "decay", "warmup": "ema", "by": "ema"}.get(name)
    more = ["--mode", mode] if mode else []
    unknown = run("avg", "c-1.pth", "c-2.pth", option, "nonsense", *more, "--dry-run").err
    for word in OF_AVG[name].words:
        message = run("avg", "c-1.pth", "c-2.pth", option, word, *more, "--dry-run").err
        assert message.replace(word, "") != unknown.replace("nonsense", "")


@pytest.mark.parametrize("layout", offering(ConvertedOutput)["to"].words)
def test_layouts_are_offered_that_are_written(layout: str) -> None:
    assert f"{layout} " in run("convert", "--list").out
