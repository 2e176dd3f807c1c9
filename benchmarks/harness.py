"""What both benchmarks share: fresh child processes with their own peak memory, files, tables, facts.

This module must not import torch. On Linux a child's ``ru_maxrss`` starts from the resident size of
the process that started it (exec carries the old high-water mark over), so a parent that had torch
loaded would put a floor of half a gigabyte under every figure. Everything heavy runs in ``child.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).parent.absolute()
CHILD = str(HERE / "child.py")
VIT_L_BYTES = 1_217_400_000  # one file at scale 1, zip overhead included
GB = 1e9


class BenchError(Exception):
    """A benchmark that cannot go on; the message is for the person who ran it."""


@dataclass(frozen=True)
class Run:
    """One finished child process."""

    seconds: float
    rss_gb: float
    stdout: str
    others: float
    """Cores that everything else on the machine kept busy meanwhile."""


def make_console() -> Console:
    """A console that keeps tables whole when the output is a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def child_env(python: str) -> dict[str, str]:
    """Let this interpreter find the checkout; another one must have ckpt_tools installed by itself."""
    env = dict(os.environ)
    if python == sys.executable:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), env.get("PYTHONPATH")]))
    return env


def busy_seconds() -> float:
    """CPU seconds of the whole machine so far, stolen ones included, idle and waiting ones not."""
    user, nice, system, _idle, _iowait, *rest = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")


def run(argv: Sequence[str], *, discard_stdout: bool = False) -> Run:
    """Run one command without a shell; wall time and peak memory are that process's own.

    ``getrusage(RUSAGE_CHILDREN)`` keeps the maximum over all children so far, ``wait4`` does not.
    Output goes to files, not pipes, so that nobody has to drain it while we wait.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        busy = busy_seconds()
        start = time.perf_counter()
        proc = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if discard_stdout else out,
            stderr=err,
            env=child_env(argv[0]),
        )
        try:
            _, status, usage = os.wait4(proc.pid, 0)
        except BaseException:
            proc.kill()
            proc.wait()
            raise
        seconds = time.perf_counter() - start
        others = max(0.0, busy_seconds() - busy - usage.ru_utime - usage.ru_stime) / seconds
        # We reaped the child behind Popen's back, so Popen has to be told.
        proc.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if proc.returncode != 0:
            text = err.read().decode(errors="replace").strip()
            raise BenchError(f"{' '.join(argv[:4])} ... ended with {proc.returncode}:\n{text}")
        return Run(seconds, usage.ru_maxrss * 1024 / GB, out.read().decode(errors="replace"), others)


def run_job(job: str, *args: str, python: str = sys.executable) -> tuple[Run, dict[str, float]]:
    """Run one job of child.py; the last line it writes is a JSON object."""
    done = run([python, CHILD, job, *args])
    return done, json.loads(done.stdout.strip().splitlines()[-1])


def require_ckpt_tools(python: str) -> None:
    """Say what is missing before gigabytes are written, not after."""
    try:
        run([python, "-c", "import ckpt_tools"])
    except BenchError as exc:
        raise BenchError(f"{python} cannot import ckpt_tools: {exc}") from exc


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder the user named, kept; or a temporary one, removed at the end."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as name:
        yield Path(name)


def require_disk(folder: Path, need: float) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise BenchError(f"{folder} has {free / GB:.1f} GB free, this needs {need / GB:.1f} GB")


def series(folder: Path, files: int, scale: float) -> list[str]:
    """Paths of the ``vit_l-like`` series, written now where they are not there yet.

    The name holds the scale, and a file gets its name only when it is whole, so one that exists is right.
    """
    paths = [folder / f"vit_l-like-x{scale:g}-{i:02d}.pth" for i in range(files)]
    missing = [str(i) for i, path in enumerate(paths) if not path.exists()]
    if missing:
        # Two more: the output, and the temporary file a safe writer may need beside it.
        require_disk(folder, (len(missing) + 2) * VIT_L_BYTES * scale * 1.1)
        pattern = str(folder / f"vit_l-like-x{scale:g}-{{:02d}}.pth")
        run_job("series", pattern, str(scale), *missing)
    return [str(path) for path in paths]


def warm(paths: Sequence[str]) -> None:
    """Write the files out and read them once, so that no timed run pays for either."""
    run(["sync", *paths])
    run(["cat", *paths], discard_stdout=True)


def first_match(path: str, key: str) -> str:
    with contextlib.suppress(OSError), Path(path).open() as lines:
        for line in lines:
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    return "unknown"


def machine_facts(folder: Path, python: str = sys.executable) -> list[str]:
    """What a reader needs to place the figures."""
    ram = first_match("/proc/meminfo", "MemTotal").split()[0]
    if python == sys.executable:
        versions = f"Python {platform.python_version()}, torch {version('torch')}"
    else:
        code = "import platform, sys, torch; sys.stdout.write(f'Python {platform.python_version()}, "
        versions = run([python, "-c", code + "torch {torch.__version__}')"]).stdout
    return [
        f"CPU: {first_match('/proc/cpuinfo', 'model name')}, {len(os.sched_getaffinity(0))} cores",
        f"RAM: {int(ram) * 1024 / GB:.1f} GB" if ram.isdigit() else "RAM: unknown",
        f"Kernel: {platform.system()} {platform.release()}",
        f"File system: {run(['stat', '-f', '-c', '%T', str(folder)]).stdout.strip()}",
        f"{run(['cp', '--version']).stdout.splitlines()[0]}",
        versions,
        # Decisive on a busy machine: OpenMP threads that wait for a core spin meanwhile.
        f"OMP_NUM_THREADS: {os.environ.get('OMP_NUM_THREADS', 'not set')}",
        f"Load average at the start: {os.getloadavg()[0]:.1f}",
    ]


def show_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def write_markdown(
    path: Path,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    lines: Sequence[str],
    facts: Sequence[str],
) -> None:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    table = ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
    bullets = [f"- {line}" for line in lines]
    text = [f"# {title}", "", *table, "", *bullets, *([""] if bullets else []), "Machine:", ""]
    path.write_text("\n".join([*text, *(f"- {fact}" for fact in facts), ""]), encoding="utf-8")
