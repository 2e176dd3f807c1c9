"""Writing: from an assembly to files, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..compute import engine
from ..compute.gpu.devices import GPU_MEMORY
from ..compute.work_units import OutFile
from ..errors import WriteError
from ..formats.file_plan import FilePlan
from ..storage import splice
from ..storage.opened import OpenFiles
from ..storage.source import Stamp
from ..storage.splice import Span, Splice
from ..storage.staged import staged_files
from .assembly import Assembly


@contextmanager
def only_noted(notes: list[str], dry_run: bool) -> Iterator[None]:
    """In a dry run, say that the target would be refused, and go on."""
    try:
        yield
    except WriteError as error:
        if not dry_run:
            raise
        notes.append(f"Without --dry-run this would be refused: {error}")


def write(
    assembly: Assembly,
    stamps: Sequence[Stamp],
    *,
    force: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    devices: Sequence[str] = (),
    gpu_memory: int = GPU_MEMORY,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Carry an assembly out, beside its target, and put it in its place at the end.

    Args:
        stamps: of the inputs, taken when their headers were read.
        force: replace what is there.
        threads, allow_nonfinite, devices, gpu_memory, on_progress: see `engine.run`.

    Raises:
        CkptError: see `engine.run` and `staged_files`; nothing is left at the target then.
    """
    files = assembly.files
    names = [plan.name for plan in files] if assembly.folder else None
    with staged_files(assembly.target, names, [plan.size for plan in files], force=force) as (stage, fds):
        splices = [_spliced(plan, stamps) for plan in files]
        if all(splices):
            _splice([each for each in splices if each], fds, stamps, on_progress)
        else:
            engine.run(
                [OutFile(plan, fd) for plan, fd in zip(files, fds, strict=True)],
                stamps=stamps,
                threads=threads,
                allow_nonfinite=allow_nonfinite,
                devices=devices,
                gpu_memory=gpu_memory,
                on_progress=on_progress,
            )
        for companion in assembly.companions:
            shutil.copyfile(companion, stage / companion.name)


def _spliced(plan: FilePlan, stamps: Sequence[Stamp]) -> Splice | None:
    """Describe a file whose tensors stand in one other file, as they are; None for any other."""
    if plan.needs_crc or not all(tensor.verbatim for tensor, _ in plan.slots):
        return None
    pieces: list[tuple[int, bytes | Span]] = [*plan.patches({})]
    sources: dict[Path, None] = {}
    for tensor, position in plan.slots:
        spec = tensor.terms[0][0]
        pieces.append((position, Span(spec.begin, spec.begin + spec.nbytes)))
        sources[spec.storage.path] = None
    if len(sources) > 1:
        return None
    # An index has no tensors, and any file will do.
    source = next(iter(sources), stamps[0].path)
    return Splice(source, tuple(piece for _, piece in sorted(pieces, key=lambda item: item[0])))


def _splice(
    splices: Sequence[Splice], fds: Sequence[int], stamps: Sequence[Stamp], on_progress: Callable[[int], None] | None
) -> None:
    """Let the kernel move payloads of which not a bit changes."""
    moved = 0

    def count(nbytes: int) -> None:
        nonlocal moved
        moved += 2 * nbytes  # read and written
        if on_progress is not None:
            on_progress(moved)

    with OpenFiles(stamps) as sources:
        for each, fd in zip(splices, fds, strict=True):
            sources.open(each.source)
            splice.write(each, sources[each.source], fd, count)
        sources.check_unchanged()
