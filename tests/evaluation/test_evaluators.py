"""Evaluators: commands, functions and images, and all that can go wrong with them."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.evaluation.evaluators import Command, Function, Scores, parsed

Save = Callable[..., Path]
CKPT = Path("a folder/it's.pth")


def scored(here: Path, code: str, limit: float | None = None) -> Scores:
    """Run Python code as a command; `path` is the checkpoint in it."""
    (here / "evaluate.py").write_text(f"import sys, json\npath = sys.argv[1]\n{code}\n")
    return Command(f"{sys.executable} evaluate.py {{ckpt}}", limit).score(CKPT, here / "log")


@pytest.mark.parametrize(
    ("code", "metrics"),
    [
        ("print('loading'); print(81.25)", {"metric": 81.25}),
        ("print(-3)", {"metric": -3.0}),
        ("print(json.dumps({'top1': 81.5, 'loss': 0.5, 'model': 'net', 'ok': True}))", {"top1": 81.5, "loss": 0.5}),
        ("print(json.dumps({'length': len(path)}), end='')", {"length": float(len(str(CKPT)))}),
        ("print(1.5); print(); print('  ')", {"metric": 1.5}),
    ],
)
def test_the_last_line_of_a_command_has_the_metrics(here: Path, code: str, metrics: dict[str, float]) -> None:
    assert scored(here, code).metrics == metrics


def test_what_a_command_prints_is_kept(here: Path) -> None:
    scored(here, "print('loading'); print('careful', file=sys.stderr); print(1)")
    assert (here / "log").read_text() == "loading\n1\n"
    assert (here / "log.err").read_text() == "careful\n"


@pytest.mark.parametrize(
    "command",
    [
        "cat {ckpt}",
        "cat '{ckpt}'",
        'cat "{ckpt}"',
        "cat ./'{ckpt}'",
        """PYTHON -c "import sys; print(open(sys.argv[1]).read())" {ckpt}""",
        """PYTHON -c 'import sys; print(open("it is \\" \\\\"[:0] + sys.argv[1]).read())' "{ckpt}" """,
        'echo "it\'s" \\" \\\' >/dev/null; cat "{ckpt}"',
    ],
)
def test_a_path_is_quoted_as_its_place_in_the_command_needs(here: Path, command: str) -> None:
    for name in ("a.pth", "it's $HOME `x` \\ \".pth"):
        Path(name).write_text("81.25")
        assert Command(command.replace("PYTHON", sys.executable)).score(Path(name), here / "log").metrics == {
            "metric": 81.25
        }


def test_quotes_of_a_language_inside_those_of_the_shell_stay(here: Path) -> None:
    command = f"""{sys.executable} -c "print(len('{{ckpt}}'))" """
    assert Command(command).score(Path("abc.pth"), here / "log").metrics == {"metric": 7.0}


def test_values_of_samples_are_read(here: Path) -> None:
    found = scored(here, "print(json.dumps({'loss': 2.0, 'per_sample': {'loss': [1, 2, 3]}}))")
    assert found.samples["loss"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("sys.exit('no such data')", r"exit code 1\): no such data"),
        ("sys.exit(3)", r"exit code 3\): it printed no error"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9|exit code 137"),
        ("print('accuracy: 81')", "'accuracy: 81' is neither a number nor JSON"),
        ("pass", "it printed nothing"),
        ("print('nan')", "neither a number nor JSON"),
        ("print('NaN')", "nan for 'metric'"),
        ("print(json.dumps({'loss': float('inf'), 'top1': 3}))", "inf for 'loss'"),
        ("print(json.dumps({'model': 'net'}))", "there is no number"),
        ("print('[1, 2]')", "there is no number"),
        ("print(json.dumps({'loss': 2.0, 'per_sample': {'loss': [1, 9]}}))", "whose mean is 5"),
        ("print(json.dumps({'loss': 2.0, 'per_sample': {'top1': [1, 9]}}))", "none of the metrics"),
        ("print(json.dumps({'loss': 2.0, 'per_sample': {'loss': ['x']}}))", "no list of finite numbers"),
        ("print(json.dumps({'loss': 2.0, 'top1': 3, 'per_sample': [1]}))", "as a list for 2 metrics"),
    ],
)
def test_a_command_without_a_number_is_one_clear_message(here: Path, code: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        scored(here, code)
    assert str(here / "log") in str(error.value)


def test_a_command_is_ended_at_its_limit_with_all_that_it_started(here: Path) -> None:
    code = "import subprocess, time; subprocess.Popen(['sleep', '600']).wait()"
    began = time.monotonic()
    with pytest.raises(DataError, match="more than 0.5 s"):
        scored(here, code, limit=0.5)
    assert time.monotonic() - began < 60
    running = [p for p in Path("/proc").glob("[0-9]*/cmdline") if _cmdline(p) == b"sleep\0600\0"]
    assert running == []


def _cmdline(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("text", "limit", "says"),
    [
        ("python eval.py", None, "write {ckpt} where"),
        ("eval {ckpt}", 0, "above 0"),
        ("eval {ckpt}", math.nan, "above 0"),
    ],
)
def test_impossible_commands_are_refused(text: str, limit: float | None, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Command(text, limit)


def function(here: Path, body: str) -> str:
    (here / "own_scores.py").write_text(f"import torch\ndef score(given):\n    {body}\n")
    sys.modules.pop("own_scores", None)
    return "own_scores.py:score"


def test_a_function_takes_the_path_or_the_weights(save: Save, here: Path) -> None:
    path = save("w.pth", {"w": torch.full((3,), 2.0)})
    assert Function(function(here, "return len(given)")).score(path, here / "log").metrics == {"metric": len(str(path))}
    in_memory = Function(function(here, "return {'sum': given['w'].sum()}"), in_memory=True)
    assert in_memory.score(path, here / "log").metrics == {"sum": 6.0}


def test_a_function_that_fails_is_one_clear_message(here: Path) -> None:
    with pytest.raises(DataError, match=r"own_scores\.py:score fails \(KeyError: 'data'\)"):
        Function(function(here, "raise KeyError('data')")).score(CKPT, here / "log")
    with pytest.raises(DataError, match="returns 'None', in which there is no number"):
        Function(function(here, "return None")).score(CKPT, here / "log")
    with pytest.raises(UsageError, match="cannot be imported"):
        Function("nowhere.py:score").score(CKPT, here / "log")


@pytest.mark.parametrize("value", [2.5, np.float32(2.5), torch.tensor(2.5), {"metric": np.array(2.5)}])
def test_numbers_of_libraries_count(value: Any) -> None:
    assert parsed(value).metrics == {"metric": 2.5}


def test_samples_may_be_tensors_and_arrays() -> None:
    for values in (torch.tensor([1.0, 2.0]), np.array([1, 2]), [1, 2]):
        assert parsed({"loss": 1.5, "per_sample": values}).samples["loss"].tolist() == [1, 2]


def test_evaluators_say_what_their_scores_depend_on() -> None:
    assert json.dumps(Command("x {ckpt}", 3).identity) == '{"command": "x {ckpt}"}'
    assert Function("a.py:f").identity != Function("a.py:f", in_memory=True).identity
