"""Running: a planned job is checked, shown and carried out; its output is whole or not there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..compute import engine
from ..compute.fetching import any_remote
from ..compute.progress import SYNCING, WRITING, Activity, Progress, counted
from ..compute.work_units import OutFile
from ..errors import CorruptError, UsageError, WriteError
from ..formats.file_plan import FilePlan, whole_file
from ..formats.sharded import parse_size
from ..storage import ahead, page_cache, splice
from ..storage.hidden import kept_stages
from ..storage.pace import Pace
from ..storage.source import LOCAL, OpenFiles, Stamp, read_file, store_of
from ..storage.splice import Span, Splice
from ..storage.staged import flush, keep_attributes, staged_files, write_at
from .assembly import Assembly
from .options import Moving, Recorded, Running
from .outputs import check_target, on_this_machine

if TYPE_CHECKING:
    from ..compute.follower import Follower
    from .asked import Asked
    from .share import Work
    from .sign_off import SignOff

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Hashed:
    """Files of which the record has the SHA-256, which is computed while they are read.

    Attributes:
        paths: the files, all of them inputs.
        recorded: from their hashes to the output with them in its record, which has its size without them.
    """

    paths: Sequence[Path]
    recorded: Callable[[Mapping[Path, str]], Assembly]


def manners(running: Moving) -> dict[str, Any]:
    """Return the options of `write` by which a job leaves others their share of disk and memory.

    Raises:
        UsageError: `max_read_rate` is not a size.
    """
    rate = running.max_read_rate
    pace = None if rate is None else Pace(parse_size(rate, "max_read_rate"))
    return {"pace": pace, "drop_cache": running.drop_cache}


def run(
    report: R,
    running: Running,
    *,
    check: Callable[[], None] | None = None,
    work: Callable[[R], R] | None = None,
    completes: Callable[[], bool] = lambda: True,
) -> R:
    """Check a planned job, show it, and carry it out.

    Args:
        report: the plan; a frozen dataclass with `notes` and `written`.
        check: refuses the target. In a dry run the refusal becomes a note.
        work: writes the output and returns the report of what was done. None if there is nothing to do.
        completes: called after the work: the output is there.

    Returns:
        The report; `written` is True if there was work, and the output is there.

    Raises:
        WriteError: the target is refused.
    """
    plan: Any = report
    try:
        if check is not None:
            check()
    except WriteError as error:
        if not running.dry_run:
            raise
        plan = replace(plan, notes=(*plan.notes, f"The real run would stop: {error}"))
    if running.on_plan is not None:
        running.on_plan(plan)
    if running.dry_run or work is None:
        return plan  # type: ignore[no-any-return]
    done: Any = work(plan)
    return replace(done, written=completes())  # type: ignore[no-any-return]


def produce(
    report: R,
    assembly: Assembly,
    stamps: Sequence[Stamp],
    output: Recorded,
    running: Running,
    *,
    doing: str,
    inputs: Iterable[Path] = (),
    replaces: Collection[Stamp] = (),
    finish: Callable[[R], tuple[R, Assembly, Sequence[Stamp]]] | None = None,
    scratch: int = 0,
    asked: Asked | None = None,
    hashed: Hashed | None = None,
    **options: Any,
) -> R:
    """Run a job whose output is an assembly; see `run`.

    Args:
        stamps: of the input files, taken when their headers were read.
        doing: the name of the work, for `on_progress`.
        inputs: further files and folders that the target must not be.
        replaces: those of `stamps` whose place the target may take.
        finish: called after the plan is shown; returns the report, the assembly to write instead, and its stamps.
        scratch: bytes that `finish` writes beside the target.
        asked: do this of the job, in a stage that stays; the report then has a field `part`.
        hashed: files to hash; none if `finish` is given.
        options: of `write`.
    """

    if asked is not None and store_of(assembly.target) is not LOCAL:
        raise UsageError(f"`out`: {assembly.target} is in a store, and parts of a job need a disk that they share.")

    def check() -> None:
        kept = [stamp.path for stamp in stamps if stamp not in replaces]
        more = scratch
        if asked is not None:
            from .share import allocated

            more -= allocated(assembly.target)
        check_output(assembly, [*inputs, *kept], force=output.force, scratch=more, sign_off=output.sign_off)

    published = True

    def work(plan: R) -> R:
        nonlocal published
        done, final, sources = (plan, assembly, stamps) if finish is None else finish(plan)
        sign_off = None
        if output.sign_off is not None:
            from .sign_off import SignOff

            sign_off = SignOff(Path(output.sign_off), stamps)
        told = {"doing": doing, "on_progress": running.on_progress}
        more = {"force": output.force, "sign_off": sign_off, "hashed": hashed, **told, **options}
        if asked is not None:
            words, published = _shared(final, sources, asked, **more)
            shared: Any = done
            return replace(shared, part=words)  # type: ignore[no-any-return]
        write(final, sources, **more)
        if kept_stages(final.target):
            from ..storage.kept_stage import clear

            clear(final.target)
        return done

    if asked is not None and asked.silent:
        running = type(running)(**{**vars(running), "on_plan": None, "on_progress": None})
    return run(report, running, check=check, work=work, completes=lambda: published)


def check_output(
    assembly: Assembly,
    inputs: Iterable[Path],
    *,
    force: bool,
    scratch: int = 0,
    sign_off: str | Path | None = None,
) -> None:
    """Refuse a target before any work is done.

    Args:
        scratch: further bytes that are written beside it meanwhile.
        sign_off: where a statement about it goes, see `write`.

    Raises:
        UsageError, WriteError: see `check_target`, `check_sign_off` and `on_this_machine`.
    """
    inputs = [*inputs]
    if sign_off is not None:
        from .sign_off import check_sign_off

        check_sign_off(on_this_machine(sign_off, "sign_off"), assembly, inputs, force=force)
    names = assembly.names if assembly.folder else None
    check_target(assembly.target, inputs, nbytes=assembly.nbytes + scratch, force=force, names=names)


def write(
    assembly: Assembly,
    stamps: Sequence[Stamp],
    *,
    force: bool = False,
    sign_off: SignOff | None = None,
    internal: bool = False,
    pace: Pace | None = None,
    drop_cache: bool = False,
    hashed: Hashed | None = None,
    doing: str = WRITING,
    on_progress: Progress | None = None,
    **options: Any,
) -> None:
    """Write an assembly next to its target, and move it into place at the end.

    Args:
        stamps: of the inputs, taken when their headers were read.
        force: replace what is there.
        sign_off: a statement to write when the output is in place.
        internal: it is for the job alone, and no output.
        pace: at which the inputs are read.
        drop_cache: let the system drop the pages of inputs that it had not in memory before, and of the output.
        hashed: files to hash.
        doing: the name of the work.
        on_progress: called with (what is done, how much of it so far, all of it): bytes of tensors that are read and
            written, then also those sent to a store.
        options: of `engine.run`.

    Raises:
        CkptError: see `engine.run` and `staged_files`; nothing is left at the target then.
    """
    statement = None if sign_off is None else sign_off.begun(assembly, on_progress)
    total = assembly.bytes_moved + (0 if store_of(assembly.target) is LOCAL else assembly.nbytes)
    tell = counted(on_progress, Activity(doing), total)
    with ExitStack() as stages:
        made = assembly
        if store_of(assembly.target) is not LOCAL:
            from .uploads import uploading

            sent = [assembly.bytes_moved]

            def on_sent(nbytes: int) -> None:
                sent[0] += nbytes
                if tell is not None:
                    tell(sent[0])

            made = stages.enter_context(uploading(assembly, on_sent, force=force))
        how = {"force": force, "internal": internal, "drop_cache": drop_cache}
        outputs, companions = _staged(made, 0, stages, on_progress, **how)
        follower = stages.enter_context(followed(stamps, hashed, drop_cache=drop_cache, **options))
        final = _Final(assembly, hashed, follower, on_progress)
        splices = [_spliced(out.plan, stamps) for out in outputs]
        if all(splices):
            on_copied = None if tell is None else lambda nbytes: tell(2 * nbytes)  # read and written
            fds = [out.fd for out in outputs]
            copy([each for each in splices if each], fds, stamps, on_copied, pace=pace, drop_cache=drop_cache)
            for out, plan in zip(outputs, final.plans(), strict=True):
                for segment in plan.computed if hashed is not None else ():
                    write_at(out.fd, memoryview(segment.make(())), segment.offset, plan.name)
        else:
            engine.run(
                outputs,
                stamps=stamps,
                pace=pace,
                follower=follower,
                drop_cache=drop_cache,
                complete=final.plans,
                on_progress=tell,
                **options,
            )
        if assembly.checksums:
            from .checksums import fill

            fill(final.assembly, outputs, options.get("threads"), on_progress)
        if statement is not None:
            statement = statement.about(final.assembly, [*outputs, *companions], on_progress)
    if statement is not None:
        statement.write(assembly.target, force=force)


@dataclass(slots=True)
class _Final:
    """An output whose record may lack hashes until all of it is written.

    Attributes:
        assembly: with the hashes, as soon as they are known.
    """

    assembly: Assembly
    hashed: Hashed | None
    follower: Follower | None
    on_progress: Progress | None

    def plans(self) -> Sequence[FilePlan]:
        """Return the plans of its files, with the hashes; see `engine.run`."""
        found = {} if self.follower is None else self.follower.finish(self.on_progress)
        if self.hashed is not None:
            self.assembly = self.hashed.recorded(found)
        return self.assembly.files


def followed(
    stamps: Sequence[Stamp], hashed: Hashed | None, *, drop_cache: bool, threads: int | None = None, **_: Any
) -> AbstractContextManager[Follower | None]:
    """Return what follows the sums, if anything is to be hashed or dropped."""
    if hashed is None and not drop_cache:
        return nullcontext()
    from ..compute.follower import Follower

    return Follower(stamps, hashed=() if hashed is None else hashed.paths, drop=drop_cache, threads=threads)


def _shared(assembly: Assembly, stamps: Sequence[Stamp], asked: Asked, **options: Any) -> tuple[str, bool]:
    """Do what is asked of a job that processes share; see `write`.

    Returns:
        (what became of it, in words; True if this process has published the output).

    Raises:
        CkptError: see `write` and `share.opened`.
    """
    from ..storage.kept_stage import Stage
    from .share import described, job_of, opened, until_last

    plans = _plans(assembly)
    job = job_of(assembly.folder, described(plans), stamps)
    stage = Stage.of(assembly.target, job["digest"])

    def part(asked: Asked) -> str:
        with opened(assembly, plans, job, stage, asked) as own:
            _write_share(assembly, plans, stamps, own, **options)
        return own.words

    if asked.step:
        return until_last(asked, stage, part)
    return part(asked), asked.finish or asked.resume


def _write_share(
    assembly: Assembly,
    plans: Sequence[FilePlan],
    stamps: Sequence[Stamp],
    own: Work,
    *,
    force: bool,
    sign_off: SignOff | None,
    doing: str,
    on_progress: Progress | None,
    drop_cache: bool = False,
    hashed: Hashed | None = None,
    **options: Any,
) -> None:
    """Do a part of an assembly in a stage that stays until the output is published; see `write`.

    Args:
        plans: of all its files.
        own: the part.

    Raises:
        CkptError: see `engine.run`.
    """
    statement = None if sign_off is None else sign_off.begun(assembly, on_progress)
    outputs = [OutFile(plan, fd) for plan, fd in zip(plans, own.fds, strict=True)]
    show, work = on_progress, Activity(doing)
    # What is to be done of it is known when the job is cut.
    on_bytes = None if show is None else lambda nbytes: show(work, nbytes, own.nbytes)
    with followed(stamps, hashed, drop_cache=drop_cache, **options) as follower:
        final = _Final(assembly, hashed, follower, on_progress)

        def complete() -> Sequence[FilePlan]:
            return [*final.plans(), *plans[len(assembly.files) :]]  # and companions

        more = {"drop_cache": drop_cache, "follower": follower, "complete": complete, **options}
        try:
            engine.run(outputs, stamps=stamps, share=own, on_progress=on_bytes, **more)
        except CorruptError:
            own.forget()
            raise
        own.timed()
        if own.completes:
            if assembly.checksums:
                from .checksums import fill

                fill(final.assembly, outputs[: len(assembly.files)], options.get("threads"), on_progress)
            if statement is not None:
                statement = statement.about(final.assembly, outputs, on_progress)
            own.place(force=force, on_sync=told_of_sync(on_progress, len(plans)))
            for fd in own.fds if drop_cache else ():
                page_cache.drop(fd)
    if statement is not None:
        statement.write(assembly.target, force=force)


def _plans(assembly: Assembly) -> list[FilePlan]:
    """Return the plans of all files of an assembly, of its companions last."""
    # The content of companions now, so that their sizes are known.
    return [*assembly.files, *[whole_file(path.name, read_file(path)[0]) for path in assembly.companions]]


def write_all(
    assemblies: Sequence[Assembly],
    stamps: Sequence[Stamp],
    *,
    doing: str,
    force: bool = False,
    drop_cache: bool = False,
    on_progress: Progress | None = None,
    **options: Any,
) -> None:
    """Write files for the job alone that share their tensors, each from its own row, for one read of the inputs.

    All are moved into place, one after another, when all are complete; see `write`.
    """
    total = max(each.bytes_read for each in assemblies) + sum(each.nbytes for each in assemblies)
    tell = counted(on_progress, Activity(doing), total)
    with ExitStack() as stages:
        more = {"force": force, "internal": True, "drop_cache": drop_cache}
        staged = [_staged(each, row, stages, on_progress, **more)[0] for row, each in enumerate(assemblies)]
        outputs = [out for files in staged for out in files]
        follower = stages.enter_context(followed(stamps, None, drop_cache=drop_cache, **options))
        options |= {"follower": follower, "drop_cache": drop_cache}
        engine.run(outputs, stamps=stamps, on_progress=tell, **options)
        if follower is not None:
            follower.finish()


def told_of_sync(on_progress: Progress | None, files: int) -> Callable[[int], None]:
    """Return what tells how many files of an output are on the disk; see `staged_files`."""
    return lambda done: None if on_progress is None else on_progress(SYNCING, done, files)


def _staged(
    assembly: Assembly, row: int, stages: ExitStack, on_progress: Progress | None, **options: bool
) -> tuple[list[OutFile], list[OutFile]]:
    """Create the files of an assembly, to be moved into place when the stages end.

    Args:
        options: of `staged_files`.

    Returns:
        (those to fill; its companions, which are complete)
    """
    files = _plans(assembly)
    names = [plan.name for plan in files] if assembly.folder else None
    sizes, on_sync = [plan.size for plan in files], told_of_sync(on_progress, len(files))
    fds = stages.enter_context(staged_files(assembly.target, names, sizes, on_sync=on_sync, **options))
    outputs = [OutFile(plan, fd, row) for plan, fd in zip(files, fds, strict=True)]
    companions = outputs[len(assembly.files) :]
    for out in companions:
        for segment in out.plan.computed:
            write_at(out.fd, memoryview(segment.make(())), 0, assembly.target / out.plan.name)
    return outputs[: len(assembly.files)], companions


def _spliced(plan: FilePlan, stamps: Sequence[Stamp]) -> Splice | None:
    """Return a file as a copy of one other file with edits; None if it is not."""
    if plan.needs_checksums or not all(tensor.verbatim for tensor, _ in plan.payloads):
        return None
    pieces: list[tuple[int, bytes | Span]] = [(each.offset, each.make(())) for each in plan.computed]
    sources: dict[Path, None] = {}
    for tensor, position in plan.payloads:
        spec = tensor.terms[0]
        pieces.append((position, Span(spec.begin, spec.begin + spec.nbytes)))
        sources[spec.storage.path] = None
    if len(sources) > 1:
        return None
    # An index has no tensors, and any file will do.
    source = next(iter(sources), stamps[0].path)
    return Splice(source, tuple(piece for _, piece in sorted(pieces, key=lambda item: item[0])))


def copy(
    splices: Sequence[Splice],
    fds: Sequence[int],
    stamps: Sequence[Stamp],
    on_progress: Callable[[int], None] | None,
    *,
    in_place: bool = False,
    pace: Pace | None = None,
    drop_cache: bool = False,
) -> None:
    """Write files of which the kernel copies most.

    Args:
        splices, fds: the files, and a descriptor of each.
        stamps: of the inputs, taken when their headers were read.
        on_progress: called with the bytes copied so far.
        in_place: each file replaces its source, and keeps its attributes.
        pace: at which they are read.
        drop_cache: let the system drop the pages of sources that it had not in memory before.

    Raises:
        CkptError: see `splice.write`; or an input has changed.
    """
    copied = 0

    def count(nbytes: int) -> None:
        nonlocal copied
        copied += nbytes
        if on_progress is not None:
            on_progress(copied)
        if pace is not None:
            pace.take(nbytes, going_on)

    going_on = threading.Event()
    with OpenFiles(stamps) as sources, ExitStack() as stack:
        sources.open_all(each.source for each in splices)
        splices, around = _fetched_ahead(splices, sources, stack, going_on)
        for each, fd in zip(splices, fds, strict=True):
            if in_place:
                keep_attributes(fd, sources.handle(each.source), each.source)  # before it holds anything to read
            read = sources[each.source].fileno()
            drops = drop_cache and read is not None and not page_cache.in_use(read)
            splice.write(each, sources[each.source], fd, count, around)
            if drops and read is not None:
                page_cache.drop(read)
            if in_place:
                flush(
                    fd, each.source
                )  # now, so that little time is left for others between the next lines and the rename
        sources.check_unchanged()


def _fetched_ahead(
    splices: Sequence[Splice], sources: OpenFiles, stack: ExitStack, stop: threading.Event
) -> tuple[Sequence[Splice], Callable[[], AbstractContextManager[object]]]:
    """Have the spans of remote files fetched ahead of their copies, until the stack ends.

    Returns:
        The splices, with smaller spans if a file is remote, and what is to be entered for each span in turn.
    """
    if not any_remote(sources):
        return splices, nullcontext
    splices = [each.cut(ahead.BLOCK) for each in splices]
    spans = [(each.source, span.start, span.stop) for each in splices for span in each.pieces if isinstance(span, Span)]
    fetched = stack.enter_context(ahead.ReadAhead(sources, lambda number: [spans[number]], len(spans)))
    numbers = iter(range(len(spans)))

    @contextmanager
    def there() -> Iterator[None]:
        number = next(numbers)
        fetched.wait(number, stop)
        yield
        fetched.done(number)

    return splices, there
