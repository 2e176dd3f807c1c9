"""Running sums: a soup of one more checkpoint is made from the float64 sum of those before it, and that checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...formats import read_header
from ...formats.file_plan import OutTensor, Terms
from ...formats.format import Writing
from ...formats.safetensors import SAFETENSORS
from ...series.candidates import Candidate
from ...series.member import Member
from ...series.weighted_sums import weighted_sums
from ...storage.hidden import remove
from ...tensors import DTYPES, DType, TensorSpec
from ..assembly import Assembly
from ..run import write
from .making import Maker


class RunningSum:
    """The sum of checkpoints in a file, to which one is added at a time.

    What is read for a soup of any size is the sum and one checkpoint; a sum of two is read from the two themselves.

    Args:
        maker: of the series, in which every checkpoint has every tensor.
        path: for the file, which is removed at the end.

    Attributes:
        path: of the file.
        order: in which checkpoints are added to the sum; the last one is that of the next soup.
    """

    def __init__(self, maker: Maker, path: Path) -> None:
        self.order: Sequence[Member] = ()
        self.path, self._maker = path, maker
        self._members: tuple[Member, ...] = ()
        self._sums: dict[str, TensorSpec] = {}  # name to the sum; while there is one member, to its own tensor

    @staticmethod
    def nbytes(maker: Maker) -> int:
        """Return the size of the sum."""
        specs = (maker.spec(name, maker.members[-1]) for name in _averaged(maker))
        return sum(math.prod(spec.shape) * _of_sum(spec).itemsize for spec in specs)

    def make(self, candidates: Sequence[Candidate], paths: Sequence[Path]) -> None:
        """Write the soup of all in `order`, from the sum of those before the last, and the last.

        Raises:
            CkptError: see `engine.run`.
        """
        *before, further = self.order
        for member in before[len(self._members) :]:
            self._add(member)
        for candidate, path in zip(candidates, paths, strict=True):
            self._make(candidate, further, path)

    def _add(self, member: Member) -> None:
        if not self._members:
            self._sums = {name: self._maker.spec(name, member) for name in _averaged(self._maker)}
        else:
            tensors = {}
            for name, spec in self._sums.items():
                terms = Terms.of([(spec, 1.0), (self._maker.spec(name, member), 1.0)])
                tensors[name] = OutTensor(_of_sum(spec), spec.shape, terms, name)
            files = SAFETENSORS.plan(tensors, Writing(name=self.path.name))
            self._write(Assembly(self.path, files, folder=False))
            tree = read_header(self.path).tree
            self._sums = {name: tree[name] for name in self._sums}
        self._members = (*self._members, member)

    def _make(self, candidate: Candidate, further: Member, path: Path) -> None:
        share = candidate.coefficients[0]
        tied: dict[OutTensor, OutTensor] = {}

        def of_sum(tensor: OutTensor, name: str) -> OutTensor:
            if name not in self._sums:
                return tensor
            terms = Terms.of([(self._sums[name], share), (self._maker.spec(name, further), share)])
            return tied.setdefault(tensor, replace(tensor, terms=terms))

        self._write(self._maker.planned([candidate], [path], instead=of_sum)[0])

    def end(self) -> None:
        """Remove the file."""
        remove(self.path)

    def _write(self, assembly: Assembly) -> None:
        running = self._maker.running
        stamps = self._maker.stamps + ([*read_header(self.path).files] if self.path.exists() else [])
        options: dict[str, Any] = {"threads": running.threads, "allow_nonfinite": running.allow_nonfinite}
        write(assembly, stamps, force=True, internal=True, **options)


def _averaged(maker: Maker) -> list[str]:
    """Return the names of the tensors that are summed."""
    own = weighted_sums(
        maker.lined_up.aligned,
        [1.0] * len(maker.members),
        dtype=maker.dtype,
        keep_running=maker.matching.buffers == "last",
        shared=maker.lined_up.shared,
    )
    return [name for name, tensor in own.items() if not tensor.copied and tensor.numel]


def _of_sum(spec: TensorSpec) -> DType:
    return DTYPES["complex128" if "complex" in spec.dtype.name else "float64"]
