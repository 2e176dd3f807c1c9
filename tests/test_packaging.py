"""Packages: the source distribution is whole, versions agree, and a release is refused where they do not."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()

pytest.importorskip("setuptools")


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a checkout")
def test_the_source_distribution_has_every_file_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from setuptools._distutils.filelist import FileList  # what reads MANIFEST.in

    monkeypatch.chdir(ROOT)
    kept = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    files = FileList()
    files.allfiles = [*kept]
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        if line and not line.startswith("#"):
            files.process_template_line(line)
    # Modules, and what belongs to the build, setuptools takes by itself.
    own = {"LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py"}
    left = (
        {name for name in kept if not name.startswith("ckpt_tools/") or not name.endswith(".py")} - {*files.files} - own
    )
    assert {name for name in left if not name.startswith(".")} == set()
    assert left == {".ci/run", ".gitignore", ".pre-commit-config.yaml"}


def test_the_lowest_versions_that_are_tested_are_the_lowest_that_are_allowed() -> None:
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "lowest.txt").read_text(), re.MULTILINE))
    needed = re.search(r"^dependencies = (\[.*\])$", PYPROJECT, re.MULTILINE)
    assert needed
    for requirement in json.loads(needed[1]):
        name, _, version = requirement.partition(";")[0].partition(">=")
        assert (tested[name] + ".0").startswith(version + "."), requirement


def test_the_tests_run_on_every_python_that_is_named() -> None:
    named = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT))
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert named == set(re.findall(r'"(3\.\d+)"', workflow)) == {f"3.{minor}" for minor in range(10, 15)}


DATED = "## [Unreleased]\n\n## [1.2.3] - 2026-12-31\n"


@pytest.mark.parametrize(
    ("tag", "changelog", "fault"),
    [
        ("v1.2.3", DATED, None),
        ("v1.2.4", DATED, "The tag is v1.2.4, but ckpt_tools/__init__.py says 1.2.3."),
        ("v1.2.3", "## [1.2.3] - date of the tag\n", "CHANGELOG.md has no line '## [1.2.3] - YYYY-MM-DD'."),
        ("v1.2.3", DATED.replace("ed]\n", "ed]\n\n- more\n"), "CHANGELOG.md still has entries under Unreleased."),
    ],
)
def test_a_release_whose_tag_version_and_changelog_differ_is_refused(
    tag: str, changelog: str, fault: str | None
) -> None:
    faults = runpy.run_path(str(ROOT / ".github" / "check_release.py"))["faults"]
    assert faults(tag, '__version__ = "1.2.3"\n', changelog) == ([] if fault is None else [fault])


def test_the_notebook_runs_from_top_to_bottom(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl

    monkeypatch.delitem(sys.modules, "digits_net", raising=False)  # of a folder that is gone
    mpl.use("agg")
    pages.lay_out("notebook.ipynb", here)
    names: dict[str, object] = {}
    cells = json.loads((pages.DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "the site runs it, so no output is kept"
            exec(compile("".join(cell["source"]), "notebook.ipynb", "exec"), names)  # noqa: S102 - our own
    assert min(names["losses"]) < min(loss for _, loss in names["single"])  # type: ignore[call-overload, attr-defined]
