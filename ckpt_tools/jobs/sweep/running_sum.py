"""Running sums: a soup of one more checkpoint is made from the float64 sum of those before it, and that checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...formats import read_header
from ...formats.file_plan import OutTensor, Terms
from ...formats.format import Writing
from ...formats.safetensors import SAFETENSORS
from ...series.candidates import Candidate
from ...series.member import Member
from ...series.weighted_sums import weighted_sums
from ...storage.staged import remove
from ...tensors import DTYPES, TensorSpec
from ..assembly import Assembly
from ..run import write
from .making import Maker


class RunningSum:
    """The sum of checkpoints in a file, to which one is added at a time.

    What is read for a soup of any size is the sum and one checkpoint; a sum of two is read from the two themselves.

    Args:
        maker: of the series, in which every checkpoint has every tensor.
        path: for the file, which is removed at the end.
    """

    def __init__(self, maker: Maker, path: Path) -> None:
        self._maker, self._path = maker, path
        self._members: tuple[Member, ...] = ()
        self._sums: dict[str, TensorSpec] = {}  # name to the sum; while there is one member, to its own tensor

    def start(self, member: Member) -> None:
        """Begin with one checkpoint."""
        self._members = (member,)
        self._sums = {name: self._spec(name, member) for name in self._averaged()}

    def add(self, member: Member) -> None:
        """Add a checkpoint to the sum.

        Raises:
            CkptError: it cannot be read, or the sum cannot be written.
        """
        tensors = {}
        for name, spec in self._sums.items():
            dtype = DTYPES["complex128" if "complex" in spec.dtype.name else "float64"]
            terms = Terms.of([(spec, 1.0), (self._spec(name, member), 1.0)])
            tensors[name] = OutTensor(dtype, spec.shape, terms, name)
        files = SAFETENSORS.plan(tensors, Writing(name=self._path.name))
        self._write(Assembly(self._path, files, folder=False))
        self._members = (*self._members, member)
        tree = read_header(self._path).tree
        self._sums = {name: tree[name] for name in self._sums}

    def make(self, candidates: Sequence[Candidate], paths: Sequence[Path]) -> None:
        """Write the soup of the sum and one more checkpoint; any other candidate as the maker does.

        Raises:
            CkptError: see `engine.run`.
        """
        for candidate, path in zip(candidates, paths, strict=True):
            further = [member for member in candidate.members if member not in self._members]
            if len(further) != 1 or len(candidate.members) != len(self._members) + 1:
                self._maker.make([candidate], [path])
            else:
                self._make(candidate, further[0], path)

    def _make(self, candidate: Candidate, further: Member, path: Path) -> None:
        share = candidate.coefficients[0]
        tied: dict[OutTensor, OutTensor] = {}

        def of_sum(tensor: OutTensor, name: str) -> OutTensor:
            if name not in self._sums:
                return tensor
            terms = Terms.of([(self._sums[name], share), (self._spec(name, further), share)])
            return tied.setdefault(tensor, replace(tensor, terms=terms))

        self._write(self._maker.planned([candidate], [path], instead=of_sum)[0])

    def end(self) -> None:
        """Remove the file."""
        remove(self._path)

    def _averaged(self) -> list[str]:
        maker = self._maker
        n = len(maker.members)
        own = weighted_sums(
            maker.lined_up.aligned,
            [1.0] * n,
            dtype=maker.dtype,
            keep_running=maker.matching.buffers == "last",
            shared=maker.lined_up.shared,
        )
        return [name for name, tensor in own.items() if not tensor.copied and tensor.numel]

    def _spec(self, name: str, member: Member) -> TensorSpec:
        return self._maker.spec(name, member)

    def _write(self, assembly: Assembly) -> None:
        running = self._maker.running
        stamps = self._maker.stamps + ([*read_header(self._path).files] if self._path.exists() else [])
        write(assembly, stamps, force=True, threads=running.threads, allow_nonfinite=running.allow_nonfinite)
