"""Peak resident memory of ``ckpt avg`` for few files, many files, and one very large tensor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from harness import (
    GB,
    BenchError,
    machine_facts,
    make_console,
    require_ckpt_tools,
    require_disk,
    run,
    run_job,
    series,
    show_table,
    work_folder,
    write_markdown,
)

FEW, MANY = 6, 12
BIG_FILES = 2
BIG_BYTES = 2_000_000_000
HEADER = (
    "run",
    "input GB",
    "largest tensor GB",
    "ckpt avg, peak RSS GB",
    "above import torch",
    "function, peak RSS GB at its end",
    "above imports",
)
VIT_L_TENSOR_BYTES = 4 * 4096 * 1024  # an MLP weight in fp32


def peak(argv: Sequence[str], repeat: int) -> float:
    """The highest of a few runs: a promise about memory is about the worst one."""
    return max(run(argv).rss_gb for _ in range(repeat))


def peak_avg(python: str, paths: Sequence[str], out: Path, repeat: int) -> float:
    try:
        return peak([python, "-m", "ckpt_tools", "avg", *paths, "-o", str(out), "--force"], repeat)
    finally:
        out.unlink(missing_ok=True)


def peak_function(python: str, paths: Sequence[str], out: Path, repeat: int) -> tuple[float, float]:
    """Highest peak before the process ends, and its highest rise over what the imports took."""
    try:
        told = [run_job("ours", str(out), *paths, python=python)[1] for _ in range(repeat)]
    finally:
        out.unlink(missing_ok=True)
    return max(t["peak_gb"] for t in told), max(t["peak_gb"] - t["before_gb"] for t in told)


def big_files(folder: Path, scale: float) -> list[str]:
    paths = [folder / f"one-tensor-x{scale:g}-{i}.pth" for i in range(BIG_FILES)]
    if not all(path.exists() for path in paths):
        require_disk(folder, (BIG_FILES + 2) * BIG_BYTES * scale * 1.1)
        run_job("big", str(folder / f"one-tensor-x{scale:g}-{{}}.pth"), str(scale), str(BIG_FILES))
    return [str(path) for path in paths]


def measure(python: str, folder: Path, scale: float, repeat: int, keep: bool) -> list[list[str]]:
    out = folder / "bench-out.pth"
    floor = peak([python, "-c", "import torch"], repeat)
    # os._exit leaves out what the libraries do while the process ends.
    bare = peak([python, "-c", "import os, torch; os._exit(0)"], repeat)

    def row(name: str, paths: Sequence[str], tensor_bytes: float) -> list[str]:
        size = sum(Path(path).stat().st_size for path in paths) / GB
        whole = peak_avg(python, paths, out, repeat)
        inside, rise = peak_function(python, paths, out, repeat)
        figures = (whole, whole - floor, inside, rise)
        return [name, f"{size:.2f}", f"{tensor_bytes * scale / GB:.3f}", *(f"{x:.2f}" for x in figures)]

    rows = [["import torch alone", "", "", f"{floor:.2f}", "", f"{bare:.2f}", ""]]
    paths: list[str] = []
    for files in (FEW, MANY):
        # The longer series takes in the shorter one; all are real files, for links would be counted once.
        paths = series(folder, files, scale)
        rows.append(row(f"{files} files", paths, VIT_L_TENSOR_BYTES))
    if not keep:
        remove(paths)
    return [*rows, row(f"{BIG_FILES} files of one tensor", big_files(folder, scale), BIG_BYTES)]


def remove(paths: Sequence[str]) -> None:
    """Bound the disk use: the next case brings its own files."""
    for path in paths:
        Path(path).unlink()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the files here (default: a temporary folder)")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the files; 1 is 1.21 GB each")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each case; the highest peak counts")
    parser.add_argument("--python", default=sys.executable, help="another interpreter that has ckpt_tools")
    parser.add_argument("--out-md", type=Path, help="write the table here too, as Markdown")
    args = parser.parse_args(argv)
    if args.repeat < 1 or args.scale <= 0:
        parser.error("--repeat and --scale must be positive")
    # Not resolved: the link in a virtual environment is what makes it one.
    args.python = str(Path(args.python).absolute())
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    console = make_console()
    try:
        require_ckpt_tools(args.python)
        with work_folder(args.folder) as folder:
            facts = machine_facts(folder, args.python)
            rows = measure(args.python, folder, args.scale, args.repeat, keep=args.folder is not None)
    except BenchError as exc:
        console.print(escape(str(exc)), style="red")
        return 2
    title = f"Peak memory of ckpt avg, highest of {args.repeat} runs, scale {args.scale:g}"
    show_table(console, title, HEADER, rows)
    for fact in facts:
        console.print(escape(fact))
    if args.out_md:
        write_markdown(args.out_md, title, HEADER, rows, [], facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
