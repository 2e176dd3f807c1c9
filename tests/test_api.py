"""The Python API: its names, signatures and types."""

from __future__ import annotations

import inspect
import pydoc
import runpy
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

import ckpt_tools
from ckpt_tools import errors
from ckpt_tools.batchnorm.recalibrate import ESTIMATORS
from ckpt_tools.jobs.average import BUFFERS
from ckpt_tools.jobs.options import AveragedOutput, Matching, Recalibration, Selection
from ckpt_tools.series.align import KEYS, MATCHES
from ckpt_tools.series.find import ORDERS
from ckpt_tools.series.lora import LORA

ROOT = Path(__file__).parents[1]


def test_the_names_that_a_notebook_completes_are_the_public_ones() -> None:
    assert {*dir(ckpt_tools)} == {*ckpt_tools.__all__}
    for name in ckpt_tools.__all__:
        assert getattr(ckpt_tools, name).__doc__, name


def test_help_shows_every_public_function() -> None:
    shown = pydoc.plain(pydoc.render_doc(ckpt_tools))
    for name in ckpt_tools.__all__:
        if inspect.isfunction(getattr(ckpt_tools, name)):
            assert f"\n    {name}(" in shown


def test_every_error_is_public() -> None:
    raised = {
        name
        for name, each in vars(errors).items()
        if getattr(each, "__module__", "") == errors.__name__ and isinstance(each, type)
    }
    assert raised <= {*ckpt_tools.__all__}


def test_the_stub_for_type_checkers_has_the_signatures_of_the_functions() -> None:
    stub = runpy.run_path(str(ROOT / "docs/stub.py"))["stub"]
    assert (ROOT / "ckpt_tools/__init__.pyi").read_text() == stub(), "run make generated"


@pytest.mark.parametrize(
    ("group", "name", "known"),
    [
        (Selection, "order", ORDERS),
        (Matching, "match", MATCHES),
        (Matching, "keys", KEYS),
        (Matching, "buffers", BUFFERS),
        (Matching, "lora", LORA),
        (Recalibration, "estimator", ESTIMATORS),
    ],
)
def test_an_option_of_a_closed_set_has_its_words_as_type(group: Any, name: str, known: tuple[str, ...]) -> None:
    (kind,) = (option.type for option in group.options() if option.name == name)
    assert get_origin(kind) is Literal
    assert get_args(kind) == known


def test_what_a_function_says_of_an_option_without_value_is_there_only_where_there_is_none() -> None:
    (dtype,) = (each for each in AveragedOutput.options() if each.name == "dtype")
    assert dtype.default is None
    doc = inspect.getdoc(ckpt_tools.average) or ""
    assert "dtype: Of the output: float32, bfloat16, ... If None: same." in doc
    assert "warmup_power: timm: power in it; 2/3 as in ModelEmaV3.\n" in doc


def test_the_public_names_are_these() -> None:
    functions = [
        "average", "card", "clean", "convert", "diff", "evaluate", "fix_prefix", "inspect", "look", "open_checkpoint",
        "recalibrate_bn",
        "recalibrate_checkpoint", "strip", "sweep", "tune_checkpoint", "verify",
    ]  # fmt: skip
    reports = [
        "AverageReport", "BatchNormReport", "CardReport", "Checkpoint", "CleanReport", "ConvertReport", "DiffReport",
        "EvaluationReport", "InspectReport",
        "LookReport", "PrefixReport", "RecalibrationReport", "StripReport", "SweepReport", "TuneReport", "VerifyReport",
    ]  # fmt: skip
    raised = [
        "AlignmentError", "CkptError", "CorruptError", "DataError", "LayoutError", "ModelError", "NotACheckpointError",
        "NumericsError", "ReadError", "SeriesError", "UnsupportedError", "UsageError", "WriteError", "WriteWarning",
    ]  # fmt: skip
    assert {*ckpt_tools.__all__} == {"__version__", *functions, *reports, *raised}


def test_a_report_of_thousands_of_tensors_is_one_short_line_and_html_that_is_escaped(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [
        save(f"{i}.pth", {f"<script>&'\"{j}": torch.zeros(1, dtype=torch.float32) for j in range(2000)})
        for i in range(2)
    ]
    for report in (
        ckpt_tools.average(paths, dry_run=True),
        ckpt_tools.inspect(paths[0]),
        ckpt_tools.convert(paths[0], out="<b>.pth", dry_run=True),
    ):
        assert len(repr(report).splitlines()) == 1
        assert len(repr(report)) < 1000
        page = ET.fromstring(report._repr_html_())  # an error unless all is escaped
        assert {each.tag for each in page.iter()} == {"div", "b", "table", "tr", "th", "td", "details", "summary"}
        assert len([*page.iter()]) < 1000
    averaged = ET.fromstring(ckpt_tools.average(paths, dry_run=True)._repr_html_())
    assert "<script>&'\"7" in {each.text for each in averaged.iter("td")}
    assert "... and 1950 more" in {each.text for each in averaged.iter("td")}


@pytest.mark.parametrize("name", [name for name in ckpt_tools.__all__ if name.endswith("Report")])
def test_every_report_is_shown_alike(name: str) -> None:
    report = getattr(ckpt_tools, name)
    assert report.__repr__.__doc__ == "Return one line; lists are there by their lengths."
    assert report._repr_html_.__doc__ == "Return the report as a notebook shows it."
