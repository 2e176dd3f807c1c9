"""Writing: from an assembly to files, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .assembly import Assembly
from .errors import WriteError
from .formats.header import Stamp
from .formats.staged import staged_files


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
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Carry an assembly out, beside its target, and put it in its place at the end.

    Args:
        stamps: of the inputs, taken when their headers were read.
        force: replace what is there.
        threads, allow_nonfinite, on_progress: see `engine.run`.

    Raises:
        CkptError: see `engine.run` and `staged_files`; nothing is left at the target then.
    """
    from . import engine  # imports torch, which a refused job has no need of

    files = assembly.files
    names = [plan.name for plan in files] if assembly.folder else None
    with staged_files(assembly.target, names, [plan.size for plan in files], force=force) as (stage, fds):
        engine.run(
            [engine.OutFile(plan, fd) for plan, fd in zip(files, fds, strict=True)],
            stamps=stamps,
            threads=threads,
            allow_nonfinite=allow_nonfinite,
            on_progress=on_progress,
        )
        for companion in assembly.companions:
            shutil.copyfile(companion, stage / companion.name)
