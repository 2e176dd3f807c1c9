"""Callbacks that average at the end of a training: real trainings, and the recipes of the docs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_fit import Module, fit, images
from safetensors.torch import load_file
from small import differences, mean
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ckpt_tools.errors import CkptError
from ckpt_tools.integrations import lightning as for_lightning
from ckpt_tools.integrations import transformers as for_transformers

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
BLOCKS = [
    next(
        block
        for block in re.findall(r"^```py\n(.*?)^```$", (RECIPES / page).read_text(), re.MULTILINE | re.DOTALL)
        if "AverageCheckpoints" in block
    )
    for page in ("lightning.md", "transformers.md")
]
BOTH = pytest.mark.parametrize("library", ["lightning", "transformers"])


def text_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def texts() -> list[dict[str, list[int]]]:
    return [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]} for _ in range(8)]


def train(callback: Any, folder: Path) -> None:
    arguments = TrainingArguments(str(folder), max_steps=6, save_steps=2, report_to=[], use_cpu=True)
    Trainer(text_model(), arguments, train_dataset=texts(), callbacks=[callback]).train()


RUN: dict[str, tuple[Any, Callable[..., None], str]] = {
    "lightning": (for_lightning.AverageCheckpoints, fit, "averaged.ckpt"),
    "transformers": (for_transformers.AverageCheckpoints, train, "averaged"),
}


@pytest.mark.parametrize("block", BLOCKS, ids=["lightning", "transformers"])
def test_a_recipe_averages_the_last_two_and_loads_them(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "transformers" in block
    names: dict[str, Any] = {"model": text_model() if text else Module(), "data": texts() if text else images()}
    exec(compile(block.replace("report_to", "use_cpu=True, report_to"), "recipes.md", "exec"), names)
    if text:
        saved = [load_file(f"run/checkpoint-{step}/model.safetensors") for step in (4, 6)]
    else:
        saved = [torch.load(f"run/epoch={epoch}.ckpt", weights_only=False)["state_dict"] for epoch in (1, 2)]
    found = {name: tensor for name, tensor in names["model"].state_dict().items() if name in saved[0]}
    assert found.keys() == saved[0].keys()
    assert not differences(found, mean(*saved))


@BOTH
def test_an_error_is_a_warning_unless_it_is_asked_for(library: str, tmp_path: Path) -> None:
    make, run, out = RUN[library]
    callback = make(weights=[1, 2])  # for three checkpoints
    with pytest.warns(UserWarning, match=r"The checkpoints of this training were not averaged: .*weights"):
        run(callback, tmp_path / "a")
    assert callback.report is None
    assert not (tmp_path / "a" / out).exists()
    with pytest.raises(CkptError, match="weights"):
        run(make(weights=[1, 2], strict=True), tmp_path / "b")


@BOTH
def test_an_option_that_average_lacks_is_refused_before_the_training(library: str) -> None:
    with pytest.raises(TypeError, match="dekay"):
        RUN[library][0](dekay=0.9)


@BOTH
def test_an_output_that_is_there_stays_unless_it_may_be_replaced(library: str, tmp_path: Path) -> None:
    make, run, out = RUN[library]
    first = make()
    run(first, tmp_path)
    assert first.report is not None
    assert len(first.report.inputs) == 3
    target = tmp_path / out
    written = (target / "model.safetensors" if target.is_dir() else target).stat().st_ino
    for path in tmp_path.iterdir():  # as a fit that goes on in this folder overwrites them
        if path != target and path.is_file():
            path.unlink()
    with pytest.warns(UserWarning, match="exists"):
        run(make(), tmp_path)
    again = make(force=True)
    run(again, tmp_path)
    assert again.report is not None
    assert again.report.written
    assert (target / "model.safetensors" if target.is_dir() else target).stat().st_ino != written


def test_several_folders_of_checkpoints_are_asked_for(tmp_path: Path) -> None:
    savers = [
        ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1, every_n_epochs=n)
        for name, n in (("a", 2), ("b", 1))
    ]
    for dirpath, count in ((None, 0), (tmp_path / "b", 3)):
        callback = for_lightning.AverageCheckpoints(dirpath, force=True)
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[*savers, callback],
        )  # fmt: skip
        if dirpath is None:
            with pytest.warns(UserWarning, match="there are 2 folders of ModelCheckpoint, not one: give the one"):
                trainer.fit(Module(), images())
            for each in tmp_path.glob("*/*.ckpt"):
                each.unlink()
        else:
            trainer.fit(Module(), images())
            assert callback.report is not None
            assert len(callback.report.inputs) == count


def test_a_process_that_is_not_the_first_averages_nothing(tmp_path: Path) -> None:
    callback = for_transformers.AverageCheckpoints(strict=True)
    callback.on_train_end(
        SimpleNamespace(output_dir=tmp_path), SimpleNamespace(is_world_process_zero=False), SimpleNamespace()
    )  # type: ignore[arg-type]
    assert callback.report is None


def test_the_first_of_two_processes_averages_alone(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from pathlib import Path\n"
        "from lightning_fit import fit\n"
        "from ckpt_tools.integrations.lightning import AverageCheckpoints\n"
        "callback = AverageCheckpoints(strict=True)\n"
        f"fit(callback, Path({str(tmp_path / 'run')!r}), strategy='ddp', devices=2)\n"
        "import torch\n"
        f"Path({str(tmp_path)!r}, f'report-{{torch.distributed.get_rank()}}').write_text(str(callback.report))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    here = Path(__file__).parent
    done = subprocess.run(
        torchrun,
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}:{here.parent / 'support'}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "report-0").read_text().startswith("AverageReport(")
    assert (tmp_path / "report-1").read_text() == "None"
    saved = [
        torch.load(path, weights_only=False)["state_dict"] for path in sorted((tmp_path / "run").glob("epoch=*.ckpt"))
    ]
    averaged = torch.load(tmp_path / "run" / "averaged.ckpt", weights_only=False)["state_dict"]
    assert not differences(averaged, mean(*saved))
