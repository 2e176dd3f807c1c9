"""docs/formats.md: what it says is done is what the tests with the real libraries show."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from ckpt_tools.checkpoints.layouts import LAYOUTS

FOLDER = Path(__file__).parent / "ecosystem"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ecosystem_table", FOLDER / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_marks_of_the_tests_make(table: ModuleType) -> None:
    page = table.PAGE.read_text()
    assert page == table.updated(page, table.render(table.shown())), "docs/formats.md is old: make formats-table"


def test_every_layout_that_is_read_has_a_row(table: ModuleType) -> None:
    assert {layout.name for layout in LAYOUTS} <= set(table.LAYOUTS)


def test_every_layout_has_a_paragraph_of_its_own(table: ModuleType) -> None:
    told = [
        name for heading in re.findall(r"^\*\*(.+?)\*\*", table.PAGE.read_text(), re.M) for name in heading.split(", ")
    ]
    assert sorted(told) == sorted(table.LAYOUTS)


def test_a_mark_outside_the_table_is_refused(table: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text('@pytest.mark.shows("timn", "write")\ndef test_it(): ...\n')
    with pytest.raises(ValueError, match=r"test_one\.py: no such cell: timn, write"):
        table.shown(tmp_path)


def test_a_dash_that_a_test_fills_is_refused(table: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text('@pytest.mark.shows("nemo", "write")\ndef test_it(): ...\n')
    with pytest.raises(ValueError, match=r"nemo, write is shown"):
        table.shown(tmp_path)


def test_a_cell_without_a_test_is_empty(table: ModuleType, tmp_path: Path) -> None:
    assert "| timm |  |  |  |  |" in table.render(table.shown(tmp_path))
