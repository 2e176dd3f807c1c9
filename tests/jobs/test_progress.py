"""Progress: from nothing to all bytes of tensors, and never beyond."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import ckpt_tools

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
    seen: list[tuple[int, int]] = []
    job(write(suffix, 1), out=out, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (moved, moved)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_fix_prefix_reports_progress_up_to_all(suffix: str) -> None:
    seen: list[tuple[int, int]] = []
    ckpt_tools.fix_prefix(
        write(suffix, 1), out=f"o{suffix}", on_progress=lambda done, total: seen.append((done, total))
    )
    done, total = seen[-1]
    assert PAYLOAD <= done == total
