"""Pages that run: the commands and the Python of the documentation, from top to bottom, on the fixtures."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from cli_runner import run
from safetensors.torch import load_file

import ckpt_tools
from ckpt_tools import errors

RUNNING = sorted(
    str(path.relative_to(pages.DOCS))
    for path in pages.DOCS.rglob("*.md")
    if pages.blocks(str(path.relative_to(pages.DOCS)))
)


@pytest.fixture(autouse=True)
def _own_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page finds the network of another one, whose folder is gone."""
    monkeypatch.delitem(sys.modules, "digits_net", raising=False)


def run_page(page: str, folder: Path) -> list[list[str]]:
    """Run the blocks of a page in a folder, which is the current one; return the commands."""
    pages.lay_out(page, folder)
    names: dict[str, Any] = {}
    done = []
    for block in pages.blocks(page):
        if block.language == "python":
            exec(compile(block.text, page, "exec"), names)  # noqa: S102 - our own page
            continue
        for words in block.commands():
            result = run(*words)
            assert result.code in ((0, 1) if words[0] == "diff" else (0,)), f"{page}: {words}: {result.err}"
            done.append(words)
    return done


def test_pages_that_run_are_the_start_the_recipes_and_the_reference() -> None:
    recipes = [f"recipes/{path.name}" for path in (pages.DOCS / "recipes").glob("*.md")]
    assert set(RUNNING) == {"index.md", "recipes.md", "exact.md", "python.md", "batchnorm.md", *recipes}
    assert len(recipes) == 6


@pytest.mark.parametrize("page", [page for page in RUNNING if page != "recipes.md"])
def test_a_page_runs_from_top_to_bottom(page: str, here: Path) -> None:
    before = {*here.iterdir()}
    commands = run_page(page, here)
    written = [words[words.index("-o") + 1] for words in commands if "-o" in words and "--dry-run" not in words]
    assert all(Path(name).exists() for name in written)
    assert {*here.iterdir()} > before  # a page that writes nothing shows little


def test_recipes_run_from_a_training_to_final_weights(here: Path) -> None:
    shown = [words[0] for words in run_page("recipes.md", here)]
    assert shown == ["look", "sweep", "avg", "recal-bn", "tune", "diff", "inspect", "convert"]
    weights = torch.load("tuned.pth")["state_dict"]
    final = load_file("final.safetensors")
    assert final.keys() == weights.keys()
    assert all(torch.equal(final[name], weights[name]) for name in final)


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: ckpt_tools\.(.+)$", (pages.DOCS / "python.md").read_text(), re.MULTILINE)
    public = {getattr(ckpt_tools, name) for name in ckpt_tools.__all__ if name not in ("__version__", *vars(errors))}
    homes = [name.rpartition(".") for name in listed if name != "errors"]
    found = {getattr(__import__(f"ckpt_tools.{home}", fromlist=[name]), name) for home, _, name in homes}
    assert found == public


def test_python_that_does_not_run_here_is_python() -> None:
    """Lines that need another library, such as its Trainer, are only parsed."""
    texts = [path.read_text() for path in sorted(pages.DOCS.rglob("*.md"))]
    found = [each for text in texts for each in re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    assert len(found) > 3
    assert all(ast.parse(each).body for each in found)
