"""What mkdocs does to the pages: commands get what they print, notebooks become pages, links stay within the site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import pages  # noqa: E402

BESIDE = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "promises.md", "CHANGELOG.md": "changelog.md"}
"""Pages that stand in the root of the repository, where people look for them."""

WITHOUT = ("recipes.md",)
"""Pages that the tests run, but the site does not: this one trains a network, and needs torchvision."""

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "PYTHONWARNINGS")}
ENVIRONMENT |= {"COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and those that notebooks become."""
    for name, page in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for path in (ROOT / "docs").glob("*.ipynb"):
        files.append(File.generated(config, f"{path.stem}.md", content=notebook_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show what the commands of a page print, and lead links to files of the repository to pages, or nowhere."""
    path = page.file.src_uri
    if path not in BESIDE.values() and (ROOT / "docs" / path).exists():
        markdown = with_outputs(path)
    for name, target in BESIDE.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{name}", f"]({target}", markdown)
    markdown = re.sub(r"\]\(docs/", "](", markdown)
    # Tests, fixtures and scripts are in the repository, of which the site knows no address.
    return re.sub(r"\[([^\]]+)\]\((?:\.\./(?!\w+\.md)|fixtures/|tests/)[^)]*\)", r"\1", markdown)


def with_outputs(page: str) -> str:
    """Run the commands of a page in order, and return its text with what each block prints."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = pages.blocks(page)
    if page in WITHOUT or not any(block.language == "sh" for block in blocks):
        return text
    parts, at = [], 0
    with tempfile.TemporaryDirectory() as name:
        pages.lay_out(page, Path(name))
        for block in blocks:
            parts.append(text[at : block.end])
            at = block.end
            commands = block.commands() if block.language == "sh" else [["-c", block.text]]
            printed = "\n\n".join(filter(None, (printed_by(words, Path(name), page) for words in commands)))
            if printed:
                parts.append(f"\n\n{output(printed)}\n")
    return "".join([*parts, text[at:]])


def output(text: str) -> str:
    """Return what was printed as a block; lines wrap between words, as on a terminal of 100 columns."""
    wrapped = [textwrap.fill(line, 100) if len(line) > 100 else line for line in text.splitlines()]
    return "\n".join(["``` { .text .output }", *wrapped, "```"])


def printed_by(words: list[str], folder: Path, page: str) -> str:
    """Run `ckpt` with these words, or Python if they are its `-c`, and return what it prints."""
    program = [sys.executable, *([] if words[0] == "-c" else ["-m", "ckpt_tools"]), *words]
    done = subprocess.run(
        program, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode not in ((0, 1) if words[0] == "diff" else (0,)):
        raise PluginError(f"{page}: {words} fails:\n{done.stdout}")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    if "--json" in words and len(lines) > 12:
        lines = [*lines[:12], "..."]
    return "\n".join(line for line in lines if not pages.PROGRESS.match(line))


def notebook_page(path: Path) -> str:
    """Run a notebook from top to bottom, and return it as a page."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as name:
        pages.lay_out(path.name, Path(name))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), name])
        NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": name}}).execute()
    return "\n\n".join(part for cell in notebook.cells for part in cell_parts(cell))


def cell_parts(cell: Any) -> Iterator[str]:
    """Yield a cell and its outputs as Markdown."""
    if cell.cell_type == "markdown":
        yield cell.source
        return
    yield f"```python\n{cell.source}\n```"
    if printed := "".join(each.get("text", "") for each in cell.outputs).rstrip():
        yield output(printed)
    for each in cell.outputs:
        if picture := each.get("data", {}).get("image/png"):
            yield f"![](data:image/png;base64,{picture.strip()})"
