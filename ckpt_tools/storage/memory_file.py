"""Files in memory: they have no name, and what is written to one can be used as memory afterwards."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_file(nbytes: int) -> Iterator[tuple[int, mmap.mmap]]:
    """Give an empty file of this size: its descriptor, until the block ends, and its memory, as long as it is used.

    Where the system has no files in memory, it is one without a name in the folder for temporary files.
    """
    try:
        fd = os.memfd_create("ckpt", os.MFD_CLOEXEC)
    except (AttributeError, OSError) as error:  # another system, or a sandbox
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        fd, name = tempfile.mkstemp(prefix="ckpt-")
        Path(name).unlink()
    try:
        os.truncate(fd, nbytes)
        yield fd, mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)
