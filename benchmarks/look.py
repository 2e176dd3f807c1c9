"""`ckpt look` beside `ckpt avg` of the same files: what one pass over a series costs; makes its own files.

    python benchmarks/look.py                        # 8 files of 200 MB, in each dtype
    python benchmarks/look.py --megabytes 800 --rounds 9

The files are in the page cache, the commands run in turns, and the figures are medians: seconds by the clock, and the
seconds that all threads computed, which other work on the machine changes less. Both have the start of the process.
The exit code is 1 if `look` takes more than 1.3 times the CPU seconds of `avg`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

from harness import Sample, interleave, run, warm

CKPT = [sys.executable, "-m", "ckpt_tools"]
FILES = 8
DTYPES = ["float32", "bfloat16"]
MOST = 1.3


def make(folder: Path, megabytes: int) -> None:
    """Write series of one run: random weights that move a little from file to file."""
    import torch

    torch.manual_seed(0)
    for dtype in DTYPES:
        kind = getattr(torch, dtype)
        weights = [torch.randn(megabytes * 1_000_000 // 16 // kind.itemsize // 1000, 1000) for _ in range(16)]
        for i in range(FILES):
            for each in weights:
                each += 0.01 * torch.randn(each.shape)
            model = {f"layers.{k}.weight": each.to(kind) for k, each in enumerate(weights)}
            torch.save({"model": model, "step": 1000 * i}, folder / f"{dtype}-{i}.pth")


def ran(*words: str, out: Path | None = None) -> Sample:
    if out is not None:
        out.unlink(missing_ok=True)
        words = (*words, "-o", str(out))
    return run([*CKPT, *words], discard_stdout=True)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="of a file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        make(Path(options.job[0]), int(options.job[1]))
        return 0
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        run([sys.executable, str(Path(__file__).absolute()), "--job", name, str(options.megabytes)])
        sys.stdout.write(f"{'':10}{'':6}{'seconds':>10}{'CPU s':>10}{'peak GB':>10}{'others':>10}\n")
        for dtype in DTYPES:
            paths = [f"{name}/{dtype}-{i}.pth" for i in range(FILES)]
            warm(paths)
            found, _ = interleave(
                {"look": lambda: ran("look", *paths), "avg": lambda: ran("avg", *paths, out=Path(name, "out.pth"))},  # noqa: B023
                rounds=options.rounds,
                few=(),
                few_rounds=0,
                say=lambda text: None,
            )
            middle = {
                verb: [median(getattr(s, field) for s in samples) for field in ("seconds", "cpu", "rss_gb", "others")]
                for verb, samples in found.items()
            }
            for verb, figures in middle.items():
                sys.stdout.write(f"{dtype:10}{verb:6}" + "".join(f"{figure:10.2f}" for figure in figures) + "\n")
            by_clock, by_cpu = (a / b for a, b in zip(middle["look"][:2], middle["avg"][:2], strict=True))
            sys.stdout.write(f"{dtype:10}{'ratio':6}{by_clock:10.2f}{by_cpu:10.2f}\n")
            ratios.append(by_cpu)
    return 0 if max(ratios) <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
