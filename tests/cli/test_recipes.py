"""The recipes: the page runs from top to bottom."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from cli_runner import run
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
BLOCKS = re.findall(r"^```(python|)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_recipes_run_from_a_training_to_final_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "fixtures" / "digits", tmp_path / "digits")
    shutil.copy(ROOT / "fixtures" / "digits_net.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = []
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "recipes.md", "exec"), {})  # noqa: S102 - our own page
            continue
        for line in text.splitlines():
            command, *words = line.split()
            assert command == "ckpt"
            done = run(*words)
            assert done.code in ((0, 1) if words[0] == "diff" else (0,)), done.err
            shown.append(words[0])
    assert shown == ["look", "sweep", "avg", "recal-bn", "tune", "diff", "inspect", "convert"]
    weights = torch.load("tuned.pth")["state_dict"]
    final = load_file("final.safetensors")
    assert final.keys() == weights.keys()
    assert all(torch.equal(final[name], weights[name]) for name in final)
