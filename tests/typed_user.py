"""A user's script, for the type checker: what the public functions take and return, and what they refuse.

`make check` runs mypy over it, in strict mode: a line with ``type: ignore`` is one that must be an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, assert_type

import torch
from torch import nn

import ckpt_tools
from ckpt_tools import (
    AverageReport,
    BatchNormReport,
    Checkpoint,
    CkptError,
    CleanReport,
    ConvertReport,
    DiffReport,
    InspectReport,
    LookReport,
    PrefixReport,
    RecalibrationReport,
    StripReport,
    SweepReport,
    TuneReport,
    UsageError,
    VerifyReport,
)


def averages(runs: list[Path]) -> AverageReport:
    mode: Literal["uniform", "ema"] = "ema"
    plan = ckpt_tools.average("runs/", mode=mode, decay=0.99, last=5, out=Path("a.pth"), dtype="bfloat16", dry_run=True)
    report = ckpt_tools.average(
        runs, mode="weights", weights=[1, 2], dtype=torch.float32, keys="union", device="cuda:1"
    )
    assert_type(report.inputs[0].coefficient, float)
    assert_type(plan.recalibration, RecalibrationReport | None)
    ckpt_tools.average(runs, mode="uniformm")  # type: ignore[call-overload]
    ckpt_tools.average(runs, moed="uniform")  # type: ignore[call-overload]
    ckpt_tools.average(runs, "uniform")  # type: ignore[call-overload]
    ckpt_tools.average(runs, decay="0.99")  # type: ignore[call-overload]
    ckpt_tools.average(runs, keys="all")  # type: ignore[call-overload]
    ckpt_tools.average(runs, match="shape")  # type: ignore[call-overload]
    ckpt_tools.average(runs, buffers="first")  # type: ignore[call-overload]
    ckpt_tools.average(runs, order="size")  # type: ignore[call-overload]
    ckpt_tools.average(runs, dtype="float33")  # type: ignore[call-overload]
    ckpt_tools.average(runs, by="epochs")  # type: ignore[call-overload]
    ckpt_tools.average(runs, shape="sine")  # type: ignore[call-overload]
    ckpt_tools.average(3)  # type: ignore[call-overload]
    report.mode = "ema"  # type: ignore[misc]
    return report


def plans(runs: list[str]) -> None:
    def show(plan: AverageReport) -> None:
        assert_type(plan.memory, int)

    def other(plan: DiffReport) -> None: ...

    ckpt_tools.average(runs, on_plan=show)
    ckpt_tools.average(runs, on_plan=other)  # type: ignore[arg-type]


def weights(runs: list[Path], models: list[nn.Module]) -> dict[str, torch.Tensor]:
    averaged = ckpt_tools.average([model.state_dict() for model in models], mode="ema", decay=0.5, out=None)
    assert_type(averaged, dict[str, torch.Tensor])
    models[0].load_state_dict(averaged)
    assert_type(ckpt_tools.average([averaged, averaged], out="a.pth"), AverageReport)
    return ckpt_tools.average(runs, last=3, out=None)


def views(path: Path) -> Mapping[str, torch.Tensor]:
    checkpoint = ckpt_tools.open_checkpoint(path, state="ema")
    assert_type(checkpoint, Checkpoint)
    assert_type(checkpoint["head.weight"], torch.Tensor)
    nn.Linear(2, 2).load_state_dict(checkpoint)
    return checkpoint


def one_checkpoint(path: Path) -> None:
    assert_type(ckpt_tools.convert(path, to="timm-ema", out="b.safetensors"), ConvertReport)
    assert_type(ckpt_tools.strip(path, out="c.pth"), StripReport)
    assert_type(ckpt_tools.fix_prefix(path, strip=["module."]), PrefixReport)
    assert_type(ckpt_tools.diff(path, "b.safetensors", rtol=1e-3).tensors[0].max_abs, float | None)
    assert_type(ckpt_tools.inspect(path).sets[0].dtypes, dict[str, tuple[int, int]])
    assert_type(ckpt_tools.verify(path, sample="1%").passed, bool)
    assert_type(ckpt_tools.clean(path.parent).freed, int)
    ckpt_tools.convert(path, to="tim", out="b.pth")  # type: ignore[arg-type]
    ckpt_tools.convert(path, to="plain")  # type: ignore[call-arg]
    ckpt_tools.diff(path)  # type: ignore[call-arg]


def several(runs: list[Path]) -> tuple[LookReport, SweepReport]:
    swept = ckpt_tools.sweep(runs, last=[3, 5], mode=["uniform", "ema"], eval_function="score.py:score")
    assert_type(swept.best, str | None)
    return ckpt_tools.look(runs, keys="intersection"), swept


def networks(path: Path, model: nn.Module, batches: list[torch.Tensor]) -> None:
    found = ckpt_tools.recalibrate_bn(model, batches, passes=2, estimator="batch-mean")
    assert_type(found, BatchNormReport)
    assert_type(found.layers[0].mean_moved, float)
    assert_type(ckpt_tools.recalibrate_checkpoint(path, data="train/", images=-1).before is None, bool)
    assert_type(ckpt_tools.tune_checkpoint(path, data="train/", train="last-block"), TuneReport)
    ckpt_tools.recalibrate_bn(model, batches, estimator="sample")  # type: ignore[arg-type]
    ckpt_tools.tune_checkpoint(path, data="train/", train="heads")  # type: ignore[arg-type]
    ckpt_tools.recalibrate_checkpoint(path)  # type: ignore[call-arg]


def errors(path: Path) -> InspectReport | VerifyReport | CleanReport:
    try:
        return ckpt_tools.inspect(path)
    except UsageError:
        return ckpt_tools.clean(path)
    except CkptError as error:
        assert_type(error.exit_code, int)
        return ckpt_tools.verify(path)
