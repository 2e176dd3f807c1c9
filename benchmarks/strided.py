"""`ckpt` on tensors in another order than C, and on dtypes other than float32; makes its own files.

    python benchmarks/strided.py                 # 3 files of 144 MB each; 3 GB of disk
    python benchmarks/strided.py --megabytes 20 --rounds 1

The first table has each verb on a transposed and on a channels-last tensor, beside the seconds for a contiguous one.
The second has `ckpt avg` beside a loop of torch (load each file, add in float64, round, save), for each dtype. The
fastest of all rounds counts. The averages must be equal, byte for byte: else the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

from harness import Way, interleave, run

FILES = 3
ORDERS = ("contiguous", "transposed", "channels-last")
DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64", "float8_e4m3fn", "float8_e5m2")
CKPT = [sys.executable, "-m", "ckpt_tools"]


def make(folder: Path, megabytes: int) -> None:
    """Write the files of all orders and dtypes."""
    import torch

    side = max(int((megabytes * 10**6 / 4) ** 0.5), 64)
    filters = max(int((megabytes * 10**6 / 4 / 9) ** 0.5), 8)
    for i in range(FILES):
        torch.manual_seed(i)
        matrix, kernel = torch.randn(side, side), torch.randn(filters, filters, 3, 3)
        torch.save({"w": matrix}, folder / f"contiguous-{i}.pth")
        torch.save({"w": matrix.t().contiguous().t()}, folder / f"transposed-{i}.pth")
        torch.save({"w": kernel.to(memory_format=torch.channels_last)}, folder / f"channels-last-{i}.pth")
        for name in DTYPES:
            dtype = getattr(torch, name)
            wide = torch.randn(megabytes * 10**6 // dtype.itemsize, dtype=dtype if dtype.is_complex else torch.float32)
            torch.save({"w": wide.to(dtype)}, folder / f"{name}-{i}.pth")


def loop(out: str, paths: list[str]) -> None:
    """Average files as one writes it by hand, in float64."""
    import torch

    total = None
    for path in paths:
        values = torch.load(path, weights_only=True)["w"]
        values = values.to(torch.complex128 if values.is_complex() else torch.float64)
        total = values if total is None else total.add_(values)
    dtype = torch.load(paths[0], weights_only=True, mmap=True)["w"].dtype
    torch.save({"w": total.div_(len(paths)).to(dtype)}, out)


def verbs(paths: list[str], out: str) -> dict[str, list[str]]:
    """The commands to measure on some files."""
    return {
        "avg": ["avg", *paths, "-o", out],
        "diff": ["diff", paths[0], paths[1]],
        "convert": ["convert", paths[0], "--to", "plain", "-o", out],
        "strip": ["strip", paths[0], "-o", out],
    }


def way(command: list[str], out: str) -> Way:
    def go():  # type: ignore[no-untyped-def]
        Path(out).unlink(missing_ok=True)
        # `ckpt diff` ends with 1 where files differ, which is no failure.
        shell = ["sh", "-c", '"$@"; test $? -le 1', "sh", *command]
        return run(shell, discard_stdout=True)[0]

    return go


def fastest(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    found, failed = interleave(ways, rounds=rounds, few=(), few_rounds=0, say=lambda text: None)
    for name, reason in failed.items():
        sys.stdout.write(f"{name}: {reason}\n")
    return {name: min(sample.seconds for sample in samples) for name, samples in found.items() if samples}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=144, help="of a file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job, *arguments = options.job
        make(Path(arguments[0]), int(arguments[1])) if job == "make" else loop(arguments[0], arguments[1:])
        return 0
    this = [sys.executable, str(Path(__file__).absolute())]
    with tempfile.TemporaryDirectory() as name:
        out, status = f"{name}/out.safetensors", 0
        run([*this, "--job", "make", name, str(options.megabytes)])
        series = {kind: [f"{name}/{kind}-{i}.pth" for i in range(FILES)] for kind in (*ORDERS, *DTYPES)}
        sys.stdout.write(f"{'':12}" + "".join(f"{order:>24}" for order in ORDERS) + "\n")
        for verb in verbs([""] * FILES, out):
            ways = {order: way([*CKPT, *verbs(series[order], out)[verb]], out) for order in ORDERS}
            seconds = fastest(ways, options.rounds)
            base = seconds[ORDERS[0]]
            cells = [f"{seconds[order]:12.2f} s {seconds[order] / base:8.2f}x" for order in ORDERS]
            sys.stdout.write(f"{verb:12}" + "".join(f"{cell:>24}" for cell in cells) + "\n")
        outs = {order: f"{name}/{order}.safetensors" for order in ORDERS[:2]}
        for order, target in outs.items():
            run([*CKPT, "avg", *series[order], "-o", target])
        status |= len({digest(target) for target in outs.values()}) != 1
        sys.stdout.write(f"\n{'':16}{'ckpt avg':>12}{'torch loop':>14}{'ratio':>10}\n")
        for dtype in DTYPES:
            seconds = fastest(
                {
                    "ckpt avg": way([*CKPT, "avg", *series[dtype], "-o", f"{name}/out.pth"], f"{name}/out.pth"),
                    "torch loop": way([*this, "--job", "loop", f"{name}/loop.pth", *series[dtype]], f"{name}/loop.pth"),
                },
                options.rounds,
            )
            ours, theirs = seconds["ckpt avg"], seconds["torch loop"]
            sys.stdout.write(f"{dtype:16}{ours:10.2f} s{theirs:12.2f} s{ours / theirs:9.2f}x\n")
    return status


def digest(path: str) -> str:
    """The SHA-256 of the tensors of a safetensors file."""
    with Path(path).open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
