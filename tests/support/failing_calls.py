"""Let the k-th system call of a run fail, for every k, and look at what is left and what is said; Linux only.

As a script it tries every call of every verb: ``python tests/support/failing_calls.py``, with ``--each-kind`` only one
of each function and kind of path.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from every_verb import OLD, Job, jobs
from forks import Content, Forks, Outcome, kind_of, preloaded

REASONS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}


def faults(forks: Forks, job: Job, good: Outcome, bad: Outcome) -> Iterator[str]:
    """Yield what is wrong with a run in which a call has failed."""
    if "Traceback" in bad.err or bad.code not in (0, 1):
        yield "a traceback, or another exit code"
    before = forks.given(job)
    found: dict[str, Content] = {name: bad.left.get(name) for name in job.outputs}
    for name in job.outputs:
        if not (found[name] == before.get(name) or is_new(job, name, good, bad)):
            yield f"{name} is neither the old nor the new one"
    warned = [line for line in bad.err.splitlines() if line.startswith("Warning: ")]
    for name in {*before, *bad.left} - {*job.outputs, job.scratch}:
        if before.get(name) != bad.left.get(name) and not any(name in line for line in warned):
            yield f"{name} is left, or has changed"
    message = bad.err.splitlines()[-1:]
    refused = bool(message) and message[0].startswith(("Error: ", "FAILED: ")[: 1 + (job.verb == "verify")])
    if bad.code == good.code and not refused:
        if job.target is None and bad.out != good.out and job.verb != "look":
            yield "success is reported, and the result is another one"
        if not all(is_new(job, name, good, bad) for name in job.outputs):
            yield "success is reported, and the target is not the new one"
    elif not refused:
        yield "there is no message at the end"
    elif any(found[name] != before.get(name) and f"{name} " not in _complete(message[0]) for name in job.outputs):
        yield "an error is reported, and the target is the new one"
    if os.strerror(errno.EIO) in bad.err and "Errno" in bad.err:
        yield "the message shows the exception"
    if job.scratch is not None:
        yield from _goes_on(forks, job, good, bad)


def _complete(message: str) -> str:
    """Return the part of a message that says which outputs are in their places."""
    return (re.search(r"[^;.][^;]* (is|are) complete\.$", message) or [""])[0].replace(",", " ")


def is_new(job: Job, name: str, good: Outcome, bad: Outcome) -> bool:
    """Return True if an output is that of the undisturbed run."""
    new, found = good.left[name], bad.left.get(name)
    if name in job.beside and isinstance(new, bytes) and isinstance(found, bytes):  # a table with seconds
        return new.splitlines()[0] == found.splitlines()[0] and len(new.splitlines()) == len(found.splitlines())
    # A sweep that could not score all candidates may choose another one, and says so.
    return new == found or (job.verb == "sweep" and found is not None and "not scored" in bad.err)


def _goes_on(forks: Forks, job: Job, good: Outcome, bad: Outcome) -> Iterator[str]:
    """Run a sweep again, as after a failure, and look at what it leaves."""
    again = replace(job, arguments=(*job.arguments, *(() if "--force" in job.arguments else ("--force",))))
    after = forks.ended(forks.start(again))
    if after.code or not all(is_new(job, name, good, after) for name in job.outputs):
        yield f"the next run ends otherwise: {after.err.splitlines()[-1:]}"
    left = _files(after.left[job.scratch or ""]) - _files(good.left[job.scratch or ""])
    if left:
        yield f"the next run leaves {left}"


def _files(folder: Content) -> set[str]:
    """Return the names in a scratch folder; those of candidates depend on the time of change of the inputs."""
    return {re.sub("[0-9a-f]{8}", "", name) for name in folder} if isinstance(folder, dict) else set()


def _kind_of_target(job: Job) -> tuple[bool, bool]:
    return "." in (job.target or "."), job.target in OLD


def try_all(library: Path, inputs: Path, options: argparse.Namespace) -> Iterator[str]:
    """Yield the faults of all jobs, and then how many runs there were."""
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        folder = Path(name)
        (folder / "place").mkdir()
        forks, runs, known = Forks(library, folder, inputs, folder / "place"), 0, set[str]()
        for torch in (False, *([] if options.without_torch else [True])):
            chosen = [job for job in jobs() if job.torch == torch and options.only in job.name]
            if options.each_kind:  # one job for each verb that writes a file, a folder, or over what is there
                chosen = [*{(job.verb, *_kind_of_target(job)): job for job in chosen}.values()]
            forks.import_for(chosen)
            for job in chosen:
                good = forks.run(job)
                if good.code != (job.verb == "diff") or not {*job.outputs} <= good.left.keys():
                    yield f"{job.name}: {good.err}"
                    continue
                print(f"{runs:,} runs; {job.name}: {len(good.calls):,} calls", file=sys.stderr, flush=True)  # noqa: T201
                for at, call in enumerate(good.calls, 1):
                    reasons = [*REASONS]
                    if options.each_kind:
                        kind = kind_of(call, job)
                        reasons = [] if kind in known else [reasons[len(known) % 2]]
                        known.add(kind)
                    for reason in reasons:
                        bad = forks.run(job, at, REASONS[reason])
                        runs += 1
                        for fault in faults(forks, job, good, bad):
                            said = "\n    ".join(bad.err.splitlines()[-4:])
                            where = f"call {at} of {len(good.calls)}, {call}, {reason}"
                            yield f"ckpt {job.name}: {where}: {fault}\n    {said}"
        yield f"{runs} runs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="jobs with this in their command line")
    parser.add_argument("--without-torch", action="store_true", help="only jobs that do not need it, which are quicker")
    parser.add_argument("--each-kind", action="store_true", help="one call of each function and kind of path")
    parser.add_argument("--inputs", type=Path, help="a folder in which every_verb.make_inputs has been")
    options = parser.parse_args()
    for line in try_all(*preloaded(options.inputs), options):
        print(line, flush=True)  # noqa: T201 - a script


if __name__ == "__main__":
    main()
