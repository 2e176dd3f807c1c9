"""Time `ckpt fix-prefix` and `ckpt convert` to safetensors on a 2.4 GB file beside `cp` of it; memory, too.

    python benchmarks/bench_copies.py --rounds 5
    python benchmarks/bench_copies.py --scale 0.1 --folder DIR

All ways get the same file in a warm page cache, in interleaved rounds, each in a fresh process. `ckpt` syncs what it
wrote before it renames, `cp` does not: so `cp` is timed with `sync` behind it, which is as much work, and
without, beside the library with its syncs left out (`no sync`). Start-up of Python stands in the totals. On a file
system that shares blocks (btrfs, XFS) both share them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

from harness import GB, Run, machine_facts, make_console, require_disk, run, show_table, warm, work_folder

NBYTES = 2.4e9
LAYERS = 600
CP, CP_SYNC = "cp", "cp, sync"
FIX, IN_PLACE, CONVERT = "fix-prefix -o", "fix-prefix in place", "convert"
FIX_NO_SYNC, CONVERT_NO_SYNC = "fix-prefix -o, no sync", "convert, no sync"
PLAIN = {CP_SYNC: (FIX, IN_PLACE, CONVERT), CP: (FIX_NO_SYNC, CONVERT_NO_SYNC)}
"""What is compared with what."""


def write(path: str, nbytes: str) -> None:
    """Write a file with wrapped names, in a process of its own, for torch is heavy."""
    import torch
    from safetensors.torch import save_file

    values = torch.randn(int(float(nbytes)) // LAYERS // 4)
    state = {f"module.blocks.{i}.weight": values + i for i in range(LAYERS)}
    if path.endswith(".pth"):
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path, metadata={"format": "pt"})


def fix_without_sync(source: str, target: str) -> None:
    os.fsync = lambda fd: None
    from ckpt_tools import fix_prefix

    fix_prefix(source, out=target)


def convert_without_sync(source: str, target: str) -> None:
    os.fsync = lambda fd: None
    from ckpt_tools import convert

    convert(source, to="plain", out=target)


def timed(way: str, source: Path, target: Path) -> tuple[float, Run]:
    """Run one way, and return its seconds with what belongs to it, and its process."""
    python = [sys.executable, str(Path(__file__).absolute())]
    if way in (CP, CP_SYNC):
        done = run(["cp", str(source), str(target)])
        return done.seconds + (run(["sync", str(target)]).seconds if way == CP_SYNC else 0), done
    ckpt = [sys.executable, "-m", "ckpt_tools"]
    if way == FIX_NO_SYNC:
        done = run([*python, "--child", "fix_without_sync", str(source), str(target)])
    elif way == CONVERT_NO_SYNC:
        done = run([*python, "--child", "convert_without_sync", str(source), str(target)])
    elif way == FIX:
        done = run([*ckpt, "fix-prefix", str(source), "-o", str(target)])
    elif way == CONVERT:
        done = run([*ckpt, "convert", str(source), "-o", str(target)])
    else:
        os.link(source, target)  # so that the source stays when this name gets the new file
        done = run([*ckpt, "fix-prefix", str(target)])
    return done.seconds, done


def measure(source: Path, rounds: int) -> dict[str, list[tuple[float, Run]]]:
    ways = (CP, CP_SYNC, FIX, IN_PLACE, CONVERT, FIX_NO_SYNC, CONVERT_NO_SYNC)
    found: dict[str, list[tuple[float, Run]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            target = source.with_name("out" + (".safetensors" if way in (CONVERT, CONVERT_NO_SYNC) else source.suffix))
            warm([str(source)])
            found[way].append(timed(way, source, target))
            run(["sync", str(target)])
            target.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of 2.4 GB")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary folder)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        jobs = {job.__name__: job for job in (write, fix_without_sync, convert_without_sync)}
        jobs[options.child[0]](*options.child[1:])
        return
    console = make_console()
    child = [sys.executable, str(Path(__file__).absolute()), "--child"]
    with work_folder(options.folder) as folder:
        require_disk(folder, 3 * NBYTES * options.scale)
        for name in ("wrapped.pth", "wrapped.safetensors"):
            source = folder / name
            run([*child, "write", str(source), str(NBYTES * options.scale)])
            found = measure(source, options.rounds)
            rows = []
            for way, runs in found.items():
                median = statistics.median(seconds for seconds, _ in runs)
                base = next((base for base, ways in PLAIN.items() if way in ways), None)
                ratio = "" if base is None else f"{median / statistics.median(s for s, _ in found[base]):.2f} of {base}"
                span = f"{median:.2f} ({min(runs)[0]:.2f}-{max(s for s, _ in runs):.2f})"
                memory = f"{max(process.rss_gb for _, process in runs) * 1000:.0f}"
                rows.append([way, span, ratio, memory, f"{max(process.others for _, process in runs):.2f}"])
            title = f"{name}, {source.stat().st_size / GB:.2f} GB, {options.rounds} rounds"
            show_table(console, title, ["way", "seconds, median (min-max)", "ratio", "peak RSS MB", "other load"], rows)
            source.unlink()
        for fact in machine_facts(folder):
            console.print(fact)


if __name__ == "__main__":
    main()
