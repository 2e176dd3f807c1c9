"""The scripts beside the package: they use names that the package has."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    [
        *ROOT.glob("fixtures/*.py"),
        *ROOT.glob("benchmarks/*.py"),
        ROOT / "docs/schemas.py",
        ROOT / "docs/stub.py",
        *ROOT.glob("docs/pictures/*.py"),
        ROOT / "tests/soak.py",
        *ROOT.glob("fuzz/*.py"),
    ]
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_a_script_imports_is_there(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(script.parent)
    before = {*sys.modules}
    runpy.run_path(str(script), run_name="imported")
    for name in {*sys.modules} - before:
        if str(script.parent) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]
