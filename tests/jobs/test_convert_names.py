"""Names in conversions: lists and encodings without names get them back, and module versions follow them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load, same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel
from two_sets import PAIRS, opened, weights

import ckpt_tools
from ckpt_tools.errors import LayoutError

Save = Callable[..., Path]


class LitEma(nn.Module):
    """What latent diffusion's class keeps: decay, num_updates, and parameters without the dots of their names."""

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(7, dtype=torch.int))
        for name, parameter in model.named_parameters():
            self.register_buffer(name.replace(".", ""), parameter.detach() + 1)


class Diffusion(nn.Module):
    """A model under `model.`, its averages under `model_ema.`, and more beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(OrderedDict(net=nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))))
        self.model_ema = LitEma(self.model, decay=0.99)
        self.first_stage = nn.Linear(1, 1)


def test_convert_restores_lit_ema_names_from_the_raw_names(save: Save, tmp_path: Path) -> None:
    net = Diffusion()
    source = save("sd.ckpt", {"state_dict": net.state_dict(), "global_step": 9})
    ema, raw = opened(source, "ema"), opened(source, "raw")
    assert list(raw) == [name for name in net.state_dict() if not name.startswith("model_ema.")] == list(ema)
    assert torch.equal(ema["model.net.0.weight"], net.model.net[0].weight + 1)  # type: ignore[union-attr,index,operator]
    assert torch.equal(ema["model.net.1.running_var"], raw["model.net.1.running_var"])
    ckpt_tools.convert(source, to="torchvision", out=tmp_path / "t.pth")
    assert load(tmp_path / "t.pth")["model_ema"]["n_averaged"].item() == 7
    ckpt_tools.convert(tmp_path / "t.pth", to="litema", out=tmp_path / "back.ckpt", decay=0.99)
    net.load_state_dict(load(tmp_path / "back.ckpt")["state_dict"])
    assert same_bits({n: t for n, t in load(tmp_path / "back.ckpt")["state_dict"].items() if n in net.state_dict()},
                     {n: net.state_dict()[n] for n in load(tmp_path / "back.ckpt")["state_dict"]})  # fmt: skip


def test_convert_restores_lit_ema_names_from_another_checkpoint(save: Save, tmp_path: Path) -> None:
    net = Diffusion()
    source = save("ema.pth", net.model_ema.state_dict())
    with pytest.raises(LayoutError, match="names have lost their dots, .* Give `names_from`, or `model`"):
        ckpt_tools.convert(source, to="plain", out=tmp_path / "out.pth")
    names = save("model.pth", net.model.state_dict())
    ckpt_tools.convert(source, to="plain", out=tmp_path / "out.pth", names_from=names)
    assert list(load(tmp_path / "out.pth")) == list(net.model.state_dict())
    assert torch.equal(load(tmp_path / "out.pth")["net.0.bias"], net.model_ema.net0bias)


@pytest.mark.parametrize("to", ["pytorch-ema", "diffusers"])
def test_convert_names_a_list_of_parameters(save: Save, tmp_path: Path, to: str) -> None:
    source = save("timm.pth", {"state_dict": weights(1), "state_dict_ema": weights(2)})
    report = ckpt_tools.convert(source, to=to, out=tmp_path / "list.pth", updates=4, decay=0.5)
    found = load(tmp_path / "list.pth")
    parameters = [t for n, t in weights(2).items() if "running" not in n and "num_batches" not in n]
    assert all(map(torch.equal, found["shadow_params"], parameters))
    assert (found["decay"], found.get("num_updates", found.get("optimization_step"))) == (0.5, 4)
    assert any("'1.running_mean' and 2 more are lost: the list holds parameters alone" in note for note in report.notes)
    with pytest.raises(LayoutError, match="a list of 6 tensors without names. Give `names_from`, or `model`"):
        ckpt_tools.convert(tmp_path / "list.pth", to="plain", out=tmp_path / "out.pth")
    ckpt_tools.convert(
        tmp_path / "list.pth", to="plain", names_from=save("raw.pth", weights(1)), out=tmp_path / "out.pth"
    )
    expected = {n: (weights(1) if "running" in n or "num_batches" in n else weights(2))[n] for n in weights(1)}
    assert same_bits(load(tmp_path / "out.pth"), expected)


def test_convert_names_a_list_by_the_raw_weights_beside_it(save: Save) -> None:
    shadow = [t + 1 for n, t in weights(1).items() if "running" not in n and "num_batches" not in n]
    tree = {"model": weights(1), "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": shadow}, "step": 3}
    found = opened(save("score.pth", tree))
    assert torch.equal(found["2.0.weight"], weights(1)["2.0.weight"] + 1)
    assert torch.equal(found["1.running_mean"], weights(1)["1.running_mean"])


def test_convert_takes_names_but_no_values_from_a_model(save: Save, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 2)))\n"
    )
    shadow = [t for n, t in weights(1).items() if "running" not in n and "num_batches" not in n]
    source = save("list.pth", {"decay": 0.9, "num_updates": None, "shadow_params": shadow, "collected_params": None})
    ckpt_tools.convert(source, to="plain", model=f"{tmp_path}/net.py:make", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert same_bits(found, {n: t for n, t in weights(1).items() if "running" not in n and "num_batches" not in n})


def test_convert_keeps_empty_parameters_apart_in_a_list(save: Save, tmp_path: Path) -> None:
    empty = torch.ones(0)
    state = OrderedDict({"a": empty, "b": empty, "c": torch.ones(2)})
    source = save("in.pth", state)
    tree = {"decay": 0.5, "num_updates": 1, "shadow_params": list(state.values()), "collected_params": None}
    ckpt_tools.convert(save("list.pth", tree), to="plain", names_from=source, out=tmp_path / "out.pth")
    assert same_bits(load(tmp_path / "out.pth"), state)


ATTENTION = ("to_q", "to_k", "to_v", "to_out")  # of one shape, so only their order tells them apart


def attention(seed: int) -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return OrderedDict((f"{name}.weight", torch.randn(3, 3)) for name in ATTENTION)


@pytest.mark.parametrize("out", ["names.safetensors", "names"])
def test_convert_takes_no_names_for_a_list_from_a_file_that_sorts_them(save: Save, tmp_path: Path, out: str) -> None:
    ckpt_tools.convert(save("names.pth", attention(1)), to="plain", out=tmp_path / out)
    tree = {"decay": 0.5, "num_updates": 1, "shadow_params": list(attention(2).values()), "collected_params": None}
    source = save("list.pth", tree)
    with pytest.raises(LayoutError, match="in the order of the model's parameters, .* keeps names in another order"):
        ckpt_tools.convert(source, to="plain", names_from=tmp_path / out, out=tmp_path / "out.pth")
    ckpt_tools.convert(source, to="plain", names_from=tmp_path / "names.pth", out=tmp_path / "out.pth")
    assert same_bits(load(tmp_path / "out.pth"), attention(2))


@pytest.mark.parametrize("to", ["pytorch-ema", "diffusers"])
def test_convert_makes_no_list_of_names_that_a_file_has_sorted(save: Save, tmp_path: Path, to: str) -> None:
    source, sorted_one = save("in.pth", attention(1)), tmp_path / "in.safetensors"
    ckpt_tools.convert(source, to="plain", out=sorted_one)
    with pytest.raises(LayoutError, match="the list .* in the order of the model, .* Give `names_from`"):
        ckpt_tools.convert(sorted_one, to=to, updates=3, out=tmp_path / "out.pth")
    ckpt_tools.convert(sorted_one, to=to, updates=3, names_from=source, out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")["shadow_params"]
    assert all(torch.equal(a, b) for a, b in zip(found, attention(1).values(), strict=True))


class Versioned(nn.Linear):
    """A layer that takes only its own version, as torchvision's MNASNet does; a file without one is version None."""

    _version = 3

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        assert local_metadata.get("version") == 3, f"{prefix} is of version {local_metadata.get('version')}"
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class TwoModels(nn.Module):
    """As ema-pytorch's EMA keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.online_model, self.ema_model = versioned(1), versioned(2)
        self.register_buffer("initted", torch.tensor(True))
        self.register_buffer("step", torch.tensor(0))


def versioned(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(Versioned(2, 3), nn.BatchNorm1d(3), nn.Sequential(Versioned(3, 2)))


def averaged(seed: int) -> nn.Module:
    return AveragedModel(versioned(seed))


@pytest.mark.parametrize("source", ["timm", "ema-pytorch", "lightning", "mmengine", "litema"])
@pytest.mark.parametrize("layout", [*PAIRS, "litema"])
def test_convert_keeps_module_versions_in_any_layout(save: Save, tmp_path: Path, source: str, layout: str) -> None:
    raw, ema = versioned(1).state_dict(), versioned(2).state_dict()
    path = save("timm.pth", {"state_dict": raw, "state_dict_ema": ema})
    if source != "timm":
        given, path = path, tmp_path / "source.pth"
        ckpt_tools.convert(given, to=source, out=path, updates=5, decay=0.9)
    ckpt_tools.convert(path, to=layout, out=tmp_path / "there.pth", updates=5, decay=0.9)
    for state, seed in (("raw", 1), ("ema", 2)):
        out = tmp_path / f"{state}.pth"
        ckpt_tools.convert(tmp_path / "there.pth", to="plain", state=state, out=out)
        made = versioned(0)
        made.load_state_dict(load(out))  # fails without the versions
        assert torch.equal(made.state_dict()["0.weight"], versioned(seed).state_dict()["0.weight"])


@pytest.mark.parametrize(
    ("layout", "keys", "make"),
    [
        ("plain", [], versioned),
        ("timm", ["state_dict", "state_dict_ema"], versioned),
        ("averaged-model", [], averaged),
        ("torchvision", ["model_ema"], averaged),
        ("ema-pytorch", [], lambda seed: TwoModels()),
    ],
)
def test_convert_writes_state_dicts_that_modules_with_versions_load(
    save: Save, tmp_path: Path, layout: str, keys: list[str], make: Callable[[int], nn.Module]
) -> None:
    source = save("deit.pth", {"model": versioned(1).state_dict(), "model_ema": versioned(2).state_dict()})
    ckpt_tools.convert(source, to=layout, out=tmp_path / "out.pth", updates=5)
    found = load(tmp_path / "out.pth")
    for state in [found[key] for key in keys] or [found]:
        made = make(0)
        made.load_state_dict(state)
        shells = {"", "module"}  # modules that have no version in any release
        assert (
            dict(state._metadata).items()
            >= {key: version for key, version in made.state_dict()._metadata.items() if key not in shells}.items()
        )


def test_convert_takes_the_prefix_of_an_averaged_model_off_its_module_versions(save: Save, tmp_path: Path) -> None:
    ckpt_tools.convert(save("swa.pth", averaged(1).state_dict()), to="plain", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert found._metadata == versioned(0).state_dict()._metadata
    versioned(0).load_state_dict(found)


def test_convert_gives_an_average_without_versions_those_of_the_raw_weights(save: Save, tmp_path: Path) -> None:
    ema = {name: tensor.clone() for name, tensor in versioned(2).state_dict().items()}
    source = save("own.pth", {"model": versioned(1).state_dict(), "model_ema": ema})
    ckpt_tools.convert(source, to="plain", dtype="float16", out=tmp_path / "out.pth")
    made = versioned(0)
    made.load_state_dict(load(tmp_path / "out.pth"))  # fails without the versions
    assert torch.equal(made.state_dict()["0.weight"], ema["0.weight"].half().float())


@pytest.mark.parametrize("metadata", [None, 3, [1], {1: 2}, {"": 10**2000}, {10**2000: 2, "0": {"version": 3}}])
def test_convert_takes_module_versions_of_any_kind(save: Save, tmp_path: Path, metadata: Any) -> None:
    state = weights(1)
    state._metadata = metadata  # type: ignore[attr-defined]
    ckpt_tools.convert(save("odd.pth", state), to="averaged-model", out=tmp_path / "out.pth")
    assert same_bits(opened(tmp_path / "out.pth"), weights(1))
