"""The schemas of --json: one for each command, closed, and true of what it prints."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_network
import torch
from cli_runner import run
from jsonschema import Draft202012Validator

from ckpt_tools.cli.words import COMMANDS

ROOT = Path(__file__).parents[1]
SCHEMAS = ROOT / "docs/schemas"
NET, LABELLED, SCORE = (f"{small_network.__file__}:{name}" for name in ("Net", "labelled", "score"))
BATCHES = ("--batch-size", "8", "--workers", "0", "--device", "cpu")
RUNS: dict[str, list[tuple[str, ...]]] = {
    "avg": [
        ("1.pth", "2.pth", "3.pth", "--mode", "ema", "--decay", "0.5", "--hash"),
        ("1.pth", "2.pth", "--recal-bn", LABELLED, "--model", NET, *BATCHES, "-o", "b.pth"),
        ("1.pth", "nan.pth", "--dry-run", "-o", "c.pth"),
    ],
    "look": [("1.pth", "2.pth", "3.pth")],
    "sweep": [("1.pth", "2.pth", "3.pth", "--last", "2,3", "--eval-function", SCORE, "--in-memory", "-o", "s.pth")],
    "convert": [("1.pth", "--to", "timm-ema", "-o", "t.pth"), ("--list",)],
    "fix-prefix": [("wrapped.pth", "-o", "w.pth"), ("1.pth", "--dry-run")],
    "inspect": [("1.pth",), ("1.pth", "--tensors"), ("averaged.pth",), (".",)],
    "diff": [("1.pth", "2.pth"), ("1.pth", "nan.pth"), ("1.pth", "wrapped.pth")],
    "verify": [("1.pth", "averaged.pth", "nan.pth")],
    "strip": [("1.pth",), ("2.pth", "3.pth"), ("gone.pth",)],
    "recal-bn": [("1.pth", "--model", NET, "--data", LABELLED, "--eval", LABELLED, *BATCHES)],
    "tune": [
        ("1.pth", "--model", NET, "--data", LABELLED, "--eval", LABELLED, "--epochs", "1", "--lr", "0.1", *BATCHES)
    ],
    "eval": [
        ("1.pth", "averaged.pth", "--eval-function", SCORE, "--in-memory"),
        ("1.pth", "2.pth", "--data", LABELLED, "--model", NET, *BATCHES),
    ],
    "card": [("averaged.pth", "-o", "card.md")],
    "clean": [(".",)],
}
"""Command to what it is run with, after one another in one folder."""


@pytest.fixture
def checkpoints(here: Path, save: Callable[..., Path]) -> None:
    for i in (1, 2, 3):
        optimizer = {"state": {0: {"momentum_buffer": torch.ones(8)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        save(f"{i}.pth", {"state_dict": small_network.trained(i), "epoch": i, "optimizer": optimizer})
    save(
        "nan.pth",
        {
            "state_dict": {
                n: t * torch.nan if t.dtype.is_floating_point else t for n, t in small_network.trained(1).items()
            },
            "epoch": 9,
        },
    )
    save("wrapped.pth", {f"module.{name}": tensor for name, tensor in small_network.trained(2).items()})
    (here / ".averaged.pth.0123abcd.partial").write_bytes(b"left by a job that was killed")


def test_the_schemas_are_those_of_the_reports() -> None:
    made = runpy.run_path(str(ROOT / "docs/schemas.py"))["schemas"]()
    assert {path.name: path.read_text() for path in SCHEMAS.iterdir()} == made, "run make generated"


def test_every_command_has_a_schema() -> None:
    assert {path.stem for path in SCHEMAS.iterdir()} == {*COMMANDS, "convert-list", "error"}


@pytest.mark.usefixtures("checkpoints")
def test_what_every_command_prints_is_as_its_schema_says() -> None:
    for command, runs in RUNS.items():
        for arguments in runs:
            result = run(command, *arguments, "--json")
            assert result.out, result.err
            data = json.loads(result.out)
            other = "convert-list" if "--list" in arguments else "error" if "error" in data else command
            validator = _validator(other)
            validator.validate(data)
            for each in data if isinstance(data, list) else [data]:
                each["a key without a schema"] = 1
                assert not validator.is_valid(data)
    assert {*RUNS} == {*COMMANDS}


@pytest.mark.parametrize("path", sorted(SCHEMAS.iterdir()), ids=lambda path: path.stem)
def test_an_object_of_a_schema_has_no_key_without_description(path: Path) -> None:
    waiting: list[Any] = [json.loads(path.read_text())]
    while waiting:
        node = waiting.pop()
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if isinstance(node, dict) and node.get("type") == "object" and "properties" in node:
            assert node["additionalProperties"] is False
            assert {*node["required"]} <= {*node["properties"]}


def _validator(name: str) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)
