"""A soak: random jobs of all verbs beside a checker, with kills, signals, failing calls, full disks and changed inputs.

``python tests/soak.py --minutes 60`` runs on Linux, in mounts of its own; it prints a line for each loss, and now and
then how many jobs and disturbances there were. A loss is an input that nobody changed and that differs, an output that
is neither the old one nor that of an undisturbed run, something hidden that is left after the next run, a traceback, an
exit code or a message that is not true, or an undisturbed run whose values are not those that NumPy finds in float64.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "support"), str(HERE.parent)]
from every_verb import OLD, Job  # noqa: E402
from failing_calls import REASONS, faults, is_new  # noqa: E402
from forks import Forks, Outcome, contents, preloaded, with_own_mounts  # noqa: E402
from kills import NUMBERS, SYSTEMS, Trial, again, filled, killed, stopped  # noqa: E402

WORLD = 120
"""Jobs after which there are new inputs."""
Values = dict[str, np.ndarray[Any, Any]]


def values(path: Path) -> Values:
    """Read a checkpoint by torch or the safetensors library; names without what stands before those of the tensors."""
    if path.is_dir() and (path / ".metadata").exists():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        with tempfile.NamedTemporaryFile() as file:
            dcp_to_torch_save(path, file.name)
            return _named(torch.load(file.name, weights_only=True))
    if path.is_dir():
        return _named({k: v for each in path.glob("*.safetensors") for k, v in load_file(each).items()})
    return _named(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True))


def _named(tree: Any, path: str = "") -> Values:
    if isinstance(tree, torch.Tensor):
        found = re.search(r"(\d\.\w+|\b[wb])$", path)
        return {found[1]: tree.numpy()} if found and "exp_avg" not in path else {}
    if isinstance(tree, Mapping):
        return {name: each for key, inner in tree.items() for name, each in _named(inner, f"{path}.{key}").items()}
    return {}


def mean(*inputs: Values) -> Values:
    """Return the mean of weights in float64, rounded once."""
    sums = {name: np.mean([each[name].astype(np.float64) for each in inputs], axis=0) for name in inputs[0]}
    return {name: each.astype(inputs[-1][name].dtype) for name, each in sums.items()}


def wrong(job: Job, inputs: Path, found: Values) -> Iterator[str]:
    """Yield what is wrong with the values that an undisturbed run has written; the reference is NumPy in float64."""
    known = {path.name for path in inputs.iterdir()} - {*OLD, "averaged.pth"}
    given = [values(inputs / name) for name in job.arguments if name in known]
    if job.verb == "avg" and "--replay" in job.arguments:
        given = [values(inputs / f"{each}.pth") for each in "ab"]
    if "--update" in job.arguments:
        given = [values(inputs / f"{each}.pth") for each in "abc"]
    if job.verb == "sweep":
        n = given[:3]
        candidates = [mean(*n[1:]), mean(*n), *n]
        score = [abs(sum(float(v.astype(np.float64).mean()) for v in each.values()) - 3.3) for each in candidates]
        close = [each for each, s in zip(candidates, score, strict=True) if s <= min(score) + 1e-6]
        if not any(_equal(each, found, each.keys() - {"1.num_batches_tracked"}) for each in close):
            yield "the best average is another one"
        return
    expected = mean(*given)
    measured = job.verb == "recal-bn" or "--recal-bn" in job.arguments
    trained = {name for name in expected if name.startswith("3.")} if job.verb == "tune" else set()
    statistics = {name for name in expected if name.startswith("1.") and not name.endswith(("weight", "bias"))}
    exact = expected.keys() - trained - (statistics if measured or trained or job.verb == "avg" else set())
    if found.keys() != expected.keys():
        yield f"the tensors are {sorted(found)}, not {sorted(expected)}"
    elif "--update" in job.arguments:  # from an average that was rounded
        if not all(np.allclose(found[name], expected[name], rtol=1e-6, atol=1e-7) for name in exact):
            yield "the values are others"
    elif not _equal(expected, found, exact):
        yield f"the values of {[n for n in exact if not np.array_equal(expected[n], found[n])]} are others"
    if measured:
        x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)).numpy().astype(np.float64)
        y = x @ expected["0.weight"].astype(np.float64).T + expected["0.bias"].astype(np.float64)
        for name, reference in (("1.running_mean", y.mean(0)), ("1.running_var", y.var(0, ddof=1))):
            if not np.allclose(found[name], reference, rtol=1e-4, atol=1e-5):
                yield f"{name} is another one"


def _equal(a: Values, b: Values, names: Any) -> bool:
    return all(name in b and a[name].tobytes() == b[name].tobytes() for name in names)


class World:
    """Inputs, and places on two file systems to disturb jobs in.

    Attributes:
        trials: on the disk, and on a small tmpfs.
        other: runs jobs in the place of the first of them at the same time.
    """

    def __init__(self, library: Path, folder: Path, seed: int) -> None:
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        made = f"import every_verb as e; e.make_inputs(e.Path({str(self.inputs)!r}), {NUMBERS // 10}, {seed})"
        subprocess.run([sys.executable, "-c", made], check=True)
        lacking = seed % len({lack for _, lack in SYSTEMS.values()})
        self.trials = []
        for name, lack in (("disk", lacking), ("tmpfs", 0)):
            (folder / name / "place").mkdir(parents=True)
            if name == "tmpfs":
                subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder / name / "place")], check=True)
            self.trials.append(Trial(library, self.inputs, folder / name, lack, ""))
        (folder / "other").mkdir()
        self.other = Forks(library, folder / "other", self.inputs, self.trials[0].forks.place, lacking)
        self.checked: set[Job] = set()

    def good(self, job: Job) -> Iterator[str]:
        """Compare what an undisturbed run writes with the reference, once for each job."""
        if job not in self.checked:
            self.checked.add(job)
            self.trials[0].good(job)
            trial = self.trials[0]
            trial.forks.renew(job)
            outcome = trial.forks.ended(trial.forks.start(job))
            if outcome.code or outcome.left[job.target or ""] != trial.good(job)[0].left[job.target or ""]:
                yield f"{job.name}: two undisturbed runs differ: {outcome.err[-300:]}"
                return
            for fault in wrong(job, self.inputs, values(trial.forks.place / (job.target or ""))):
                yield f"{job.name}: {fault}"


def failing(world: World, job: Job, choose: random.Random) -> Iterator[str]:
    """Let a call fail."""
    trial = world.trials[0]
    good, _ = trial.good(job)
    at = choose.randint(1, len(good.calls))
    bad = trial.forks.run(job, at, choose.choice([*REASONS.values()]))
    trial.counts["failing calls"] += 1
    for fault in faults(trial.forks, job, good, bad):
        yield f"{job.name}: {good.calls[at - 1]} fails: {fault}\n    {bad.err[-300:]}"


def changed(world: World, job: Job, choose: random.Random) -> Iterator[str]:
    """Change an input while a job runs: it is refused, or the output is that of the old inputs or of the new ones."""
    trial = world.trials[0]
    good, seconds = trial.good(job)
    names = [name for name in trial.forks.given(job) if name not in (*job.outputs, "averaged.pth")]
    if not names:
        return
    name = choose.choice(names)
    trial.forks.renew(job)
    process = trial.forks.start(job)
    time.sleep(choose.uniform(0, seconds))
    path = trial.forks.place / name
    file = path if path.is_file() else choose.choice([each for each in path.rglob("*") if each.is_file()])
    how = choose.choice(("touched", "rewritten", "replaced", "cut"))
    data = bytearray(file.read_bytes())
    if how in ("rewritten", "replaced"):
        data[-1] ^= 1  # of a value in safetensors; a zip or DCP file is damaged
    if how == "touched":
        os.utime(file)
    elif how == "cut":
        os.truncate(file, len(data) // 2)
    elif how == "rewritten":
        file.write_bytes(data)
    else:
        new = file.with_name("new-content")
        new.write_bytes(data)
        new.replace(file)
    now = contents(path)
    bad = trial.forks.ended(process)
    trial.counts[f"changed inputs, exit {bad.code}"] += 1
    if "Traceback" in bad.err or bad.code not in (0, 1):
        yield f"{job.name}: {file.name} was {how}: {bad.code} {bad.err[-600:]}"
    if bad.left.get(name) != now and not (name == job.target and bad.code == 0):
        yield f"{job.name}: {name} was {how}, and is not as it was left"
    if trial.hidden(job, bad.left):
        yield f"{job.name}: {trial.hidden(job, bad.left)} is left"
    possible = [good.left]
    if bad.code == 0 and not all(is_new(job, each, good, bad) for each in job.outputs) and job.target != name:
        if job.scratch is not None:
            shutil.rmtree(trial.forks.place / job.scratch)
        possible.append(trial.forks.ended(trial.forks.start(again(job))).left)
    wanted = [left.get(job.target or "") for left in (*possible, *([trial.forks.given(job)] if bad.code else []))]
    fewer = job.verb == "sweep" and "not scored" in bad.err  # the best of those that could be made
    if job.target != name and bad.left.get(job.target or "") not in wanted and not fewer:
        yield f"{job.name}: {file.name} was {how}: the target is a mixture (exit {bad.code})\n    {bad.err[-900:]}"


def pairs(world: World, job: Job, choose: random.Random) -> Iterator[str]:
    """Run two jobs for one target at the same time."""
    trial = world.trials[0]
    if "-o" not in job.arguments or job.scratch is not None:  # a sweep has its scratch folder alone
        return
    second = choose.choice([each for each in trial.jobs if each.target == job.target and each.scratch is None])
    goods = [trial.good(job)[0], trial.good(second)[0]]
    both = Job(arguments=(*job.arguments, *second.arguments), target=job.target, needs=(*job.needs, *second.needs))
    trial.forks.renew(both)
    processes = [trial.forks.start(job), world.other.start(second)]
    ends: list[Outcome] = [trial.forks.ended(processes[0]), world.other.ended(processes[1])]
    trial.counts[f"pairs, exits {sorted(each.code for each in ends)}"] += 1
    for each in ends:
        if "Traceback" in each.err or each.code not in (0, 1):
            yield f"{both.name}: {each.code} {each.err[-600:]}"
    left = {path.name: contents(path) for path in trial.forks.place.iterdir()}
    target = job.target or ""
    won = [good.left[target] for good, end in zip(goods, ends, strict=True) if end.code == 0]
    if left.get(target) not in (won or [trial.forks.given(both).get(target)]):
        yield f"{both.name}: the target is that of neither (exits {[each.code for each in ends]})"
    if not won and "--force" not in job.arguments:
        yield f"{both.name}: neither wins: {[each.err[-200:] for each in ends]}"
    hidden = sorted(left.keys() - trial.forks.given(both).keys() - {target})
    if hidden:
        yield f"{both.name}: {hidden} is left"


def undisturbed(world: World, job: Job, choose: random.Random) -> Iterator[str]:
    """Run a job over what is there, on the tmpfs."""
    trial = world.trials[1]
    trial.good(job)
    trial.forks.renew(job)
    trial.counts["undisturbed"] += 1
    for fault in trial.finished(job):
        yield f"{job.name}: {fault}"


WAYS: dict[Callable[[World, Job, random.Random], Iterator[str]], int] = {
    lambda world, job, choose: killed(choose.choice(world.trials), job, choose): 5,
    lambda world, job, choose: stopped(choose.choice(world.trials), job, choose): 4,
    lambda world, job, choose: filled(world.trials[1], job, choose): 3,
    failing: 4,
    changed: 4,
    pairs: 4,
    undisturbed: 1,
}
"""Ways to disturb a job, and how often each is taken."""


@contextmanager
def world(library: Path, seed: int) -> Iterator[World]:
    """Make inputs and places, and remove them at the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        try:
            yield World(library, folder, seed)
        finally:
            subprocess.run(["umount", "-l", str(folder / "tmpfs" / "place")], check=False)


def soak(library: Path, minutes: float, seed: int) -> int:
    """Disturb jobs for some minutes; print losses as they come, and what was done; return the number of losses."""
    choose, counts, losses = random.Random(seed), Counter[str](), 0
    began = time.monotonic()
    while time.monotonic() - began < 60 * minutes:
        seed += 1
        with world(library, seed) as here:
            for _ in range(WORLD):
                if time.monotonic() - began >= 60 * minutes:
                    break
                job = choose.choice(here.trials[0].jobs)
                way = choose.choices([*WAYS], [*WAYS.values()])[0]
                for fault in [*here.good(job), *way(here, job, choose)]:
                    losses += 1
                    say(f"LOSS, seed {seed}: {fault}")
            for trial in here.trials:
                counts += trial.counts
                counts["runs"] += trial.forks.runs
            counts["runs"] += here.other.runs
            counts["inputs made"] += 1
        say(f"{(time.monotonic() - began) / 60:.0f} min: {dict(sorted(counts.items()))}, losses: {losses}")
    return losses


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with_own_mounts()
    library, _ = preloaded()
    sys.exit(1 if soak(library, options.minutes, options.seed) else 0)


if __name__ == "__main__":
    main()
