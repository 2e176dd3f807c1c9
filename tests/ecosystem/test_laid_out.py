"""Libraries that are not installed here: files laid out, and read back, as their published code does it.

d2go (d2go/modeling/ema.py), DINO (main_dino.py, utils.py), icefall (icefall/checkpoint.py), fairseq (trainer.py,
checkpoint_utils.py, models/ema/ema.py), DiT (train.py, download.py), guided-diffusion (train_util.py), NeMo
(nemo/collections/common/callbacks/ema.py), score_sde (losses.py, utils.py), mmcv 1.x (mmcv/runner/hooks/ema.py),
torchtitan (see there).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small import Net, Weights, differences, load, mean, pair, parameters_of, save, train, weights_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import ckpt_tools


@pytest.fixture
def trained() -> tuple[Net, Net]:
    """A network, and an average of it that differs in parameters and in buffers."""
    model = Net()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    train(model, 3, lambda: average.update_parameters(model))
    return model, average.module


Both = tuple[Net, Net]


def check(path: Path, raw: Weights, ema: Weights, layout: str) -> None:
    assert differences(raw, ema), "the sets must differ to be told apart"
    assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), raw)
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), ema)
    checkpoint = ckpt_tools.open_checkpoint(path)
    assert (checkpoint.state.which, checkpoint.state.layout) == ("ema", layout)


def own(folder: Path, trained: Both) -> Path:
    return pair(folder / "own.pth", weights_of(trained[0]), weights_of(trained[1]))


@pytest.mark.shows("d2go", "read raw")
@pytest.mark.shows("d2go", "read EMA")
def test_both_sets_of_d2go_are_read(tmp_path: Path, trained: Both) -> None:
    model, average = trained
    # EMAState lists parameters, then buffers, where state_dict mixes them.
    state = {**dict(average.named_parameters()), **dict(average.named_buffers())}
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    content = {"model": model.state_dict(), "ema_state": state, "iteration": 9}
    path = save(tmp_path / "model_0000009.pth", content)
    check(path, weights_of(model), state, "d2go")


@pytest.mark.shows("d2go", "write")
@pytest.mark.shows("d2go", "library loads")
def test_d2go_applies_the_state_that_we_write(tmp_path: Path, trained: Both) -> None:
    model, average = trained
    out = tmp_path / "model.pth"
    ckpt_tools.convert(own(tmp_path, trained), to="d2go", out=out)
    state, again = load(out)["ema_state"], Net()
    with torch.no_grad():
        for name, tensor in [*again.named_parameters(), *again.named_buffers()]:
            tensor.copy_(state[name])
    assert not differences(again.state_dict(), average.state_dict())
    again.load_state_dict(load(out)["model"])
    assert not differences(again.state_dict(), model.state_dict())


class MultiCrop(nn.Module):
    """DINO's wrapper: backbone and projection head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(2, 4), nn.GELU())


@pytest.mark.shows("dino", "read raw")
@pytest.mark.shows("dino", "read EMA")
def test_student_and_teacher_are_read(tmp_path: Path, trained: Both) -> None:
    student, teacher = nn.DataParallel(MultiCrop(trained[0])), MultiCrop(trained[1])
    content = {
        "student": student.state_dict(),
        "teacher": teacher.state_dict(),
        "optimizer": torch.optim.AdamW(student.parameters()).state_dict(),
        "epoch": 4,
        "args": argparse.Namespace(arch="vit_tiny"),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    path = save(tmp_path / "checkpoint.pth", content)
    check(path, weights_of(student), weights_of(teacher), "dino")


@pytest.mark.shows("dino", "write")
@pytest.mark.shows("dino", "library loads")
def test_dino_loads_the_teacher_that_we_write(tmp_path: Path, trained: Both) -> None:
    student, teacher = MultiCrop(trained[0]), MultiCrop(trained[1])
    out = tmp_path / "checkpoint.pth"
    source = pair(tmp_path / "own.pth", weights_of(student), weights_of(teacher))
    ckpt_tools.convert(source, to="dino", out=out)
    state = {name.replace("module.", "").replace("backbone.", ""): t for name, t in load(out)["teacher"].items()}
    again = Net()
    assert not again.load_state_dict(state, strict=False).missing_keys
    assert not differences(again.state_dict(), teacher.backbone.state_dict())
    mirror = MultiCrop(Net())
    mirror.load_state_dict(load(out)["student"])
    assert not differences(mirror.state_dict(), student.state_dict())


@pytest.mark.shows("icefall", "read raw")
@pytest.mark.shows("icefall", "read EMA")
def test_model_and_running_average_of_icefall_are_read(tmp_path: Path, trained: Both) -> None:
    model, average = trained
    content = {
        "model": model.state_dict(),
        "optimizer": None,
        "scheduler": None,
        "grad_scaler": None,
        "sampler": None,
        "model_avg": average.to(torch.float32).state_dict(),
        "batch_idx_train": 400,
        "average_period": 200,
    }
    path = save(tmp_path / "checkpoint-400.pt", content)
    check(path, weights_of(model), weights_of(average), "icefall")


@pytest.mark.shows("icefall", "write")
@pytest.mark.shows("icefall", "library loads")
def test_icefall_loads_model_and_average_that_we_write(tmp_path: Path, trained: Both) -> None:
    out = tmp_path / "checkpoint-400.pt"
    ckpt_tools.convert(own(tmp_path, trained), to="icefall", out=out)
    content = load(out)
    for key, expected in zip(("model", "model_avg"), trained, strict=True):
        assert not next(iter(content[key])).startswith("module.")
        again = Net()
        again.load_state_dict(content[key])
        assert not differences(again.state_dict(), expected.state_dict())


def fairseq(trained: Both, **extra: object) -> dict[str, object]:
    model, average = trained
    return {
        "args": None,
        "cfg": {"model": {"_name": "net"}},
        "model": model.state_dict(),
        "criterion": {},
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "num_updates": 7}],
        "task_state": {},
        "extra_state": {"metrics": {}, "previous_training_time": 1.0, "ema": average.state_dict(), **extra},
        "last_optimizer_state": torch.optim.AdamW(model.parameters()).state_dict(),
    }


@pytest.mark.shows("fairseq", "read raw")
@pytest.mark.shows("fairseq", "read EMA")
def test_model_and_average_of_fairseq_are_read(tmp_path: Path, trained: Both) -> None:
    path = save(tmp_path / "checkpoint_1_7.pt", fairseq(trained))
    check(path, weights_of(trained[0]), weights_of(trained[1]), "fairseq")


@pytest.mark.shows("fairseq", "read EMA")
def test_the_exact_copy_of_a_half_average_is_taken(tmp_path: Path, trained: Both) -> None:
    model, average = trained
    exact = weights_of(average)
    half = copy.deepcopy(average).half()
    path = save(tmp_path / "checkpoint_1_7.pt", fairseq((model.half(), half), ema_fp32_params=exact))
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), exact)


@pytest.mark.shows("fairseq", "write")
@pytest.mark.shows("fairseq", "library loads")
def test_fairseq_restores_the_average_that_we_write(tmp_path: Path, trained: Both) -> None:
    out = tmp_path / "checkpoint_1_7.pt"
    ckpt_tools.convert(own(tmp_path, trained), to="fairseq", out=out)
    content = load(out)
    for state, expected in ((content["model"], trained[0]), (content["extra_state"]["ema"], trained[1])):
        again = Net()
        again.load_state_dict(state)
        assert not differences(again.state_dict(), expected.state_dict())


@pytest.mark.shows("dit", "read raw")
@pytest.mark.shows("dit", "read EMA")
def test_model_and_average_of_dit_are_read(tmp_path: Path, trained: Both) -> None:
    model, average = trained
    content = {
        "model": model.state_dict(),
        "ema": average.state_dict(),
        "opt": torch.optim.AdamW(model.parameters()).state_dict(),
        "args": argparse.Namespace(model="DiT-S/8"),
    }
    path = save(tmp_path / "0050000.pt", content)
    check(path, weights_of(model), weights_of(average), "dit")


@pytest.mark.shows("dit", "write")
@pytest.mark.shows("dit", "library loads")
def test_dit_finds_the_average_that_we_write(tmp_path: Path, trained: Both) -> None:
    out = tmp_path / "0050000.pt"
    ckpt_tools.convert(own(tmp_path, trained), to="dit", out=out)
    content, again = load(out), Net()
    again.load_state_dict(content.get("ema", content))
    assert not differences(again.state_dict(), trained[1].state_dict())


@pytest.mark.shows("guided-diffusion", "read raw")
@pytest.mark.shows("guided-diffusion", "read EMA")
def test_the_files_of_guided_diffusion_are_each_one_set(tmp_path: Path, trained: Both) -> None:
    for name, model in zip(("model010000.pt", "ema_0.9999_010000.pt"), trained, strict=True):
        path = save(tmp_path / name, model.state_dict())
        assert not differences(ckpt_tools.open_checkpoint(path), model.state_dict())


@pytest.mark.shows("guided-diffusion", "write")
@pytest.mark.shows("guided-diffusion", "library loads")
def test_guided_diffusion_loads_the_file_that_we_write(tmp_path: Path, trained: Both) -> None:
    out = tmp_path / "ema_0.9999_010000.pt"
    ckpt_tools.convert(own(tmp_path, trained), to="plain", state="ema", out=out)
    again = Net()
    again.load_state_dict(load(out))
    assert not differences(again.state_dict(), trained[1].state_dict())


@pytest.mark.shows("nemo", "read raw")
@pytest.mark.shows("nemo", "read EMA")
def test_the_two_files_of_nemo_are_told_apart_and_never_averaged_together(tmp_path: Path, trained: Both) -> None:
    for name, model in zip(("step=7", "step=7-EMA"), trained, strict=True):
        content = {"state_dict": model.state_dict(), "epoch": 0, "global_step": 7, "pytorch-lightning_version": "2.0.7"}
        save(tmp_path / f"{name}.ckpt", content)
    assert not differences(ckpt_tools.open_checkpoint(tmp_path / "step=7.ckpt"), trained[0].state_dict())
    assert not differences(ckpt_tools.open_checkpoint(tmp_path / "step=7-EMA.ckpt"), trained[1].state_dict())
    assert ckpt_tools.open_checkpoint(tmp_path / "step=7-EMA.ckpt").state.which == "ema"
    with pytest.raises(ckpt_tools.CkptError, match="EMA"):
        ckpt_tools.average(tmp_path, out=tmp_path / "averaged.pth")


@pytest.mark.shows("score_sde", "read raw")
@pytest.mark.shows("score_sde", "read EMA")
def test_the_nameless_average_of_score_sde_gets_the_names_of_its_model(tmp_path: Path, trained: Both) -> None:
    model, average = nn.DataParallel(trained[0]), trained[1]
    shadow = [parameter.detach().clone() for parameter in average.parameters()]
    content = {
        "optimizer": torch.optim.Adam(model.parameters()).state_dict(),
        "model": model.state_dict(),
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": shadow},
        "step": 3,
    }
    path = save(tmp_path / "checkpoint_1.pth", content)
    smooth = {f"module.{name}": parameter for name, parameter in parameters_of(average).items()}
    assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), weights_of(model))
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), {**weights_of(model), **smooth})


def titan(folder: Path, model: nn.Module, average: nn.Module, frozen: tuple[str, ...] = ()) -> Path:
    """Save as torchtitan does (components: checkpointer/dcp.py, optimizer/utils.py, optimizer/ema.py).

    The model is at the top level; states of optimizers are flat, and the average is one of them.
    """
    names = [name for name, _ in model.named_parameters() if name not in frozen]
    ema = {f"state.{name}.ema_params": average.state_dict()[name] for name in names}
    optimizer = {f"state.{name}.{slot}": torch.ones(2) for name in names for slot in ("exp_avg", "exp_avg_sq", "step")}
    optimizer |= {f"param_groups.{name}.lr": 0.1 for name in names}
    content = {
        **model.state_dict(),
        "optimizer": optimizer,
        "lr_scheduler": {"last_epoch": 7},
        "dataloader": {"dp_rank_0": b"state", "world_size": 1},
        "train_state": {"step": 7, "ntokens_seen": 99},
        "ema": ema,
    }
    dcp.save(content, checkpoint_id=folder)
    return folder


@pytest.mark.shows("torchtitan", "read raw")
@pytest.mark.shows("torchtitan", "read EMA")
def test_both_sets_of_torchtitan_are_read(tmp_path: Path, trained: Both) -> None:
    model, average = trained
    # It averages parameters that are trained, and no buffers unless the run names them.
    for frozen in ((), ("head.weight",)):
        path = titan(tmp_path / f"step-{len(frozen)}", model, average, frozen)
        ema = weights_of(model) | {k: v for k, v in parameters_of(average).items() if k not in frozen}
        check(path, weights_of(model), ema, "torchtitan")
        assert ckpt_tools.open_checkpoint(path).counters["step"] == 7


def test_averages_of_torchtitan_are_averaged(tmp_path: Path, trained: Both) -> None:
    model, average = trained
    titan(tmp_path / "step-10", model, average)
    titan(tmp_path / "step-20", average, model)
    for state in ("ema", "raw"):
        report = ckpt_tools.average(tmp_path, state=state, out=tmp_path / f"{state}.pth")
        assert report.inputs[-1].state.startswith(state)
        expected = mean(parameters_of(model), parameters_of(average))
        found = {name: tensor for name, tensor in load(tmp_path / f"{state}.pth").items() if name in expected}
        assert not differences(found, expected)


@pytest.mark.parametrize("swapped", [True, False])
def test_both_sets_of_mmcv_are_averaged_each_in_its_place(tmp_path: Path, swapped: bool) -> None:
    """EMAHook registers a buffer ``ema_*`` for each parameter, and swaps them after an epoch.

    Whether a file was saved before or after that depends on the priorities of the hooks, and the file does not say it.
    """
    contents = []
    for i in range(2):
        model = Net()
        average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9))
        train(model, 3, lambda model=model, average=average: average.update_parameters(model))  # type: ignore[misc]
        first, second = (average.module, model) if swapped else (model, average.module)
        for name, parameter in parameters_of(second).items():
            first.register_buffer(f"ema_{name.replace('.', '_')}", parameter)
        contents.append(weights_of(first))
        save(tmp_path / f"epoch_{i + 1}.pth", {"meta": {"epoch": i + 1, "iter": 3}, "state_dict": contents[-1]})
    ckpt_tools.average(tmp_path, out=tmp_path / "out.pth")
    assert not differences(load(tmp_path / "out.pth")["state_dict"], mean(*contents))
