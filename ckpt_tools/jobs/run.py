"""Running: a planned job is checked, shown and carried out; its output is whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..compute import engine
from ..compute.work_units import OutFile
from ..errors import CorruptError, UsageError, WriteError
from ..formats.file_plan import FilePlan, whole_file
from ..storage import splice
from ..storage.hidden import kept_stages
from ..storage.source import LOCAL, OpenFiles, Stamp, read_file, store_of
from ..storage.splice import Span, Splice
from ..storage.staged import flush, keep_attributes, staged_files, write_at
from .assembly import Assembly
from .options import Recorded, Running
from .outputs import check_target

if TYPE_CHECKING:
    from .asked import Asked
    from .share import Work
    from .sign_off import SignOff

R = TypeVar("R")


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
        plan = replace(plan, notes=(*plan.notes, f"Without `dry_run` this would be refused: {error}"))
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
    inputs: Iterable[Path] = (),
    replaces: Collection[Stamp] = (),
    finish: Callable[[R], tuple[R, Assembly, Sequence[Stamp]]] | None = None,
    scratch: int = 0,
    asked: Asked | None = None,
    **options: Any,
) -> R:
    """Run a job whose output is an assembly; see `run`.

    Args:
        stamps: of the input files, taken when their headers were read.
        inputs: further files and folders that the target must not be.
        replaces: those of `stamps` whose place the target may take.
        finish: called after the plan is shown; returns the report, the assembly to write instead, and its stamps.
        scratch: bytes that `finish` writes beside the target.
        asked: do this of the job, in a stage that stays; the report then has a field `part`.
        options: of `engine.run`.
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
        show = running.on_progress
        total = final.bytes_moved + (0 if store_of(final.target) is LOCAL else final.nbytes)
        on_bytes = None if show is None else lambda nbytes: show(nbytes, total)
        sign_off = None
        if output.sign_off is not None:
            from .sign_off import SignOff

            sign_off = SignOff(Path(output.sign_off), stamps)
        if asked is not None:
            more = {"force": output.force, "sign_off": sign_off, "on_progress": show, **options}
            words, published = _shared(final, sources, asked, **more)
            shared: Any = done
            return replace(shared, part=words)  # type: ignore[no-any-return]
        write(final, sources, force=output.force, sign_off=sign_off, on_progress=on_bytes, **options)
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
        UsageError, WriteError: see `check_target` and `check_sign_off`.
    """
    inputs = [*inputs]
    if sign_off is not None:
        from .sign_off import check_sign_off

        check_sign_off(Path(sign_off), assembly, inputs, force=force)
    names = assembly.names if assembly.folder else None
    check_target(assembly.target, inputs, nbytes=assembly.nbytes + scratch, force=force, names=names)


def write(
    assembly: Assembly,
    stamps: Sequence[Stamp],
    *,
    force: bool = False,
    sign_off: SignOff | None = None,
    internal: bool = False,
    on_progress: Callable[[int], None] | None = None,
    **options: Any,
) -> None:
    """Write an assembly next to its target, and move it into place at the end.

    Args:
        stamps: of the inputs, taken when their headers were read.
        force: replace what is there.
        sign_off: a statement to write when the output is in place.
        internal: it is for the job alone, and no output.
        on_progress: called with the bytes of tensors read and written so far; then also with those sent to a store.
        options: of `engine.run`.

    Raises:
        CkptError: see `engine.run` and `staged_files`; nothing is left at the target then.
    """
    statement = None if sign_off is None else sign_off.begun()
    with ExitStack() as stages:
        made = assembly
        if store_of(assembly.target) is not LOCAL:
            from .uploads import uploading

            sent = [assembly.bytes_moved]

            def on_sent(nbytes: int) -> None:
                sent[0] += nbytes
                if on_progress is not None:
                    on_progress(sent[0])

            made = stages.enter_context(uploading(assembly, on_sent, force=force))
        outputs, companions = _staged(made, 0, stages, force=force, internal=internal)
        splices = [_spliced(out.plan, stamps) for out in outputs]
        if all(splices):
            show = on_progress
            on_copied = None if show is None else lambda nbytes: show(2 * nbytes)  # read and written
            copy([each for each in splices if each], [out.fd for out in outputs], stamps, on_copied)
        else:
            engine.run(outputs, stamps=stamps, on_progress=on_progress, **options)
        if assembly.checksums:
            from .checksums import fill

            fill(assembly, outputs, options.get("threads"))
        if statement is not None:
            statement = statement.about(assembly, [*outputs, *companions])
    if statement is not None:
        statement.write(assembly.target, force=force)


def _shared(assembly: Assembly, stamps: Sequence[Stamp], asked: Asked, **options: Any) -> tuple[str, bool]:
    """Do what is asked of a job that processes share; see `write`.

    Returns:
        (what became of it, in words; True if this process has published the output).

    Raises:
        CkptError: see `write` and `share.opened`.
    """
    from ..storage.kept_stage import Stage
    from .share import described, job_of, opened, together, until_last

    plans = _plans(assembly)
    job = job_of(assembly.folder, described(plans), stamps)
    stage = Stage.of(assembly.target, job["digest"])

    def part(asked: Asked) -> str:
        with opened(assembly, plans, job, stage, asked) as own:
            _write_share(assembly, plans, stamps, own, **options)
        return own.words

    if asked.together:
        return together(asked, job, part)
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
    on_progress: Callable[[int, int], None] | None,
    **options: Any,
) -> None:
    """Do a part of an assembly in a stage that stays until the output is published; see `write`.

    Args:
        plans: of all its files.
        own: the part.

    Raises:
        CkptError: see `engine.run`.
    """
    statement = None if sign_off is None else sign_off.begun()
    outputs = [OutFile(plan, fd) for plan, fd in zip(plans, own.fds, strict=True)]
    show = on_progress
    on_bytes = None if show is None else lambda nbytes: show(nbytes, own.nbytes)
    try:
        engine.run(outputs, stamps=stamps, share=own, on_progress=on_bytes, **options)
    except CorruptError:
        own.forget()
        raise
    if own.completes:
        if assembly.checksums:
            from .checksums import fill

            fill(assembly, outputs[: len(assembly.files)], options.get("threads"))
        if statement is not None:
            statement = statement.about(assembly, outputs)
        own.place(force=force)
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
    force: bool = False,
    on_progress: Callable[[int], None] | None = None,
    **options: Any,
) -> None:
    """Write files for the job alone that share their tensors, each from its own row, for one read of the inputs.

    All are moved into place, one after another, when all are complete; see `write`.
    """
    with ExitStack() as stages:
        staged = [_staged(each, row, stages, force=force, internal=True)[0] for row, each in enumerate(assemblies)]
        outputs = [out for files in staged for out in files]
        engine.run(outputs, stamps=stamps, on_progress=on_progress, **options)


def _staged(assembly: Assembly, row: int, stages: ExitStack, **options: bool) -> tuple[list[OutFile], list[OutFile]]:
    """Create the files of an assembly, to be moved into place when the stages end.

    Args:
        options: of `staged_files`.

    Returns:
        (those to fill; its companions, which are complete)
    """
    files = _plans(assembly)
    names = [plan.name for plan in files] if assembly.folder else None
    fds = stages.enter_context(staged_files(assembly.target, names, [plan.size for plan in files], **options))
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
) -> None:
    """Write files of which the kernel copies most.

    Args:
        splices, fds: the files, and a descriptor of each.
        stamps: of the inputs, taken when their headers were read.
        on_progress: called with the bytes copied so far.
        in_place: each file replaces its source, and keeps its attributes.

    Raises:
        CkptError: see `splice.write`; or an input has changed.
    """
    copied = 0

    def count(nbytes: int) -> None:
        nonlocal copied
        copied += nbytes
        if on_progress is not None:
            on_progress(copied)

    with OpenFiles(stamps) as sources:
        sources.open_all(each.source for each in splices)
        for each, fd in zip(splices, fds, strict=True):
            if in_place:
                keep_attributes(fd, sources.descriptor(each.source), each.source)  # before it holds anything to read
            splice.write(each, sources[each.source], fd, count)
            if in_place:
                flush(
                    fd, each.source
                )  # now, so that little time is left for others between the next lines and the rename
        sources.check_unchanged()
