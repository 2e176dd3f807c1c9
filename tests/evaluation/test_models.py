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
    (tmp_path / "nets.py").write_text(
        "from torch import nn\nfrom neighbour import WIDTH\ndef net(width=WIDTH): return nn.Linear(width, 2)\n"
    )
    (tmp_path / "neighbour.py").write_text("WIDTH = 3\n")
    path = save("a.pth", nn.Linear(3, 2).state_dict())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    for spec in ("nets.py:net", str(tmp_path / "nets.py:net"), "nets:net", "torch.nn:Linear"):
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


@pytest.mark.parametrize(
    ("own", "stored", "fix"),
    [
        ("", "model.", r"start with 'model\.'\. Run `fix_prefix\(strip=\['model\.'\]\)`"),
        ("", "net.backbone.", r"`fix_prefix\(strip=\['net\.backbone\.'\]\)`"),
        ("", "module.student.", r"`fix_prefix\(strip=\['module\.student\.'\]\)`"),
        ("head.", "", r"lack 'head\.'\. Run `fix_prefix\(add=\['head\.'\]\)`"),
    ],
)
def test_load_weights_names_the_prefix_by_which_all_names_differ(save: Save, own: str, stored: str, fix: str) -> None:
    layers = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    path = save("a.pth", {"state_dict": {f"{stored}{name}": tensor for name, tensor in layers.state_dict().items()}})
    made = "nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))"
    made = f"nn.ModuleDict({{'head': {made}}})" if own else made
    file = path.parent / f"net{len(own)}.py"  # of its own for each model: an imported module stays
    file.write_text(f"from torch import nn\ndef net(): return {made}\n")
    with pytest.raises(ModelError, match=fix):
        built(path, f"{file}:net")
    kind, prefix = ("add", own) if own else ("strip", stored)
    fixed = fix_prefix(path, out=path.with_name("b.pth"), **{kind: [prefix]})
    assert isinstance(built(Path(fixed.out), f"{file}:net"), nn.Module)


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
