"""Pictures of reports: what they show is read back from the figures, and compared with NumPy on the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runner import run

import ckpt_tools
from ckpt_tools.batchnorm.report import BatchNormReport, LayerReport
from ckpt_tools.errors import UsageError
from ckpt_tools.jobs.listing import listing
from ckpt_tools.jobs.pictures import rendered

pytest.importorskip("matplotlib")

from ckpt_tools.jobs.report_pictures import (  # noqa: E402
    TOP,
    draw_average,
    draw_batchnorm,
    draw_diff,
    draw_listing,
    draw_sizes,
)

Save = Callable[..., Path]


def figure_of(draw: Callable[[Any], None]) -> Any:
    """The figure as it is saved."""
    kept: list[Any] = []
    assert rendered(lambda figure: (draw(figure), kept.append(figure))[0], size=(8, 4), suffix=".svg")
    return kept[0]


def points(axes: Any) -> dict[float, float]:
    lines = [line for line in axes.lines if line.get_marker() in ("o", "D")]
    return {float(x): float(y) for line in lines for x, y in zip(*line.get_data(), strict=True)}


def test_an_average_shows_the_coefficient_of_each_step(save: Save, here: Path) -> None:
    for i in range(4):
        save(f"c-{i}.pth", {"model": {"w": torch.full((3,), float(i))}, "step": 100 * (i + 1)})
    report = ckpt_tools.average("c-*.pth", mode="weights", weights=[0.5, -0.25, 0.25, 0.5], plot="a.svg")
    assert Path("a.svg").read_bytes().startswith(b"<?xml")
    axes = figure_of(lambda figure: draw_average(report, figure)).axes[0]
    assert points(axes) == {100: 0.5, 200: -0.25, 300: 0.25, 400: 0.5}
    below = [line for line in axes.lines if line.get_marker() == "D"]  # told apart in a grey print, too
    assert [list(line.get_xdata()) for line in below] == [[200]]


def test_a_difference_shows_the_tensors_that_differ_most(save: Save, here: Path) -> None:
    generator = np.random.default_rng(0)
    a = {f"layer.{i}.weight": generator.normal(size=(4, 3)) for i in range(TOP + 5)}
    b = {name: values + 10.0 ** -generator.uniform(0, 6) * generator.normal(size=(4, 3)) for name, values in a.items()}
    for name, values in (("a.pth", a), ("b.pth", b)):
        save(name, {key: torch.from_numpy(each) for key, each in values.items()} | {"count": torch.tensor(len(name))})
    report = ckpt_tools.diff("a.pth", "b.pth", plot="d.png")
    assert Path("d.png").read_bytes().startswith(b"\x89PNG")
    axes = figure_of(lambda figure: draw_diff(report, figure)).axes[0]
    found = {text.get_text().split()[0]: bar.get_width() for text, bar in zip(axes.texts, axes.patches, strict=True)}
    expected = sorted(((np.abs(a[name] - b[name]).max(), name) for name in a), reverse=True)[:TOP]
    assert [*found] == [name for _, name in expected]
    assert [*found.values()] == [size for size, _ in expected]


def test_a_tensor_with_nan_on_one_side_comes_first(save: Save, here: Path) -> None:
    save("a.pth", {"v": torch.ones(2), "w": torch.tensor([1.0, float("nan")])})
    save("b.pth", {"v": torch.zeros(2), "w": torch.ones(2)})
    report = ckpt_tools.diff("a.pth", "b.pth")
    axes = figure_of(lambda figure: draw_diff(report, figure)).axes[0]
    assert [text.get_text() for text in axes.texts] == ["w  0 (relative 0), 1 not finite", "v  1 (relative 1)"]


def test_equal_checkpoints_have_a_picture_of_no_difference(save: Save, here: Path) -> None:
    save("a.pth", {"w": torch.ones(2)})
    save("b.pth", {"w": torch.ones(2)})
    found = run("diff", "a.pth", "b.pth", "--plot", "d.svg")
    assert (found.code, "Wrote d.svg." in found.err) == (0, True)


@pytest.mark.parametrize("layers", [1, 5, 60])
def test_a_recalibration_shows_how_far_each_layer_moved(layers: int) -> None:
    moved = [(0.01 * i, 1 + 0.1 * i) for i in range(layers - 1)] + [(2.5, float("inf"))]
    rows = [LayerReport(f"bn{i}", "BatchNorm2d", 8, 9, 0, 1, 1, 2, *each, None, None) for i, each in enumerate(moved)]
    report = BatchNormReport(tuple(rows), (), 256, 4, 1, "pooled", 1.0, {})
    means, variances = figure_of(lambda figure: draw_batchnorm(report, figure)).axes
    assert [*points(means).values()] == [mean for mean, _ in moved]
    assert [*points(variances).values()] == [variance for _, variance in moved]
    assert [text.get_text() for text in means.texts] == [f"bn{layers - 1}: 2.5"]  # beyond the limit


def test_recal_bn_draws_what_it_measured(runs: list[Path], here: Path) -> None:
    fixtures = runs[0].parent.parent
    found = run(
        "recal-bn", runs[-1], "--model", f"{fixtures}/digits_net.py:DigitsNet", "--data", fixtures / "digits" / "train",
        "--img-size", 8, "--crop-pct", 1, "--mean", 0, "--std", 1, "-j", 0, "--images", 64, "-o", "bn.pth",
        "--plot", "bn.svg",
    )  # fmt: skip
    assert (found.code, found.err.splitlines()[-1]) == (0, "Wrote bn.svg.")
    assert Path("bn.svg").read_bytes().startswith(b"<?xml")


def test_a_picture_and_an_output_have_two_names(save: Save, here: Path) -> None:
    path = save("a.pth", {"w": torch.ones(2)})
    with pytest.raises(UsageError, match=r"`plot` and `out` are both out\.svg: give them different names"):
        ckpt_tools.average(path, out="out.svg", plot="out.svg")
    assert not Path("out.svg").exists()


def test_a_dry_run_draws_nothing(save: Save, here: Path) -> None:
    path = save("a.pth", {"w": torch.ones(2)})
    assert run("avg", path, "--dry-run", "--plot", "a.svg").code == 0
    assert not Path("a.svg").exists()


def test_sizes_are_those_of_parts_and_tensors(save: Save, here: Path) -> None:
    weights = {f"layer.{i}": torch.zeros(1000 * (i + 1)) for i in range(TOP + 3)}
    moments = {0: {"exp_avg": torch.zeros(50_000), "exp_avg_sq": torch.zeros(50_000)}}
    optimizer = {"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]}
    path = save("a.pth", {"state_dict": weights, "optimizer": optimizer})
    report = ckpt_tools.inspect(path, plot="a.svg")
    assert Path("a.svg").read_bytes().startswith(b"<?xml")
    parts, tensors = figure_of(lambda figure: draw_sizes(report, figure)).axes
    nbytes = [sum(each.nbytes for each in weights.values()), 400_000]
    expected = [*nbytes, path.stat().st_size - sum(nbytes)]
    assert parts.get_xlabel() == "MB"
    assert [bar.get_width() * 1e6 for bar in parts.patches] == pytest.approx(expected)
    assert [text.get_text().split()[0] for text in tensors.texts] == [f"layer.{i}" for i in range(TOP + 2, 2, -1)]
    assert tensors.get_xlabel() == "kB"
    assert [bar.get_width() for bar in tensors.patches] == [4.0 * (i + 1) for i in range(TOP + 2, 2, -1)]


def test_sizes_of_several_checkpoints_stand_over_their_steps(save: Save, here: Path) -> None:
    paths = [save(f"c-{i}.pth", {"model": {"w": torch.zeros(10_000 * i)}, "step": 100 * i}) for i in (1, 2, 3)]
    Path("c-4.pth").write_bytes(b"cut off")
    found = run("inspect", ".", "--plot", "s.png", "--json")
    assert (found.code, Path("s.png").read_bytes()[:4]) == (1, b"\x89PNG")
    report = listing(["."], "metric")
    axes = figure_of(lambda figure: draw_listing(report, figure)).axes[0]
    assert axes.get_ylabel() == "kB"
    expected = {100.0 * i: path.stat().st_size / 1000 for i, path in enumerate(paths, 1)}
    assert points(axes) == pytest.approx(expected)


def test_a_checkpoint_without_weights_has_a_picture(save: Save, here: Path) -> None:
    path = save("a.pth", {"epoch": 3})
    assert run("inspect", path, "--plot", "a.svg").code == 0
