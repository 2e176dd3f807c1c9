"""Layouts: the right set of weights is found, and always said; what misleads is refused."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckpt_tools.errors import LayoutError
from ckpt_tools.formats import read_header
from ckpt_tools.layouts import select, states

Save = Callable[..., Path]


def weights(value: float = 0.0, prefix: str = "") -> dict[str, torch.Tensor]:
    return OrderedDict({f"{prefix}w": torch.full((2,), value), f"{prefix}b": torch.full((1,), value)})


@pytest.mark.parametrize(
    ("tree", "auto", "both"),
    [
        (weights(), ("raw", ()), {"raw"}),
        ({"state_dict": weights(), "epoch": 3}, ("raw", ("state_dict",)), {"raw"}),
        ({"state_dict": weights(), "state_dict_ema": weights()}, ("ema", ("state_dict_ema",)), {"raw", "ema"}),
        ({"model": weights(), "model_ema": weights()}, ("ema", ("model_ema",)), {"raw", "ema"}),
        ({"model": weights(), "model_ema": None}, ("raw", ("model",)), {"raw"}),
        ({"model_state_dict": weights(), "ema_state_dict": weights()}, ("ema", ("ema_state_dict",)), {"raw", "ema"}),
        ({"state_dict": weights(), "state_dict_ema": {}}, ("raw", ("state_dict",)), {"raw"}),
    ],
)
def test_each_layout_is_found_and_auto_prefers_the_ema(
    save: Save, tree: Any, auto: tuple[str, Any], both: set[str]
) -> None:
    header = read_header(save("c.pth", tree))
    chosen = select(header)
    assert (chosen.which, chosen.path) == auto
    assert list(chosen.tensors) == ["w", "b"]
    assert set(states(header)) == both


def test_a_flat_state_dict_may_have_a_module_called_model(save: Save) -> None:
    header = read_header(save("c.pth", {"model.w": torch.zeros(1), "state_dict": torch.zeros(1)}))
    assert list(select(header).tensors) == ["model.w", "state_dict"]


def test_a_dotted_path_reaches_any_place(save: Save) -> None:
    tree = {"nets": {"teacher.ema": weights(2), "student": weights(1)}}
    header = read_header(save("c.pth", tree))
    assert select(header, "nets.teacher.ema").path == ("nets", "teacher.ema")
    assert select(header, "nets.student").label == "nets.student"


def test_the_counter_of_averaged_model_is_no_weight(save: Save) -> None:
    model = AveragedModel(nn.Linear(2, 3))
    model.update_parameters(nn.Linear(2, 3))
    chosen = select(read_header(save("c.pth", {"model": weights(), "model_ema": model.state_dict()})))
    assert list(chosen.tensors) == ["module.weight", "module.bias"]


def test_a_buffer_called_n_averaged_stays_in_other_models(save: Save) -> None:
    chosen = select(read_header(save("c.pth", {**weights(), "n_averaged": torch.tensor(3)})))
    assert "n_averaged" in chosen.tensors


@pytest.mark.parametrize("other", ["ema_state_dict", "current_model_state"])
def test_files_of_libraries_that_swap_the_sets_are_not_guessed_at(save: Save, other: str) -> None:
    header = read_header(save("c.pth", {"state_dict": weights(1), other: weights(2)}))
    with pytest.raises(LayoutError, match=f"--state state_dict or --state {other}"):
        select(header)
    assert select(header, "state_dict").path == ("state_dict",)


@pytest.mark.parametrize(
    ("tree", "state", "message"),
    [
        ({"state_dict": weights()}, "ema", r"has no ema weights, only raw \(state_dict\)\. Use --state raw"),
        (
            {"student": weights(), "teacher": weights()},
            "auto",
            r"Tensors stand in student, teacher\. Choose with --state student",
        ),
        ({"epoch": 3, "args": argparse.Namespace(lr=1)}, "auto", "no tensor inside"),
        ({"state_dict": {}}, "auto", "'state_dict' holds no tensor"),
        ({"a": {"b": 1}}, "a.c", r"nothing at 'a\.c'\. a holds: b"),
        ({"a": {"b": 1}}, "a", "'a' is no state dict"),
        ([torch.zeros(1)], "auto", "tensors without names"),
        (torch.zeros(1), "auto", "tensors without names"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(save: Save, tree: Any, state: str, message: str) -> None:
    header = read_header(save("c.pth", tree))
    with pytest.raises(LayoutError, match=message):
        select(header, state)


def test_a_pickled_module_is_named_and_not_loaded(save: Save) -> None:
    header = read_header(save("c.pth", {"model": nn.Linear(2, 2)}))
    with pytest.raises(LayoutError, match=r"'model' is a pickled object \(torch\.nn\.modules\.linear\.Linear\)"):
        select(header)
    with pytest.raises(LayoutError, match=r"a pickled object \(torch\.nn\.modules\.linear\.Linear\)"):
        select(read_header(save("d.pth", nn.Linear(2, 2))))


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"net": weights(), "best_acc": torch.tensor(90.0)}, "net"),
        ({"model": {"enc": weights(), "scale": torch.ones(1)}}, "model.enc"),
        ({"w": torch.ones(1), "layers": [torch.ones(1)]}, "layers"),
    ],
)
def test_a_stray_tensor_beside_the_weights_is_not_taken_for_them(save: Save, tree: Any, place: str) -> None:
    with pytest.raises(LayoutError, match=f"not clear which are the weights.*--state {place}"):
        select(read_header(save("c.pth", tree)))
