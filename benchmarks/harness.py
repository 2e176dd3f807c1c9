"""Run new child processes in interleaved rounds, measure their time and peak memory, and describe the machine.

This module must not import torch. On Linux a child's ``ru_maxrss`` starts from the resident size of
the process that started it (the peak survives exec). A parent with torch loaded would add half a
gigabyte to every figure. Everything heavy runs in ``child.py``.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent.absolute()
GB = 1e9
MAX_FLOOR_GB = 0.15


class BenchError(Exception):
    """The benchmark cannot go on; the message is for its user."""


@dataclass(frozen=True)
class Sample:
    """One run of one way.

    Attributes:
        seconds, rss_gb: wall time and peak memory of the process.
        cpu: seconds of all its threads, in the system, too.
        apart: seconds without start-up, measured inside the process.
        sync: seconds to write the rest of the output to the disk afterwards.
        others: cores that other processes kept busy meanwhile.
        imports_gb, peak_gb: peak memory after the imports and after the work, measured inside.
        images: how many a network has seen.
    """

    seconds: float
    rss_gb: float = 0.0
    cpu: float = 0.0
    apart: float | None = None
    sync: float | None = None
    others: float = 0.0
    imports_gb: float | None = None
    peak_gb: float | None = None
    images: float | None = None


Way = Callable[[], Sample]


def busy_seconds() -> float:
    """Return the CPU seconds of the whole machine so far, with stolen time, without idle and waiting time."""
    user, nice, system, _idle, _iowait, *rest = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")


def run(argv: Sequence[str], *, limit: float = 1200, discard_stdout: bool = False) -> tuple[Sample, str]:
    """Run a command without a shell; return its time and peak memory, and its stdout.

    ``wait4`` gives the peak of this child; ``getrusage(RUSAGE_CHILDREN)`` gives the maximum over all children so far.

    Raises:
        BenchError: it fails, takes more than LIMIT seconds, or would start from a memory peak of this process.
    """
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
    if floor > MAX_FLOOR_GB:
        raise BenchError(f"The benchmark itself has taken {floor:.2f} GB, which the peak of each child would include.")
    env = dict(os.environ)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, each start would compile all modules
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), env.get("PYTHONPATH")]))
    # Files, not pipes, which would have to be read while we wait.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stdout = subprocess.DEVNULL if discard_stdout else out
        busy, start = busy_seconds(), time.perf_counter()
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=err, env=env)
        late = threading.Timer(limit, child.kill)
        late.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            late.cancel()
        seconds = time.perf_counter() - start
        cpu = usage.ru_utime + usage.ru_stime
        others = max(0.0, busy_seconds() - busy - cpu) / seconds
        # wait4 has reaped the child, which Popen cannot know.
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if seconds > limit and child.returncode != 0:
            raise BenchError(f"more than {limit:.0f} s")
        if child.returncode != 0:
            last = err.read().decode(errors="replace").strip().splitlines()[-1:]
            # Without folders, which do not help a reader of the tables.
            command = " ".join(Path(word).name for word in argv[:4])
            raise BenchError(f"{command} ended with {child.returncode}: {' '.join(last)}")
        return Sample(seconds, usage.ru_maxrss * 1024 / GB, cpu, others=others), out.read().decode(errors="replace")


def run_job(
    job: str, *args: str, python: str = sys.executable, limit: float = 1200, script: str = "child.py"
) -> tuple[Sample, dict[str, float]]:
    """Run a job of a script in this folder; the last line of its output is JSON."""
    done, text = run([python, str(HERE / script), job, *args], limit=limit)
    told = json.loads(text.strip().splitlines()[-1]) or {}
    inside = {key: told.get(key) for key in ("imports_gb", "peak_gb", "images")}
    return replace(done, apart=told.get("seconds"), **inside), told


def interleave(
    ways: dict[str, Way], *, rounds: int, few: Collection[str], few_rounds: int, say: Callable[[str], None]
) -> tuple[dict[str, list[Sample]], dict[str, str]]:
    """Run all ways in turns; the order rotates, so that no way always follows the same one.

    The first round warms up and is not counted: on a virtual machine, the first use of memory is slow.
    The ways in FEW run in FEW_ROUNDS rounds, and may fail.

    Returns:
        The samples of each way, and the reasons why some have none.
    """
    found: dict[str, list[Sample]] = {name: [] for name in ways}
    failed: dict[str, str] = {}
    for number in range(rounds + 1):
        names = [name for name in ways if name not in failed and (name not in few or number <= few_rounds)]
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            try:
                sample = ways[name]()
            except BenchError as problem:
                if name not in few:
                    raise
                failed[name] = str(problem)
                say(f"  {name}: {problem}")
                continue
            if number:
                found[name].append(sample)
            say(f"  {'warm-up' if number == 0 else f'round {number}'}: {name} {sample.seconds:.2f} s")
    return {name: samples for name, samples in found.items() if samples}, failed


def contents(paths: Sequence[str]) -> list[str]:
    """Return the files, and the files in folders."""
    return [str(f) for p in map(Path, paths) for f in (sorted(p.iterdir()) if p.is_dir() else [p])]


def warm(paths: Sequence[str]) -> None:
    """Flush the files to the disk and read them once, so that no timed run has to."""
    run(["sync", *contents(paths)])
    for path in contents(paths):  # the data is not needed
        run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"])


def cool(paths: Sequence[str]) -> None:
    """Take the files out of the page cache, after a flush: pages that are not on the disk would stay."""
    for path in contents(paths):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def remove(path: str) -> None:
    if Path(path).is_dir():
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def require_disk(folder: Path, need: float) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise BenchError(f"{folder} has {free / GB:.1f} GB free, this needs {need / GB:.1f} GB; see --scale, --folder.")


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def facts(folder: Path) -> dict[str, str]:
    """Return what a reader must know about the machine to compare the figures."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    reporting = Path("/sys/module/page_reporting/parameters/page_reporting_order")
    return {
        "processor": f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory_bytes() / GB:.1f} GB",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": run(["stat", "-f", "-c", "%T", str(folder)])[1].strip(),
        "versions": f"Python {platform.python_version()}, torch {installed('torch')}, numpy {installed('numpy')}, "
        f"safetensors {installed('safetensors')}, ckpt-tools {installed('ckpt-tools')}, "
        f"{run(['cp', '--version'])[1].splitlines()[0]}",
        "page_reporting_order": reporting.read_text().strip() if reporting.exists() else "none",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
    }
