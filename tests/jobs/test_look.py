"""Looking at a series, against NumPy on the whole vectors of its parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runner import run

from ckpt_tools import look
from ckpt_tools.compute import native
from ckpt_tools.errors import CkptError, NumericsError, UsageError

Save = Callable[..., Path]


def series(save: Save, n: int = 5, **other: Any) -> np.ndarray:
    """Write a run of a small net with BatchNorm, and return its parameters, one row a checkpoint."""
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(20, 30, generator=generator), torch.randn(20, generator=generator)
    rows = []
    for i in range(n):
        weight = weight + 0.02 * torch.randn(20, 30, generator=generator)
        state = {
            "fc.weight": weight,
            "fc.bias": bias,
            "bn.running_mean": torch.full((20,), 1e3 * i),
            "n": torch.tensor(i),
        }
        tree = {"model": state, "step": 100 * (i + 1)} | {key: value[i] for key, value in other.items()}
        save(f"c-{i}.pth", tree)
        rows.append(np.concatenate([weight.double().numpy().ravel(), bias.double().numpy()]))
    return np.array(rows)


def optimizer(rate: float) -> dict[str, Any]:
    return {"state": {}, "param_groups": [{"lr": rate, "params": [0, 1]}]}


def test_look_measures_the_parameters_without_the_buffers(save: Save, here: Path) -> None:
    rows = series(save)
    report = look("c-*.pth", threads=2)
    mean = rows.mean(axis=0)
    assert [each.step for each in report.checkpoints] == [100, 200, 300, 400, 500]
    assert [each.to_mean for each in report.checkpoints] == pytest.approx(np.linalg.norm(rows - mean, axis=1), rel=1e-6)
    assert [each.norm for each in report.checkpoints] == pytest.approx(np.linalg.norm(rows, axis=1), rel=1e-9)
    steps = np.diff(rows, axis=0)
    assert [each.to_next for each in report.checkpoints[:-1]] == pytest.approx(np.linalg.norm(steps, axis=1), rel=1e-6)
    cosine = steps[0] @ steps[1] / np.linalg.norm(steps[0]) / np.linalg.norm(steps[1])
    assert report.checkpoints[1].cosine == pytest.approx(cosine, abs=1e-5)
    assert list(report.movement) == ["fc.weight", "fc.bias"]
    assert report.movement["fc.bias"] == 0
    assert (report.outlier, report.one_basin, report.notes) == (None, True, ())
    assert report.bytes_read == 5 * 4 * 620


def test_look_tells_of_an_outlier_a_decayed_rate_and_another_basin(save: Save, here: Path) -> None:
    series(save, optimizer=[optimizer(rate) for rate in (0.1, 0.05, 0.01, 0.005, 0.001)])
    report = look("c-*.pth")
    assert [each.learning_rate for each in report.checkpoints] == [0.1, 0.05, 0.01, 0.005, 0.001]
    assert any("learning rate falls from 0.1 to 0.001" in note for note in report.notes)
    torch.manual_seed(9)
    for i in (2, 3):
        tree = torch.load(f"c-{i}.pth")
        tree["model"]["fc.weight"] = torch.randn(20, 30) if i == 3 else tree["model"]["fc.weight"]
        save(f"c-{i}.pth", tree)
    report = look("c-*.pth")
    assert report.outlier == "c-3.pth"
    assert any("c-3.pth is far from all others: the nearest is" in note for note in report.notes)
    for i in range(5):
        save(f"d-{i}.pth", {"fc.weight": torch.randn(50, 40)})
    report = look("d-*.pth")
    assert not report.one_basin
    assert report.mean_norm == pytest.approx(5**-0.5, abs=0.02)
    assert any("no common basin" in note for note in report.notes)


def test_look_tells_of_a_rate_that_fell_before_the_first_file_or_is_not_in_every_file(save: Save, here: Path) -> None:
    late = optimizer(0.001)
    late["param_groups"][0]["initial_lr"] = 0.3
    series(save, optimizer=[{}, late, optimizer(0.001), late, {}])
    report = look("c-*.pth")
    assert [each.learning_rate for each in report.checkpoints] == [None, 0.001, 0.001, 0.001, None]
    assert report.notes == ()
    series(save, optimizer=[{}, optimizer(0.2), {}, optimizer(0.001), {}])
    assert any("falls from 0.2 to 0.001" in note for note in look("c-*.pth").notes)
    series(save, optimizer=[optimizer(0.001)] * 4 + [late])
    assert any("began at 0.3, and is 0.001 in the last file" in note for note in look("c-*.pth").notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("which", [0, 2, 4])
def test_look_refuses_what_is_at_no_distance(save: Save, here: Path, value: float, which: int) -> None:
    series(save)
    tree = torch.load(f"c-{which}.pth")
    tree["model"]["fc.weight"] = tree["model"]["fc.weight"].double()
    tree["model"]["fc.weight"][3, 4] = value
    save(f"c-{which}.pth", tree)
    with pytest.raises(NumericsError, match=rf"'fc\.weight' in c-{which}\.pth: a value is NaN or infinity"):
        look("c-*.pth")


def test_look_needs_no_torch(save: Save, here: Path) -> None:
    if native._native is None:
        pytest.skip("no C extension")
    series(save)
    code = "import sys; from ckpt_tools import look; assert look('c-*.pth').one_basin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_look_tells_how_much_of_an_ema_is_still_its_start(save: Save, here: Path) -> None:
    for i in (1, 2):
        w = torch.full((4,), float(i))
        save(
            f"e-{i}.ckpt",
            {
                "model.w": w,
                "model_ema.w": w * 1,
                "model_ema.decay": torch.tensor(0.99),
                "model_ema.num_updates": torch.tensor(100 * i),
            },
        )
    report = look("e-*.ckpt")
    assert report.checkpoints[0].start_left == pytest.approx(0.99**100, rel=1e-5)
    assert any("36.6% of the EMA in e-1.ckpt is still the weights that it began with" in note for note in report.notes)
    for columns in (60, 80, 120):
        shown = run("look", "e-*.ckpt", columns=columns, terminal=True, NO_COLOR="1").out
        assert "start left" in shown
        assert all(len(line) <= columns for line in shown.splitlines()[:3])
        assert [name for name in ("e-1.ckpt", "e-2.ckpt") if f"\n{name}  " in shown] == ["e-1.ckpt", "e-2.ckpt"]


def test_the_command_shows_a_table_and_writes_json(save: Save, here: Path) -> None:
    rows = series(save)
    found = run("look", "c-*.pth", "--last", "3", "--json")
    assert found.code == 0
    assert "c-4.pth" in found.err
    assert "These tensors move most, relative to their norm: fc.weight" in found.err
    report = json.loads(found.out)
    mean = rows[2:].mean(axis=0)
    assert report["checkpoints"][0]["to_mean"] == pytest.approx(np.linalg.norm(rows[2] - mean), rel=1e-6)


def test_look_refuses_one_checkpoint_and_files_that_share_nothing(save: Save, here: Path) -> None:
    save("a.pth", {"w": torch.ones(2)})
    with pytest.raises(UsageError, match=r"a\.pth is one checkpoint alone"):
        look("a.pth")
    save("b.pth", {"v": torch.ones(2)})
    with pytest.raises(CkptError, match=r"'w'|'v'"):
        look(["a.pth", "b.pth"])


@pytest.mark.parametrize("value", [10**400, 1e300, 1e-320, float("nan"), True, "0.1"], ids=lambda value: str(value)[:9])
def test_what_is_no_learning_rate_is_not_shown(save: Save, here: Path, value: object) -> None:
    odd = optimizer(0.1) | {"param_groups": [{"lr": 0.1, "initial_lr": value}]}
    series(save, optimizer=[optimizer(0.1), {"param_groups": [{"lr": value}], "state": {}}, odd, odd, odd])
    report = look("c-*.pth")
    assert [each.learning_rate for each in report.checkpoints] == [0.1, None, 0.1, 0.1, 0.1]
    assert not any("learning rate" in note for note in report.notes)


def test_short_names_leave_room_for_the_title_of_their_column(save: Save, here: Path) -> None:
    series(save)
    shown = run("look", "c-*.pth", columns=60).out
    assert shown.startswith("checkpoint  ")
