"""Averages that no file has: of state dicts, and as state dicts; each bit is that of the files."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load, same_bits
from torch import nn

import ckpt_tools
from ckpt_tools.errors import AlignmentError, CorruptError, NumericsError, UsageError
from ckpt_tools.storage.source import STORES

Save = Callable[..., Path]
StateDict = dict[str, torch.Tensor]


def state_dict(seed: int) -> StateDict:
    """Tensors of many kinds: large, views, ties, other orders of axes, a scalar, empty ones, and those copied as is."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(7, 50, generator=generator)
    tied = torch.randn(5, 3, generator=generator)
    return {
        "large.a": torch.randn(300, 100, generator=generator),
        "none": torch.empty(0),
        "large.b": torch.randn(33_333, generator=generator).half(),
        "large.c": torch.randn(41_111, generator=generator).bfloat16(),
        "half": torch.randn(300, generator=generator).half(),
        "brain": torch.randn(40, 3, generator=generator).bfloat16(),
        "double": torch.randn(4, dtype=torch.float64, generator=generator),
        "view": large[2:5, 10:40],
        "transposed": large.t(),
        "last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "tied.a": tied,
        "tied.b": tied,
        "scalar": torch.randn((), generator=generator),
        "empty": torch.empty(0, 3),
        "complex": torch.randn(6, dtype=torch.complex64, generator=generator).conj(),
        "steps": torch.tensor(seed),
        "mask": torch.tensor([True, seed > 1]),
        "eight": torch.randn(33, generator=generator).to(torch.float8_e4m3fn),
    }


@pytest.fixture
def three(save: Save) -> tuple[list[StateDict], list[Path]]:
    """State dicts, and the files that torch.save makes of them."""
    found = [state_dict(i) for i in (1, 2, 3)]
    dense = [{name: tensor.resolve_conj() for name, tensor in each.items()} for each in found]
    return found, [save(f"run-{i}.pth", each) for i, each in enumerate(dense, 1)]


@pytest.mark.usefixtures("here", "way")
@pytest.mark.parametrize(
    "options", [{}, {"mode": "ema", "decay": 0.3, "bias_correction": True}, {"last": 2}, {"dtype": torch.float32}]
)
def test_what_stays_in_memory_has_the_bits_of_the_file(
    three: tuple[list[StateDict], list[Path]], options: dict[str, Any]
) -> None:
    state_dicts, paths = three
    ckpt_tools.average(paths, out="expected.pth", **options)
    expected = load(Path("expected.pth"))
    assert same_bits(ckpt_tools.average(paths, out=None, **options), expected)
    assert same_bits(ckpt_tools.average(state_dicts, out=None, **options), expected)
    ckpt_tools.average(state_dicts, out="of_state_dicts.pth", **options)
    assert same_bits(load(Path("of_state_dicts.pth")), expected)
    for each, path in zip(state_dicts, paths, strict=True):
        assert all(tensor.equal(each[name]) for name, tensor in load(path).items())  # no input is changed
    assert STORES == {}
    assert {path.name for path in Path().iterdir()} == {"expected.pth", "of_state_dicts.pth", *(p.name for p in paths)}


def test_the_average_of_state_dicts_is_that_of_numpy() -> None:
    values = [np.random.default_rng(i).standard_normal((50, 7)) for i in range(5)]
    weights = [1, 0, 2, 3, 2]
    found = ckpt_tools.average([{"w": torch.from_numpy(each)} for each in values], weights=weights, out=None)
    np.testing.assert_allclose(found["w"].numpy(), np.average(values, axis=0, weights=weights), rtol=1e-14)


def test_a_network_takes_the_average_of_others_with_the_versions_of_its_modules() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    found = ckpt_tools.average((model.state_dict() for model in models), out=None)
    assert isinstance(found, OrderedDict)
    assert found._metadata == models[0].state_dict()._metadata  # type: ignore[attr-defined]
    models[0].load_state_dict(found)
    for name, tensor in models[0].state_dict().items():
        assert tensor.equal(found[name])


@pytest.mark.usefixtures("here")
def test_the_result_is_memory_of_its_own_in_which_what_is_tied_stays_tied(
    three: tuple[list[StateDict], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")  # as on other systems
    (one, *_), _ = three
    found = ckpt_tools.average(one, out=None)
    assert found["tied.a"].data_ptr() == found["tied.b"].data_ptr()
    before = one["tied.a"].clone()
    found["tied.a"].zero_()
    assert one["tied.a"].equal(before)
    assert found["tied.b"].eq(0).all()
    assert found["view"].equal(one["view"])


@pytest.mark.usefixtures("here")
def test_progress_and_the_plan_of_an_average_in_memory_are_told(three: tuple[list[StateDict], list[Path]]) -> None:
    seen: list[Any] = []
    plans: list[Any] = []
    ckpt_tools.average(three[0], out=None, on_plan=plans.append, on_progress=lambda *each: seen.append(each))
    (plan,) = plans
    assert (plan.out, plan.written, [each.name for each in plan.inputs]) == (
        "", False, ["state_dict_1", "state_dict_2", "state_dict_3"],
    )  # fmt: skip
    what, done, total = seen[-1]
    assert (what, done) == ("averaging", total)
    assert total == plan.bytes_read + plan.bytes_written


def test_averages_in_several_threads_do_not_mix() -> None:
    found: dict[int, StateDict] = {}

    def work(number: int) -> None:
        given = [{"w": torch.full((1000,), float(number + i))} for i in range(3)]
        found[number] = ckpt_tools.average(given, out=None)

    threads = [threading.Thread(target=work, args=(10 * number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert {number: set(each["w"].tolist()) for number, each in found.items()} == {
        10 * number: {10.0 * number + 1} for number in range(8)
    }
    assert STORES == {}


def test_a_state_dict_that_changes_meanwhile_is_refused() -> None:
    given = [{"w": torch.randn(10)}, {"w": torch.randn(10)}]
    with pytest.raises(CorruptError, match="state_dict_2: changed while it was read"):
        ckpt_tools.average(given, out=None, on_plan=lambda plan: given[1]["w"].add_(1))
    assert STORES == {}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ([{"w": torch.ones(2)}, "a.pth"], {}, UsageError, "paths and state dicts together have no order"),
        (
            [{"w": torch.ones(2), "epoch": 3}],
            {},
            UsageError,
            r"state_dict_1: 'epoch' is a int, and a state dict has te",
        ),
        ([{"w": torch.ones(2, device="meta")}], {}, UsageError, "'w' is on the device 'meta', and has no values"),
        ([{"w": torch.eye(2).to_sparse()}], {}, AlignmentError, "'w' is torch.sparse_coo of dtype torch.float32"),
        ([{"w": torch.ones(2)}, {"v": torch.ones(2)}], {}, AlignmentError, r"state_dict_[12] (lacks|has no)"),
        ([{"w": torch.tensor([1.0, torch.nan])}], {}, NumericsError, "state_dict_1"),
        ([{"w": torch.ones(2)}], {"hash": True, "out": "o.pth"}, UsageError, "`hash` needs checkpoints that are files"),
        ([{"w": torch.ones(2)}], {"update": "o.pth"}, UsageError, "`update` needs checkpoints that are files"),
        (
            [{"w": torch.ones(2)}],
            {"dry_run": True},
            UsageError,
            "`dry_run` goes with a file, and `out=None` writes none",
        ),
        ("a.pth", {"sign_off": "s.json"}, UsageError, "`sign_off` goes with a file, and `out=None` writes none"),
        ("a.pth", {"recal_bn": "images/"}, UsageError, "`recal_bn` goes with a file"),
    ],
)
def test_what_cannot_be_done_in_memory_is_refused(
    given: Any, options: Mapping[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ckpt_tools.average(given, **({"out": None} | options))
    assert STORES == {}
    assert [*Path().iterdir()] == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_state_dicts_on_a_gpu_are_averaged_as_on_the_cpu() -> None:
    found = [state_dict(i) for i in (1, 2, 3)]
    placed = [{name: tensor.cuda() for name, tensor in each.items()} for each in found]
    assert same_bits(ckpt_tools.average(placed, out=None), ckpt_tools.average(found, out=None))
