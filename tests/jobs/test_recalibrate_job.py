"""The job: a checkpoint as it came, with new BatchNorm buffers and nothing else changed."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import runpy
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import torch
import torch.distributed.checkpoint as dcp
from cli_runner import run
from conftest import Photos
from PIL import Image
from safetensors.torch import load_file, save_file, save_model
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchvision.ops import FrozenBatchNorm2d

from ckpt_tools import average, open_checkpoint, recalibrate_checkpoint, verify
from ckpt_tools.errors import CkptError, DataError, LayoutError, ModelError, NumericsError, UsageError, WriteError

Save = Callable[..., Path]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
QUICK: dict[str, Any] = {"img_size": 32, "batch_size": 4, "workers": 0}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=3)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def oracle(model: nn.Module, folder: Path, said: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Buffers by torch alone: one batch of all images, BatchNorm in train mode with a momentum of 1."""
    config = resolve_data_config({"img_size": 32} if said is None else dict(said), model=model)
    transform = create_transform(**config, is_training=False)
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))])
    model.eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
            layer.momentum = 1.0
    with torch.no_grad():
        model(images)
    return {name: buffer for name, buffer in model.named_buffers() if "running" in name}


def assert_only_buffers_changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    assert list(before) == list(after)
    for name in before:
        assert before[name].dtype == after[name].dtype
        old, new = (each[name].contiguous().reshape(-1).view(torch.uint8) for each in (before, after))
        assert old.equal(new) or name.endswith(BUFFERS), name


def test_comparison_of_these_tests_sees_a_changed_scalar() -> None:
    with pytest.raises(AssertionError, match="scale"):
        assert_only_buffers_changed({"scale": torch.tensor(1.0)}, {"scale": torch.tensor(2.0)})


def test_recalibrate_checkpoint_changes_only_the_buffers(save: Save, photos: Photos) -> None:
    model = network()
    tree = {
        "epoch": 3,
        "arch": "test_resnet",
        "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(5)}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(model="test_resnet", num_classes=3),
        "metric": 77.5,
    }
    path, folder = save("averaged.pth", tree), photos()
    before = path.read_bytes()
    report = recalibrate_checkpoint(path, data=str(folder), **QUICK | {"batch_size": 12})
    assert path.read_bytes() == before
    found = load(path.with_name("averaged-bn.pth"))
    assert list(found) == list(tree)
    assert found["optimizer"]["state"][0]["momentum_buffer"].equal(tree["optimizer"]["state"][0]["momentum_buffer"])
    assert found["args"] == {"model": "test_resnet", "num_classes": 3}
    assert_only_buffers_changed(tree["state_dict"], found["state_dict"])
    for name, want in oracle(network(), folder).items():
        np.testing.assert_allclose(found["state_dict"][f"module.{name}"].numpy(), want.numpy(), rtol=1e-4, atol=1e-6)
    counter = next(v for k, v in found["state_dict"].items() if k.endswith("num_batches_tracked"))
    assert counter.dtype == torch.int64
    assert counter.item() == 1
    assert report.written
    assert report.images == 12
    again = timm.create_model("test_resnet", num_classes=3)
    timm.models.load_checkpoint(again, str(path.with_name("averaged-bn.pth")))


def test_recalibrate_checkpoint_writes_a_valid_zip_with_provenance(save: Save, photos: Photos) -> None:
    paths = [save(f"{i}.pth", network(i).state_dict()) for i in range(2)]
    average(paths, out=paths[0].with_name("averaged.pth"))
    path = paths[0].with_name("averaged.pth")
    options: dict[str, Any] = {"passes": 2, "seed": 5, "images": 9, "write_checksums": True, **QUICK}
    sign_off = path.with_name("signed.json")
    recalibrate_checkpoint(path, data=str(photos()), model="test_resnet", sign_off=sign_off, **options)
    out = path.with_name("averaged-bn.pth")
    assert zipfile.ZipFile(out).testzip() is None
    made = open_checkpoint(out).provenance
    assert made is not None
    assert made["command"] == "recal-bn"
    assert made["arguments"]["images"] == 9
    assert made["arguments"]["seed"] == 5
    assert made["arguments"]["passes"] == 2
    assert made["arguments"]["preprocessing"]["input_size"] == [3, 32, 32]
    assert [i["name"] for i in made["input"]["made"]["inputs"]] == ["0.pth", "1.pth"]
    (subject,) = json.loads(sign_off.read_text())["subject"]
    assert subject["digest"]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    found = {check.name: (check.result, check.detail) for check in verify(out).checks}
    assert found["checksums"][0] == "ok"
    assert found["made again"][0] == "not checked"
    assert "all else is the same bit for bit" in found["made again"][1]


def test_recalibrate_checkpoint_changes_the_chosen_state(save: Save, photos: Photos) -> None:
    tree = {"arch": "test_resnet", "state_dict": network(0).state_dict(), "state_dict_ema": network(1).state_dict()}
    path, folder = save("a.pth", tree), str(photos())
    for state, changed in (("auto", "state_dict_ema"), ("raw", "state_dict"), ("state_dict", "state_dict")):
        recalibrate_checkpoint(path, data=folder, state=state, force=True, **QUICK)
        found = load(path.with_name("a-bn.pth"))
        for key in ("state_dict", "state_dict_ema"):
            assert_only_buffers_changed(tree[key], found[key])
            name = "bn1.running_mean"
            assert found[key][name].equal(tree[key][name]) is (key != changed)


def test_recalibrate_checkpoint_keeps_safetensors_metadata_and_dtypes(tmp_path: Path, photos: Photos) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in network().state_dict().items()}
    save_file(state, tmp_path / "averaged.safetensors", metadata={"format": "pt", "note": "mine"})
    recalibrate_checkpoint(tmp_path / "averaged.safetensors", data=str(photos()), model="test_resnet", **QUICK)
    found = load_file(tmp_path / "averaged-bn.safetensors")
    assert_only_buffers_changed(dict(sorted(state.items())), dict(sorted(found.items())))
    assert not found["bn1.running_var"].equal(state["bn1.running_var"])
    with safetensors.safe_open(tmp_path / "averaged-bn.safetensors", "pt") as file:
        assert file.metadata()["note"] == "mine"


def test_recalibrate_checkpoint_keeps_a_dcp_folder(tmp_path: Path, photos: Photos) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    tree = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 5, "arch": "test_resnet"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        dcp.save(tree, checkpoint_id=tmp_path / "step-5")
        recalibrate_checkpoint(tmp_path / "step-5", data=str(photos()), model_kwargs={"num_classes": 3}, **QUICK)
        for folder in ("step-5", "step-5-bn"):
            dcp_to_torch_save(tmp_path / folder, tmp_path / f"{folder}.pth")
    before, after = (load(tmp_path / f"{folder}.pth") for folder in ("step-5", "step-5-bn"))
    assert_only_buffers_changed(
        {name: before["model"][name] for name in tree["model"]}, {name: after["model"][name] for name in tree["model"]}
    )
    assert not before["model"]["bn1.running_mean"].equal(after["model"]["bn1.running_mean"])
    moments = [saved["optim"]["state"]["0"]["momentum_buffer"] for saved in (before, after)]
    assert moments[0].equal(moments[1])
    assert (after["step"], after["arch"]) == (5, "test_resnet")
    made = open_checkpoint(tmp_path / "step-5-bn").provenance
    assert made is not None
    assert made["command"] == "recal-bn"


def test_recalibrate_checkpoint_keeps_a_sharded_folder(tmp_path: Path, photos: Photos) -> None:
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.safetensors")
        save_file(network(i).state_dict(), paths[-1])
    average(paths, out=tmp_path / "sharded", max_shard_size=300_000)
    (tmp_path / "sharded" / "config.json").write_text("{}")
    recalibrate_checkpoint(tmp_path / "sharded", data=str(photos()), model="test_resnet", **QUICK)
    names = {path.name for path in (tmp_path / "sharded").iterdir()}
    assert {path.name for path in (tmp_path / "sharded-bn").iterdir()} == names
    assert len(names) > 3
    old, new = open_checkpoint(tmp_path / "sharded"), open_checkpoint(tmp_path / "sharded-bn")
    assert_only_buffers_changed(dict(old), dict(new))
    assert not new["bn1.running_var"].equal(old["bn1.running_var"])


def test_recalibrate_checkpoint_writes_legacy_files_as_zip(save: Save, photos: Photos) -> None:
    path = save("old.pth", network().state_dict(), _use_new_zipfile_serialization=False)
    recalibrate_checkpoint(path, data=str(photos()), model="test_resnet", **QUICK)
    assert_only_buffers_changed(network().state_dict(), load(path.with_name("old-bn.pth")))


def test_recalibrate_checkpoint_requires_a_path(
    save: Save, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `ckpt avg` writes is the default of the command alone."""
    monkeypatch.chdir(tmp_path)
    save("averaged.pth", network().state_dict())
    with pytest.raises(TypeError, match=r"recalibrate_checkpoint\(\) missing a required argument: 'path'"):
        recalibrate_checkpoint(data=str(photos()), model="test_resnet", **QUICK)
    assert not Path("averaged-bn.pth").exists()


def test_recal_bn_reads_what_avg_writes_by_default(
    save: Save, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(photos()), "--model", "test_resnet", "--img-size", "32", "-b", "4", "-j", "0"]
    missing = run("recal-bn", *arguments)
    assert (missing.code, "no averaged.pth or averaged.safetensors here" in missing.err) == (2, True)
    save("averaged.pth", network().state_dict())
    assert run("recal-bn", *arguments).code == 0
    assert Path("averaged-bn.pth").exists()


def test_recalibrate_checkpoint_leaves_sys_path_as_it_was(save: Save, photos: Photos, tmp_path: Path) -> None:
    """User code may import its neighbours as late as in the forward pass."""
    (tmp_path / "latenet.py").write_text(
        "import timm\n"
        "def net():\n"
        "    model = timm.create_model('test_resnet', num_classes=3)\n"
        "    def late(*_):\n"
        "        import lateneighbour\n"
        "    model.register_forward_pre_hook(late)\n"
        "    return model\n"
    )
    (tmp_path / "lateneighbour.py").touch()
    before = list(sys.path)
    path = save("a.pth", network().state_dict())
    recalibrate_checkpoint(path, data=str(photos()), model=f"{tmp_path}/latenet.py:net", **QUICK)
    assert "lateneighbour" in sys.modules
    assert sys.path == before


def test_recalibrate_checkpoint_measures_the_accuracy_that_torch_does(save: Save, photos: Photos) -> None:
    path, folder = save("a.pth", network().state_dict()), photos(each=6)
    report = recalibrate_checkpoint(
        path, data=str(folder), model="test_resnet", eval_data=str(folder), **QUICK | {"batch_size": 18}
    )
    assert report.before is not None
    assert report.after is not None
    assert any("so the accuracy afterwards is higher than" in note for note in report.notes)
    transform = create_transform(**resolve_data_config({"img_size": 32}, model=network()), is_training=False)
    files = sorted(folder.rglob("*.png"))
    images = torch.stack([transform(Image.open(f).convert("RGB")) for f in files])
    labels = torch.tensor([int(f.parent.name.removeprefix("class")) for f in files])
    for found, state in ((report.before, load(path)), (report.after, load(path.with_name("a-bn.pth")))):
        model = network().eval()
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model(images)
        assert found.top1 == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
        assert found.top5 == pytest.approx(100.0)  # of three classes
        assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
        assert found.images == 18


def test_recalibrate_checkpoint_prepares_images_as_the_run_did(save: Save, photos: Photos) -> None:
    """What is evaluated by its train.py: the images at the size, mean and std in its args."""
    args = argparse.Namespace(
        model="test_resnet", num_classes=3, img_size=48, mean=[0.2] * 3, std=[0.1] * 3, crop_pct=1.0,
        interpolation="bilinear",
    )  # fmt: skip
    model, folder = network(), photos()
    path = save("a.pth", {"arch": "test_resnet", "args": args, "state_dict": model.state_dict()})
    report = recalibrate_checkpoint(path, data=str(folder), batch_size=12, workers=0)
    assert set(report.preprocessing_from.values()) == {"the args of the checkpoint"}
    found = load(path.with_name("a-bn.pth"))["state_dict"]
    for name, want in oracle(network(), folder, vars(args)).items():
        np.testing.assert_allclose(found[name].numpy(), want.numpy(), rtol=1e-4, atol=1e-6)


def test_recalibrate_checkpoint_warns_of_images_enlarged_to_a_size_that_nobody_gave(
    save: Save, photos: Photos, tmp_path: Path
) -> None:
    path = save("a.pth", network().state_dict())
    wanted = timm.get_pretrained_cfg("test_resnet").test_input_size or timm.get_pretrained_cfg("test_resnet").input_size
    for size, options, warned in ((40, {}, True), (wanted[-1], {}, False), (40, {"img_size": 160}, False)):
        folder = photos(f"of{size}", size=size)
        report = recalibrate_checkpoint(path, model="test_resnet", data=str(folder), dry_run=True, **options)
        enlarged = f"is enlarged to {wanted[-1]}x{wanted[-1]}, the size in timm's"
        note = f"{folder}: the first image has 40x40 pixels, and {enlarged}"
        assert any(each.startswith(note) for each in report.notes) == warned
    run_of_timm = {"arch": "test_resnet", "args": argparse.Namespace(model="test_resnet", img_size=None, num_classes=3)}
    path = save("b.pth", run_of_timm | {"state_dict": network().state_dict()})  # train.py enlarges them, too
    report = recalibrate_checkpoint(path, data=str(tmp_path / "of40"), dry_run=True)
    assert not any("enlarged" in each for each in report.notes)


@pytest.mark.parametrize("lead", ["", "model."])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_recalibrate_checkpoint_fills_in_the_statistics_of_parameters_alone(
    save: Save, photos: Photos, tmp_path: Path, lead: str, suffix: str
) -> None:
    model, folder = network(), photos()
    state = {f"{lead}{name}": value.detach() for name, value in model.named_parameters()}
    state |= {"criterion.weight": torch.ones(3)}
    path = tmp_path / f"ema.{suffix}"
    torch.save({"state_dict": state}, path) if suffix == "pth" else save_file(state, path)
    report = recalibrate_checkpoint(path, data=str(folder), model="test_resnet", **QUICK | {"batch_size": 12})
    assert any("the measured ones are added" in note for note in report.notes)
    out = path.with_name(f"ema-bn.{suffix}")
    found = load(out)["state_dict"] if suffix == "pth" else load_file(out)
    assert all(found[name].equal(value) for name, value in state.items())
    assert found.pop("criterion.weight").equal(torch.ones(3))
    made = {name.removeprefix(lead): value for name, value in found.items()}
    network().load_state_dict(made)  # strictly
    for name, want in oracle(network(), folder).items():
        np.testing.assert_allclose(made[name].numpy(), want.numpy(), rtol=1e-4, atol=1e-6)


BRIGHT = """
import torch
from torch import nn

class Net(nn.Module):
    '''Tells three classes by their brightness, if images are normalised by 0 and 1.'''

    def __init__(self):
        super().__init__()
        self.bn, self.fc = nn.BatchNorm2d(3, affine=False), nn.Linear(1, 3)
        self.bn.running_mean.fill_(0.175)
        self.bn.running_var.fill_(0.0073)
        levels = (torch.tensor([25.0, 45.0, 65.0]) / 255 - 0.175) / 0.0073**0.5
        with torch.no_grad():
            self.fc.weight[:, 0], self.fc.bias[:] = 40 * levels, -20 * levels**2

    def forward(self, x):
        return self.fc(self.bn(x).mean((1, 2, 3))[:, None])

def wrong():  # as of another mean and std
    return [(torch.randn(8, 3, 8, 8) * 30 + 9, torch.arange(8) % 3) for _ in range(3)]
"""


def test_recalibrate_checkpoint_says_when_the_network_is_far_worse(save: Save, photos: Photos, tmp_path: Path) -> None:
    (tmp_path / "bright.py").write_text(BRIGHT)
    names = runpy.run_path(str(tmp_path / "bright.py"))
    path, folder = save("a.pth", names["Net"]().state_dict()), photos(each=20)
    options = {"model": f"{tmp_path}/bright.py:Net", "workers": 0, "crop_pct": 1.0, "img_size": 32, "force": True}
    plain = {"mean": [0.0], "std": [1.0]}

    def doubts(**given: Any) -> list[str]:
        report = recalibrate_checkpoint(path, **{"data": str(folder), **options, **given})
        return [note for note in report.notes if "of the training?" in note]

    assert doubts(**plain) == []
    assert doubts(**plain, eval_data=str(folder)) == []
    (doubt,) = doubts(**plain, data=f"{tmp_path}/bright.py:wrong", eval_data=str(folder))
    assert doubt.startswith("Warning: the network is far worse: its loss went from ")
    assert "Are size (`img_size`, `crop_pct`), `mean` and `std` those of the training?" in doubt
    unlike = tmp_path / "unlike.txt"
    unlike.write_text("class2\nclass0\nclass1\n")
    (doubt,) = doubts(**plain, eval_data=str(folder), class_map=unlike)
    assert "Are the classes numbered as in the training (`class_map`)?" in doubt
    few = tmp_path / "few"
    (few / "class0").mkdir(parents=True)
    Image.open(folder / "class0" / "0-0.png").save(few / "class0" / "0.png")
    report = recalibrate_checkpoint(path, data=str(folder), eval_data=str(few), **options, **plain)
    assert any("1 class folders, and the network 3 outputs" in note for note in report.notes)


def test_recalibrate_checkpoint_with_require_gain_writes_nothing_without_a_gain(
    save: Save, photos: Photos, tmp_path: Path
) -> None:
    folder = photos(each=6)
    good = save("good.pth", network().state_dict())
    recalibrate_checkpoint(good, data=str(folder), model="test_resnet", **QUICK)
    (tmp_path / "noise.py").write_text("import torch\ndef make(): return [torch.randn(8, 3, 32, 32) * 9 + 50]\n")
    wrong = {"data": f"{tmp_path}/noise.py:make", "model": "test_resnet", "eval_data": str(folder), **QUICK}
    path, target = tmp_path / "good-bn.pth", tmp_path / "x.pth"
    report = recalibrate_checkpoint(path, **wrong, out=target)
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss > report.before.loss
    target.unlink()
    with pytest.raises(NumericsError, match=r"the loss on .* went from .* nothing was written \(`require_gain`\)"):
        recalibrate_checkpoint(path, **wrong, require_gain=True, out=target)
    assert not target.exists()
    right = wrong | {"data": str(folder)}
    assert recalibrate_checkpoint(path, **right, require_gain=True, out=target).written


def test_recalibrate_checkpoint_changes_a_shared_layer_in_both_places(save: Save, tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    bn = nn.BatchNorm2d(3)\n    return nn.Sequential(bn, nn.ReLU(), bn)\n"
        "def data(): return [torch.randn(8, 3, 4, 4)]\n"
    )
    bn = nn.BatchNorm2d(3)
    path = save("a.pth", nn.Sequential(bn, nn.ReLU(), bn).state_dict())
    recalibrate_checkpoint(path, data=f"{tmp_path}/twice.py:data", model=f"{tmp_path}/twice.py:net")
    found = load(path.with_name("a-bn.pth"))
    assert not found["0.running_mean"].equal(torch.zeros(3))
    for what in BUFFERS:
        assert found[f"0.{what}"].equal(found[f"2.{what}"])
    save_model(nn.Sequential(bn, nn.ReLU(), bn), str(tmp_path / "a.safetensors"))
    recalibrate_checkpoint(
        tmp_path / "a.safetensors", data=f"{tmp_path}/twice.py:data", model=f"{tmp_path}/twice.py:net"
    )
    assert load_file(tmp_path / "a-bn.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()
    assert not load_file(tmp_path / "a-bn.safetensors")["0.running_mean"].equal(torch.zeros(3))
    assert not open_checkpoint(tmp_path / "a-bn.safetensors")["2.running_mean"].equal(torch.zeros(3))


def test_recalibrate_checkpoint_writes_the_counter_as_int64(save: Save, photos: Photos) -> None:
    state = {k: v.float() if k.endswith("num_batches_tracked") else v for k, v in network().state_dict().items()}
    path = save("a.pth", state)
    recalibrate_checkpoint(path, data=str(photos()), model="test_resnet", **QUICK)
    found = load(path.with_name("a-bn.pth"))
    counters = [value for name, value in found.items() if name.endswith("num_batches_tracked")]
    assert all(value.dtype == torch.int64 and value.item() == 3 for value in counters)


def test_recalibrate_checkpoint_records_the_number_of_images_of_a_stream(save: Save, tmp_path: Path) -> None:
    (tmp_path / "stream.py").write_text("import torch\ndef make(): return [torch.randn(8, 3, 32, 32)] * 3\n")
    path = save("a.pth", network().state_dict())
    recalibrate_checkpoint(path, data=f"{tmp_path}/stream.py:make", model="test_resnet")
    made = open_checkpoint(path.with_name("a-bn.pth")).provenance
    assert made is not None
    assert made["arguments"]["images"] == 24


def test_recalibrate_checkpoint_names_frozen_layers_and_writes_nothing(save: Save, tmp_path: Path) -> None:
    (tmp_path / "frozen.py").write_text("from torchvision.ops import FrozenBatchNorm2d as net\n")
    path = save("a.pth", FrozenBatchNorm2d(3).state_dict())
    report = recalibrate_checkpoint(
        path, data="nowhere", model=f"{tmp_path}/frozen.py:net", model_kwargs={"num_features": 3}
    )
    assert report.notes[0] == "Left as it is: the model (FrozenBatchNorm2d), frozen: its class never updates them."
    assert not report.written


def test_recalibrate_checkpoint_is_close_with_amp_and_equal_with_channels_last(save: Save, photos: Photos) -> None:
    path, folder = save("a.pth", network().state_dict()), str(photos())
    found = {}
    for name, options in (("plain", {"channels_last": False}), ("last", {}), ("amp", {"amp": True})):
        out = path.with_name(f"{name}.pth")
        recalibrate_checkpoint(path, data=folder, model="test_resnet", out=out, **QUICK, **options)
        found[name] = load(out)["layer4.0.bn1.running_var"]
    torch.testing.assert_close(found["last"], found["plain"], rtol=1e-4, atol=0)
    torch.testing.assert_close(found["amp"], found["plain"], rtol=0.1, atol=0)
    assert not found["amp"].equal(found["last"])


VOLUMES = """
import torch
from torch import nn


class Net(nn.Module):  # over a volume, then over its slices, then over what is left of time
    def __init__(self):
        super().__init__()
        self.volume, self.bn3 = nn.Conv3d(2, 4, 3, groups=2), nn.BatchNorm3d(4)
        self.up, self.bn_up = nn.ConvTranspose3d(4, 3, 2), nn.BatchNorm3d(3)
        self.plane, self.bn2 = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.line, self.bn1 = nn.Conv1d(5, 2, 2), nn.BatchNorm1d(2)

    def forward(self, x):
        x = self.bn_up(self.up(self.bn3(self.volume(x)).relu())).relu()
        x = self.bn2(self.plane(x.amax(2))).relu()
        return self.bn1(self.line(x.mean(3)))


def net():
    return Net().double()


def data():
    torch.manual_seed(5)
    return [torch.randn(n, 2, 6, 7, 8, dtype=torch.float64) + n for n in (3, 4, 6)]
"""


@pytest.mark.parametrize("channels_last", [True, False])
def test_recalibrate_checkpoint_measures_volumes_as_torch_does(save: Save, tmp_path: Path, channels_last: bool) -> None:
    script = tmp_path / "volumes.py"
    script.write_text(VOLUMES)
    names = runpy.run_path(str(script))
    model = names["net"]()
    path = save("v.pth", model.state_dict())
    recalibrate_checkpoint(
        path, model=f"{script}:net", data=f"{script}:data", estimator="batch-mean", channels_last=channels_last
    )
    torch.optim.swa_utils.update_bn(names["data"](), model)
    found = load(path.with_name("v-bn.pth"))
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=name)


def test_recalibrate_checkpoint_writes_nothing_without_batchnorm(save: Save, tmp_path: Path) -> None:
    path = save("a.pth", nn.Linear(3, 2).state_dict())
    kwargs = {"in_features": 3, "out_features": 2}
    report = recalibrate_checkpoint(path, data="nowhere", model="torch.nn:Linear", model_kwargs=kwargs)
    assert not report.written
    assert report.layers == 0
    assert "no BatchNorm statistics; nothing to do" in report.notes[-1]
    assert list(tmp_path.iterdir()) == [path]


def test_recalibrate_checkpoint_dry_run_runs_nothing(save: Save, photos: Photos, tmp_path: Path) -> None:
    path, folder = save("a.pth", network().state_dict()), photos()
    before = sorted(tmp_path.iterdir())
    plans: list[Any] = []
    report = recalibrate_checkpoint(
        path, data=str(folder), model="test_resnet", dry_run=True, on_plan=plans.append, **QUICK
    )
    assert plans == [report]
    assert report.images == 12
    assert report.layers > 3
    assert sorted(tmp_path.iterdir()) == before
    json.dumps(report.to_dict())
    again = recalibrate_checkpoint(path, data=str(folder), model="test_resnet", dry_run=True, out=path, **QUICK)
    assert any("The real run would stop: " in note and "is one of the inputs" in note for note in again.notes)


def corrupt(state: dict[str, torch.Tensor], name: str, value: float) -> dict[str, torch.Tensor]:
    return state | {name: torch.full_like(state[name], value)}


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"data": "missing"}, DataError, "no such folder"),
        ({}, {"images": 99}, DataError, "`images=99`: there are only 12"),
        ({}, {"images": 1}, UsageError, "`images=1`: must be 2 or more"),
        ({}, {"batch_size": 1}, UsageError, "`batch_size=1`: must be a whole number from 2 on"),
        ({}, {"workers": -1}, UsageError, "`workers=-1`"),
        ({}, {"passes": 0}, UsageError, "`passes=0`"),
        ({}, {"estimator": "mode"}, UsageError, "`estimator` is one of"),
        ({}, {"model": "tset_resnet"}, UsageError, "Did you mean test_resnet"),
        ({}, {"state": "ema"}, LayoutError, "has no ema weights"),
        ({}, {"device": "abacus"}, UsageError, "`device='abacus'`"),
        ({}, {"require_gain": True}, UsageError, "`require_gain` goes with `eval_data`"),
        ({}, {"out": "a.pth"}, WriteError, "is one of the inputs"),
        ({}, {"out": "x.safetensors"}, UsageError, "stays one"),
        ({}, {"out": "no/x.pth"}, WriteError, "there is no folder"),
        ({}, {"mean": [0.5, 0.5]}, UsageError, "`mean` has 2 numbers"),
        ({}, {"mean": [0.5, math.inf, 0.5]}, UsageError, r"`mean=\[0.5, inf, 0.5\]`: must be finite numbers, one for"),
        ({}, {"std": [0.0]}, UsageError, r"`std=\[0.0\]`: must be finite numbers above 0, one for each channel"),
        ({}, {"img_size": 0}, UsageError, "`img_size=0`: must be a whole number from 1 on"),
        ({}, {"crop_pct": 0.0}, UsageError, "`crop_pct=0.0`: must be above 0 and at most 2"),
        ({}, {"crop_pct": math.nan}, UsageError, "`crop_pct=nan`: must be above 0 and at most 2"),
        (
            {},
            {"interpolation": "cubic"},
            UsageError,
            "`interpolation='cubic'`: must be one of nearest, bilinear",
        ),
        ({"fc.weight": torch.zeros(3, 5)}, {}, ModelError, "of another shape"),
        ({"extra": torch.zeros(3)}, {}, ModelError, "1 unexpected"),
        ({"conv1.0.weight": None}, {}, NumericsError, r"batch 1: the input of 'conv1\.1' holds NaN"),
        ({}, {"data": "mine.py:wrong_shape"}, ModelError, r"failed on a batch of shape \[4, 5, 32, 32\]"),
        ({}, {"data": "mine.py:nan"}, NumericsError, "batch 2: the input of "),
        ({}, {"data": "mine.py:nothing"}, DataError, "yield no batch"),
        ({}, {"data": "mine.py:fails"}, DataError, r"the data failed after .* \(OSError: disk gone\)"),
        ({}, {"data": "mine.py:once", "passes": 2}, UsageError, "can be read again"),
        ({}, {"eval_data": "flat"}, DataError, "`eval_data`"),
        ({}, {"model": "mine.py:unmade"}, ModelError, r"cannot be made \(AttributeError: torch\)"),
        ({}, {"model": "mine.py:leaves"}, ModelError, r"cannot be made \(SystemExit: 0\)"),
        ({}, {"data": "mine.py:leaves_later"}, DataError, r"the data failed after 4 images \(SystemExit: 0\)"),
        (
            {"fc.weight": torch.full((3, 96), float("nan"))},
            {"eval_data": "photos", "require_gain": True},
            NumericsError,
            "from nan to nan; nothing was written",
        ),
    ],
)
def test_recalibrate_checkpoint_rejects_bad_jobs_and_writes_nothing(
    save: Save,
    photos: Photos,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    options: dict[str, Any],
    error: type[CkptError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    state: dict[str, Any] = dict(network().state_dict())
    for name, value in change.items():
        state[name] = torch.full_like(state[name], float("nan")) if value is None else value
    save("a.pth", state)
    photos()
    photos("flat", classes=9, each=1)
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def wrong_shape(): return [torch.zeros(4, 5, 32, 32)]\n"
        "def nan(): return [torch.zeros(4, 3, 32, 32), torch.full((4, 3, 32, 32), float('nan'))]\n"
        "def nothing(): return []\n"
        "def unmade(): raise AttributeError('torch')\n"
        "def leaves(): raise SystemExit(0)\n"
        "def leaves_later():\n"
        "    yield torch.zeros(4, 3, 32, 32)\n"
        "    raise SystemExit(0)\n"
        "def once(): return iter([torch.zeros(4, 3, 32, 32)])\n"
        "class Fails:\n"
        "    def __iter__(self):\n"
        "        yield torch.zeros(4, 3, 32, 32)\n"
        "        raise OSError('disk gone')\n"
        "def fails(): return Fails()\n"
    )
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != "__pycache__"}
    with pytest.raises(error, match=message):
        recalibrate_checkpoint("a.pth", **{"data": "photos", "model": "test_resnet", **QUICK, **options})
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != "__pycache__"}
    assert after == before
    assert not os.environ.get("RANK")
