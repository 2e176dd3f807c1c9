"""Features: the input of the classifier for each image, computed once, in memory-mapped files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError, WriteError
from ..storage.staged import is_writable, reserve, scratch_file
from .examples import Example


@dataclass(frozen=True, slots=True)
class Row:
    """What is stored of an image: the shape and dtype of one row."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check_space(folder: Path, nbytes: int) -> None:
    """Refuse features that do not fit the disk.

    Raises:
        WriteError: there is no such folder, or too little room in it.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise WriteError(f"`scratch='{folder}'`: {error.strerror}.") from error
    if not folder.is_dir() or not is_writable(folder):
        raise WriteError(f"`scratch='{folder}'`: is no folder that can be written. Choose another place.")
    if nbytes > free:
        raise WriteError(
            f"`scratch='{folder}'`: the features take {nbytes:,} bytes, and {free:,} are free. Choose another place, "
            "or fewer `images`, or compute them anew in each epoch with `augment`."
        )


@contextmanager
def mapped(folder: Path, images: int, rows: Sequence[Row]) -> Iterator[list[Tensor]]:
    """Give tensors of [images, *row] in memory-mapped files of a folder; see `scratch_file`.

    Raises:
        WriteError: the folder cannot be written, or is full.
    """
    check_space(folder, images * sum(row.nbytes for row in rows))
    tensors = []
    with ExitStack() as stack:
        for row in rows:
            file = stack.enter_context(scratch_file(folder / "ckpt-features", option="scratch"))
            try:
                # Where the disk is full, a write to a hole in a mapped file would end the process.
                reserve(file.fd, 0, images * row.nbytes, file.path)
                size = images * math.prod(row.shape)
                flat = torch.from_file(str(file.path), shared=True, size=size, dtype=row.dtype)
            except WriteError as error:
                raise WriteError(f"`scratch='{folder}'`: the disk is full. Choose another place.") from error
            except RuntimeError as error:  # of torch, which shows the reason of the system
                raise WriteError(f"`scratch='{folder}'`: cannot be used for features ({error}).") from error
            tensors.append(flat.view(images, *row.shape))
        yield tensors


@dataclass(frozen=True, slots=True)
class Features:
    """The input of the classifier for all images, in batches.

    Attributes:
        inputs: [N, ...], in the order in which the images came.
        labels: int64 [N].
        teacher: logits [N, C]; None without a teacher.
        sizes: of the batches.
    """

    inputs: Tensor
    labels: Tensor
    teacher: Tensor | None
    sizes: tuple[int, ...]

    def epoch(self, number: int, seed: int) -> Iterator[Example]:
        """Yield batches of the same sizes: in order in epoch 0, shuffled in every other one."""
        ends = [0]
        for size in self.sizes:
            ends.append(ends[-1] + size)
        generator = torch.Generator().manual_seed(seed + number)
        order = torch.randperm(ends[-1], generator=generator) if number else None
        for begin, end in pairwise(ends):
            at = slice(begin, end) if order is None else order[begin:end]
            yield self.inputs[at], self.labels[at], None if self.teacher is None else self.teacher[at]


def stored(examples: Iterable[Example], inputs: Tensor, teacher: Tensor | None) -> Features:
    """Store batches, one after another.

    Args:
        examples: of at most N images.
        inputs, teacher: [N, ...] to fill.

    Raises:
        DataError: there are more images, or none.
    """
    labels, sizes, done = [], [], 0
    for found, label, logits in examples:
        end = done + len(found)
        if end > len(inputs):
            raise DataError(f"`data` gives more than the {len(inputs)} images that were counted before.")
        inputs[done:end] = found
        if teacher is not None and logits is not None:
            teacher[done:end] = logits
        labels.append(label.cpu())
        sizes.append(len(found))
        done = end
    if not labels:
        raise DataError("`data`: no image could be read.")
    return Features(inputs, torch.cat(labels), teacher, tuple(sizes))
