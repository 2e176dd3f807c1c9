"""Progress: from nothing to all bytes of tensors, and never beyond."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_network
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import ckpt_tools
from ckpt_tools.errors import UsageError

TENSORS, ELEMENTS = 300, 3
PAYLOAD = TENSORS * ELEMENTS * 4  # far less than the names


def small_tensors(i: int) -> dict[str, torch.Tensor]:
    return {f"module.a_layer_of_a_long_name.{j}.weight": torch.full((ELEMENTS,), float(i + j)) for j in range(TENSORS)}


def write(suffix: str, i: int) -> Path:
    path = Path(f"net-{i}{suffix}")
    if suffix == ".safetensors":
        save_file(small_tensors(i), path)
    elif suffix == "":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is one process
            dcp.save({**small_tensors(i)}, checkpoint_id=path)
    else:
        torch.save({"model": small_tensors(i), "optimizer": {"state": {}, "param_groups": []}}, path)
    return path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("job", "suffix", "out", "moved"),
    [
        (ckpt_tools.convert, ".safetensors", "o.safetensors", 2 * PAYLOAD),
        (ckpt_tools.convert, ".pth", "o.safetensors", 2 * PAYLOAD),
        (ckpt_tools.convert, ".safetensors", "o.pth", 2 * PAYLOAD),
        (ckpt_tools.convert, "", "o.safetensors", 2 * PAYLOAD),
        (ckpt_tools.convert, ".safetensors", "folder/", 2 * PAYLOAD),
        (ckpt_tools.strip, ".pth", "o.pth", 2 * PAYLOAD),
        (
            lambda path, **options: ckpt_tools.average([path, write(path.suffix, 2)], **options),
            ".pth",
            "o.pth",
            3 * PAYLOAD,
        ),
    ],
)
def test_jobs_report_progress_up_to_all_bytes_of_tensors(
    job: Callable[..., Any], suffix: str, out: str, moved: int
) -> None:
    seen: list[Any] = []
    job(write(suffix, 1), out=out, on_progress=lambda _, *counted: seen.append(counted))
    assert seen[-1] == (moved, moved)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_fix_prefix_reports_progress_up_to_all(suffix: str) -> None:
    seen: list[Any] = []
    ckpt_tools.fix_prefix(write(suffix, 1), out=f"o{suffix}", on_progress=lambda _, *counted: seen.append(counted))
    done, total = seen[-1]
    assert PAYLOAD <= done == total


NETWORK: dict[str, Any] = {"model": f"{small_network.__file__}:Net", "batch_size": 10, "workers": 0}
LABELLED = f"{small_network.__file__}:labelled"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("job", "told"),
    [
        (lambda paths, show: ckpt_tools.look(paths, on_progress=show), {"measuring"}),
        (lambda paths, show: ckpt_tools.verify(paths[0], on_progress=show), {"verifying"}),
        (
            lambda paths, show: ckpt_tools.average(paths[1:], base=paths[0], out="o.pth", on_progress=show),
            {"measuring", "averaging"},
        ),
        (
            lambda paths, show: ckpt_tools.average(
                paths, out="o.pth", recal_bn=LABELLED, on_images=show, on_progress=show, **NETWORK
            ),
            {"averaging", "checking before", "measuring", "checking after", "writing"},
        ),
        (
            lambda paths, show: ckpt_tools.recalibrate_checkpoint(
                paths[0], data=LABELLED, eval_data=LABELLED, passes=2, on_progress=show, **NETWORK
            ),
            {"evaluating before", "measuring, pass 1 of 2", "evaluating after"},
        ),
        (
            lambda paths, show: ckpt_tools.diff(*paths[:2], part="2/3", on_progress=show),
            {"comparing"},
        ),
    ],
    ids=["look", "verify", "stock", "recal_bn", "recalibrate", "part"],
)
def test_each_kind_of_work_is_told_up_to_its_end(job: Callable[..., Any], told: set[str]) -> None:
    paths = [Path(f"{i}.pth") for i in range(3)]
    for i, path in enumerate(paths):
        torch.save({"state_dict": small_network.trained(i), "epoch": i}, path)
    seen: dict[str, list[tuple[int, int | None]]] = {}
    job(paths, lambda what, done, total: seen.setdefault(what, []).append((done, total)))
    assert {*seen} == told
    for counted in seen.values():
        done, total = counted[-1]
        assert 0 < done == total
        assert [each for each, _ in counted] == sorted(each for each, _ in counted)


@pytest.mark.usefixtures("here")
def test_a_function_that_cannot_be_told_the_progress_is_refused_before_the_work() -> None:
    with pytest.raises(UsageError, match=r"`on_progress` is called with \(what is done, how much of it so far, all"):
        ckpt_tools.strip(write(".pth", 1), on_progress=lambda done, total: None)
    with pytest.raises(UsageError, match=r"`on_images` is a function, not 3\."):
        ckpt_tools.average("gone.pth", on_images=3)
