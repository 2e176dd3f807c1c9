"""The house itself: imports go one way, the front door is light, and the API is what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import ckpt_tools

PACKAGE = Path(ckpt_tools.__file__).parent
# Each room may import from those before it, and from none after.
ROOMS = [
    "errors",
    "tensors",
    "formats",
    "trees",
    "layouts",
    "keys",
    "schedules",
    "paths",
    "steps",
    "series",
    "payload",
    "checkpoint",
    "pieces",
    "devices",
    "native",
    "summing",
    "streams",
    "lanes",
    "engine",
    "comparing",
    "targets",
    "assembly",
    "writing",
    "optimizers",
    "names",
    "prefixes",
    "inspection",
    "provenance",
    "recipes",
    "averaging",
    "diffing",
    "training_state",
    "stripping",
    "batchnorm",
    "counters",
    "naming",
    "conversion",
    "cli",
    "__main__",
]


def imports(path: Path) -> set[str]:
    """Rooms that a module imports from, in functions too."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found.update(name for name in names if name in ROOMS)
    return found


def test_imports_go_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in ROOMS, f"{path.name} stands in no room; give it a place in this list"
        for other in imports(path):
            assert ROOMS.index(other) < ROOMS.index(room), f"{path.relative_to(PACKAGE)} imports {other}"


def test_the_map_shows_every_room() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for room in ROOMS[:-1]:
        assert f"| `{room}/` |" in page or f"| `{room}.py` |" in page, room


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_the_package_and_its_headers_do_not_import_torch(runs: list[Path]) -> None:
    code = f"from ckpt_tools import open_checkpoint; c = open_checkpoint({str(runs[0])!r}); assert c.specs"
    assert "torch" not in loaded_after(code)


def test_no_module_is_too_long_to_read() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path


def test_the_wheel_takes_every_package_along() -> None:
    listed = (PACKAGE.parent / "pyproject.toml").read_text().partition("\npackages = [")[2].partition("]")[0]
    found = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(listed.replace('"', "").split(", ")) == found


def test_the_public_names_are_these() -> None:
    assert ckpt_tools.__all__ == [
        "AverageReport",
        "BatchNormReport",
        "Checkpoint",
        "CkptError",
        "ConvertReport",
        "DiffReport",
        "PrefixReport",
        "RecalibrationReport",
        "StripReport",
        "__version__",
        "average",
        "convert",
        "diff",
        "fix_prefix",
        "open_checkpoint",
        "recalibrate_bn",
        "recalibrate_checkpoint",
        "strip",
    ]
    for name in ckpt_tools.__all__:
        assert getattr(ckpt_tools, name).__doc__
