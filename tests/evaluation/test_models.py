"""Models: what the user names or the checkpoint says, filled strictly; a checkpoint never decides what runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from crafting import bounded_resident
from torch import nn

from ckpt_tools import fix_prefix, open_checkpoint
from ckpt_tools.cli.arguments import parse_kwargs
from ckpt_tools.errors import ModelError, UsageError
from ckpt_tools.evaluation.models import build_model, input_channels, load_weights, pick_device

Save = Callable[..., Path]


def built(path: Path, spec: str | None = None, **kwargs: Any) -> nn.Module:
    checkpoint = open_checkpoint(path)
    model = build_model(spec, checkpoint.header, kwargs, checkpoint.specs)
    load_weights(model, checkpoint)
    return model


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_build_model_takes_the_arch_of_a_timm_checkpoint(save: Save, prefix: str) -> None:
    source = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    args = argparse.Namespace(model="test_resnet", num_classes=None, in_chans=None, model_kwargs={})
    model = built(save("a.pth", {"arch": "test_resnet", "args": args, "state_dict": state}))
    assert type(model) is type(source)
    assert all(tensor.equal(source.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert input_channels(model) == 1


def test_build_model_overrides_arguments_of_the_checkpoint_by_those_given(save: Save) -> None:
    source = timm.create_model("test_resnet", num_classes=7)
    args = argparse.Namespace(model="test_resnet", num_classes=7, model_kwargs={"drop_rate": 0.25})
    path = save("a.pth", {"model": source.state_dict(), "args": args})
    assert built(path).drop_rate == 0.25
    assert built(path, drop_rate=0.5).drop_rate == 0.5
    with pytest.raises(ModelError, match=r"2 of another shape \('fc\.weight' is \[7, \d+\], the model's \[8, \d+\]"):
        built(path, num_classes=8)


def test_build_model_believes_the_weights_on_the_number_of_classes(save: Save) -> None:
    source = timm.create_model("test_resnet", num_classes=7)
    path = save("a.pth", {"arch": "test_resnet", "num_classes": 1 << 40, "state_dict": source.state_dict()})
    assert built(path).num_classes == 7


def test_weights_that_do_not_fit_name_both_models(save: Save) -> None:
    """Networks of timm of many names have one class."""
    source = timm.create_model("test_resnet", num_classes=7)
    path = save("a.pth", {"arch": "test_resnet", "state_dict": source.state_dict()})
    with pytest.raises(
        ModelError, match=r"do not fit resnet10t \(ResNet\).*The checkpoint says that its model is test_resnet\."
    ):
        built(path, "resnet10t")


@pytest.mark.parametrize("asked", [{"num_classes": 1 << 33}, {"block_args": {}, "channels": (1 << 20,) * 4}])
def test_build_model_makes_no_network_that_the_weights_cannot_fill(asked: dict[str, Any], save: Save) -> None:
    state = timm.create_model("test_resnet", num_classes=0).state_dict()  # whose rows would tell the number
    args = argparse.Namespace(model="test_resnet", model_kwargs=asked)
    path = save("a.pth", {"arch": "test_resnet", "args": args, "state_dict": state})
    with bounded_resident(300 << 20), pytest.raises(ModelError, match="far larger than the weights of the checkpoint"):
        built(path)


def test_build_model_restores_sys_path_after_a_factory(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factory that imports its neighbour only when it is called, too."""
    (tmp_path / "late_net.py").write_text(
        "from torch import nn\ndef net():\n    from late_width import WIDTH\n    return nn.Linear(WIDTH, 2)\n"
    )
    (tmp_path / "late_width.py").write_text("WIDTH = 3\n")
    path = save("a.pth", nn.Linear(3, 2).state_dict())
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    for spec in (f"{tmp_path}/late_net.py:net", "late_net:net"):
        assert built(path, spec).in_features == 3
        assert sys.path == before
    with pytest.raises(UsageError, match="cannot be imported"):
        built(path, "no_such_module_here:net")
    assert sys.path == before


def test_build_model_needs_no_timm_for_a_factory(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain_net.py").write_text(
        "from torch import nn\nfrom neighbour import WIDTH\ndef net(width=WIDTH): return nn.Linear(width, 2)\n"
    )
    (tmp_path / "neighbour.py").write_text("WIDTH = 3\n")
    path = save("a.pth", nn.Linear(3, 2).state_dict())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    for spec in ("plain_net.py:net", str(tmp_path / "plain_net.py:net"), "plain_net:net", "torch.nn:Linear"):
        kwargs = {"in_features": 3, "out_features": 2} if "torch" in spec else {}
        assert isinstance(built(path, spec, **kwargs), nn.Linear)
    with pytest.raises(ModelError, match="timm is not installed. Run: pip install"):
        built(path, "resnet18")


def test_build_model_never_runs_what_a_checkpoint_names(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef main(): pass\n")
    for arch in ("evil.py:main", "evil:main", "hf-hub:nobody/nothing", "local-dir:evil"):
        path = save("a.pth", {"arch": arch, "state_dict": {"w": torch.zeros(2)}})
        with pytest.raises(ModelError, match=rf"a\.pth: its arch '{arch}' is not a timm model\. Use `model='path/to"):
            built(path)
    assert not (tmp_path / "ran").exists()
    asks = {"checkpoint_path": "evil.pth", "pretrained": True, "cache_dir": "evil"}
    args = {"model": "test_resnet", "model_kwargs": asks}
    path = save("a.pth", {"args": args, "state_dict": timm.create_model("test_resnet").state_dict()})
    assert isinstance(built(path), nn.Module)  # and timm looked for no evil.pth


def test_build_model_suggests_nothing_for_a_name_that_nobody_typed(save: Save) -> None:
    path = save("a.pth", {"arch": "resnet81", "state_dict": {"w": torch.zeros(2)}})
    with pytest.raises(
        ModelError, match=r"its arch 'resnet81' is not a timm model\. Use `model='path/to/file.py:factory'`\.$"
    ):
        built(path)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("resnet81", UsageError, r"`model='resnet81'`: timm has no such model. Did you mean .*resnet18"),
        ("nothing_like_it_at_all", UsageError, "Use `model='path/to/file.py:factory'`"),
        ("torch.nn:Lienar", UsageError, "torch.nn has no 'Lienar'. Did you mean Linear"),
        ("net.py:", UsageError, r"`model='net.py:'`: names no function. Write path/to/file.py:name or module:name"),
        ("torch.nn:Linear", ModelError, r"cannot be made \(TypeError"),
        ("builtins:dict", ModelError, "gives a dict, not a torch.nn.Module"),
        (None, ModelError, "does not record its model. Use `model`"),
    ],
)
def test_build_model_rejects_a_model_that_cannot_be_made(
    save: Save, spec: str | None, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        built(save("a.pth", {"w": torch.zeros(2)}), spec)


def test_load_weights_names_weights_that_do_not_fit(save: Save) -> None:
    state = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict()
    del state["1.running_mean"]
    state["2.bias"] = torch.zeros(1)
    path = save("a.pth", state)
    (path.parent / "fits.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))\n"
    )
    with pytest.raises(ModelError, match=r"1 missing \(1\.running_mean\); 1 unexpected \(2\.bias\)"):
        built(path, f"{path.parent}/fits.py:net")


NET = "nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))"


def factory(folder: Path, made: str) -> str:
    file = folder / f"net{abs(hash(made))}.py"  # of its own for each model: an imported module stays
    file.write_text(f"from torch import nn\ndef net(): return {made}\n")
    return f"{file}:net"


@pytest.mark.parametrize("lead", ["model.", "net.backbone.", "module.student.", "_orig_mod.model."])
def test_load_weights_understands_a_prefix_of_all_names(save: Save, lead: str) -> None:
    layers = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = {f"{lead}{name}": tensor for name, tensor in layers.state_dict().items()}
    path = save("a.pth", {"state_dict": state})
    checkpoint = open_checkpoint(path)
    model = build_model(factory(path.parent, NET), checkpoint.header, {}, checkpoint.specs)
    loaded = load_weights(model, checkpoint)
    assert all(tensor.equal(layers.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert loaded.names == {name: f"{lead}{name}" for name in layers.state_dict()}
    shown = lead.removeprefix("module.").removeprefix("_orig_mod.")
    assert loaded.notes == (f"The names of the model begin with '{shown}' in the checkpoint.",)


def test_load_weights_names_the_prefix_that_the_model_has_alone(save: Save) -> None:
    layers = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    path = save("a.pth", {"state_dict": layers.state_dict()})
    spec = factory(path.parent, f"nn.ModuleDict({{'head': {NET}}})")
    with pytest.raises(ModelError, match=r"lack 'head\.'\. Run `fix_prefix\(add=\['head\.'\]\)`"):
        built(path, spec)
    fixed = fix_prefix(path, out=path.with_name("b.pth"), add=["head."])
    assert isinstance(built(Path(fixed.out), spec), nn.Module)


@pytest.mark.parametrize(
    ("lead", "beside"),
    [
        ("model.", ("criterion.weight", "ema_decay", "train_acc.total")),
        ("", ("criterion.weight", "loss_fn.pos_weight", "class_weights", "val_metric.total")),
    ],
)
def test_load_weights_leaves_the_weights_of_a_loss_aside(save: Save, lead: str, beside: tuple[str, ...]) -> None:
    layers = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = {f"{lead}{name}": tensor for name, tensor in layers.state_dict().items()}
    path = save("a.pth", {"state_dict": state | {name: torch.ones(2) for name in beside}})
    checkpoint = open_checkpoint(path)
    model = build_model(factory(path.parent, NET), checkpoint.header, {}, checkpoint.specs)
    loaded = load_weights(model, checkpoint)
    assert all(tensor.equal(layers.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert loaded.notes[-1].startswith(
        f"{len(beside)} tensors are not the model's, and stay as they are ({beside[0]}, "
    )


def test_load_weights_does_not_choose_between_two_models(save: Save) -> None:
    layers = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict()
    both = {f"{lead}.{name}": tensor for lead in ("student", "teacher") for name, tensor in layers.items()}
    path = save("a.pth", {"state_dict": both})
    with pytest.raises(ModelError, match=r"the model fits in 2 places, such as 'student\.' and 'teacher\.'"):
        built(path, factory(path.parent, NET))
    other = {name.replace("teacher", "other"): tensor for name, tensor in both.items()}
    other["other.0.weight"] = torch.zeros(2, 5)
    path = save("b.pth", {"state_dict": other})  # of the same names, and another shape
    assert built(path, factory(path.parent, NET))[0].weight.equal(layers["0.weight"])


def test_load_weights_refuses_a_model_that_is_a_part(save: Save) -> None:
    """A deeper network has all names of one with fewer blocks."""
    deep = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    path = save("a.pth", {"state_dict": {f"model.{name}": tensor for name, tensor in deep.state_dict().items()}})
    with pytest.raises(ModelError, match=r"4 unexpected \(2\.weight, "):
        built(path, factory(path.parent, "nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))"))


def test_load_weights_names_the_buffers_that_a_checkpoint_lacks(save: Save) -> None:
    """An average of parameters alone has no statistics; what it would call them follows from its other names."""
    layers = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))
    buffers = [name for name, _ in layers.named_buffers()]
    state = {f"module.model.{name}": tensor for name, tensor in layers.named_parameters()}
    path = save("a.pth", {"state_dict": state})
    checkpoint = open_checkpoint(path)
    spec = factory(path.parent, NET.removesuffix(")") + ", nn.BatchNorm1d(2, affine=False))")
    model = build_model(spec, checkpoint.header, {}, checkpoint.specs)
    loaded = load_weights(model, checkpoint, measured=buffers)
    assert loaded.added == {name: f"module.model.{name}" for name in buffers}
    assert "These weights have no BatchNorm statistics; the measured ones are added to them." in loaded.notes
    with pytest.raises(ModelError, match=r"4 missing \(1\.running_mean, "):
        load_weights(model, checkpoint)
    path = save("b.pth", {"state_dict": state | {"module.model.1.running_var": torch.ones(2)}})
    with pytest.raises(ModelError, match=r"3 missing \(1\.running_mean, "):
        load_weights(model, open_checkpoint(path), measured=buffers)


def test_load_weights_says_what_to_do_without_statistics(save: Save) -> None:
    state = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict()
    path = save("a.pth", {name: each for name, each in state.items() if "running" not in name})
    with pytest.raises(
        ModelError, match=r"2 missing \(1.running_mean, 1.running_var\). Run recal-bn first, which measures"
    ):
        load_weights(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), open_checkpoint(path))


def test_load_weights_accepts_files_without_num_batches_tracked(save: Save) -> None:
    state = nn.BatchNorm1d(2).state_dict()
    del state["num_batches_tracked"]
    assert isinstance(built(save("a.pth", state), "torch.nn:BatchNorm1d", num_features=2), nn.BatchNorm1d)


def test_model_kwargs_are_python_literals_or_text() -> None:
    found = parse_kwargs(["num_classes=10", "act=relu", "sizes=(1, 2)", "flag=True", "x=a=b", "empty="])
    assert found == {"num_classes": 10, "act": "relu", "sizes": (1, 2), "flag": True, "x": "a=b", "empty": ""}
    for wrong in ("num_classes", "=3", "a b=1"):
        with pytest.raises(UsageError, match="write name=value"):
            parse_kwargs([wrong])


def test_pick_device_rejects_a_missing_device() -> None:
    assert pick_device("cpu").type == "cpu"
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UsageError, match=f"`device='{name}'`: not usable here"):
            pick_device(name)
