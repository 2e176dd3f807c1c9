"""The picture, the page and the table of a sweep: what they show is read back from them."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import PATIENCE, run
from torch import nn

from ckpt_tools import average
from ckpt_tools.batchnorm.report import BatchNormReport, LayerReport
from ckpt_tools.cli.arguments import spelled
from ckpt_tools.cli.sweep import command
from ckpt_tools.errors import CkptError, UsageError, WriteError
from ckpt_tools.jobs.look import LookReport, look
from ckpt_tools.jobs.pictures import rendered
from ckpt_tools.jobs.sweep.files import ranking
from ckpt_tools.jobs.sweep.job import sweep
from ckpt_tools.jobs.sweep.page import Background, Wording, page
from ckpt_tools.jobs.sweep.picture import curves, draw, size
from ckpt_tools.jobs.sweep.report import Ranked, SweepReport
from ckpt_tools.jobs.sweep.verdict import Comparison

pytest.importorskip("matplotlib")

Save = Callable[..., Path]
NAMES = tuple(f"c-{i}.pth" for i in range(6))
HOSTILE = '<script>alert("1")</script>&\x1b[2J\udcff'
WORDING = Wording(command, spelled)
VOID = {"meta", "link", "br", "img", "input", "hr"}


def candidate(score: float | None, options: Mapping[str, Any] | None = None, **given: Any) -> Ranked:
    given.setdefault("label", " ".join(f"{name}={value}" for name, value in (options or {}).items()))
    checkpoints = given.pop("checkpoints", NAMES[-3:])
    return Ranked(
        same=given.pop("same", ()),
        options=options or {},
        checkpoints=checkpoints,
        coefficients=(1 / len(checkpoints),) * len(checkpoints),
        kind="checkpoint" if len(checkpoints) == 1 else "average" if options else "soup",
        metrics={} if score is None else {"loss": score, "top1": 100 - score},
        **given,
    )


def report(*averages: Ranked, names: Sequence[str] = NAMES, lower: bool = True, **changed: Any) -> SweepReport:
    """A made-up report on these averages and each checkpoint alone, of which the one before the last is the best."""
    singles = [
        candidate(2.0 if i == len(names) - 2 else 3.0 + 0.1 * i, label=name, checkpoints=(name,))
        for i, name in enumerate(names)
    ]
    scored = [each for each in (*averages, *singles) if each.metrics]
    scored.sort(key=lambda each: each.metrics["loss"] if lower else -each.metrics["loss"])
    found = SweepReport(
        checkpoints=tuple(names),
        steps=tuple(range(len(names))),
        ordered_by="the step",
        candidates=(*scored, *(each for each in averages if not each.metrics)),
        refused={},
        metric="loss",
        lower_is_better=lower,
        best=scored[0].label,
        best_single=names[-2],
        last=names[-1],
        verdict="Better than the last checkpoint. Give other data with `test`.",
        against_last=(Comparison("loss", 1.0, 3.5, -2.5, -3.0, -2.0, None, 50),),
        other_data=False,
        paths=("run",),
        options={"mode": "ema", "decay": 0.9},
        recalibrated=False,
        evaluations=len(scored),
        reused=0,
        bytes_read=1,
        bytes_written=2,
        notes=("See `scratch`.",),
        results="ckpt-sweep/results.jsonl",
        out=None,
    )
    return replace(found, **changed)


def decays(*values: float, **options: Any) -> list[Ranked]:
    return [
        candidate(1 + abs(value - 0.7), {**options, "decay": value}, low=0.5 + abs(value - 0.7), high=1.6)
        for value in values
    ]


def axes_of(shown: SweepReport) -> Any:
    """The axes as they are saved."""
    kept: list[Any] = []

    def drawn(figure: Any) -> None:
        draw(shown, figure)
        kept.append(figure)

    rendered(drawn, size=size(shown), suffix=".svg")
    width = kept[0].bbox.width
    for axis in (kept[0].axes[0].xaxis, kept[0].axes[0].yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for text in [*kept[0].legends[0].get_texts(), kept[0]._suptitle]:
        assert text.get_window_extent().x1 <= width, text.get_text()
    return kept[0].axes[0]


def lines_of(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_child")}


def test_one_option_is_a_curve_with_its_interval_and_the_best_and_last_marked() -> None:
    axes = axes_of(report(*decays(0.5, 0.7, 0.9, 0.99)))
    curve = axes.lines[0]
    assert list(curve.get_xdata()) == pytest.approx([2, 1 / 0.3, 10, 100])
    assert list(curve.get_ydata()) == pytest.approx([1.2, 1.0, 1.2, 1.29])
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.5", "0.7", "0.9", "0.99"]
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(0.5)
    marked = lines_of(axes)
    assert list(marked["last checkpoint: c-5.pth, 3.5"].get_ydata()) == [3.5, 3.5]
    assert list(marked["best checkpoint alone: c-4.pth, 2"].get_ydata()) == [2, 2]
    star = marked["best: decay=0.7, 1"]
    assert (list(star.get_xdata()), list(star.get_ydata()), star.get_marker()) == ([pytest.approx(1 / 0.3)], [1.0], "*")


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([3, 5, 8], "linear"),
        ([1, 10, 100], "log"),
        ([0.01 * i for i in range(1, 26)], "linear"),
        ([0, 1, 50], "linear"),
    ],
)
def test_the_axis_is_logarithmic_where_the_values_are_more_even_so(values: list[float], scale: str) -> None:
    averages = [candidate(1 + 0.01 * i, {"sigma_rel": value}) for i, value in enumerate(values)]
    assert axes_of(report(*averages)).get_xscale() == scale


@pytest.mark.parametrize(
    ("values", "label", "at"),
    [
        (["5%", "10%"], "window (%)", [5, 10]),
        (["5k", "20k"], "window", [5000, 20000]),
        ([100, "1k"], "window", [100, 1000]),
    ],
)
def test_amounts_as_people_write_them_are_numbers(values: list[Any], label: str, at: list[float]) -> None:
    axes = axes_of(report(*[candidate(1 + 0.1 * i, {"window": value}) for i, value in enumerate(values)]))
    assert (axes.get_xlabel(), list(axes.lines[0].get_xdata())) == (label, at)


def test_other_options_are_lines_and_what_has_no_number_is_a_level() -> None:
    averages = [
        *[each for last in (3, 5) for each in decays(0.5, 0.7, 0.9, last=last, mode="ema")],
        candidate(1.5, {"last": 3, "mode": "uniform"}),
        candidate(1.4, label="greedy c-1.pth+c-2.pth", checkpoints=NAMES[1:3]),
        candidate(1.45, label="greedy c-1.pth+c-3.pth", checkpoints=NAMES[1:4:2]),
    ]
    found = curves(report(*averages))
    assert found is not None
    assert {label: [value for value, _ in line] for label, line in found.lines.items()} == {
        "last=3 mode=ema": [0.5, 0.7, 0.9],
        "last=5 mode=ema": [0.5, 0.7, 0.9],
    }
    assert {label: each.metrics["loss"] for label, each in found.levels.items()} == {
        "last=3 mode=uniform": 1.5,
        "greedy soup": 1.4,
    }
    assert {"last=3 mode=ema", "last=5 mode=ema", "greedy soup, 1.4"} < {*lines_of(axes_of(report(*averages)))}


def test_an_average_that_is_equal_by_other_options_is_a_point_of_each_line() -> None:
    both = candidate(
        1.2,
        {"last": 1, "mode": "ema"},
        same=("last=1 mode=uniform",),
        same_options=({"last": 1, "mode": "uniform"}, {}),
    )
    others = [candidate(1.0 + i, {"last": 3, "mode": mode}) for i, mode in enumerate(("ema", "uniform"))]
    found = curves(report(both, *others))
    assert found is not None
    assert {label: [value for value, _ in line] for label, line in found.lines.items()} == {
        "mode=ema": [1, 3],
        "mode=uniform": [1, 3],
    }


@pytest.mark.parametrize("n", [1, 40, 194])
def test_more_lines_than_can_be_told_apart_and_words_are_a_ranking_of_dots(n: int) -> None:
    averages = [candidate(1 + 0.001 * i, {"mode": f"mode{i}", "last": 2 + i % 9}, low=0.9, high=1.3) for i in range(n)]
    shown = report(*averages)
    assert curves(shown) is None
    axes = axes_of(shown)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "mode=mode0 last=2"
    assert {"c-4.pth", "c-5.pth"} < {*names}  # the best one alone and the last, however bad
    assert len(names) == min(n + 6, 43 if n > 100 else 42 + (n == 40))
    marked = lines_of(axes)
    assert list(marked["last checkpoint: c-5.pth, 3.5"].get_xdata()) == [3.5, 3.5]
    assert list(marked["best: mode=mode0 last=2, 1"].get_xdata()) == [1.0]
    drawn = sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() in ("o", "|"))
    assert drawn == n + 6


def test_the_last_checkpoint_may_be_the_best_of_all() -> None:
    shown = report(candidate(9.0, {"mode": "uniform"}), lower=False, best_single=NAMES[-1])
    shown = replace(shown, best=NAMES[-1])
    assert "last checkpoint, which is the best one alone: c-5.pth, 3.5" in lines_of(axes_of(shown))


@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("label", ["$x_1$ \\frac{", HOSTILE + "long" * 40])
def test_the_same_sweep_has_the_same_picture_whatever_the_names(suffix: str, label: str) -> None:
    shown = report(candidate(1.0, {"mode": "a"}, label=label), candidate(2.0, label="greedy " + label))
    first, second = (rendered(lambda figure: draw(shown, figure), size=size(shown), suffix=suffix) for _ in range(2))
    assert first == second


class Reader(HTMLParser):
    """Reads a page as a browser does, and keeps what may load or run anything."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            self.links += re.findall(r"url\(['\"]?([^)]*)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] == ["style"]:
            assert "url(" not in data
            assert "@import" not in data


def read(data: bytes) -> Reader:
    reader = Reader()
    reader.feed(data.decode())
    reader.close()
    assert reader.open == []
    assert all(link.startswith("#") for link in reader.links), reader.links
    assert {link.removeprefix("#") for link in reader.links} <= {*reader.ids}
    assert len({*reader.ids}) == len(reader.ids)
    assert not reader.tags & {"script", "link", "iframe", "object", "embed", "form", "base", "img", "image"}
    return reader


def background(geometry: LookReport | str = "no reason", **given: Any) -> Background:
    return Background({"command": "python eval.py {ckpt}", "limit": None}, None, None, geometry, given.get("drift"))


def test_the_page_has_every_candidate_and_reason_and_loads_nothing() -> None:
    averages = [
        *decays(*[round(0.5 + 0.001 * i, 3) for i in range(190)]),
        candidate(None, {"decay": 2}, error="late (`time_limit`)"),
    ]
    shown = report(*averages, refused={"decay=7": "outside <b>[0, 1]</b>"})
    found = read(page(shown, background(), WORDING))
    for each in shown.candidates:
        assert found.text.count(each.label) >= 2, each.label  # in the ranking and in the matrix
    for said in (
        "Better than the last checkpoint. Give other data with --test.",
        "ckpt avg run --mode ema --decay 0.9 -o best.pth",
        "late (--time-limit)",
        "outside <b>[0, 1]</b>",
        "See --scratch.",
        "command python eval.py {ckpt}",
        "It could not be measured: no reason",
        "166 more candidates",
        "-3 to -2",
    ):
        assert said in found.text, said
    assert "svg" in found.tags


@pytest.mark.parametrize("name", [HOSTILE, '"><img src=x onerror=alert(1)>', "a --> b <!-- c", "]]></style>"])
def test_names_of_unknown_origin_are_text(name: str) -> None:
    names = (*NAMES[:4], f"{name}-4", f"{name}-5")
    shown = report(
        candidate(1.0, {"mode": name}, checkpoints=names[2:], same=(name,)),
        candidate(None, label=f"failed {name}", error=f"error {name}"),
        names=names,
        notes=(f"note {name}",),
        refused={f"refused {name}": name},
        verdict=f"verdict {name}",
        ordered_by=name,
        metric="loss",
        paths=(f"path {name}",),
        out=name,
    )
    found = read(
        page(shown, Background({name: name}, {name: name}, None, f"geometry {name}", f"drift {name}"), WORDING)
    )
    visible = name.replace("\x1b", "\\x1b").replace("\udcff", "\\udcff")
    for lead in ("failed", "error", "note", "refused", "verdict", "geometry", "drift"):
        assert f"{lead} {visible}" in found.text, lead


def test_the_page_shows_the_geometry_and_the_drift_of_each_layer(save: Save, here: Path) -> None:
    for i in range(3):
        save(f"c-{i}.pth", {"model": {"fc.weight": torch.full((4, 3), i**2 + 1.0)}, "step": 100 * i})
    layers = tuple(
        LayerReport(f"layer{i}.bn<1>", "BatchNorm2d", 8, 64, 1, 1, 1, 1, 0.125 * i, 1.5 + i, 0.01, None)
        for i in range(3)
    )
    drift = BatchNormReport(layers, (("odd", "Frozen", "it is frozen"),), 77, 3, 1, "population", 0.1, {})
    found = read(page(report(candidate(1.0, {"mode": "ema"})), background(look("c-*.pth"), drift=drift), WORDING))
    for said in ("fc.weight", "distance", "layer2.bn<1>80.253.5", "77 images", "odd (Frozen), it is frozen"):
        assert said.replace("distance", "to mean") in found.text, said


def test_the_same_sweep_has_the_same_page_and_forbids_the_browser_to_load_anything() -> None:
    shown = report(*decays(0.5, 0.9))
    data = page(shown, background(), WORDING)
    assert data == page(shown, background(), WORDING)
    assert b"://" not in data
    assert b"default-src 'none'; style-src 'unsafe-inline'" in data


def test_a_page_from_python_speaks_python() -> None:
    shown = report(*decays(0.5, 0.9))
    found = read(page(shown, background(), Wording()))
    assert "Give other data with `test`." in found.text
    assert "average(['run'], mode='ema', decay=0.9, out='best.pth')" in found.text


def test_without_matplotlib_the_page_says_that_it_has_no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = read(page(report(*decays(0.5, 0.9)), background(), WORDING))
    assert "There is no picture, for matplotlib was not installed." in found.text
    assert "figure" not in found.tags


def test_the_table_is_read_back_whatever_the_names() -> None:
    odd = 'a, "b"\nc\r\nd\te;\udcff=1'
    shown = report(
        candidate(0.125, {"last": 3, "mode": odd}, same=(odd,), low=0.1, high=0.2),
        candidate(None, {"decay": 0.9}, label=odd, error="no, \n number"),
    )
    rows = [*csv.DictReader(io.StringIO(ranking(shown).decode("utf-8", "surrogateescape"), newline=""))]
    assert len(rows) == len(shown.candidates)
    assert {len(row) for row in rows} == {len(rows[0])}
    first, last = rows[0], rows[-1]
    assert (first["rank"], first["options.last"], first["options.mode"], first["options.decay"]) == ("1", "3", odd, "")
    assert (float(first["metrics.loss"]), float(first["metrics.top1"]), float(first["low"])) == (0.125, 99.875, 0.1)
    assert json.loads(first["checkpoints"]) == [*NAMES[-3:]]
    assert json.loads(first["coefficients"]) == [1 / 3] * 3
    assert json.loads(first["same"]) == [odd]
    assert (last["rank"], last["label"], last["error"], last["metrics.loss"]) == ("", odd, "no, \n number", "")


def test_a_table_with_text_that_is_in_no_encoding_is_written() -> None:
    assert b"\\ud800" in ranking(report(candidate(1.0, {"mode": "\ud800"})))


def series(save: Save, n: int = 4) -> None:
    for i in range(n):
        save(f"run/c-{i}.pth", {"model": {"w": torch.full((4, 3), float(i))}, "step": 100 * i + 100})
    Path("scores.py").write_text(
        "calls = []\ndef score(state):\n    calls.append(1)\n"
        "    each = [abs(state['w'].mean().item() - 2.2) + 0.01 * i for i in range(20)]\n"
        "    return {'error': sum(each) / 20, 'per_sample': each}\n"
    )
    sys.modules.pop("scores", None)


OPTIONS: dict[str, Any] = {"eval_function": "scores.py:score", "in_memory": True}
WORDS = ("--eval-function", "scores.py:score", "--in-memory")


def test_a_sweep_writes_picture_page_and_table(save: Save, here: Path) -> None:
    series(save)
    done = run("sweep", "run", "--last", "2,3", *WORDS, "--plot", "s.png", "--report", "s.html", "--csv", "s.csv")
    assert done.code == 0, done.err
    assert all(f"Wrote s.{suffix}." in done.err for suffix in ("png", "html", "csv"))
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")
    found = read(Path("s.html").read_bytes())
    assert "to mean" in found.text
    with Path("s.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [float(row["metrics.error"]) for row in rows] == sorted(float(row["metrics.error"]) for row in rows)
    assert all(float(row["low"]) < float(row["metrics.error"]) < float(row["high"]) for row in rows)
    assert len(rows) == 6
    assert not [*Path().glob(".*.partial")]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"plot": "s.pdf"}, UsageError, r"`plot='s.pdf'`: a picture is .svg or .png"),
        ({"report": "s.txt"}, UsageError, r"`report='s.txt'`: give it the suffix .html"),
        ({"csv": "s"}, UsageError, r"`csv='s'`: give it the suffix .csv"),
        ({"plot": "old.png"}, WriteError, r"old.png: exists"),
        ({"report": "old.html"}, WriteError, r"old.html: exists"),
        ({"csv": "old.csv"}, WriteError, r"old.csv: exists"),
        ({"csv": "none/s.csv"}, WriteError, r"there is no folder"),
        ({"report": "s.html", "out": "s.html/"}, UsageError, r"`report` and `out` are both s.html"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_any_work(
    given: dict[str, Any], error: type[CkptError], message: str, save: Save, here: Path
) -> None:
    series(save)
    for suffix in ("png", "html", "csv"):
        Path(f"old.{suffix}").write_text("old")
    with pytest.raises(error, match=message):
        sweep("run", last=2, **OPTIONS, **given)
    assert not Path("ckpt-sweep").exists()
    if "old" in str(given):
        sweep("run", last=2, **OPTIONS, **given, force=True)
        assert all(Path(path).read_bytes() != b"old" for path in given.values())


def test_without_matplotlib_a_picture_is_refused_and_a_page_is_noted(
    save: Save, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(save)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="`plot` needs matplotlib"):
        sweep("run", last=2, **OPTIONS, plot="s.png")
    assert not Path("ckpt-sweep").exists()
    found = sweep("run", last=2, **OPTIONS, report="s.html")
    assert any(note.startswith("The page has no pictures: they need matplotlib") for note in found.notes)


def test_a_plan_writes_no_files(save: Save, here: Path) -> None:
    series(save)
    sweep("run", last=2, **OPTIONS, plot="s.png", report="s.html", csv="s.csv", dry_run=True)
    assert not [*Path().glob("s.*")]


def test_a_series_without_geometry_has_a_page_that_says_why(save: Save, here: Path) -> None:
    for i in range(3):
        save(f"run/c-{i}.pth", {"model": {"w": torch.tensor([1.0, float("inf")])}, "step": i})
    Path("scores.py").write_text("def score(state):\n    return 1.0\n")
    sys.modules.pop("scores", None)
    sweep("run", last=2, **OPTIONS, report="s.html", allow_nonfinite=True)
    found = read(Path("s.html").read_bytes())
    assert "It could not be measured: 'w' in c-2.pth: a value is NaN or infinity" in found.text


NET = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
"""


def test_the_drift_is_that_of_recal_bn_on_the_best_average(save: Save, here: Path, photos: Callable[..., Path]) -> None:
    pytest.importorskip("timm")
    Path("net.py").write_text(NET)
    sys.modules.pop("net", None)
    namespace: dict[str, Any] = {}
    exec(NET, namespace)  # noqa: S102 - the same text as the file
    torch.manual_seed(0)
    for i in range(3):
        save(f"run/c-{i}.pth", {"model": namespace["net"]().state_dict(), "step": i})
    images: dict[str, Any] = {
        "img_size": 16, "crop_pct": 1.0, "mean": [0.5], "std": [0.25], "workers": 0, "batch_size": 6,
    }  # fmt: skip
    shared = {"model": "net.py:net", "data": str(photos()), **images}
    found = sweep("run", mode="uniform", eval_data=shared["data"], keep=0, metric="loss", report="s.html", **shared)
    assert found.best is not None
    assert found.options["recal_bn"] == shared["data"]
    recalibration = average(found.paths, **found.options, out="best.pth").recalibration
    assert recalibration is not None
    statistics = recalibration.statistics
    assert statistics is not None
    (layer,) = statistics.layers
    assert layer.variance_moved > 1.1
    row = f"14{layer.mean_moved:.3g}{layer.variance_moved:.4g}{layer.mean_error:.2g}"
    assert row in read(Path("s.html").read_bytes()).text
    assert not [*Path("ckpt-sweep").glob("*.pth")]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_opens_the_page_without_errors(width: int, here: Path) -> None:
    def messages(name: str) -> list[str]:
        command = [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--user-data-dir={here / 'profile'}", f"--window-size={width},900", f"--screenshot={here / 'shot.png'}"),
            (here / name).as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert (here / "shot.png").read_bytes().startswith(b"\x89PNG")
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    names = (*NAMES[:4], f"{HOSTILE}-4", f"{HOSTILE}-5")
    shown = report(*decays(0.5, 0.7, 0.9), names=names, notes=(HOSTILE,))
    data = page(shown, background(HOSTILE), WORDING)
    (here / "page.html").write_bytes(data)
    assert messages("page.html") == []
    if width == 400:  # errors would be seen
        (here / "bad.html").write_bytes(data.replace(b"</main>", b"<script>alert(1)</script></main>"))
        assert "Content Security Policy" in "".join(messages("bad.html"))


def test_a_sweep_measures_frozen_layers_if_it_is_asked_to_and_so_does_its_command(save: Save, here: Path) -> None:
    for i, name in enumerate("ab"):
        save(f"{name}.pth", {**nn.BatchNorm2d(3).state_dict(), "weight": torch.full((3,), i + 1.0)})
    Path("frozen_net.py").write_text(
        "import torch\nfrom torch import nn\ndef net(): return nn.Sequential(nn.BatchNorm2d(3, momentum=0.0), Mean())\n"
        "class Mean(nn.Module):\n    def forward(self, x): return x.mean((2, 3))\n"
        "def data():\n    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 5\n"
        "    return [(x, torch.arange(8) % 3)]\n"
    )
    for name in "ab":
        stored = torch.load(f"{name}.pth")
        save(f"{name}.pth", {f"0.{key}": value for key, value in stored.items()})
    options: dict[str, Any] = {
        "model": "frozen_net.py:net",
        "data": "frozen_net.py:data",
        "eval_data": "frozen_net.py:data",
    }
    left = sweep(["a.pth", "b.pth"], **options, scratch="left", out="left.pth")
    found = sweep(["a.pth", "b.pth"], **options, include_frozen=True, scratch="found", out="found.pth")
    assert found.options["include_frozen"] is True
    assert torch.load("left.pth")["0.running_mean"].abs().max() == 0
    assert left.evaluations == found.evaluations
    assert (torch.load("found.pth")["0.running_mean"] - 5).abs().max() < 0.3
