"""Sharing: one job done by several processes in parts, or by one that may be killed and goes on.

The plan of a job is a function of headers and arguments, so that every process makes the same one. Its digest names the
stage (`storage/kept_stage.py`) in which all of them fill the same output files. A journal tells which work units are
done, with the checksums that the ends of the files need. The process that finds all of them done publishes.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import __version__
from ..compute.shares import SliceSum, shares
from ..errors import WriteError
from ..formats.file_plan import FilePlan, OutTensor
from ..series.paths import shown
from ..storage.kept_stage import KEPT, Journal, Open, Stage, clear, stages
from ..storage.source import Stamp
from ..storage.staged import flush
from ..tensors import TensorSpec
from .asked import COMMAND, Asked
from .assembly import Assembly

NBYTES, SECONDS = 64 << 20, 2.0
"""After so many bytes, or so long, what is done goes to the journal."""
_LAST = " When all parts are, run the same command with `finish` in place of `part`."
_LAST_OF_STEP = " The process that ends last publishes the output."


def until_last(asked: Asked, stage: Stage, work: Callable[[Asked], str]) -> tuple[str, bool]:
    """Do the part of a process that was started with others, and publish if it ends last; nothing waits for others.

    Args:
        work: does what is asked; returns what became of it, in words.

    Returns:
        (what became of this part, in words; True if this process has published).

    Raises:
        CkptError: this process has failed.
    """
    words = work(asked)
    last, missing = stage.ended(asked.step, asked.index, asked.count)
    return (work(replace(asked, finish=True)), True) if last else (words + not_begun(missing), False)


@contextmanager
def opened(
    assembly: Assembly, plans: Sequence[FilePlan], job: Mapping[str, Any], stage: Stage, asked: Asked
) -> Iterator[Work]:
    """Open the stage of a job.

    Args:
        plans: of all files, companions too.
        job: see `job_of`.

    Raises:
        WriteError: the stage is in use, is that of another job, or lacks parts.
    """
    notes = _others(stage, job, asked)
    if asked.finish and stage.job() is None:
        raise WriteError(
            f"{assembly.target}: nothing of it is there yet. First run all parts, such as `part='1/2'` and "
            "`part='2/2'`."
        )
    with ExitStack() as stack:
        names = [plan.name if assembly.folder else assembly.target.name for plan in plans]
        fds = stack.enter_context(stage.opened(names, [plan.size for plan in plans], told(job)))
        KEPT.append(stage.target)
        if asked.finish:
            own = None
            stack.enter_context(stage.alone())
        else:
            own = stack.enter_context(stage.journal(asked.index, asked.count).opened())
            for other in stage.journals():  # parts of another division would fill the same ranges at once
                if other != own.journal and (asked.resume or other.count != asked.count):
                    stack.enter_context(other.opened())
        if asked.step and not asked.finish:
            stage.began(asked.step, asked.index, asked.count)
            _others(stage, job, asked)  # one that began at the same time
        journals = stage.journals()
        if (
            asked.step and asked.finish
        ):  # a listing of the folder may lag behind other machines; that of a name does not
            journals = [stage.journal(index, asked.count) for index in range(1, asked.count + 1)] + [
                each for each in journals if each.count != asked.count
            ]
        yield Work(stage, fds, asked, own, journals, names if assembly.folder else None, notes)


def allocated(target: Path) -> int:
    """Return the bytes that stages of a target take on the disk."""
    return sum(stage.allocated for stage in stages(target))


@dataclass(slots=True)
class Work:
    """The part of a job that this process does; a `compute.shares.Share`.

    Attributes:
        stage: where the files are.
        fds: descriptors of them.
        asked: what to do.
        own: the journal of this process; None if it does no units.
        journals: all that are there.
        names: of the files in the folder; None if the target is one file.
        notes: what was found, in words.
        nbytes: to read and to write here.
        found: bytes of this part that were done before.
    """

    stage: Stage
    fds: Sequence[int]
    asked: Asked
    own: Open | None
    journals: Sequence[Journal]
    names: Sequence[str] | None
    notes: tuple[str, ...]
    nbytes: int = 0
    found: int = 0
    _sizes: Sequence[int] = ()
    _known: list[SliceSum] = field(default_factory=list)
    _units: list[int] = field(default_factory=list)
    _sums: list[SliceSum] = field(default_factory=list)
    _waiting: int = 0  # bytes in `_units`
    _speeds: str = ""
    _began: float = field(default_factory=time.monotonic)
    _flushed: float = field(default_factory=time.monotonic)

    @property
    def completes(self) -> bool:
        """True if the target can be published after the run."""
        return self.asked.finish or self.asked.resume

    def todo(self, sizes: Sequence[int]) -> Collection[int]:
        """Return the units of this part that no journal has; see `Share`.

        Raises:
            WriteError: parts are missing; or the units of another process are not the same.
        """
        self._sizes = array("Q", sizes)
        cut = f"{len(sizes)} units, {hashlib.sha256(self._sizes).hexdigest()[:32]}"
        done = self._read(cut)
        if self.asked.finish:
            self._check_all(done)
            return ()
        share = range(len(sizes)) if self.asked.resume else shares(sizes, self.asked.count)[self.asked.index - 1]
        own = [unit for unit in share if unit not in done]
        self.nbytes = sum([sizes[unit] for unit in own])
        self.found = sum([sizes[unit] for unit in share]) - self.nbytes
        if self.own is not None:
            self.own.append({"cut": cut, "total": sum(sizes)})
        return own

    def _read(self, cut: str) -> set[int]:
        done: set[int] = set()
        for journal in self.journals:
            for line in journal.lines():
                if line.get("cut", cut) != cut:
                    raise WriteError(
                        f"{self.stage.target}: part {journal.index} of {journal.count} was cut into other work units, "
                        "as by a ckpt without its C extension. Run all parts with the same installation; to begin "
                        f"anew, remove the folder {self.stage.path}."
                    )
                for begin, end in line.get("units", ()):
                    done.update(range(begin, end))
                if self.completes:
                    self._known += [SliceSum(*each) for each in line.get("sums", ())]
        return done

    def _check_all(self, done: Collection[int]) -> None:
        """Refuse to publish before all units are done.

        Raises:
            WriteError: some are not; names their parts.
        """
        if len(done) == len(self._sizes):
            return
        count = max((journal.count for journal in self.journals), default=1)
        missing = [
            index
            for index, share in enumerate(shares(self._sizes, count), 1)
            if not all(unit in done for unit in share)
        ]
        raise incomplete(self.stage.target, missing, count)

    def done(self, units: Sequence[int], sums: Sequence[SliceSum]) -> None:
        """Note units, and bring them to the journal from time to time; see `Share`."""
        self._units += units
        self._sums += sums
        self._waiting += sum([self._sizes[unit] for unit in units])
        if self._waiting >= NBYTES or time.monotonic() - self._flushed >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring all that was noted to the journal, after the files themselves; see `Share`."""
        self._flushed = time.monotonic()
        if self.own is None or not (self._units or self._sums):
            return
        for fd in self.fds:
            flush(fd, self.stage.target)
        self.own.append({"units": _ranges(sorted(self._units)), "nbytes": self._waiting, "sums": self._sums})
        if self.completes:
            self._known += self._sums
        self._units, self._sums, self._waiting = [], [], 0

    def timed(self) -> None:
        """Note how long this part took; if it publishes, find out how long each part took."""
        if self.own is not None and self.nbytes:
            self.own.append({"took": round(time.monotonic() - self._began, 3), "moved": self.nbytes})
        if self.asked.finish:
            self._speeds = _speeds(self.journals)
        elif self.nbytes and not self.completes:
            self._speeds = f" It moved {_moved(self.nbytes, time.monotonic() - self._began)}."

    def sums(self) -> Iterable[SliceSum]:
        """Return the checksums that all journals have; see `Share`."""
        return self._known

    def forget(self) -> None:
        """Let nothing count that this process has done: an input changed meanwhile."""
        if self.own is not None:
            self.own.forget()

    def place(self, *, force: bool, on_sync: Callable[[int], None]) -> None:
        """Publish the output; see `staged_files`.

        Raises:
            WriteError: the system refuses.
        """
        self.stage.place(self.names, force=force, on_sync=on_sync)

    @property
    def words(self) -> str:
        """What became of this part."""
        found = f"{self.found:,} bytes were read and written before."
        if self.completes:
            return " ".join((*self.notes, *([found] if self.found else ()), *filter(None, [self._speeds])))
        return (
            f"Part {self.asked.index} of {self.asked.count} of {self.stage.target} is done"
            + (f"; {found}" if self.found else ".")
            + self._speeds
            + (_LAST_OF_STEP if self.asked.step else _LAST)
        )


def not_begun(missing: Sequence[int]) -> str:
    """Name the parts that nobody has begun when another one ends: their processes may have another target."""
    return f" Not begun yet: part{'s' * (len(missing) > 1)} {_some(missing)}." if missing else ""


def _some(parts: Sequence[int]) -> str:
    return ", ".join(map(str, parts[:8])) + (", ..." if len(parts) > 8 else "")


def incomplete(target: Path, missing: Sequence[int], count: int) -> WriteError:
    """Return the error of a job of which parts are missing."""
    some = _some(missing)
    what = f"part {some} of {count} is" if len(missing) == 1 else f"parts {some} of {count} are"
    run = f"`part='{missing[0]}/{count}'`" if len(missing) == 1 else f"each, such as `part='{missing[0]}/{count}'`"
    return WriteError(f"{target}: {what} missing or not complete. Run {run}, then `finish` again.")


def _speeds(journals: Iterable[Journal]) -> str:
    """Say how fast the parts were, and which one was the slowest; nothing of fewer than two."""
    parts = []
    for journal in journals:
        times = [line for line in journal.lines() if "took" in line]
        if times:
            seconds, nbytes = (sum(line[key] for line in times) for key in ("took", "moved"))
            parts.append((seconds, nbytes, journal.index))
    if len(parts) < 2:
        return ""
    seconds, nbytes, index = max(parts)
    mean = sum(each for each, _, _ in parts) / len(parts)
    return (
        f"{len(parts)} parts took {mean:.1f} s on average, and the slowest, part {index}, "
        f"moved {_moved(nbytes, seconds)}."
    )


def _moved(nbytes: int, seconds: float) -> str:
    return f"{nbytes / 1e9:.3g} GB in {seconds:.1f} s, {nbytes / 1e9 / max(seconds, 1e-3):.3g} GB/s read and written"


def _ranges(units: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as ranges."""
    breaks = [i for i, (a, b) in enumerate(pairwise(units), 1) if b != a + 1]
    return [(units[a], units[b - 1] + 1) for a, b in pairwise([0, *breaks, len(units)]) if b > a]


def _others(stage: Stage, job: Mapping[str, Any], asked: Asked) -> tuple[str, ...]:
    """Deal with the stages of other jobs with the same target: `resume` begins anew, and parts are not mixed.

    Raises:
        WriteError: there is one.
    """
    if asked.finish and stage.job() is not None:
        return ()
    if not asked.resume:
        clear(stage.target, but=stage, void=True)
    others = [each for each in stages(stage.target) if each.path != stage.path and each.job() is not None]
    differing = {each.path: _difference(each.job() or {}, job) for each in others}
    gone = {each.path for each in clear(stage.target, but=stage)} if asked.resume else set()
    for path, difference in differing.items():
        if path not in gone:
            raise _another(stage, path, difference)
    return tuple(f"Began anew: {difference}." for difference in differing.values())


def refuse_step(stage: Stage, job: Mapping[str, Any], step: str) -> None:
    """Refuse to go on if processes that were started together with this one do another job.

    Raises:
        WriteError: they do.
    """
    for other in stages(stage.target):
        if other.path != stage.path and other.has(step):
            raise _another(stage, other.path, _difference(other.job() or {}, job))


def _another(stage: Stage, path: Path, difference: str) -> WriteError:
    return WriteError(
        f"{stage.target}: parts of another job are there: {difference}. Run all parts with the same command "
        f"and the same files; to begin anew, remove the folder {path}."
    )


def _difference(said: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """Say in what a job differs from this one."""
    then, now = ({each[0]: each[1:] for each in one.get("inputs", ())} for one in (said, job))
    changed = [path for path, stamp in now.items() if path in then and then[path] != stamp]
    if changed:
        return f"{changed[0]} has changed since" + (f", and {len(changed) - 1} more" if len(changed) > 1 else "")
    if then.keys() != now.keys():
        return f"its inputs are others ({', '.join(sorted({*then} ^ {*now})[:2])})"
    if said.get("version") != job["version"]:
        return f"it was begun by ckpt {said.get('version')}, and this is {job['version']}"
    return "its arguments are others"


def job_of(what: object, texts: Iterable[str], stamps: Iterable[Stamp]) -> dict[str, Any]:
    """Describe a job: the same in every process that does it, on any machine.

    Args:
        what: it is, in short.
        texts: everything that the result depends on, apart from the payload of the inputs.
        stamps: of the inputs, taken when their headers were read.
    """
    inputs = sorted({(str(each.path), each.nbytes, str(_changing(each))) for each in stamps})
    hasher = hashlib.sha256(repr((__version__, what, inputs)).encode())
    for text in texts:
        hasher.update(text.encode())
    return {"digest": hasher.hexdigest(), "version": __version__, "inputs": [list(each) for each in inputs]}


def _changing(stamp: Stamp) -> object:
    """Return what changes with the content of a file, without device and inode: these differ between machines."""
    return stamp.identity[-1]


def told(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job as its stage keeps it: with the command that goes on with it."""
    return {**job, "command": [shown(word) for word in COMMAND], "folder": str(Path.cwd())}


def described(plans: Iterable[FilePlan]) -> Iterator[str]:
    """Write everything that the bytes of files depend on, apart from the payload of the inputs."""
    numbers: dict[OutTensor, int] = {}
    written: dict[int, str] = {}  # of tuples that tensors share, by id; the plans keep them alive
    for plan in plans:
        yield f"\nfile {plan.name!r} {plan.size}"
        for tensor, offset in plan.payloads:
            number = numbers.get(tensor)
            yield f"\n{offset} "
            if number is not None:
                yield f"= {number}"
                continue
            numbers[tensor] = len(numbers)
            yield f"{tensor.name!r} {tensor.dtype.name} {tensor.shape} {tensor.finite}"
            if tensor.data is not None:
                yield hashlib.sha256(tensor.data).hexdigest()
            terms = tensor.terms
            if terms:
                for shared in (terms.rows, terms.files):
                    if id(shared) not in written:
                        written[id(shared)] = hashlib.sha256(repr(shared).encode()).hexdigest()
                    yield f" {written[id(shared)]}"
                for spec in terms.specs:
                    yield described_spec(spec)
        for segment in plan.computed:
            data = segment.make([0] * len(segment.needs))
            needs = [numbers.get(each) for each in segment.needs]
            yield f"\n{segment.offset} {needs} {hashlib.sha256(data).hexdigest()}"


def described_spec(spec: TensorSpec) -> str:
    """Write where the bytes of a tensor are."""
    if type(spec) is not TensorSpec:
        return f" {spec!r}"
    where = spec.storage
    begin, big = where.offset + spec.start * spec.dtype.itemsize, where.big_endian
    return f" {spec.dtype.name} {spec.stride} {where.path} {begin} {big}"
