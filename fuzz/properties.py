"""Properties: what holds for every input, whatever its bytes are.

An input is read, or refused with an error of the library. Nothing that it names is run or imported, no file is written,
no file outside of the checkpoint is read, and what it takes is bounded.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import unicodedata  # noqa: F401 - with which tables measure names that are not ASCII, of sound files, too
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt_tools import average, fix_prefix, strip
from ckpt_tools.checkpoints.open import Checkpoint
from ckpt_tools.cli import console
from ckpt_tools.cli.inspect import _list, _show
from ckpt_tools.compute.payload import read_tensor
from ckpt_tools.errors import CkptError
from ckpt_tools.formats import read_header
from ckpt_tools.formats.header import Header
from ckpt_tools.formats.tree import tensors_in
from ckpt_tools.jobs.inspect import describe
from ckpt_tools.tensors import TensorSpec

LARGEST_READ = 1 << 16
"""Bytes of a tensor whose values are read."""
_MOST_TENSORS = 100
_MOST_MEMORY = 100 << 20  # bytes more than any input before took
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_OWN = "/proc/self/status"  # where a plan finds how much memory the process takes
_DENIED = (
    "import", "exec", "pickle.find_class", "marshal.", "code.__new__", "ctypes.", "subprocess.", "socket.", "shutil.",
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.remove", "os.rename",
    "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.putenv", "os.kill",
)  # fmt: skip


class Fault(AssertionError):
    """A property that does not hold."""


class Watch:
    """Notices what the process does while an input is read.

    Args:
        seconds: of CPU time that an input may take; None: any.
        patient: do all that can be done with each input.
    """

    def __init__(self, seconds: float | None = None, *, patient: bool = True) -> None:
        self._seconds, self.patient = seconds, patient
        self._inside: str | None = None
        self._noted: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[object, ...]) -> None:
        if self._inside is None:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):
                return
            if not isinstance(flags, int) or flags & _WRITING:
                self._noted.append(f"opens {path!r} for writing")
            elif path != _OWN and not os.path.realpath(os.fspath(path)).startswith(self._inside):  # type: ignore[call-overload]
                self._noted.append(f"opens {path!r}, which is not in the checkpoint")
        elif event.startswith(_DENIED):
            self._noted.append(f"{event} {str(args)[:200]}")

    @contextlib.contextmanager
    def watching(self, folder: Path) -> Iterator[None]:
        """Hold all that is done in the block against the properties; files in the folder may be read.

        Raises:
            Fault: one does not hold.
        """
        modules, peak = {*sys.modules}, _peak()
        start = time.process_time()
        self._noted.clear()
        self._inside = os.path.realpath(folder)
        hooks = sys.excepthook, sys.unraisablehook  # for errors that Python prints and nobody catches
        sys.excepthook = lambda cls, error, trace: self._noted.append(f"prints {cls.__name__}: {error}")
        sys.unraisablehook = lambda what: self._noted.append(f"prints {what.exc_value!r}")
        try:
            yield
        finally:
            self._inside = None
            sys.excepthook, sys.unraisablehook = hooks
        seconds = time.process_time() - start
        if self._noted:
            raise Fault(f"while an input was read: {'; '.join(self._noted)}")
        if new := {*sys.modules} - modules:
            raise Fault(f"imported: {', '.join(sorted(new))}")
        if (grown := _peak() - peak) > _MOST_MEMORY:
            raise Fault(f"took {grown >> 20} MB more than any input before")
        if self._seconds is not None and seconds > self._seconds:
            raise Fault(f"took {seconds:.1f} s of CPU time")


def _peak() -> int:
    # Not that of getrusage, which a process takes over from the one that started it.
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def look(path: Path, job: int | None = None) -> Header | None:
    """Do with a checkpoint what `ckpt inspect` does, read its small tensors, and plan jobs that rewrite it.

    Args:
        job: which one, by any number; None: all.

    Returns:
        Its header; None if it is refused.
    """
    try:
        header = read_header(path)
    except CkptError:
        return None
    jobs = _JOBS if job is None else _JOBS[job % len(_JOBS) :][:1]
    for each in (_inspect, _read, *jobs):
        with contextlib.suppress(CkptError):
            each(header)
    return header


def _inspect(header: Header) -> None:
    with (
        io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") as stderr,
        io.TextIOWrapper(io.BytesIO(), "utf-8") as stdout,
        contextlib.redirect_stderr(stderr),
        contextlib.redirect_stdout(stdout),
    ):
        description = describe(header)
        _show(description)
        for weights in description.sets:
            _list(weights)
        console.print_json(description.to_dict())


def _read(header: Header) -> None:
    for count, (_, spec) in enumerate(tensors_in(header.tree)):
        if count < _MOST_TENSORS and isinstance(spec, TensorSpec) and spec.nbytes <= LARGEST_READ:
            with contextlib.suppress(CkptError):
                read_tensor(spec, header.files)
    checkpoint = Checkpoint(header)
    for name, spec in list(checkpoint.specs.items())[:_MOST_TENSORS]:
        if isinstance(spec, TensorSpec) and spec.nbytes <= LARGEST_READ:
            with contextlib.suppress(CkptError):
                checkpoint[name]


def _job(job: Callable[..., object], **options: object) -> Callable[[Header], None]:
    def plan(header: Header) -> None:
        job(header.path, dry_run=True, **options)

    return plan


_JOBS = (
    _job(average, out="/dev/shm/ckpt-tools-fuzz-out.pth"),
    _job(strip, out="/dev/shm/ckpt-tools-fuzz-out.pth"),
    _job(fix_prefix, out="/dev/shm/ckpt-tools-fuzz-out.pth"),
)
