"""Measure `ckpt` against the bytes alone and against other ways to do the same work.

python benchmarks/bench.py                                 # a quarter of an hour; --full: an hour, larger series
python benchmarks/bench.py --scale 0.05 --rounds 2         # a quick test
python benchmarks/bench.py --part avg --series vit-l --only "ckpt avg" --only cat --only cp
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import report
from harness import (
    GB,
    HERE,
    BenchError,
    Sample,
    Way,
    contents,
    cool,
    facts,
    interleave,
    memory_bytes,
    remove,
    require_disk,
    run,
    run_job,
    warm,
)
from report import CAT, CKPT, CONVERT, CP, DD, FIX, IN_PLACE, INSIDE, INSPECT, LOOP, MERGEKIT, TIMM, TORCH, VERSION
from series import BY_NAME, SERIES, Series

PARTS = ("start-up", "avg", "copies", "cold", "inspect", "recal-bn")
SINGLE_FILES = ("vit-l", "vit-l-st")
"""Series of which a single file is copied and inspected."""
COLD_SERIES, COLD_QUICK = ("vit-l", "vit-l-bf16"), ("vit-l-bf16",)
"""Series that are read from the disk, with --full and without: this takes long."""
SLOW_SERIES = ("vit-l",)
"""Series on which the slow ways run without --full."""
BN_WAYS = ("forward", "update_bn", "fvcore", "ckpt", "ckpt, 2 passes")
FEW_FULL, FEW_QUICK = 2, 1
"""Rounds of the slow ways."""
MAX_ULP = 0.51
"""0.5 is correct rounding; the oracle, a NumPy float64 mean, is rounded itself."""
CKPT_COMMAND = [sys.executable, "-m", "ckpt_tools"]


@dataclass
class Bench:
    """The options, and the results so far."""

    options: argparse.Namespace
    results: dict[str, Any] = field(default_factory=dict)

    def measure(self, key: str, ways: dict[str, Way], few: Sequence[str] = (), rounds: int = 0) -> None:
        """Run the chosen ways, and write the results at once, because a long run may be interrupted.

        Args:
            key: of the results.
            few: the slow ways, which run in fewer rounds.
            rounds: for all others; as the options say if 0.
        """
        only = self.options.only
        ways = {name: way for name, way in ways.items() if only is None or name in only}
        if not ways:
            return
        say(key)
        rounds = rounds or self.options.rounds
        few_rounds = min(FEW_FULL if self.options.full else FEW_QUICK, rounds)
        found, failed = interleave(ways, rounds=rounds, few=few, few_rounds=few_rounds, say=say)
        self.results["runs"][key] = {name: [asdict(each) for each in samples] for name, samples in found.items()}
        self.results["failed"][key] = failed
        self.keep()

    def keep(self) -> None:
        self.options.json.parent.mkdir(parents=True, exist_ok=True)
        self.options.json.write_text(json.dumps(self.results, indent=1) + "\n")


@dataclass(frozen=True)
class Files:
    """A series on the disk, and a path for outputs in its format."""

    series: Series
    paths: list[str]
    out: str


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def copy(source: str, out: str) -> Way:
    """Return a way that runs `cp` and then times the write to the disk; a reflink would copy no bytes."""

    def go() -> Sample:
        done, _ = run(["cp", "-r", "--reflink=never", source, out])
        return finish(done, out)

    return go


def finish(done: Sample, out: str) -> Sample:
    """Time the write to the disk that the process left to the kernel, and remove the output."""
    sync, _ = run(["sync", *contents([out])])
    remove(out)
    return replace(done, sync=sync.seconds)


def averaging(bench: Bench, files: Files) -> None:
    """Measure `ckpt avg`, the bytes alone and the other ways; compare the first output of each with the oracle."""
    series, paths = files.series, files.paths
    ulp = bench.results["ulp"].setdefault(series.name, {})
    device = bench.options.device
    command = [*CKPT_COMMAND, "avg", *paths, "-o", files.out, "--force", *(["--device", device] if device else [])]
    size = series.file_bytes(scale_of(bench, series))
    numel = series.numel(scale_of(bench, series))
    room = 0.85 * memory_bytes() - size * (len(paths) + 1)  # with all files in the page cache
    needs = {LOOP: 2 * size, TIMM: 12 * numel + size, MERGEKIT: 3 * size}

    def checked(name: str, done: Sample, found: str | None = None) -> Sample:
        if name not in ulp:
            worst: float | None = run_job("verify", found or files.out, *paths)[1]["ulp"]
            if worst is not None:
                ulp[name] = worst
            elif name in (CKPT, INSIDE):
                raise BenchError(f"{files.out} has another dtype than the inputs, or other integers than the last.")
        return finish(done, files.out)

    def ours() -> Sample:
        return checked(INSIDE, run_job("ours", device or "", files.out, *paths)[0])

    def other(name: str, job: str) -> Sample:
        return checked(name, run_job(job, files.out, *paths, limit=bench.options.limit)[0])

    def mergekit() -> Sample:
        # It writes a folder, but cannot read one.
        python, limit = str(bench.options.mergekit), bench.options.limit
        done, _ = run_job("mergekit", files.out, *paths, python=python, limit=limit)
        return checked(MERGEKIT, done, f"{files.out}/model.safetensors")

    ways: dict[str, Way] = {
        CAT: lambda: run(["cat", *contents(paths)], discard_stdout=True)[0],
        CP: copy(paths[0], files.out),
        CKPT: lambda: checked(CKPT, run(command)[0]),
        INSIDE: ours,
    }
    slow: dict[str, Way] = {LOOP: partial(other, LOOP, "loop"), TIMM: partial(other, TIMM, "timm")}
    if bench.options.mergekit.exists() and series.suffix:
        slow[MERGEKIT] = mergekit
    if bench.options.full or series.name in SLOW_SERIES:
        ways |= {name: way for name, way in slow.items() if needs[name] < room}
    warm(paths)
    bench.measure(f"avg/{series.name}", ways, few=tuple(slow))


def copies(bench: Bench, files: Files) -> None:
    """Measure `fix-prefix` and `convert`, which sync their output before they rename it, and `cp` of the same file."""
    source, out = files.paths[0], files.out
    other = str(Path(out).with_suffix(".pth" if out.endswith(".safetensors") else ".safetensors"))

    def command(*words: str, to: str = out) -> Way:
        return lambda: finish(run([*CKPT_COMMAND, *words])[0], to)

    def in_place() -> Sample:
        os.link(source, out)  # the source stays when the new file takes this name
        return finish(run([*CKPT_COMMAND, "fix-prefix", out, "--add", "module."])[0], out)

    warm([source])
    ways = {
        CP: copy(source, out),
        FIX: command("fix-prefix", source, "--add", "module.", "-o", out),
        IN_PLACE: in_place,
        CONVERT: command("convert", source, "-o", other, to=other),
    }
    bench.measure(f"copies/{files.series.name}", ways)


def cold(bench: Bench, files: Files) -> None:
    """Measure `ckpt avg`, and `dd` of one file after the other, on files that are not in the page cache."""
    paths, out = files.paths, files.out

    def dd() -> Sample:
        cool(paths)
        parts = [run(["dd", f"if={path}", "of=/dev/null", "bs=1M"])[0] for path in contents(paths)]
        return Sample(sum(part.seconds for part in parts), others=max(part.others for part in parts))

    def ours() -> Sample:
        cool(paths)
        return finish(run_job("ours", bench.options.device or "", out, *paths)[0], out)

    def command() -> Sample:
        cool(paths)
        return finish(run([*CKPT_COMMAND, "avg", *paths, "-o", out, "--force"])[0], out)

    # The speed of a shared disk changes from round to round.
    rounds = 2 * bench.options.rounds + 1
    bench.measure(f"cold/{files.series.name}", {DD: dd, CKPT: command, INSIDE: ours}, rounds=rounds)


def inspecting(bench: Bench, files: Files) -> None:
    """Measure `ckpt inspect` of one file, start-up included."""
    bench.measure(
        f"inspect/{files.series.name}",
        {INSPECT: lambda: run([*CKPT_COMMAND, "inspect", files.paths[0]])[0]},
    )


def start_up(bench: Bench) -> None:
    """Measure the start-up of a command, which each of its figures includes, and the import of torch."""
    ways: dict[str, Way] = {
        TORCH: lambda: run([sys.executable, "-c", "import torch"])[0],
        VERSION: lambda: run([*CKPT_COMMAND, "--version"])[0],
    }
    bench.measure("start-up", ways)


def recalibration(bench: Bench) -> None:
    """Measure BatchNorm statistics by `ckpt`, by torch's `update_bn`, by fvcore, and the forward pass alone."""
    device = bench.options.device or "cpu"
    batches = "2" if bench.options.scale < 1 else "4"
    ways: dict[str, Way] = {
        way: lambda way=way: run_job(  # type: ignore[misc]
            "--way", way, "--batches", batches, "--device", device, script="bn.py"
        )[0]
        for way in BN_WAYS
    }
    bench.measure("recal-bn", ways, few=("fvcore",))


def scale_of(bench: Bench, series: Series) -> float:
    return float(bench.options.scale * (1.0 if bench.options.full else series.quick))


def parts_of(bench: Bench, series: Series) -> list[Callable[[Bench, Files], None]]:
    """Return the chosen parts that use this series."""
    options = bench.options
    if options.series is not None and series.name not in options.series:
        return []
    parts: dict[str, Callable[[Bench, Files], None]] = {"avg": averaging}
    if series.name in SINGLE_FILES:
        parts |= {"copies": copies, "inspect": inspecting}
    if series.name in (COLD_SERIES if options.full else COLD_QUICK):
        parts["cold"] = cold
    return [part for name, part in parts.items() if name in options.part]


def with_files(bench: Bench, series: Series, folder: Path) -> None:
    """Write the missing files of a series, run its parts, and remove the files."""
    scale = scale_of(bench, series)
    paths = series.paths(folder, scale)
    missing = [path for path in paths if not Path(path).exists()]
    # Three more: outputs, and the temporary file of a safe writer.
    require_disk(folder, series.file_bytes(scale) * (len(missing) + 3))
    if missing:
        say(f"{series.name}: writing {len(missing)} files of {series.file_bytes(scale) / GB:.3g} GB")
        run_job("make", series.name, str(scale), *missing)
    files = Files(series, paths, str(folder / f"bench-out{series.suffix}"))
    bench.results["series"][series.name] = {
        "title": series.title,
        "suffix": series.suffix,
        "files": len(paths),
        "file_bytes": sum(Path(file).stat().st_size for file in contents(paths)) / len(paths),
    }
    try:
        for part in parts_of(bench, series):
            part(bench, files)
    finally:
        if bench.options.folder is None:
            for path in paths:
                remove(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="full size, and the slow ways if memory allows")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable")
    parser.add_argument("--series", action="append", choices=BY_NAME, help="only this series; repeatable")
    parser.add_argument("--only", action="append", metavar="WAY", help="only this way, by its name in the tables")
    parser.add_argument("--rounds", type=int, help="without the warm-up (default: 3; 5 with --full)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the size of all files")
    parser.add_argument("--folder", type=Path, help="keep the series here (default: a temporary folder)")
    parser.add_argument("--device", help="for ckpt, and for all ways of recal-bn")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a slow way is ended")
    parser.add_argument("--mergekit", type=Path, default=HERE.parent / ".venv-mergekit/bin/python")
    parser.add_argument("--json", type=Path, default=HERE.parent / "build/bench.json", help="the results")
    parser.add_argument("--update", action="store_true", help="keep the earlier results of other series")
    parser.add_argument("--page", type=Path, help="write the figures and the plot of this page again")
    options = parser.parse_args(argv)
    if not 0 < options.scale <= 100 or not options.limit > 0 or options.rounds is not None and options.rounds < 1:
        parser.error("--scale (at most 100), --rounds and --limit must be positive")
    if options.page:
        report.check(options.page)
    options.rounds = options.rounds or (5 if options.full else 3)
    options.part = options.part or PARTS
    options.mergekit = options.mergekit.absolute()  # not resolved: the link is what makes it a virtual environment
    return options


def run_all(bench: Bench, folder: Path) -> None:
    if "start-up" in bench.options.part:
        start_up(bench)
    for series in SERIES:
        if parts_of(bench, series):
            with_files(bench, series, folder)
    if "recal-bn" in bench.options.part and bench.options.series is None:
        recalibration(bench)


def earlier(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise BenchError(f"{path} holds no results: {error}.") from error
    if not isinstance(found, dict):
        raise BenchError(f"{path} holds no results.")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary files are removed
    started = time.monotonic()
    bench = Bench(options)
    try:
        if options.update and options.json.exists():
            bench.results = earlier(options.json)
        for key in ("series", "runs", "failed", "ulp"):
            bench.results.setdefault(key, {})
        bench.keep()
        run([*CKPT_COMMAND, "--version"])
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as temporary:
            folder = (options.folder or Path(temporary)).absolute()
            bench.results |= {"facts": facts(folder), "rounds": options.rounds, "scale": options.scale}
            bench.results |= {"full": options.full, "few": FEW_FULL if options.full else FEW_QUICK}
            run_all(bench, folder)
        if not any(bench.results["runs"].values()):
            raise BenchError(
                "Nothing was measured: no series and way match --part, --series and --only. Drop one of these options."
            )
    except (BenchError, OSError) as problem:
        say(str(problem))
        return 2
    bench.results["minutes"] = (time.monotonic() - started) / 60
    bench.keep()
    sys.stdout.write(report.render(bench.results) + "\n")
    if options.page:
        report.update(bench.results, options.page)
    worst = max((found.get(way, 0) for found in bench.results["ulp"].values() for way in (CKPT, INSIDE)), default=0)
    if worst > MAX_ULP:
        say(f"WRONG: ckpt is {worst} ulp from the exact mean; at most {MAX_ULP} is right.")
    return 0 if worst <= MAX_ULP else 1


if __name__ == "__main__":
    sys.exit(main())
