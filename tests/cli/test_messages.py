"""Messages: the library names parameters, the command line options; each in one place."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runner import run

import ckpt_tools
from ckpt_tools.cli.arguments import spelled
from ckpt_tools.errors import UsageError

PACKAGE = Path(ckpt_tools.__file__).parent
LIBRARY = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "cli"]
FUNCTIONS = {name: function for name in ckpt_tools.__all__ if inspect.isfunction(function := getattr(ckpt_tools, name))}
PARAMETERS = {name for function in FUNCTIONS.values() for name in inspect.signature(function).parameters}


def texts(path: Path) -> Iterator[str]:
    """Strings of a module but for docstrings, with a dot for what an f-string fills in."""
    tree = ast.parse(path.read_text())
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts | docs:
            yield node.value


def test_library_spells_no_option() -> None:
    assert len(LIBRARY) > 60
    for path in LIBRARY:
        found = re.findall(r"(?<![-\w])--[a-z{][\w-]*|(?<![-\w])-o\b", path.read_text())
        assert not found, f"{path}: {found}"


def test_library_messages_mark_only_public_functions_and_parameters() -> None:
    marks = 0
    for path in LIBRARY:
        for text in texts(path):
            for function, name in re.findall(r"`(?:(\w+)\()?(\w+)(?:=[^`]*)?`", text):
                assert name in PARAMETERS, f"{path}: `{name}` in {text!r}"
                assert not function or name in inspect.signature(FUNCTIONS[function]).parameters
                marks += 1
            for function in re.findall(r"`(\w+)\(\.\.\.\)`", text):
                assert function in FUNCTIONS, f"{path}: `{function}(...)` in {text!r}"
                marks += 1
    assert marks > 80


def test_library_messages_name_no_command_that_is_a_function() -> None:
    for path in LIBRARY:
        for text in texts(path):
            assert not re.search(r"\bckpt (avg|convert|diff|fix-prefix|recal-bn|strip)\b", text), f"{path}: {text!r}"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`threads=0`: must be", "--threads 0: must be"),
        ("Pass `force=True` to", "Pass --force to"),
        ("or add `normalize=False`.", "or add --no-normalize."),
        ("another name with `out`.", "another name with -o."),
        ("`out=''`: there", "-o '': there"),
        ("`max_shard_size` needs a folder", "--max-shard-size needs a folder"),
        ("Use `keys='intersection'` to", "Use --keys intersection to"),
        ("`data='my photos'`: no", "--data 'my photos': no"),
        ("goes with `eval_data`.", "goes with --eval."),
        ("first: `convert(to='plain')`.", "first: ckpt convert --to plain."),
        ("first: `fix_prefix(...)`.", "first: ckpt fix-prefix."),
        ("off: `fix_prefix(strip='module.')`", "off: ckpt fix-prefix --strip module."),
        ("off: `fix_prefix(strip=['model.'])`.", "off: ckpt fix-prefix --strip model.."),
        ("`add=['a.', 'b c.']`: one", "--add a. --add 'b c.': one"),
        ("`model_kwargs={'num_classes': 10, 'act': 'a b'}`", "--model-kwargs num_classes=10 --model-kwargs 'act=a b'"),
        ("`decay=1.5`: must", "--decay 1.5: must"),
        ("`device='cuda:9'`: there", "--device cuda:9: there"),
        ("Save the model's `state_dict()`", "Save the model's `state_dict()`"),
    ],
)
def test_spelled_turns_parameters_into_options(message: str, shown: str) -> None:
    assert spelled(message) == shown


def test_average_and_avg_report_a_bad_value_alike(runs: list[Path], here: Path) -> None:
    with pytest.raises(UsageError, match=r"^`threads=0`: must be a whole number from 1 to 256\.$"):
        ckpt_tools.average(runs, threads=0)
    assert run("avg", *runs, "--threads", "0").err == "Error: --threads 0: must be a whole number from 1 to 256.\n"


def test_avg_notes_name_options_on_the_screen_and_in_json(runs: list[Path], here: Path) -> None:
    result = run("avg", *runs, "--last", "99", "--json")
    note = "--last 99: there are only 12; all are used."
    assert note in result.err.splitlines()
    assert f'"{note}"' in result.out
    assert "`last=99`: there are only 12; all are used." in ckpt_tools.average(runs, last=99, dry_run=True).notes
