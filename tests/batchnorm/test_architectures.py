"""Architectures: each layer gets the statistics of what it normalises, as brute force finds them in float64."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bn_networks import CASES, Case, OwnNorm, conv, pictures
from timm.layers.evo_norm import EvoNorm2dB0, EvoNorm2dB1
from torch import Tensor, nn
from torch.nn import functional as F

from ckpt_tools.batchnorm import recalibrate_bn

Statistics = dict[str, tuple[np.ndarray, np.ndarray]]


def brute_force(model: nn.Module, case: Case, monkeypatch: pytest.MonkeyPatch) -> Statistics:
    """Run a network whose torch has arithmetic of ours for `batch_norm`, which keeps all that it normalises."""
    model = copy.deepcopy(model).eval()
    kept: dict[str, list[np.ndarray]] = {}
    names = {id(m.running_var): name for name, m in model.named_modules() if hasattr(m, "running_var")}

    def keep(name: str, x: Tensor) -> None:
        kept.setdefault(name, []).append(x.movedim(1, 0).flatten(1).double().numpy().copy())

    def plain(x: Tensor, mean: Any, variance: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        keep(names[id(variance)], x)
        axes = [0, *range(2, x.dim())]
        shape = (1, -1, *[1] * (x.dim() - 2))
        centred = x - x.mean(axes, keepdim=True)
        out = centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()
        return out if weight is None else out * weight.view(shape) + bias.view(shape)

    def functional(x: Any, mean: Any, variance: Any, weight: Any = None, bias: Any = None, *_: Any, **k: Any) -> Tensor:
        return plain(x, mean, variance, weight, bias, k["eps"] if "eps" in k else _[2])

    def low(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: Any, momentum: Any, eps: Any, _: Any):  # type: ignore[no-untyped-def]
        return plain(x, mean, variance, weight, bias, eps)

    def given(name: str, module: Any, args: tuple[Tensor]) -> None:
        keep(name, args[0])
        columns = kept[name][-1]
        module.running_var.copy_(torch.tensor(columns.var(1)).view_as(module.running_var))
        if hasattr(module, "running_mean"):
            module.running_mean.copy_(torch.tensor(columns.mean(1)).view_as(module.running_mean))

    for name, module in model.named_modules():
        if isinstance(module, (OwnNorm, EvoNorm2dB0, EvoNorm2dB1)):  # these do without torch's function
            module.register_forward_pre_hook(partial(given, name))
    options = {"forward": None, "inputs": 1, **case.options}
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "batch_norm", functional)
        patch.setattr(torch, "batch_norm", low)
        for batch in case.batches():
            if options["forward"] is not None:
                options["forward"](model, batch)
            elif isinstance(batch, dict):
                model(**{name: value for name, value in batch.items() if name not in ("labels", "target")})
            else:
                model(*(batch[: options["inputs"]] if isinstance(batch, tuple) else [batch]))
    whole = {name: np.concatenate(parts, axis=1) for name, parts in kept.items()}
    return {name: (values.mean(1), values.var(1, ddof=1)) for name, values in whole.items()}


def assert_statistics(model: nn.Module, want: Statistics) -> None:
    for name, (mean, variance) in want.items():
        layer = model.get_submodule(name)
        if getattr(layer, "running_mean", None) is not None:
            scale = np.sqrt(variance).max()
            np.testing.assert_allclose(layer.running_mean.flatten().numpy(), mean, rtol=1e-9, atol=1e-9 * scale)
        np.testing.assert_allclose(layer.running_var.flatten().numpy(), variance, rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_recalibrate_bn_agrees_with_brute_force_on_each_architecture(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().double()
    want = brute_force(model, case, monkeypatch)
    others = {k: v.clone() for k, v in model.state_dict().items() if "running_" not in k and "tracked" not in k}
    report = recalibrate_bn(model, case.batches(), **case.options)
    assert len(want) > 1
    assert {layer.name for layer in report.layers} == want.keys()
    assert_statistics(model, want)
    assert all(model.state_dict()[key].equal(value) for key, value in others.items())


def test_there_are_25_architectures_and_the_page_names_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "batchnorm.md").read_text()
    assert len(CASES) >= 25
    for name in CASES:
        assert name in page, name


def test_recalibrate_bn_measures_layers_that_torchscript_has_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(lambda: nn.Sequential(conv(3, 4), conv(4, 4), nn.BatchNorm2d(4)), pictures())
    torch.manual_seed(0)
    model = case.make().double()
    want = brute_force(model, case, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = nn.Sequential(model[0], torch.jit.script(model[1]), model[2])
    report = recalibrate_bn(scripted, case.batches())
    assert {layer.name for layer in report.layers} == want.keys()
    assert_statistics(scripted, want)
