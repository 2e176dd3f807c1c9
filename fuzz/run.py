"""Fuzz: run targets under atheris, make their kept inputs small, or replay all that is kept without atheris.

    python fuzz/run.py fuzz torch_zip pickle --seconds 60
    python fuzz/run.py merge torch_zip
    python fuzz/run.py replay

Inputs that a run finds are in ``build/fuzz/TARGET``, those at which a property did not hold in ``build/fuzz/faults``.
`merge` keeps the fewest that reach the same code, in ``fuzz/corpus/TARGET.zip``. An input of a fault that is mended
belongs in ``fuzz/regressions/TARGET``.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "tests" / "support")]
WORK = ROOT / "build" / "fuzz"
SECONDS = 5.0
"""Of CPU time that an input may take: it takes 0.02, and instrumented code several times as long."""
_MEMORY = 4096  # MB of the process
_LONGEST = 4096  # bytes of an input
_CORPUS = 8_000  # bytes of the kept inputs of a target: all of them are replayed by a test
# What Python keeps until its end is no leak.
_SANITIZED = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def kept(target: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each kept input of a target, and of its regressions."""
    archive = HERE / "corpus" / f"{target}.zip"
    if archive.exists():
        with zipfile.ZipFile(archive) as found:
            for name in found.namelist():
                yield name, found.read(name)
    for path in sorted((HERE / "regressions" / target).glob("*")):
        yield path.name, path.read_bytes()


def replay(names: list[str], seconds: float | None) -> int:
    """Run each kept input once, without atheris; return the number of faults."""
    from properties import Watch
    from targets import TARGETS

    watch, faults = Watch(seconds, patient=False), 0
    for name in names:
        started, count = time.process_time(), 0
        target = TARGETS[name]()
        with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
            fuzz = target.start(Path(folder), watch)
            for label, data in [*target.seeds.items(), *kept(name)]:
                count += 1
                try:
                    fuzz(data)
                except Exception as error:  # noqa: BLE001 - each input is to be tried
                    faults += 1
                    print(f"{name}/{label}: {type(error).__name__}: {error}")  # noqa: T201
        print(f"{name}: {count} inputs in {time.process_time() - started:.1f} s")  # noqa: T201
    return faults


def memory_folder() -> str | None:
    """Return a folder in memory for files, if there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def fuzz(name: str, folder: str, options: list[str]) -> None:
    """Run a target under atheris in this process, which ends with it; its files are in the folder."""
    import atheris

    with atheris.instrument_imports(include=["ckpt_tools"]):
        from properties import Watch
        from targets import TARGETS

        target = TARGETS[name]()
        run = target.start(Path(tempfile.mkdtemp(dir=folder)), Watch(SECONDS, patient=False))
    # To merge, libFuzzer starts itself again by this.
    atheris.Setup([shlex.join([sys.executable, __file__, "one", name, folder]), *options], run)
    atheris.Fuzz()


def start(name: str, *options: str) -> int:
    """Run a target in a process of its own."""
    corpus = WORK / name
    corpus.mkdir(parents=True, exist_ok=True)
    faults = WORK / "faults"
    faults.mkdir(exist_ok=True)
    from targets import TARGETS

    for label, data in [*TARGETS[name]().seeds.items(), *kept(name)]:
        (corpus / label.replace(" ", "-")).write_bytes(data)
    settings = [
        f"-artifact_prefix={faults}/{name}-", f"-dict={HERE / 'dictionary.txt'}",
        f"-rss_limit_mb={_MEMORY}", f"-max_len={_LONGEST}", "-timeout=60", "-print_final_stats=1", *options,
    ]  # fmt: skip
    environment = dict(os.environ)
    if name == "native":
        import atheris

        sanitizer = Path(atheris.path()) / "asan_with_fuzzer.so"
        environment |= {
            **_SANITIZED,
            "LD_PRELOAD": str(sanitizer),
            "CKPT_TOOLS_NATIVE": str(ROOT / "build" / "sanitized"),
        }
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        command = [sys.executable, __file__, "one", name, folder, *settings]
        before = _cpu_of_children()
        code = subprocess.run(command, env=environment, check=False).returncode
        print(f"{name}: {_cpu_of_children() - before:.0f} s of CPU time, exit code {code}", flush=True)  # noqa: T201
        return code


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def merge(name: str) -> None:
    """Keep the fewest inputs of a target that reach the same code."""
    with tempfile.TemporaryDirectory(dir=memory_folder()) as found:
        start(name, "-merge=1", found, str(WORK / name))
        inputs = sorted(Path(found).iterdir(), key=lambda path: (path.stat().st_size, path.name))
        (HERE / "corpus").mkdir(exist_ok=True)
        total = 0
        with zipfile.ZipFile(HERE / "corpus" / f"{name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in inputs:
                total += path.stat().st_size
                if total <= _CORPUS:
                    archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)


def main() -> int:
    from targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["fuzz", "merge", "replay"])
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=float, help="of all targets together")
    given = parser.parse_args()
    names = given.targets or [*TARGETS]
    if given.what == "replay":
        return 1 if replay(names, given.seconds) else 0
    if given.what == "merge":
        for name in names:
            merge(name)
        return 0
    each = max(1, int((given.seconds or 300) / len(names)))
    return max(start(name, f"-max_total_time={each}", str(WORK / name)) for name in names)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        fuzz(*sys.argv[2:4], sys.argv[4:])
    sys.exit(main())
