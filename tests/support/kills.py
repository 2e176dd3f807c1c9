"""End runs at random moments, or let the disk be full, and look at what is left; Linux only.

``python tests/support/kills.py`` ends 500 runs of all verbs by SIGKILL on each of four file systems, a few in a row,
and lets the next one finish. ``--signals`` sends SIGINT, SIGTERM or SIGHUP instead, one to three of them, to running or
halted processes; ``--start-up`` sends them while modules are imported; ``--each-call`` ends a run of each job before
each of its system calls; ``--full-disk`` fills a small tmpfs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from every_verb import Job, jobs
from failing_calls import faults, is_new
from forks import STOPPING, Content, Forks, Outcome, preloaded, with_own_mounts

NUMBERS = 100_000
"""Columns of the matrices: a file has 1.2 MB, so that many moments are in its writing."""
IN_A_ROW = 5
SYSTEMS = {
    "with files without a name": ("", 0),
    "tmpfs": ("/dev/shm", 0),
    "without such files": ("", 1),
    "without them, links and exchange": ("", 2),
}
"""Name to (folder, what it lacks; see failing_calls.c)."""


class Trial:
    """Jobs in a place on a file system, with what an undisturbed run of each leaves."""

    def __init__(self, library: Path, inputs: Path, folder: Path, lacking: int, only: str) -> None:
        self.forks = Forks(library, folder, inputs, folder / "place", lacking)
        self.counts: Counter[str] = Counter()
        # Torch first: all forks then have it, and a run is chosen at random.
        self.jobs = [job for job in jobs() if job.target is not None and only in job.name]
        self.forks.import_for(self.jobs)
        self._good: dict[Job, tuple[Outcome, float]] = {}

    def good(self, job: Job) -> tuple[Outcome, float]:
        """Return what an undisturbed run of a job leaves, and the seconds that it takes."""
        if job not in self._good:
            self.forks.run(job)  # the first one takes longer
            self.forks.renew(job)
            began = time.monotonic()
            outcome = self.forks.ended(self.forks.start(job))
            if outcome.code:
                raise SystemExit(f"{job.name}: {outcome.err}")
            self._good[job] = outcome, time.monotonic() - began
        return self._good[job]

    def after(self, job: Job, seconds: float, *numbers: int, gap: float = 0.0) -> Outcome:
        """Start a job in the folder as it is, and send it signals after so many seconds, with a gap between them."""
        process = self.forks.start(job)
        time.sleep(seconds)
        for number in numbers:
            with suppress(ProcessLookupError):
                os.kill(process, number)
            time.sleep(gap)
        return self.forks.ended(process)

    def hidden(self, job: Job, found: dict[str, Content]) -> list[str]:
        """Return what is in the folder beside what was given, outputs and scratch."""
        return sorted(found.keys() - self.forks.given(job).keys() - {*job.outputs, job.scratch})

    def targets(self, job: Job, found: Outcome, *others: Outcome) -> Iterator[str]:
        """Yield what is wrong with the outputs and the inputs: each is as before, or that of another run."""
        good, before = self.good(job)[0], self.forks.given(job)
        for name in job.outputs:
            now = found.left.get(name)
            if now != before.get(name) and not is_new(job, name, good, found):
                yield f"{name} is half"
        for name in before.keys() - {*job.outputs}:
            if found.left.get(name) != before[name]:
                yield f"{name} has changed"

    def finished(self, job: Job) -> Iterator[str]:
        """Run a job after others were ended; yield what is wrong with what it leaves."""
        last, good = self.forks.ended(self.forks.start(again(job))), self.good(job)[0]
        if last.code or "Traceback" in last.err or not all(is_new(job, name, good, last) for name in job.outputs):
            yield f"the next run ends otherwise: {last.code} {last.err.splitlines()[-1:]}"
        if self.hidden(job, last.left):
            yield f"the next run leaves {self.hidden(job, last.left)}"


def killed(trial: Trial, job: Job, choose: random.Random) -> Iterator[str]:
    """End runs by SIGKILL, a few in a row, and let the next one finish."""
    _, seconds = trial.good(job)
    trial.forks.renew(job)
    before: set[str] = set()
    for _ in range(IN_A_ROW):
        outcome = trial.after(again(job), choose.uniform(0, seconds), signal.SIGKILL)
        trial.counts["kills" if outcome.code == -signal.SIGKILL else "ended before"] += 1
        hidden = {*trial.hidden(job, outcome.left)}
        trial.counts["left for the next run"] += len(hidden - before)
        before = hidden
        for fault in trial.targets(job, outcome):
            yield f"{job.name}: {fault}"
    for fault in trial.finished(job):
        yield f"{job.name}: {fault}"


def kills(trial: Trial, count: int, seed: int) -> Iterator[str]:
    """End runs of random jobs; see `killed`."""
    choose = random.Random(seed)
    while trial.counts["kills"] < count:
        yield from killed(trial, choose.choice(trial.jobs), choose)


def again(job: Job) -> Job:
    """Return the job over what is there."""
    in_place = "-o" not in job.arguments
    return replace(job, arguments=(*job.arguments, *(() if in_place or "--force" in job.arguments else ("--force",))))


def each_call(trial: Trial, _count: int, _seed: int) -> Iterator[str]:
    """End a run of each job before each of its calls."""
    for job in trial.jobs:
        good, _ = trial.good(job)
        for at, call in enumerate(good.calls, 1):
            outcome = trial.forks.run(job, at, -signal.SIGKILL)
            trial.counts["kills"] += 1
            left = trial.hidden(job, outcome.left)
            trial.counts["left by the killed"] += bool(left)
            wrong = [*trial.targets(job, outcome)]
            if left or wrong or job.scratch is not None and at % 20 == 0:
                wrong += trial.finished(job)
            for fault in wrong:
                yield f"{job.name}: before call {at}, {call}: {fault}"


def signals(trial: Trial, count: int, seed: int) -> Iterator[str]:
    """Send signals to runs of random jobs; see `stopped`."""
    choose = random.Random(seed)
    for _ in range(count):
        yield from stopped(trial, choose.choice(trial.jobs), choose)


def stopped(trial: Trial, job: Job, choose: random.Random) -> Iterator[str]:
    """Send a run a signal to stop, or several, or halt it first."""
    good, seconds = trial.good(job)
    trial.forks.renew(job)
    numbers = [choose.choice(STOPPING) for _ in range(choose.choice((1, 2, 3)))]
    sent = [signal.SIGTSTP, *numbers, signal.SIGCONT] if choose.random() < 0.3 else numbers
    outcome = trial.after(job, choose.uniform(0, seconds), *sent, gap=choose.choice((0, 0, 0.001, 0.02)))
    trial.counts[f"signals, exit {outcome.code}"] += 1
    for fault in [*_told(job, outcome, numbers, good), *trial.targets(job, outcome)]:
        yield f"{job.name}: {[each.name for each in sent]}: {fault}\n    {outcome.err[-300:]}"
    # A run that is ended by the default action of a signal may have just begun to write.
    if outcome.code >= 0 and trial.hidden(job, outcome.left):
        yield f"{job.name}: {sent}: {trial.hidden(job, outcome.left)} is left"
    for fault in trial.finished(job):
        yield f"{job.name}: {fault}"


def _told(job: Job, outcome: Outcome, numbers: list[signal.Signals], good: Outcome) -> Iterator[str]:
    """Yield what is wrong with the exit code and the message of a run that was sent signals."""
    if "Traceback" in outcome.err or "Exception ignored" in outcome.err:
        yield "a traceback"
    last = (outcome.err.splitlines() or [""])[-1]
    new = [is_new(job, name, good, outcome) for name in job.outputs]
    if outcome.code == 0:
        if not all(new):
            yield "success is reported, and the target is not the new one"
    elif outcome.code < 0:  # nothing had been begun: the default action
        if -outcome.code not in numbers:
            yield f"exit code {outcome.code}"
    elif outcome.code - 128 not in numbers:
        yield f"exit code {outcome.code}"
    elif not last.startswith(("Interrupted; ", "Terminated; ")):
        yield "the message is another one"
    elif "nothing was written" in last and any(new):
        yield "the message says that nothing was written"


def start_up(count: int, seed: int, inputs: Path) -> Iterator[str]:
    """Send signals to processes that have just been started."""
    choose, codes = random.Random(seed), Counter[int]()
    with tempfile.TemporaryDirectory() as name:
        for _ in range(count):
            command = [sys.executable, "-m", "ckpt_tools", "avg", *(str(inputs / f"{each}.pth") for each in "ab")]
            process = subprocess.Popen(
                [*command, "-o", "new.pth", "--force"], cwd=name, stderr=subprocess.PIPE, text=True
            )
            time.sleep(choose.uniform(0.01, 0.5))
            number = choose.choice(STOPPING)
            for each in [number] * choose.choice((1, 2)):
                process.send_signal(each)
            _, err = process.communicate()
            codes[process.returncode] += 1
            left = [path.name for path in Path(name).iterdir() if path.name != "new.pth"]
            ours = "Traceback" in err and "ckpt_tools/" in err
            if left or ours or ("Traceback" not in err and process.returncode not in (0, -number, 128 + number)):
                yield f"{number.name}: {process.returncode}, {left}: {err[-1000:]}"
    yield f"start-up: {dict(sorted(codes.items()))}"


def full_disk(trial: Trial, count: int, seed: int) -> Iterator[str]:
    """Run each job on a tmpfs with room for a part of what it writes; see `filled`."""
    choose = random.Random(seed)
    for at in range(count):
        yield from filled(trial, trial.jobs[at % len(trial.jobs)], choose)


def filled(trial: Trial, job: Job, choose: random.Random) -> Iterator[str]:
    """Run a job on a tmpfs with room for a part of what it writes."""
    place = trial.forks.place
    _resize(place, 1 << 30)
    good, _ = trial.good(job)
    trial.forks.renew(job)
    grown = 1.2 * sum(_size(good.left[name]) for name in job.outputs)
    free = os.statvfs(place)
    _resize(place, (free.f_blocks - free.f_bfree) * free.f_bsize + int(choose.uniform(0, grown)))
    bad = trial.forks.ended(trial.forks.start(job))
    trial.counts[f"full disks, exit {bad.code}"] += 1
    left = {name: content for name, content in bad.left.items() if name != job.scratch}
    for fault in faults(trial.forks, replace(job, scratch=None), good, replace(bad, left=left)):
        yield f"{job.name}: {fault}\n    {bad.err[-400:]}"
    _resize(place, 1 << 30)
    for fault in trial.finished(job):
        yield f"{job.name}: {fault}"


def _size(content: Content) -> int:
    if isinstance(content, dict):
        return sum(_size(each) + 4096 for each in content.values())
    return len(content or b"")


def _resize(place: Path, nbytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={max(nbytes // 4096, 1) * 4096}", str(place)], check=True)


@contextmanager
def small(place: Path) -> Iterator[None]:
    """Mount a tmpfs at a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="jobs with this in their command line")
    parser.add_argument("--on", choices=[*SYSTEMS], help="one of the file systems; all if it is not given")
    for name in ("signals", "start-up", "each-call", "full-disk"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    if options.full_disk:
        with_own_mounts()
    library, inputs = preloaded(numbers=NUMBERS)
    if options.start_up:
        for line in start_up(options.count, options.seed, inputs):
            print(line, flush=True)  # noqa: T201 - a script
        return
    way = signals if options.signals else each_call if options.each_call else full_disk if options.full_disk else kills
    first, *others = SYSTEMS
    for system in [options.on] if options.on else [first] if way in (signals, full_disk) else [first, *others]:
        where, lacking = SYSTEMS[system]
        with tempfile.TemporaryDirectory(dir=where or None) as name:
            folder, bad = Path(name).resolve(), 0
            (folder / "place").mkdir()
            with small(folder / "place") if options.full_disk else nullcontext():
                trial = Trial(library, inputs, folder, lacking, options.only)
                for fault in way(trial, options.count, options.seed):
                    bad += 1
                    print(fault, flush=True)  # noqa: T201 - a script
            print(f"{way.__name__}, {system}: {dict(sorted(trial.counts.items()))}, {bad} faults", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
