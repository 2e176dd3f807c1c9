"""Kept blocks: what was fetched of a remote file, in a local one that stays for the next job.

Beside the file, which has the size of the remote one and holes, a list has a line for each range that is in it: begin,
end, CRC-32. A range whose checksum differs, as after a loss of power, is fetched again. Its name is made of the address
and of the state of the remote file, so another state has another file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from pathlib import Path
from threading import Lock

from ..errors import WriteError
from .local import read_once

_OPENED = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


class KeptBlocks:
    """The kept ranges of one file.

    Args:
        folder: where they are; made if it is not there.
        path: the address of the remote file.
        state: its size and identity, see `Stamp`.

    Raises:
        WriteError: nothing can be written there.
    """

    def __init__(self, folder: Path, path: Path, state: tuple[int, tuple[object, ...]]) -> None:
        digest = hashlib.sha256(repr((str(path), state)).encode()).hexdigest()[:32]
        self._lock = Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(folder / digest, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.truncate(self.fd, state[0])
            self._list = os.open(
                folder / f"{digest}.ranges", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
            )
            lines = os.read(self._list, os.fstat(self._list).st_size).decode("ascii", "replace").splitlines()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise WriteError(f"`cache`: {folder} cannot be written to ({error.strerror}). Choose another.") from error
        self._ranges: dict[tuple[int, int], int] = {}
        for line in lines:
            numbers = line.split()
            if len(numbers) == 3 and all(map(str.isdecimal, numbers)):
                begin, end, crc = map(int, numbers)
                self._ranges[begin, end] = crc

    def has(self, begin: int, end: int) -> bool:
        """Return True if a range is there, as it was written."""
        crc = self._ranges.get((begin, end))
        if crc is None:
            return False
        data = bytearray(end - begin)
        self.read(begin, memoryview(data))
        return zlib.crc32(data) == crc

    def read(self, begin: int, view: memoryview) -> int:
        """Fill a buffer from an offset; return the bytes read, fewer if another program has cut the file off."""
        done = got = read_once(self.fd, view, begin)
        while got and done < len(view):
            got = read_once(self.fd, view[done:], begin + done)
            done += got
        return done

    def write(self, begin: int, data: bytes | bytearray | memoryview) -> None:
        """Write a range, and list it.

        Raises:
            OSError: the system refuses.
        """
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self.fd, view[done:], begin + done)
        end, crc = begin + len(data), zlib.crc32(data)
        with self._lock:
            self._ranges[begin, end] = crc
            os.write(self._list, f"{begin} {end} {crc}\n".encode())

    def close(self) -> None:
        """Close the files; they stay."""
        os.close(self.fd)
        os.close(self._list)
