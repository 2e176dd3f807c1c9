"""Ultralytics: checkpoints hold pickled modules, whose tensors are read without their code."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Weights, differences, load, save, weights_of
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import ModelEMA, convert_optimizer_state_dict_to_fp16, strip_optimizer

import ckpt_tools


def model() -> DetectionModel:
    made = DetectionModel("yolo11n.yaml", nc=2, verbose=False)
    made.args = get_cfg()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`last.pt` as the trainer's save_model makes it, and the stripped one that a finished run leaves."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights")
    raw = model()
    ema = ModelEMA(raw)
    for _ in range(2):
        with torch.no_grad():
            for parameter in raw.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        ema.update(raw)
    ema.update_attr(raw, include=["yaml", "nc", "args", "names", "stride"])
    half = copy.deepcopy(ema.ema).half()
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.1)
    checkpoint = {
        "epoch": 3,
        "best_fitness": 0.5,
        "model": None,
        "ema": half,
        "updates": ema.updates,
        "modelopt": None,
        "optimizer": convert_optimizer_state_dict_to_fp16(copy.deepcopy(optimizer.state_dict())),
        "scaler": {},
        "train_args": vars(raw.args),
        "version": "8.4.190",
    }
    save(path / "last.pt", checkpoint)
    strip_optimizer(path / "last.pt", s=str(path / "best.pt"))
    # YOLOv5 and older versions keep both.
    save(path / "both.pt", {**checkpoint, "model": copy.deepcopy(raw).half()})
    save(path / "expected-ema.pth", weights_of(half))
    save(path / "expected-raw.pth", weights_of(copy.deepcopy(raw).half()))
    return path


def expected(folder: Path, which: str) -> Weights:
    return load(folder / f"expected-{which}.pth")


@pytest.mark.shows("ultralytics", "read EMA")
def test_the_average_of_a_running_training_is_read(folder: Path) -> None:
    checkpoint = ckpt_tools.open_checkpoint(folder / "last.pt")
    assert (checkpoint.state.which, checkpoint.state.layout) == ("ema", "ultralytics")
    assert not differences(checkpoint, expected(folder, "ema"))
    with pytest.raises(ckpt_tools.CkptError, match="no raw weights"):
        ckpt_tools.open_checkpoint(folder / "last.pt", state="raw")


@pytest.mark.shows("ultralytics", "read EMA")
def test_the_weights_of_a_finished_training_are_read(folder: Path) -> None:
    assert not differences(ckpt_tools.open_checkpoint(folder / "best.pt"), expected(folder, "ema"))


@pytest.mark.shows("ultralytics", "read raw")
@pytest.mark.shows("ultralytics", "read EMA")
def test_both_modules_of_an_older_file_are_read(folder: Path) -> None:
    for which in ("raw", "ema"):
        assert not differences(ckpt_tools.open_checkpoint(folder / "both.pt", state=which), expected(folder, which))


@pytest.mark.shows("ultralytics", "read EMA")
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_nothing_of_the_library_is_imported(folder: Path, name: str) -> None:
    program = (
        "import json, sys; sys.modules['ultralytics'] = None; import ckpt_tools;"
        "c = ckpt_tools.open_checkpoint(sys.argv[1]);"
        "print(json.dumps([list(c), float(c['model.0.conv.weight'].double().sum()), 'ultralytics.nn' in sys.modules]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(folder / name)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    names, total, imported = json.loads(run.stdout)
    average = expected(folder, "ema")
    assert names == list(average)
    assert total == average["model.0.conv.weight"].double().sum().item()
    assert not imported


@pytest.mark.shows("plain", "write")
@pytest.mark.shows("plain", "library loads")
@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_a_plain_conversion_loads_into_the_model(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    ckpt_tools.convert(folder / "last.pt", to="plain", dtype="float32", out=out)
    again: Any = model()
    again.load_state_dict({name: tensor for name, tensor in ckpt_tools.open_checkpoint(out).items()})
    wanted = {n: t.float() if t.is_floating_point() else t for n, t in expected(folder, "ema").items()}
    assert not differences(again.state_dict(), wanted)


@pytest.mark.shows("ultralytics", "read EMA")
def test_runs_are_averaged_without_the_library(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "averaged.safetensors"
    ckpt_tools.average([folder / "last.pt", folder / "both.pt"], state="ema", order="given", out=out)
    assert not differences(ckpt_tools.open_checkpoint(out), expected(folder, "ema"))
