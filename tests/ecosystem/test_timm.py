"""timm: what its CheckpointSaver writes we read, and what we write its loaders read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small import Weights, differences, mean, pair, save, train, weights_of
from timm.models import load_checkpoint, resume_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3, NativeScaler

import ckpt_tools

Run = tuple[Path, list[Weights], list[Weights]]


def network() -> torch.nn.Module:
    return timm.create_model("test_resnet", num_classes=3)


@pytest.fixture(params=[ModelEmaV2, ModelEmaV3], ids=["ModelEmaV2", "ModelEmaV3"])
def run(request: Any, tmp_path: Path) -> Run:
    """Two epochs of timm's own loop: its folder, and the weights and averages as they were at each save."""
    model = network()
    ema = request.param(model, decay=0.8)
    saver = CheckpointSaver(
        model,
        torch.optim.AdamW(model.parameters()),
        args=argparse.Namespace(model="test_resnet", lr=0.1),
        model_ema=ema,
        amp_scaler=NativeScaler("cpu"),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    raws, averages = [], []
    for epoch in range(2):
        train(model, 2, lambda: ema.update(model))
        saver.save_checkpoint(epoch, metric=50.0 + epoch)
        raws.append(weights_of(model))
        averages.append(weights_of(ema.module))
    return tmp_path, raws, averages


@pytest.mark.shows("timm", "read raw")
@pytest.mark.shows("timm", "read EMA")
def test_both_sets_of_a_saver_are_read(run: Run) -> None:
    folder, raws, averages = run
    for name, epoch in (("checkpoint-0", 0), ("checkpoint-1", 1), ("last", 1), ("model_best", 1)):
        path = folder / f"{name}.pth.tar"
        assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), raws[epoch])
        assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), averages[epoch])
        assert ckpt_tools.open_checkpoint(path).state.which == "ema"
        assert ckpt_tools.open_checkpoint(path).state.layout == "timm"


@pytest.mark.shows("timm", "library loads")
@pytest.mark.parametrize("state", ["raw", "ema"])
def test_an_average_loads_into_the_model(run: Run, tmp_path: Path, state: str) -> None:
    folder, raws, averages = run
    out = tmp_path / "out" / "averaged.pth"
    out.parent.mkdir()
    ckpt_tools.average(folder, state=state, out=out)
    expected = mean(*(raws if state == "raw" else averages))
    for use_ema in (True, False):
        model = network()
        load_checkpoint(model, str(out), use_ema=use_ema)
        assert not differences(model.state_dict(), expected)
    model = network()
    resume_checkpoint(model, str(out))
    assert not differences(model.state_dict(), expected)


@pytest.mark.shows("timm", "write")
@pytest.mark.shows("timm", "library loads")
def test_both_sets_load_after_a_conversion(run: Run, tmp_path: Path) -> None:
    _, raws, averages = run
    out = tmp_path / "timm.pth"
    ckpt_tools.convert(pair(tmp_path / "own.pth", raws[1], averages[1]), to="timm", out=out)
    for use_ema, expected in ((False, raws[1]), (True, averages[1])):
        model = network()
        load_checkpoint(model, str(out), use_ema=use_ema)
        assert not differences(model.state_dict(), expected)
    model = network()
    resume_checkpoint(model, str(out))
    assert not differences(model.state_dict(), raws[1])


@pytest.mark.shows("timm", "write")
@pytest.mark.shows("timm", "library loads")
def test_a_checkpoint_of_timm_stays_one_through_conversion(run: Run, tmp_path: Path) -> None:
    folder, raws, averages = run
    out = tmp_path / "timm.pth"
    ckpt_tools.convert(folder / "last.pth.tar", to="timm", out=out)
    for use_ema, expected in ((False, raws[1]), (True, averages[1])):
        model = network()
        load_checkpoint(model, str(out), use_ema=use_ema)
        assert not differences(model.state_dict(), expected)


@pytest.mark.shows("timm-ema", "write")
@pytest.mark.shows("timm-ema", "library loads")
@pytest.mark.shows("timm-ema", "read EMA")
def test_weights_written_as_the_ema_load_as_the_ema(run: Run, tmp_path: Path) -> None:
    _, raws, _ = run
    out = tmp_path / "timm.pth"
    ckpt_tools.convert(save(tmp_path / "plain.pth", raws[0]), to="timm-ema", out=out)
    model = network()
    load_checkpoint(model, str(out), use_ema=True)
    assert not differences(model.state_dict(), raws[0])
    assert not differences(ckpt_tools.open_checkpoint(out, state="ema"), raws[0])


@pytest.mark.shows("timm", "read raw")
def test_an_old_file_with_the_prefix_of_ddp_reads_and_loads_after_conversion(run: Run, tmp_path: Path) -> None:
    _, raws, _ = run
    wrapped = {f"module.{name}": tensor for name, tensor in raws[0].items()}
    old = save(tmp_path / "old.pth.tar", {"epoch": 2, "arch": "test_resnet", "state_dict": wrapped})
    assert not differences(ckpt_tools.open_checkpoint(old), wrapped)
    out = tmp_path / "new.pth"
    ckpt_tools.convert(old, to="timm", out=out)
    model = network()
    load_checkpoint(model, str(out))
    assert not differences(model.state_dict(), raws[0])


@pytest.mark.shows("plain", "read raw")
@pytest.mark.shows("plain", "write")
@pytest.mark.shows("plain", "library loads")
@pytest.mark.parametrize("name", ["plain.pth", "plain.safetensors"])
def test_one_set_written_plainly_loads_into_a_timm_model(run: Run, tmp_path: Path, name: str) -> None:
    folder, _, averages = run
    out = tmp_path / name
    ckpt_tools.convert(folder / "last.pth.tar", to="plain", out=out)
    model = network()
    load_checkpoint(model, str(out))
    assert not differences(model.state_dict(), averages[1])
    assert not differences(ckpt_tools.open_checkpoint(out, state="raw"), averages[1])


@pytest.mark.shows("timm", "read EMA")
@pytest.mark.shows("timm", "library loads")
def test_the_state_of_a_task_is_averaged_with_the_model(tmp_path: Path) -> None:
    """A distillation trains a projection, too, which timm keeps as task_state, and its average as task_state_ema."""
    task_module = pytest.importorskip("timm.task", reason="this timm has no tasks")

    def a_task() -> Any:
        teacher = timm.create_model("test_resnet", num_classes=3)
        task = task_module.FeatureDistillationTask(
            network(), teacher, torch.nn.CrossEntropyLoss(), teacher_feature_dim=7, verbose=False
        )
        task.setup_ema(decay=0.8)
        return task

    task = a_task()
    trained = task.get_trainable_module()
    saver = CheckpointSaver(
        task.get_eval_model(),
        torch.optim.SGD(trained.parameters()),
        task=task,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    sets: dict[bool, list[Weights]] = {False: [], True: []}
    for epoch in range(2):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(torch.randn_like(parameter))
        task.update_ema(step=epoch)
        saver.save_checkpoint(epoch, metric=50.0 + epoch)
        for ema, kept in sets.items():
            module = task.get_trainable_module(ema=ema)
            kept.append(weights_of(module.module if ema else module))
    paths = [tmp_path / f"checkpoint-{epoch}.pth.tar" for epoch in range(2)]
    for state, ema in (("auto", True), ("raw", False)):
        ckpt_tools.average(paths, state=state, out=tmp_path / "out.pth.tar", force=True)
        loaded = a_task()
        task_module.resume_task_checkpoint(loaded, str(tmp_path / "out.pth.tar"), log_info=False)
        assert not differences(weights_of(loaded.get_trainable_module()), mean(*sets[ema]))


def test_an_ema_and_the_raw_weights_of_the_same_files_make_another_ema(tmp_path: Path) -> None:
    """Against a ModelEmaV3 with the wanted decay, which was kept beside the one in the files: 20 updates an epoch."""
    torch.manual_seed(0)
    model, updates, epochs = torch.nn.Linear(4, 3, dtype=torch.float64), 20, 12
    stored, wanted = (ModelEmaV3(model, decay=0.5 ** (1 / (h * updates)), foreach=False) for h in (1, 2))
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters()), model_ema=stored, checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path), max_history=epochs,
    )  # fmt: skip
    for epoch in range(1, epochs + 1):
        for _ in range(updates):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += torch.randn_like(parameter)
            stored.update(model)
            wanted.update(model)
        saver.save_checkpoint(epoch, metric=float(epoch))
    report = ckpt_tools.average(
        f"{tmp_path}/checkpoint-*.pth.tar", mode="posthoc", target="half-life=2",
        profile=["*:state_dict_ema=half-life:1"], out=tmp_path / "a.pth",
    )  # fmt: skip
    assert {entry.state for entry in report.inputs} == {"raw (state_dict)", "ema (state_dict_ema)"}
    assert len(report.inputs) == 2 * epochs
    made = load_weights(tmp_path / "a.pth")
    for name, tensor in wanted.module.state_dict().items():
        apart = (stored.module.state_dict()[name] - tensor).abs().max()
        assert (made[name] - tensor).abs().max() < 0.05 * apart


def load_weights(path: Path) -> Weights:
    content: Weights = torch.load(path, weights_only=True)["state_dict"]
    return content
