"""An average with measured BatchNorm statistics: that of `average` and `recalibrate_checkpoint`, written once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from cli_runner import run
from conftest import Photos
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ckpt_tools import average, open_checkpoint, recalibrate_checkpoint, sweep
from ckpt_tools.compute import follower
from ckpt_tools.errors import CkptError, LayoutError, NumericsError, UsageError

Save = Callable[..., Path]
QUICK: dict[str, Any] = {"img_size": 32, "batch_size": 4, "workers": 0}
NAMED: dict[str, Any] = {"model": "test_resnet", **QUICK}


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def of_timm(seed: int) -> dict[str, Any]:
    """As timm's train.py saves a run with an EMA, by DDP."""
    ema = {f"module.{name}": t for name, t in weights(seed + 7).items()}
    return {"epoch": seed, "arch": "test_resnet", "state_dict": weights(seed), "state_dict_ema": ema}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def same_bytes(a: Path, b: Path) -> bool:
    """True if the checkpoints have the same names, dtypes and bytes in all sets of weights."""
    states = open_checkpoint(a).states
    assert states == open_checkpoint(b).states
    for state in states:
        one, two = open_checkpoint(a, state=state), open_checkpoint(b, state=state)
        assert list(one) == list(two)
        for name in one:
            assert one[name].dtype == two[name].dtype, name
            x, y = (each[name].contiguous().reshape(-1).view(torch.uint8) for each in (one, two))
            if not x.equal(y):
                return False
    return True


@pytest.mark.parametrize(
    ("make", "out", "options"),
    [
        (weights, "avg.pth", {}),
        (weights, "avg.safetensors", {"dtype": "float16"}),
        (weights, "avg", {"max_shard_size": "400kB", "mode": "ema", "decay": 0.5}),
        (lambda seed: {"model": weights(seed, torch.bfloat16), "epoch": seed}, "avg.pth", {}),
        (of_timm, "avg.pth", {}),
        (of_timm, "avg.safetensors", {"state": "raw", "buffers": "last"}),
    ],
    ids=["plain", "float16 safetensors", "shards", "bfloat16 container", "timm with an EMA", "timm raw"],
)
def test_average_with_recal_bn_is_average_then_recalibrate_checkpoint(
    save: Save, photos: Photos, tmp_path: Path, make: Any, out: str, options: dict[str, Any]
) -> None:
    paths = [save(f"in/{i}.pth", make(i)) for i in range(2)]
    folder, (one, two, three) = str(photos()), (tmp_path / f"{i}" / out for i in range(3))
    for path in (one, two, three):
        path.parent.mkdir()
    report = average(paths, out=one, recal_bn=folder, passes=2, **NAMED, **options)
    plain = average(paths, out=two, **options)
    measured = recalibrate_checkpoint(two, data=folder, out=three, passes=2, **NAMED)
    assert same_bytes(one, three)
    assert not same_bytes(one, two)
    assert [path.name for path in one.parent.iterdir()] == [out]  # the scratch file is gone
    assert report.recalibration is not None
    assert report.recalibration.statistics is not None
    assert measured.statistics is not None
    assert report.recalibration.statistics.layers == measured.statistics.layers
    made, known = open_checkpoint(one).provenance, open_checkpoint(three).provenance
    assert made is not None
    assert known is not None
    assert made.pop("recalibrated") == known["arguments"]
    assert made == known["input"]["made"] == open_checkpoint(two).provenance
    assert report.averaged == plain.averaged
    json.dumps(report.to_dict())


def test_avg_with_recal_bn_shows_both_plans_and_writes_nothing_in_a_dry_run(
    save: Save, photos: Photos, here: Path
) -> None:
    for i in range(2):
        save(f"{i}.pth", of_timm(i))
    folder = photos()
    before = contents(here)
    arguments = ("avg", "0.pth", "1.pth", "--recal-bn", folder, "--img-size", "32", "-j", "0")
    shown = run(*arguments, "--dry-run").out
    assert "0.500000" in shown
    assert "15 layers of ResNet" in shown
    assert "Statistics of 12 images" in shown
    assert contents(here) == before
    done = run(*arguments, "--json")
    assert "layer4.0.bn2" in done.err
    assert json.loads(done.out)["recalibration"]["statistics"]["images"] == 12
    assert "measured on it: data" in run("inspect", "averaged.pth").out


CODE = """
import os, torch
def broken():
    yield torch.randn(4, 3, 32, 32)
    raise RuntimeError("the disk is gone")
def infinite(): return [torch.full((4, 3, 32, 32), float("inf"))]
def loud():
    os.write(1, b"printed by C code")
    return [torch.randn(4, 3, 32, 32) * 9 + 50] * 3
"""


def stop(what: Any, *_: Any) -> None:
    if what.unit == "images":
        raise KeyboardInterrupt("stop")


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ("broken", {}, CkptError, "the disk is gone"),
        ("infinite", {}, CkptError, "NaN or infinity"),
        ("loud", {"eval_data": "photos", "require_gain": True}, NumericsError, "nothing was written"),
        ("loud", {"on_progress": stop}, KeyboardInterrupt, "stop"),
        ("gone", {}, UsageError, "^`recal_bn='code.py:gone'`: code.py has no 'gone'"),
        ("loud", {"recal_bn": "phtos"}, CkptError, "^`recal_bn='phtos'`: no such folder"),
        ("loud", {"model_kwargs": {"num_classes": 4}}, CkptError, "do not fit"),
        ("loud", {"batch_size": 1}, UsageError, "`batch_size=1`"),
    ],
)
def test_average_with_recal_bn_leaves_nothing_after_an_error(
    save: Save, photos: Photos, here: Path, data: str, options: dict[str, Any], error: Any, message: str
) -> None:
    (here / "code.py").write_text(CODE)
    path, folder = save("1.pth", weights(0)), photos(each=6)
    recalibrate_checkpoint(path, data=str(folder), out="2.pth", **NAMED)
    before = contents(here)
    with pytest.raises(error, match=message):
        average("2.pth", out="out.pth", **{"recal_bn": f"code.py:{data}"} | NAMED | options)
    assert contents(here) == before
    assert not [path for path in here.iterdir() if path.name.endswith(".partial")]


def test_avg_keeps_what_user_code_prints_off_stdout(save: Save, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "code.py").write_text(CODE)
    save("1.pth", of_timm(0))
    result = run("avg", "1.pth", "--recal-bn", "code.py:loud", "--json")
    assert json.loads(result.out)["written"] is True
    printed = capfd.readouterr()
    assert "printed by C code" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), FrozenBatchNorm2d(3)], ids=["none", "frozen"])
def test_average_of_a_model_without_batchnorm_is_the_plain_one_with_a_note(
    save: Save, here: Path, layer: nn.Module
) -> None:
    torch.save(layer, "layer.pt")
    (here / "own.py").write_text("import torch\ndef net(): return torch.load('layer.pt', weights_only=False)\n")
    paths = [save(f"{i}.pth", {name: t + i for name, t in layer.state_dict().items()}) for i in range(2)]
    report = average(paths, out="a.pth", recal_bn="nowhere", model="own.py:net")
    assert not any("averaged statistics" in note for note in report.notes)
    Path("b").mkdir()
    average(paths, out="b/a.pth")
    assert report.notes[-1] == "The model has no BatchNorm statistics, so `recal_bn` has no effect."
    assert report.recalibration is None
    assert Path("a.pth").read_bytes() == Path("b/a.pth").read_bytes()


def test_an_update_of_a_recalibrated_average_measures_the_statistics_again(
    save: Save, photos: Photos, here: Path
) -> None:
    paths, folder = [save(f"{i}.pth", {"epoch": i, "model": weights(i)}) for i in range(3)], str(photos())
    average(paths[:2], out="measured.pth", recal_bn=folder, **NAMED)
    average(paths[:2], out="plain.pth")
    message = (
        "its BatchNorm statistics were measured, on .*photos, .* Give the images to measure them on with `recal_bn`"
    )
    with pytest.raises(LayoutError, match=message):
        average(paths[2], update="measured.pth", out="a.pth")
    assert not Path("a.pth").exists()
    for name in ("measured", "plain"):
        average(paths[2], update=f"{name}.pth", out=f"{name}-3.pth", recal_bn=folder, **NAMED)
    assert same_bytes(Path("measured-3.pth"), Path("plain-3.pth"))
    average(paths[2], update="plain.pth", out="a.pth")
    recalibrate_checkpoint("a.pth", data=folder, **NAMED)
    assert same_bytes(Path("measured-3.pth"), Path("a-bn.pth"))


def test_a_replay_of_a_recalibrated_average_measures_the_statistics_again(
    save: Save, photos: Photos, here: Path
) -> None:
    paths, folder = [save(f"{i}.pth", {"epoch": i, "model": weights(i)}) for i in range(2)], str(photos())
    average(paths, out="measured.pth", recal_bn=folder, **NAMED)
    average(paths, out="plain.pth")
    with pytest.raises(LayoutError, match="were measured, on .*photos. Give these images with `recal_bn`"):
        average([], replay="measured.pth")
    with pytest.raises(UsageError, match=r"`recal_bn`: plain\.pth was made without it"):
        average([], replay="plain.pth", recal_bn=folder, **NAMED)
    same = average([], replay="measured.pth", out="again.pth", recal_bn=folder, **NAMED)
    assert (same.same, same.compared) == (True, "It is the same as measured.pth in every byte.")
    other = average([], replay="measured.pth", out="other.pth", recal_bn=folder, **NAMED, images=6)
    assert other.same is None
    assert "Its weights are those of measured.pth in every byte; BatchNorm statistics" in other.compared


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 2}, "`passes` goes with `recal_bn`"),
        ({"model": "test_resnet"}, "`model` goes with `recal_bn`"),
        ({"recal_bn": "photos", "state": ["a", "b"], **NAMED}, "`recal_bn` needs those of one network"),
        ({"recal_bn": "gone", **NAMED}, "gone"),
    ],
)
def test_average_rejects_impossible_measurements(
    save: Save, photos: Photos, here: Path, options: dict[str, Any], message: str
) -> None:
    photos()
    save("a.pth", {"a": weights(0), "b": weights(1)})
    with pytest.raises(CkptError, match=message):
        average("a.pth", **{"out": "x.pth", "state": "a", **options})
    assert not Path("x.pth").exists()


def test_average_with_recal_bn_runs_in_one_process(
    save: Save, photos: Photos, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    monkeypatch.setitem(os.environ, "RANK", "0")
    save("a.pth", weights(0))
    with pytest.raises(UsageError, match="`recal_bn` works in one process"):
        average("a.pth", out="x.pth", recal_bn=str(photos()), **NAMED)


def layers(seed: int, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(5, generator=generator) for name in ("fc.weight", *names)}


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (
            ("bn.running_mean", "bn.running_var", "x.running_mean", "x.running_var"),
            {},
            "2 BatchNorm layers have averaged statistics",
        ),
        (("running_mean", "running_var"), {}, "1 BatchNorm layer has averaged statistics"),
        (
            ("bn.running_mean", "bn.running_var"),
            {"buffers": "last"},
            "1 BatchNorm layer has the statistics of the last",
        ),
        (("bn.running_mean", "bn.running_var"), {"weights": [0, 1]}, None),
        (("bn.running_mean", "x.running_var"), {}, None),
        ((), {}, None),
    ],
)
def test_average_says_in_one_note_that_statistics_are_averaged(
    save: Save, here: Path, names: tuple[str, ...], options: Mapping[str, Any], said: str | None
) -> None:
    paths = [save(f"{i}.pth", layers(i, *names)) for i in range(2)]
    notes = [note for note in average(paths, **options).notes if "BatchNorm" in note]
    assert len(notes) == (said is not None)
    assert all(said in note and "Measure them on training images with `recal_bn`" in note for note in notes if said)


def test_the_best_of_a_sweep_is_written_as_it_was_scored(save: Save, photos: Photos, here: Path) -> None:
    for i in range(3):
        save(f"run/c-{i}.pth", {"step": i, "model": weights(i)})
    folder = str(photos())
    found = sweep(
        "run", mode="uniform", eval_data=folder, data=folder, metric="loss", passes=2, out="best.pth", **NAMED
    )
    best = next(each for each in found.candidates if each.label == found.best)
    before = recalibrate_checkpoint("best.pth", data=folder, eval_data=folder, out="x.pth", **NAMED).before
    assert before is not None
    assert before.loss == pytest.approx(best.metrics["loss"], rel=1e-6)
    average(found.paths, **found.options, out="again.pth")
    assert same_bytes(Path("best.pth"), Path("again.pth"))
    made, again = (open_checkpoint(name).provenance for name in ("best.pth", "again.pth"))
    assert made is not None
    assert made.pop("sweep")["metric"] == "loss"
    assert made == again
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(sys.platform != "linux", reason="the names of open files are in /proc")
def test_pages_of_the_inputs_are_dropped_while_the_sums_are_made(
    save: Save, photos: Photos, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[str] = []
    monkeypatch.setattr(follower, "in_use", lambda fd: False)
    monkeypatch.setattr(follower, "drop", lambda fd, *_: dropped.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    paths = [save(f"{i}.pth", {"epoch": i, "model": weights(i)}) for i in range(2)]
    average(paths, out="a.pth", recal_bn=str(photos()), drop_cache=True, **NAMED)
    assert {"0.pth", "1.pth"} <= {*dropped}
