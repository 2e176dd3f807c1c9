"""Checkpoints as mappings: the lazy view of one file for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..formats import read_header
from ..formats.header import Header
from ..storage.remote import as_address
from ..tensors import SummedSpec, Tensor, UnsupportedTensor
from .layouts import StateDict, select
from .layouts import states as states_of
from .steps import stored_counters

if TYPE_CHECKING:
    import torch


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """A set of weights inside a checkpoint, name to tensor; a tensor is read when it is asked for.

    Attributes:
        header: what the file says about itself: format, object tree, provenance.
        state: which set of weights this is.
    """

    def __init__(self, header: Header, state: str = "auto") -> None:
        self.header = header
        self.state = select(header, state)

    @classmethod
    def of(cls, header: Header, state: StateDict) -> Checkpoint:
        """View a set of weights that is selected already."""
        found = cls.__new__(cls)
        found.header, found.state = header, state
        return found

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def specs(self) -> Mapping[str, Tensor]:
        """Dtype, shape and position in the file of every tensor, without reading it."""
        return self.state.tensors

    @property
    def states(self) -> tuple[str, ...]:
        """Which sets of weights the file holds: ``raw``, ``ema`` or both."""
        return tuple(states_of(self.header))

    @property
    def counters(self) -> dict[str, int]:
        """Training counters that the file stores, such as ``epoch`` and ``global_step``."""
        return stored_counters(self.header)

    @property
    def provenance(self) -> dict[str, Any] | None:
        """What ckpt-tools wrote about the file, if it made it."""
        return self.header.provenance

    @property
    def foreign(self) -> Counter[str]:
        """Python names in the file that were not understood, and so neither imported nor run."""
        return self.header.foreign

    def __getitem__(self, name: str) -> torch.Tensor:
        spec = self.state.tensors[name]
        if isinstance(spec, UnsupportedTensor):
            raise UnsupportedError(f"{self.path}: '{name}' is {spec.reason}, which is not read here.")
        if type(spec) is SummedSpec:
            from ..compute.torch_sums import read_sum

            return read_sum(spec, name, self.header.files)
        from ..compute.payload import read_tensor

        return read_tensor(spec, self.header.files)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state.tensors)

    def __len__(self) -> int:
        return len(self.state.tensors)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {self.header.format}, {self.state.label}, {len(self)} tensors>"


def open_checkpoint(path: str | Path, *, state: str = "auto") -> Checkpoint:
    """Open a checkpoint of any supported format as a lazy mapping of names to tensors.

    Args:
        path: a file, or a folder with a sharded checkpoint.
        state: ``auto`` (the EMA where there is one), ``raw``, ``ema``, ``eval`` (the averages of a schedule-free
            optimizer), or a dotted path such as ``model.teacher``.

    Returns:
        A mapping; ``checkpoint[name]`` reads one tensor into new memory. Names are those in the file.

    Raises:
        ReadError: missing, damaged, or of no known format. Nothing in the file is run, whatever it holds.
        LayoutError: the asked weights are not inside.
    """
    return Checkpoint(read_header(as_address(path) or Path(path)), state)
