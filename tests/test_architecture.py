"""The house itself: imports go one way, the front door is light, and the API is what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import ckpt_tools

PACKAGE = Path(ckpt_tools.__file__).parent
# Imports go down this list, from a package to those before it.
PACKAGES = [
    "errors",
    "tensors",
    "storage",
    "formats",
    "compute",
    "checkpoints",
    "series",
    "batchnorm",
    "evaluation",
    "tuning",
    "jobs",
    "integrations",
    "cli",
    "__main__",
]


def imports(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a module imports, in functions too, as parts of their names."""
    found = set()
    folder = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            if node.module:
                found.add((*base, *node.module.split(".")))
            else:
                found.update((*base, alias.name) for alias in node.names)
    return found - {("__version__",)}  # the one name that the package itself defines


def test_imports_only_go_down_the_list_of_packages() -> None:
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if package == "__init__":
            continue
        assert package in PACKAGES, f"{path} is in no package of this list"
        for other in imports(path):
            assert PACKAGES.index(other[0]) <= PACKAGES.index(package), f"{path} imports {'.'.join(other)}"
            checked += 1
    assert checked > 100


def test_the_top_level_has_at_most_fourteen_modules_and_packages() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(PACKAGES)
    assert len(PACKAGES) <= 14


def test_compute_knows_of_formats_only_the_file_plan() -> None:
    for path in (PACKAGE / "compute").rglob("*.py"):
        for other in imports(path):
            assert other[0] != "formats" or other[1:2] == ("file_plan",), f"{path} imports {'.'.join(other)}"


def test_the_architecture_page_describes_every_package() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for package in PACKAGES[:-1]:
        assert f"`{package}/`" in page or f"`{package}.py`" in page, package


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_the_package_and_its_headers_do_not_import_torch(runs: list[Path]) -> None:
    code = f"from ckpt_tools import open_checkpoint; c = open_checkpoint({str(runs[0])!r}); assert c.specs"
    assert "torch" not in loaded_after(code)


def test_the_wheel_takes_every_package_along() -> None:
    listed = (PACKAGE.parent / "pyproject.toml").read_text().partition("\npackages = [")[2].partition("]")[0]
    found = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(listed.replace('"', "").split(", ")) == found
