"""Reading ahead: payload that comes by requests, fetched before it is needed, in blocks, several at a time.

A fetched block stays where the library has put it, and a table tells the C extension the addresses, so that sums are
made as of local files, and nothing is copied before. When the last work unit that needs a block is done, it is let go.
With a folder to keep them in, blocks are written to files, which stay (`kept_blocks`), and are read by descriptor.
"""

from __future__ import annotations

import errno
import threading
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..errors import WriteError
from .kept_blocks import KeptBlocks
from .local import raise_file_limit
from .source import OpenFiles, Source, read_failed

MEMORY = 256 << 20
"""Bytes of blocks that are fetched and not yet let go. Only a unit that needs more by itself takes more."""
BLOCK = 8 << 20
"""Bytes of a request, at most."""
_LEAST = 1 << 20  # bytes of a block: many inputs at once share `MEMORY`
_GAP = 256 << 10  # bytes between two ranges that cost less than a second request
CONNECTIONS = 16
"""Requests at the same time."""
_DESCRIPTORS = 2  # of a file that is kept

Buffer = bytes | bytearray | memoryview

Need = tuple[Path, int, int]
"""Bytes of a file that a work unit reads: (path, begin, end)."""


@runtime_checkable
class RangeSource(Source, Protocol):
    """A source whose bytes come by requests."""

    def fetch(self, begin: int, end: int) -> bytes | memoryview:
        """Return a range within the file, by one request.

        Raises:
            OSError: it failed, and so did those made after it.
            CorruptError: the file has changed since it was opened.
        """


class FetchedFile:
    """A file whose blocks are fetched into memory, or into a file that stays; see `Source` and `InMemory`.

    Args:
        address_of: finds bytes in memory; None if nobody reads them there.
    """

    def __init__(
        self,
        path: Path,
        source: RangeSource,
        block: int,
        kept: KeptBlocks | None,
        address_of: Callable[[Buffer | array[int]], int] | None,
    ) -> None:
        self.path, self.inner, self.block, self.kept = path, source, block, kept
        self.nbytes = source.stat()[0]
        self.blocks: dict[int, Block] = {}
        self._address_of = address_of
        self._table = array("q", [self.nbytes, block, *(0, 0, 0) * -(-self.nbytes // block)])
        self.address = None if kept is not None or address_of is None else address_of(self._table)

    def stat(self) -> tuple[int, tuple[object, ...]]:
        return self.inner.stat()

    def fileno(self) -> int | None:
        return None if self.kept is None else self.kept.fd

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return self.inner.read_ranges([*ranges])

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill a buffer, from blocks if they are there."""
        done, end = 0, offset + len(view)
        while offset + done < min(end, self.nbytes):
            at = offset + done
            block = self.blocks.get(at // self.block)
            stop = min(end, (at // self.block + 1) * self.block, self.nbytes)
            if block is None or not block.has(at, stop):
                return done + self.inner.read_into(at, view[done:])
            part, data = view[done : done + stop - at], block.data  # which may be let go now
            if self.kept is not None:
                if self.kept.read(at, part) < len(part):
                    raise OSError(errno.EIO, "what was kept of it is cut off")
            elif data is not None:
                part[:] = data[at - block.begin : stop - block.begin]
            else:
                return done + self.inner.read_into(at, view[done:])
            done += len(part)
        return done

    def have(self, block: Block, begin: int, data: Buffer) -> None:
        """Take what was fetched of a block, from `begin` on."""
        block.begin, block.data = begin, memoryview(data)
        if self._address_of is not None:
            self._tell(block.number, begin, begin + len(data), self._address_of(data))

    def let_go(self, number: int) -> None:
        """Give the memory of a block back."""
        self._tell(number, 0, 0, 0)
        self.blocks[number].data = None

    def _tell(self, number: int, *entry: int) -> None:
        self._table[2 + 3 * number : 5 + 3 * number] = array("q", entry)

    def close(self) -> None:
        if self.kept is not None:
            self.kept.close()
        self.inner.close()


class Block:
    """A block of a file.

    Attributes:
        ranges: the bytes of it that work units need, (begin, end), and small gaps between them; in ascending order.
        units: how many need some, and are not done.
        asked, there: it is being fetched, or is fetched and not let go.
        begin, data: the first byte that is in memory, and those from there on; None if none is.
    """

    __slots__ = ("asked", "begin", "data", "file", "number", "ranges", "there", "units")

    def __init__(self, file: FetchedFile, number: int) -> None:
        self.file, self.number, self.begin = file, number, 0
        self.data: memoryview | None = None
        self.ranges: list[tuple[int, int]] = []
        self.units = 0
        self.asked = self.there = False

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, with what is between the ranges."""
        return self.ranges[-1][1] - self.ranges[0][0]

    def add(self, begin: int, end: int) -> None:
        """Add what a work unit needs."""
        ranges = self.ranges
        first = bisect_left(ranges, begin - _GAP, key=_end)
        last = first
        while last < len(ranges) and ranges[last][0] <= end + _GAP:
            begin, end = min(begin, ranges[last][0]), max(end, ranges[last][1])
            last += 1
        ranges[first:last] = [(begin, end)]

    def has(self, begin: int, end: int) -> bool:
        """Return True if bytes of the file that lie in this block are there."""
        return self.there and any(first <= begin and end <= last for first, last in self.ranges)


def _end(each: tuple[int, int]) -> int:
    return each[1]


class ReadAhead:
    """Fetches what work units need, in their order; a context manager.

    Args:
        files: the inputs; those with a `fetch` are read from blocks until this ends.
        needs: from the number of a unit to what it reads; called several times.
        count: of units.
        inputs: files that one unit reads, about.
        keep: a folder in which fetched blocks stay; None for memory.
        memory: see `MEMORY`.
        address_of: see `FetchedFile`.

    Raises:
        WriteError: nothing can be kept in the folder.
    """

    def __init__(
        self,
        files: OpenFiles,
        needs: Callable[[int], Iterable[Need]],
        count: int,
        *,
        inputs: int = 1,
        keep: Path | None = None,
        memory: int = MEMORY,
        address_of: Callable[[Buffer | array[int]], int] | None = None,
    ) -> None:
        self._needs, self._memory = needs, memory
        room = memory // (4 * max(inputs, 1)) // _LEAST * _LEAST
        # Kept blocks have one size, or another job could not use them.
        self.block = BLOCK if keep is not None else max(min(BLOCK, room), _LEAST)
        self._files: dict[Path, FetchedFile] = {}
        if keep is not None:
            raise_file_limit(_DESCRIPTORS * len(files.items()))
        for path, source in files.items():
            if isinstance(source, RangeSource):
                kept = None if keep is None else KeptBlocks(keep, path, source.stat())
                self._files[path] = FetchedFile(path, source, self.block, kept, address_of)
                files.substitute(path, self._files[path])
        self._count = count
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)  # a block, or an error
        self._room = threading.Condition(self._lock)  # a block was let go
        self._held = 0  # bytes of blocks that are asked for and not let go
        self.most_held = 0
        self._done: set[int] = set()
        self._oldest = 0  # unit that is not done
        self._writing = 0  # blocks to files that stay
        self._closed = False
        self._error: BaseException | None = None
        for number in range(count):
            for block, begin, end in self._parts(number):
                block.add(begin, end)
            for block in self._blocks(number):
                block.units += 1
        if keep is not None:  # whole blocks, for the next job may need more of them
            for file in self._files.values():
                for block in file.blocks.values():
                    begin = block.number * self.block
                    block.ranges = [(begin, min(begin + self.block, file.nbytes))]
        self._waiting = self._in_order()
        self._next: tuple[int, Block] | None = None

    def wait(self, number: int, stop: threading.Event) -> bool:
        """Wait until all that a unit reads is there.

        Returns:
            False if the job was stopped meanwhile.

        Raises:
            ReadError: a request failed for good.
        """
        blocks = self._blocks(number)
        with self._lock:
            while not all([block.there for block in blocks]):
                if self._error is not None:
                    raise self._error
                if stop.is_set():
                    return False
                self._arrived.wait(0.2)
        return True

    def done(self, number: int) -> None:
        """Let go what no other unit needs; also of a unit that is passed over."""
        with self._lock:
            for block in self._blocks(number):
                block.units -= 1
                if not block.units:
                    self._held -= block.nbytes if block.asked else 0
                    block.there, block.asked = False, True  # and not any more
                    block.file.let_go(block.number)
            self._done.add(number)
            while self._oldest in self._done:
                self._done.remove(self._oldest)
                self._oldest += 1
            self._room.notify_all()

    def _blocks(self, number: int) -> Iterable[Block]:
        """Return the blocks that a unit needs."""
        return dict.fromkeys([block for block, _, _ in self._parts(number)])

    def _parts(self, number: int) -> Iterator[tuple[Block, int, int]]:
        """Yield what a unit needs, block by block: (block, begin, end)."""
        size = self.block
        for path, begin, end in self._needs(number):
            file = self._files.get(path)
            if file is None:
                continue
            end = min(end, file.nbytes)  # a file that ends early is refused where it is read
            while begin < end:
                at = begin // size
                block = file.blocks.get(at)
                if block is None:
                    block = file.blocks[at] = Block(file, at)
                stop = min(end, (at + 1) * size)
                yield block, begin, stop
                begin = stop

    def _in_order(self) -> Iterator[tuple[int, Block]]:
        for number in range(self._count):
            for block in self._blocks(number):
                if not block.asked:
                    yield number, block

    def _take(self) -> Block | None:
        """Return the next block to fetch, when there is room for it; None at the end."""
        with self._lock:
            while not self._closed and self._error is None:
                if self._next is None:
                    self._next = next(self._waiting, None)
                    if self._next is None:
                        return None
                number, block = self._next
                if block.asked:  # for another unit
                    self._next = None
                    continue
                size = block.nbytes
                # What the oldest unit needs always comes, or nothing would be let go any more.
                if self._held + size <= self._memory or number <= self._oldest:
                    self._next = None
                    block.asked = True
                    self._held += size
                    self.most_held = max(self.most_held, self._held)
                    return block
                self._room.wait()
        return None

    def _work(self) -> None:
        while (block := self._take()) is not None:
            try:
                self._fill(block)
            except OSError as error:
                self._fail(read_failed(block.file.path, error.strerror or type(error).__name__))
            except BaseException as error:  # noqa: BLE001 - raised in the threads that wait
                self._fail(error)

    def _fill(self, block: Block) -> None:
        file = block.file
        if file.kept is not None:
            for begin, end in block.ranges:
                if not file.kept.has(begin, end):
                    self._keep(file.kept, file.path, begin, file.inner.fetch(begin, end))
        else:
            parts = [(begin, file.inner.fetch(begin, end)) for begin, end in block.ranges]
            begin, data = parts[0] if len(parts) == 1 else _joined(parts)
            with self._lock:
                if self._closed or not block.units:
                    return
                file.have(block, begin, data)
                self._came(block)
            return
        with self._lock:
            self._came(block)

    def _came(self, block: Block) -> None:
        block.there = True
        self._arrived.notify_all()

    def _keep(self, kept: KeptBlocks, path: Path, begin: int, data: Buffer) -> None:
        with self._lock:
            if self._closed:
                return
            self._writing += 1
        try:
            kept.write(begin, data)
        except OSError as error:
            raise WriteError(f"{path}: what was fetched cannot be kept with `cache` ({error.strerror}).") from error
        finally:
            with self._lock:
                self._writing -= 1
                if self._closed:
                    self._arrived.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._arrived.notify_all()
            self._room.notify_all()

    def __enter__(self) -> ReadAhead:
        # A request that hangs holds up no process that has ended its job.
        for _ in range(CONNECTIONS if self._files else 0):
            with suppress(RuntimeError):  # no more threads: fewer requests at a time
                threading.Thread(target=self._work, name="ckpt-fetch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._closed = True
            self._room.notify_all()
            while self._writing:
                self._arrived.wait()


def _joined(parts: Sequence[tuple[int, Buffer]]) -> tuple[int, Buffer]:
    """Return ranges, (first byte, content) in ascending order, as one.

    What is between them is needed by nobody. As floats it is NaN, which a sum refuses.
    """
    (first, _), (last, end) = parts[0], parts[-1]
    data = bytearray(b"\xff") * (last + len(end) - first)
    for begin, part in parts:
        data[begin - first : begin - first + len(part)] = part
    return first, data
