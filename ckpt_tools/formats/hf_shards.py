"""Safetensors files in which each process saved its chunks: HuggingFaceStorageWriter of torch.distributed.checkpoint.

The names are ``shard-<process>-model-<file>-of-<files>.safetensors``, and ``__metadata__`` has the offsets of each
chunk in its tensor. No file has the shapes of the whole tensors: they reach as far as the chunks do, as for torch's own
reader.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import CorruptError
from ..storage.source import store_of
from ..tensors import Chunk, TensorSpec, join
from .format import Format
from .header import Header
from .safetensors import SAFETENSORS

_FILE = re.compile(r"shard-(\d{5,9})-model-(\d{5,9})-of-(\d{5,9})\.safetensors")


class HFShards(Format):
    """The format of a folder with the shards of processes."""

    name = "hf-shards"
    folder = True
    usual_suffix = ".safetensors"

    @property
    def written_as(self) -> Format:
        return SAFETENSORS

    def sniff(self, path: Path, start: bytes) -> bool:
        return not start and any(map(_FILE.fullmatch, store_of(path).names(path)))

    def read(self, path: Path) -> Header:
        """Read the headers of all processes, and join their chunks.

        Raises:
            CorruptError: a process is missing, or the chunks of a tensor do not make it.
        """
        names = [*filter(_FILE.fullmatch, store_of(path).names(path))]
        _check_names(path, names)
        headers = []
        orders: list[dict[str, tuple[int, ...]]] = []
        pieces: defaultdict[str, list[tuple[tuple[int, ...], Any]]] = defaultdict(list)
        for name in names:
            header, offsets = SAFETENSORS.parse(path / name)
            if offsets is None:
                raise CorruptError(f"{path / name}: does not say where its chunks belong. Get a fresh copy.")
            headers.append(header)
            orders.append(offsets)
            for key, place in offsets.items():
                pieces[key].append((place, header.tree[key]))
        # A process lacks what another saved alone, so the longest record has the best order.
        orders.sort(key=len, reverse=True)
        ordered = dict.fromkeys(chain.from_iterable(orders))
        tree = {key: _joined(path, key, pieces[key]) for key in ordered}
        return Header(path, self, tree, tuple(each.files[0] for each in headers), metadata=headers[0].metadata)


HF_SHARDS = HFShards()


def _check_names(path: Path, names: list[str]) -> None:
    """Refuse files of which a process is missing, and those of two saves."""
    numbers = [tuple(map(int, found.groups())) for name in names if (found := _FILE.fullmatch(name))]
    if len({files for _, _, files in numbers}) > 1:
        raise CorruptError(f"{path}: has the files of several saves: {names[0]}, {names[-1]}. Get a fresh copy.")
    present = {process for process, _, _ in numbers}
    missing = next((process for process in range(1, len(present) + 1) if process not in present), None)
    if missing is not None:
        raise CorruptError(
            f"{path}: the files of process {missing} (shard-{missing:05d}-*) are missing. Was the save interrupted? "
            "Get a complete copy."
        )


def _joined(path: Path, name: str, pieces: list[tuple[tuple[int, ...], Any]]) -> Any:
    chunks: list[Chunk] = []
    for offsets, tensor in pieces:
        if not isinstance(tensor, TensorSpec):
            return tensor
        if len(offsets) != len(tensor.shape) or tensor.dtype is not pieces[0][1].dtype:
            raise CorruptError(f"{path}: the chunks of '{name}' differ in dtype or dimensions. Get a fresh copy.")
        if chunks and len(offsets) != len(chunks[0][0]):
            raise CorruptError(f"{path}: the chunks of '{name}' differ in dtype or dimensions. Get a fresh copy.")
        chunks.append((offsets, tensor))
    ends = (tuple(n + size for n, size in zip(offsets, chunk.shape, strict=True)) for offsets, chunk in chunks)
    shape = tuple(map(max, zip(*ends, strict=True)))
    filled = [offsets for offsets, chunk in chunks if chunk.numel]
    if len({*filled}) < len(filled):  # torch saves replicas once
        raise CorruptError(
            f"{path}: two processes have the same chunk of '{name}'. The files are of several saves: keep those of one."
        )
    return join(path, name, chunks[0][1].dtype, shape, chunks)
