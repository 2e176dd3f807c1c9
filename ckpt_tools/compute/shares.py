"""Shares: how several processes, at once or one after another, divide the work units of one job.

All of them make the same plan, and so the same units. Each fills its own, in the same files, and tells which are done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol


class SliceSum(NamedTuple):
    """A CRC-32 that the end of a file needs.

    Attributes:
        file: number of the output file.
        offset: of the tensor in it, in bytes.
        end: of the slice in the tensor, in bytes.
        crc: of the slice; of a tile, what it adds to that of all bytes up to its end.
    """

    file: int
    offset: int
    end: int
    crc: int


class Share(Protocol):
    """The work units that a run does, and where it tells what is done."""

    @property
    def completes(self) -> bool:
        """True if all units are done after this run; it then writes what depends on checksums."""

    def todo(self, sizes: Sequence[int]) -> Collection[int]:
        """Return the numbers of the units to do.

        Args:
            sizes: bytes that each unit moves.
        """

    def done(self, units: Sequence[int], sums: Sequence[SliceSum]) -> None:
        """Take note of units that are written, and of checksums of slices; called in one thread, some times a second.

        All checksums of a unit come with it or before it. Those of a unit that is not done yet may be among them.
        """

    def flush(self) -> None:
        """Wait until all that was noted is on the disk."""

    def sums(self) -> Iterable[SliceSum]:
        """Return the checksums of all slices that were noted, in any run; asked for if `completes`."""


def shares(sizes: Sequence[int], count: int) -> list[range]:
    """Share work units out in their order: each share takes those whose middle lies in its part of all bytes.

    Args:
        sizes: bytes that each unit moves.
        count: how many shares.

    Returns:
        The units of each.
    """
    total, done, share = sum(sizes), 0, 0
    bounds = [0]
    for unit, size in enumerate(sizes):
        while share < count - 1 and (2 * done + size) * count >= 2 * total * (share + 1):
            bounds.append(unit)
            share += 1
        done += size
    bounds += [len(sizes)] * (count + 1 - len(bounds))
    return [range(begin, end) for begin, end in pairwise(bounds)]
