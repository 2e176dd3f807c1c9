"""Inner products by torch: of tensors that C cannot read or does not know, and where there is no C extension."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..storage.source import OpenFiles
from ..tensors import DType, TensorSpec
from .payload import Buffer, Reader, TensorSource, torch_dtype
from .summation import real_dtype
from .tiles import Tile


class TorchProducts:
    """Adds inner products; each thread has its own, with its buffers."""

    def __init__(self, files: OpenFiles) -> None:
        self._files = files
        self._readers: list[Reader] = []

    def add(self, specs: Sequence[TensorSpec], blocks: Sequence[range | Tile], memory: bytearray) -> None:
        """Add what C adds for these blocks of a tensor; see `native.gram`.

        Args:
            memory: float64, a square matrix with a row for each tensor, rounded up to a multiple of 4.
        """
        n = len(specs)
        sources = [TensorSource(spec, self._files) for spec in specs]
        counts = [block.numel if isinstance(block, Tile) else len(block) for block in blocks]
        nbytes = max(counts, default=0) * max(source.item for source in sources)
        if len(self._readers) < n or len(self._readers[0].buffer.bytes) < nbytes:
            self._readers = [Reader(nbytes) for _ in range(n)]
        sums = torch.frombuffer(memory, dtype=torch.float64).view(-(-n // 4) * 4, -1)[:n, :n]
        for block, count in zip(blocks, counts, strict=True):
            for reader, source in zip(self._readers, sources, strict=False):
                if isinstance(block, Tile):
                    reader.read_tile(source, block)
                else:
                    reader.read(source, block.start, block.stop)
            sums += _products([reader.buffer for reader in self._readers[:n]], [spec.dtype for spec in specs], count)


def _products(buffers: Sequence[Buffer], dtypes: Sequence[DType], count: int) -> torch.Tensor:
    reals = dtypes[0].itemsize // real_dtype(dtypes[0]).itemsize
    wide = torch.empty(len(buffers), count * reals, dtype=torch.float64)
    for row, buffer, dtype in zip(wide, buffers, dtypes, strict=True):
        values = buffer.view(torch_dtype(real_dtype(dtype)), count * reals)
        row.copy_(values if values.dtype in _DIRECT else values.float())
    wide[:-1] -= wide[-1]
    return (wide @ wide.T).triu()


_DIRECT = (torch.float64, torch.float32, torch.bfloat16)  # whose conversion to float64 torch has vectorised
