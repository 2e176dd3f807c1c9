"""The table of docs/formats.md, made from the marks of the tests; no library is imported.

A test marked ``@pytest.mark.shows("timm", "read EMA")`` backs that cell. ``make formats-table`` writes the page.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "formats.md"
BEGIN, END = "<!-- table: make formats-table -->", "<!-- end of the table -->"

COLUMNS = ("read raw", "read EMA", "write", "library loads")
LAYOUTS = (
    "plain",
    "sharded folder",
    "dcp",
    "ranks",
    "fsdp-ranks",
    "hf-shards",
    "lightning-folder",
    "deepspeed",
    "timm",
    "timm-ema",
    "deit",
    "torchvision",
    "model-state-dict",
    "averaged-model",
    "litema",
    "lightning",
    "lightning-swa",
    "nemo",
    "mmengine",
    "ultralytics",
    "torchtitan",
    "d2go",
    "ema-pytorch",
    "diffusers",
    "dino",
    "icefall",
    "fairseq",
    "dit",
    "guided-diffusion",
    "pytorch-ema",
    "score_sde",
)
BY_PUBLISHED_CODE = ("test_litema.py", "test_laid_out.py")
"""Tests of libraries that are not installed: the files are laid out, and loaded, as their code does it."""

ONE_SET = "holds one set of weights, and does not say whether it is an average"
ONLY_AVERAGE = "holds the average and nothing else"
WITHOUT = {
    ("plain", "read EMA"): ONE_SET,
    ("sharded folder", "read EMA"): f"{ONE_SET}; diffusers' folders say it, see there",
    ("dcp", "read EMA"): "holds whatever dict was saved; a dotted path such as `--state ema` chooses",
    ("ranks", "read EMA"): "holds what each file holds, in any of these layouts",
    ("fsdp-ranks", "read EMA"): "holds whatever dict was saved, see `dcp`",
    ("fsdp-ranks", "write"): "is for one number of processes; write `dcp`, which any number loads",
    ("fsdp-ranks", "library loads"): "as it is not written",
    ("hf-shards", "read EMA"): ONE_SET,
    ("hf-shards", "write"): "is for one number of processes; write a sharded folder",
    ("hf-shards", "library loads"): "as it is not written",
    ("lightning-folder", "read EMA"): "is a file of Lightning in other files, see there",
    ("lightning-folder", "write"): "is written as the one file that Lightning's consolidate_checkpoint makes",
    ("deepspeed", "read EMA"): "averages nothing; an average that the script saved with it is found",
    ("deepspeed", "write"): "is one file for each rank, with the optimizer; write `plain`",
    ("deepspeed", "library loads"): "as it is not written; `plain` loads into the model",
    ("timm-ema", "read raw"): "is timm's layout again, see there",
    ("averaged-model", "read raw"): ONLY_AVERAGE,
    ("lightning-swa", "write"): "the callback starts its average anew when it resumes; write `lightning` instead",
    ("lightning-swa", "library loads"): "as it is not written",
    (
        "nemo",
        "write",
    ): "is two files, the second with an optimizer that holds the average again; write `plain` twice",
    ("nemo", "library loads"): "as it is not written",
    ("ultralytics", "write"): "is a pickled object of its classes, which only its code makes; write `plain`",
    ("ultralytics", "library loads"): "as it is not written; `plain` loads into its model",
    ("torchtitan", "write"): "write `dcp` of one set of weights, which it loads as a model",
    ("torchtitan", "library loads"): "as it is not written",
    ("score_sde", "write"): "write `pytorch-ema`, whose `ema` it is",
    ("score_sde", "library loads"): "as it is not written",
}
"""Cells that cannot be filled, and why."""

Shown = dict[tuple[str, str], list[str]]


def shown(folder: Path = HERE) -> Shown:
    """Read which tests show what.

    Returns:
        (layout, column) to names of the files with such tests, sorted.

    Raises:
        ValueError: a mark names no row or column of the table, or one that WITHOUT says cannot be.
    """
    cells: Shown = {}
    for file in sorted(folder.glob("test_*.py")):
        for layout, column in _marks(file):
            if layout not in LAYOUTS or column not in COLUMNS:
                raise ValueError(f"{file.name}: no such cell: {layout}, {column}")
            if (layout, column) in WITHOUT:
                raise ValueError(f"{file.name}: {layout}, {column} is shown, so it has no place in WITHOUT")
            names = cells.setdefault((layout, column), [])
            if file.name not in names:
                names.append(file.name)
    return cells


def _marks(file: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.shows":
                layout, column = (ast.literal_eval(argument) for argument in call.args)
                yield layout, column


def render(cells: Shown) -> str:
    """Make the table, and the lines below it that say why cells have a dash."""
    lines = [f"| layout | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for layout in LAYOUTS:
        row = [_cell(cells.get((layout, column), []), (layout, column)) for column in COLUMNS]
        lines.append(f"| {layout} | {' | '.join(row)} |")
    lines += ["", "A dash stands where there is nothing to do:", ""]
    for layout in LAYOUTS:
        reasons = [f"{column}: {WITHOUT[layout, column]}" for column in COLUMNS if (layout, column) in WITHOUT]
        if reasons:
            lines.append(f"- `{layout}`: {'. '.join(reason[0].upper() + reason[1:] for reason in reasons)}.")
    return "\n".join(lines)


def _cell(files: list[str], cell: tuple[str, str]) -> str:
    if cell in WITHOUT:
        return "-"
    links = []
    for file in files:
        word = "code" if file in BY_PUBLISHED_CODE else "yes"
        links.append(f"[{word}](../tests/ecosystem/{file})")
    # A real library outweighs one that was read.
    return next((link for link in links if link.startswith("[yes]")), links[0] if links else "")


def updated(page: str, table: str) -> str:
    """Put the table into the page, between its two comments.

    Raises:
        ValueError: the page lacks them.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} lacks the lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(), render(shown())))
    sys.stdout.write(f"{PAGE.name}: written\n")
