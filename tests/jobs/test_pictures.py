"""Pictures: of a series, and of the documentation; what they show is read back from the figures."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import run
from PIL import Image

from ckpt_tools import look
from ckpt_tools.errors import UsageError, WriteError
from ckpt_tools.jobs.look import LookReport, Position
from ckpt_tools.jobs.pictures import rendered, shortened

matplotlib = pytest.importorskip("matplotlib")

from ckpt_tools.jobs.look_picture import SIZE, draw  # noqa: E402

ROOT = Path(__file__).parents[2]
Save = Callable[..., Path]


def series(save: Save, n: int = 4) -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 5)
    for i in range(n):
        w = w + 0.1 * torch.randn(6, 5)
        save(f"c-{i}.pth", {"model": {"fc.weight": w}, "step": 100 * (i + 1)})


def report(n: int, *, outlier: int | None = None, rates: Any = None, name: str = "c-#.pth") -> LookReport:
    """A made-up report."""
    checkpoints = tuple(
        Position(
            name=name.replace("#", str(i)),
            step=1000 * (i + 1),
            norm=10.0,
            to_mean=9.0 if i == outlier else 1.0 + 0.01 * i,
            to_next=1.0 if i < n - 1 else None,
            cosine=0.5 if 0 < i < n - 1 else None,
            learning_rate=None if rates is None else rates(i),
            start_left=None,
        )
        for i in range(n)
    )
    return LookReport(
        checkpoints=checkpoints,
        state="raw (model)",
        ordered_by="the step",
        mean_norm=0.99,
        one_basin=True,
        outlier=None if outlier is None else name.replace("#", str(outlier)),
        movement={f"model.layers.{i}.self_attention.query_key_value.dense.weight": 0.1 / (i + 1) for i in range(14)},
        warnings=(),
        notes=(),
        bytes_read=0,
    )


def figure_of(shown: LookReport) -> Any:
    """The figure as it is saved."""
    kept: list[Any] = []

    def drawn(figure: Any) -> None:
        draw(shown, figure)
        kept.append(figure)

    assert rendered(drawn, size=SIZE, suffix=".svg").startswith(b"<?xml")
    return kept[0]


def panels(figure: Any) -> dict[str, Any]:
    return {axes.get_ylabel().replace("\n", " ") or axes.get_title(loc="left"): axes for axes in figure.axes}


@pytest.mark.parametrize("n", [2, 3, 8, 60])
def test_a_panel_shows_every_checkpoint_and_no_labels_overlap(n: int) -> None:
    figure = figure_of(report(n, outlier=n // 2 if n > 2 else None, rates=lambda i: 1e-3 * 0.9**i))
    found = panels(figure)
    expected = ["distance to the mean", "distance to the next", "learning rate", "tensors that move most"]
    assert sorted(found) == sorted(expected + (["cosine of successive steps"] if n > 2 else []))
    line = found["learning rate"].lines[0]
    assert list(line.get_xdata()) == [1000 * (i + 1) for i in range(n)]
    assert list(line.get_ydata()) == pytest.approx([1e-3 * 0.9**i for i in range(n)])
    width, height = figure.bbox.width, figure.bbox.height
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
            inside = [box for box in boxes if box.x1 > 0 and box.x0 < width and box.y1 > 0 and box.y0 < height]
            assert not any(a.overlaps(b) for i, a in enumerate(inside) for b in inside[:i]), axes.get_ylabel()
    for text in found["tensors that move most"].texts:
        assert text.get_window_extent().x1 <= width


def test_the_outlier_is_marked_by_its_name() -> None:
    axes = panels(figure_of(report(8, outlier=6)))["distance to the mean"]
    assert [text.get_text() for text in axes.texts] == ["outlier: c-6.pth"]
    assert list(axes.lines[1].get_xdata()) == [7000]
    assert axes.lines[1].get_marker() == "D"


def test_missing_learning_rates_are_gaps_and_none_at_all_is_no_panel() -> None:
    values = panels(figure_of(report(4, rates=lambda i: None if i == 1 else 0.1)))["learning rate"].lines[0].get_ydata()
    assert [value == value for value in values] == [True, False, True, True]
    assert "learning rate" not in panels(figure_of(report(4)))


def test_equal_checkpoints_have_a_picture(save: Save, here: Path) -> None:
    for i in range(3):
        save(f"e-{i}.pth", {"w": torch.zeros(4)})
    look("e-*.pth", plot="e.svg")
    assert Path("e.svg").read_bytes().startswith(b"<?xml")


def test_odd_names_are_drawn_as_they_are() -> None:
    figure = figure_of(report(3, outlier=1, name="$x_#$ \\frac{ \n\x1b[0m \u6b6a \udcff " + "long" * 40 + ".pth"))
    (text,) = panels(figure)["distance to the mean"].texts
    assert text.get_text().startswith("outlier: $x_1$ \\frac{ ??\u2026")
    assert len(text.get_text()) == len("outlier: ") + 32


def test_shortened_names_keep_both_ends() -> None:
    assert shortened("short", 5) == "short"
    assert shortened("abcdefghij", 6) == "ab\u2026hij"


@pytest.mark.parametrize("suffix", [".svg", ".png", ".PNG"])
def test_look_writes_the_same_picture_again(suffix: str, save: Save, here: Path) -> None:
    series(save)
    look("c-*.pth", plot=f"a{suffix}")
    look("c-*.pth", plot=f"b{suffix}")
    data = Path(f"a{suffix}").read_bytes()
    assert data == Path(f"b{suffix}").read_bytes()
    if suffix == ".svg":
        assert b"dc:date" not in data
    else:
        with Image.open(f"a{suffix}") as image:
            assert image.size == (2000, 1240)
    assert sorted(path.name for path in here.iterdir()) == [
        f"a{suffix}",
        f"b{suffix}",
        *(f"c-{i}.pth" for i in range(4)),
    ]


def test_an_existing_picture_needs_force(save: Save, here: Path) -> None:
    series(save)
    target = Path("a.svg")
    target.write_text("mine")
    found = run("look", "c-*.pth", "--plot", target)
    assert (found.code, target.read_text()) == (1, "mine")
    assert "a.svg: exists already. Pass --force to replace it, or choose another name with --plot." in found.err
    found = run("look", "c-*.pth", "--plot", target, "--force")
    assert (found.code, "Wrote a.svg." in found.err) == (0, True)
    assert target.read_bytes().startswith(b"<?xml")
    with pytest.raises(WriteError, match=r"there is no folder .*nowhere"):
        look("c-*.pth", plot="nowhere/a.svg")


def test_what_cannot_be_drawn_is_refused_before_any_file_is_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"`plot='a\.pdf'`: a picture is \.svg or \.png"):
        look("nothing-*.pth", plot="a.pdf")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"needs matplotlib, .*pip install 'ckpt-tools\[plot\]'"):
        look("nothing-*.pth", plot="a.svg")


def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "pictures" / "profiles.py"))


def test_the_picture_of_the_rules_shows_the_coefficients_of_the_rules() -> None:
    lines: dict[str, list[float]] = {}
    profiles = script()

    def drawn(figure: Any) -> None:
        profiles["draw"](figure)
        lines.update({line.get_label(): list(line.get_ydata()) for axes in figure.axes for line in axes.lines})

    rendered(drawn, size=(10, 3), suffix=".svg")
    assert lines["uniform"] == pytest.approx([1 / 20] * 20)
    assert lines["linear"] == pytest.approx([1 / 20] * 20)
    half = lines["5k"]  # EMA: five files later, half as much
    assert half[10] / half[15] == pytest.approx(0.5)
    w = [1 - (k / 20) ** 0.5 for k in range(21)]  # Megatron-LM's minus-sqrt
    assert lines["1-sqrt"] == pytest.approx([w[k] - w[k + 1] for k in range(20)])
    assert all(sum(line) == pytest.approx(1) for line in lines.values())


def test_the_picture_of_the_rules_is_that_of_the_script(tmp_path: Path) -> None:
    stored = (ROOT / "docs" / "pictures" / "profiles.svg").read_bytes()
    assert len(stored) < 60_000
    pinned = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    if version("matplotlib") != pinned[1]:
        pytest.skip(f"drawn by matplotlib {pinned[1]}")
    assert rendered(script()["draw"], size=script()["SIZE"], suffix=".svg") == stored


def test_steps_that_float64_does_not_tell_apart_are_numbered() -> None:
    checkpoints = tuple(replace(each, step=2**62 + i) for i, each in enumerate(report(3).checkpoints))
    assert rendered(lambda figure: draw(replace(report(3), checkpoints=checkpoints), figure), size=SIZE, suffix=".png")


def test_lengths_of_any_range_are_drawn() -> None:
    series = report(3)
    checkpoints = tuple(replace(each, to_mean=10.0 ** (-160 + 157 * i)) for i, each in enumerate(series.checkpoints))
    assert rendered(lambda figure: draw(replace(series, checkpoints=checkpoints), figure), size=SIZE, suffix=".png")
