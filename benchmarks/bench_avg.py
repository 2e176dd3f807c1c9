"""Time ``ckpt avg`` beside the bytes alone, a torch.load loop and a float64 dictionary, on the same files."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape

from harness import (
    GB,
    BenchError,
    machine_facts,
    make_console,
    require_ckpt_tools,
    run,
    run_job,
    series,
    show_table,
    warm,
    work_folder,
    write_markdown,
)

SLOW_ROUNDS = 3
MAX_ULP = 1
# More than this many cores busy with other work spoils a run. Processes shorter than the second figure
# say little: the kernel counts in ticks of 10 ms, and its own writing back counts too.
NOISY_CORES, NOISY_SECONDS = 0.2, 0.5

CAT, CP, CP_SYNC = "cat", "cp", "cp, sync"
BYTES, BYTES_SYNC = "bytes alone (cat, cp)", "bytes alone, synced"
IMPORT = "import torch"
CKPT, OURS = "ckpt avg", "ckpt_tools.average"
LOOP, FLOAT64 = "torch.load loop", "float64 dictionary"
ROWS = (CAT, CP, CP_SYNC, BYTES, BYTES_SYNC, IMPORT, CKPT, OURS, LOOP, FLOAT64)
HEADER = (
    "way",
    "seconds, median (min-max)",
    "start-up apart",
    "÷ bytes",
    "apart ÷ bytes",
    "sync after",
    "peak RSS GB",
    "worst ulp",
    "other load",
)


@dataclass(frozen=True)
class Sample:
    """One run: wall seconds of the process, seconds without start-up, the flush afterwards, memory.

    `others` is how many cores other work kept busy meanwhile.
    """

    total: float
    rss_gb: float | None = None
    apart: float | None = None
    flush: float | None = None
    others: float | None = None

    @property
    def flushed(self) -> float:
        return self.total + (self.flush or 0.0)


@dataclass
class Bench:
    """The files, and all samples so far by way and round."""

    paths: list[str]
    out: str
    samples: dict[str, dict[int, Sample]] = field(default_factory=dict)
    ulp: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, rnd: int, sample: Sample) -> None:
        self.samples.setdefault(name, {})[rnd] = sample

    def median(self, name: str, value: Callable[[Sample], float | None]) -> float | None:
        values = [v for s in self.samples.get(name, {}).values() if (v := value(s)) is not None]
        return statistics.median(values) if values else None


def flush_and_check(bench: Bench, name: str) -> float:
    """Time what the way left to the kernel to write; compare the first output of each way with the oracle.

    The output is removed, so every way starts without one and no run writes back another's pages.
    """
    seconds = run(["sync", bench.out]).seconds
    if name not in bench.ulp:
        _, found = run_job("verify", bench.out, *bench.paths)
        bench.ulp[name] = int(found["ulp"])
    Path(bench.out).unlink()
    return seconds


def run_bytes(bench: Bench, rnd: int) -> None:
    cat = run(["cat", *bench.paths], discard_stdout=True)
    # A reflink would copy no bytes at all.
    cp = run(["cp", "--reflink=never", bench.paths[0], bench.out])
    sync = run(["sync", bench.out]).seconds
    Path(bench.out).unlink()
    bench.add(CAT, rnd, Sample(cat.seconds, others=cat.others))
    bench.add(CP, rnd, Sample(cp.seconds, flush=sync))
    bench.add(CP_SYNC, rnd, Sample(cp.seconds + sync))
    bench.add(BYTES, rnd, Sample(cat.seconds + cp.seconds, flush=sync))
    bench.add(BYTES_SYNC, rnd, Sample(cat.seconds + cp.seconds + sync))


def run_import(bench: Bench, rnd: int) -> None:
    done = run([sys.executable, "-c", "import torch"])
    bench.add(IMPORT, rnd, Sample(done.seconds, done.rss_gb, others=done.others))


def run_ckpt(bench: Bench, rnd: int) -> None:
    argv = [sys.executable, "-m", "ckpt_tools", "avg", *bench.paths, "-o", bench.out, "--force"]
    done = run(argv)
    flush = flush_and_check(bench, CKPT)
    bench.add(CKPT, rnd, Sample(done.seconds, done.rss_gb, flush=flush, others=done.others))


def child_way(name: str, job: str) -> Callable[[Bench, int], None]:
    def go(bench: Bench, rnd: int) -> None:
        done, told = run_job(job, bench.out, *bench.paths)
        flush = flush_and_check(bench, name)
        bench.add(name, rnd, Sample(done.seconds, done.rss_gb, told["seconds"], flush, done.others))

    return go


def run_rounds(bench: Bench, repeat: int, skip_slow: bool, say: Callable[[str], None]) -> None:
    """Interleave the ways; the order turns from round to round so that none always follows the same one."""
    quick = [run_bytes, run_import, run_ckpt, child_way(OURS, "ours")]
    slow = [] if skip_slow else [child_way(LOOP, "loop"), child_way(FLOAT64, "float64")]
    for rnd in range(repeat):
        ways = quick + (slow if rnd < SLOW_ROUNDS else [])
        shift = rnd % len(ways)
        for way in ways[shift:] + ways[:shift]:
            way(bench, rnd)
        done = [f"{n} {bench.samples[n][rnd].total:.2f}" for n in ROWS if rnd in bench.samples.get(n, {})]
        say(f"round {rnd + 1} of {repeat}, seconds: " + "; ".join(done))


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def apart_median(bench: Bench, name: str) -> float | None:
    """Measured inside the process where it can be; the command's is its total less ``import torch``."""
    if name != CKPT:
        return bench.median(name, lambda s: s.apart)
    total, start = bench.median(CKPT, lambda s: s.total), bench.median(IMPORT, lambda s: s.total)
    return None if total is None or start is None else total - start


def most_others(bench: Bench, name: str) -> float | None:
    return max((s.others for s in bench.samples[name].values() if s.others is not None), default=None)


def spoiled(bench: Bench) -> list[str]:
    """A warning where other work ran beside some way: two threads on small tensors suffer most."""
    noisy = [
        name
        for name, runs in bench.samples.items()
        if any((s.others or 0.0) > NOISY_CORES and s.total > NOISY_SECONDS for s in runs.values())
    ]
    if not noisy:
        return []
    return [f"NOT A QUIET MACHINE: other work took more than {NOISY_CORES} cores during {', '.join(noisy)}"]


def table_row(bench: Bench, name: str) -> list[str]:
    totals = [s.total for s in bench.samples[name].values()]
    median, apart = statistics.median(totals), apart_median(bench, name)
    base = bench.median(BYTES, lambda s: s.total)
    return [
        name,
        f"{median:.2f} ({min(totals):.2f}-{max(totals):.2f})",
        number(apart),
        number(quotient(median, base)),
        number(quotient(apart, base)),
        number(bench.median(name, lambda s: s.flush)),
        number(bench.median(name, lambda s: s.rss_gb)),
        str(bench.ulp.get(name, "")),
        number(most_others(bench, name)),
    ]


def ratio(bench: Bench, a: str, b: str, value: Callable[[Sample], float]) -> str:
    """Ratio of medians; in brackets the lowest and highest of the rounds that ran both, to show the noise."""
    sa, sb = bench.samples[a], bench.samples[b]
    each = [value(sa[r]) / value(sb[r]) for r in sa if r in sb]
    whole = quotient(bench.median(a, value), bench.median(b, value))
    return f"{number(whole)} (rounds {min(each):.2f}-{max(each):.2f})"


def against(bench: Bench, other: str) -> str:
    apart = quotient(apart_median(bench, OURS), apart_median(bench, other))
    memory = quotient(bench.median(CKPT, lambda s: s.rss_gb), bench.median(other, lambda s: s.rss_gb))
    return (
        f"{CKPT} / {other}: total {ratio(bench, CKPT, other, lambda s: s.total)}; "
        f"start-up apart {number(apart)}; "
        f"both flushed to disk {ratio(bench, CKPT, other, lambda s: s.flushed)}; peak RSS {number(memory)}"
    )


def against_bytes(bench: Bench, base: str) -> str:
    apart = quotient(apart_median(bench, OURS), bench.median(base, lambda s: s.total))
    total = ratio(bench, CKPT, base, lambda s: s.total)
    return f"{CKPT} / {base}: total {total}; start-up apart {number(apart)}"


def conclusions(bench: Bench) -> list[str]:
    lines = [against(bench, name) for name in (LOOP, FLOAT64) if name in bench.samples]
    lines += [against_bytes(bench, base) for base in (BYTES, BYTES_SYNC)]
    worst = max(bench.ulp[CKPT], bench.ulp[OURS])
    verdict = "as asked" if worst <= MAX_ULP else f"WRONG, at most {MAX_ULP} is right"
    lines += spoiled(bench)
    return [*lines, f"Farthest of {CKPT} from the numpy float64 mean: {worst} ulp, {verdict}"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the series here (default: a temporary folder)")
    parser.add_argument("--scale", type=float, default=1.0, help="size of each file; 1 is 1.21 GB")
    parser.add_argument("--repeat", type=int, default=5, help=f"rounds; slow ways: first {SLOW_ROUNDS}")
    parser.add_argument("--files", type=int, default=6, help="files in the series")
    parser.add_argument("--skip-slow", action="store_true", help="leave out the loop and the dictionary")
    parser.add_argument("--out-md", type=Path, help="write the table here too, as Markdown")
    args = parser.parse_args(argv)
    if args.repeat < 1 or args.files < 1 or args.scale <= 0:
        parser.error("--repeat, --files and --scale must be positive")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    console = make_console()
    try:
        require_ckpt_tools(sys.executable)
        with work_folder(args.folder) as folder:
            facts = machine_facts(folder)
            console.print(f"{args.files} files at scale {args.scale:g} in {escape(str(folder))}")
            bench = Bench(series(folder, args.files, args.scale), str(folder / "bench-out.pth"))
            gigabytes = Path(bench.paths[0]).stat().st_size / GB
            warm(bench.paths)
            run_rounds(bench, args.repeat, args.skip_slow, console.print)
    except BenchError as exc:
        console.print(escape(str(exc)), style="red")
        return 2
    title = f"Average of {args.files} files of {gigabytes:.2f} GB, {args.repeat} rounds, warm page cache"
    rows = [table_row(bench, name) for name in ROWS if name in bench.samples]
    lines = conclusions(bench)
    show_table(console, title, HEADER, rows)
    for line in [*lines, *facts]:
        console.print(escape(line))
    if args.out_md:
        write_markdown(args.out_md, title, HEADER, rows, lines, facts)
    return 0 if max(bench.ulp[CKPT], bench.ulp[OURS]) <= MAX_ULP else 1


if __name__ == "__main__":
    sys.exit(main())
