"""Making: several averages of one series written for one read of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoints.layouts import StateDict
from ...compute.gpu import devices
from ...compute.progress import Progress
from ...formats.file_plan import OutTensor
from ...formats.format import Writing
from ...formats.sharded import parse_size
from ...series.candidates import Candidate
from ...series.member import Member
from ...series.weighted_sums import weighted_sums
from ...storage.source import Stamp
from ...tensors import DType, TensorSpec
from ..addends import Addends, inputs_of, record_of
from ..assembly import Assembly, assemble
from ..lined_up import LinedUp, line_up
from ..options import Matching
from ..outputs import Target, default_target
from ..provenance import short_names
from ..run import manners, write_all
from ..weigh import arguments_of
from .options import Sweeping

CANDIDATES_PER_READ = 16
"""Averages made at a time: the inputs are read once for them."""


@dataclass(frozen=True, slots=True)
class Maker:
    """Writes averages of a series whose weights are lined up once; the bytes are those of `average`.

    Attributes:
        members: all checkpoints, oldest first.
        lined_up: their weights.
        matching, dtype, running: as for `average`.
    """

    members: tuple[Member, ...]
    lined_up: LinedUp
    matching: Matching
    dtype: DType | None
    running: Sweeping

    @classmethod
    def of(
        cls, members: Sequence[Member], names: Sequence[str], matching: Matching, dtype: DType | None, running: Sweeping
    ) -> Maker:
        """Line up the weights of all checkpoints.

        Raises:
            CkptError: see `line_up`.
        """
        lined_up = line_up(members, names, matching, mixed_dtypes=dtype is not None)
        return cls(tuple(members), lined_up, matching, dtype, running)

    def planned(
        self,
        candidates: Sequence[Candidate],
        paths: Sequence[Path],
        evidence: Mapping[str, Any] | None = None,
        instead: Callable[[OutTensor, str], OutTensor] | None = None,
    ) -> list[Assembly]:
        """Lay out the files of candidates, which share their tensors: row i is of candidate i.

        Args:
            evidence: further facts for the provenance.
            instead: from a tensor and its name to the one that takes its place.
        """
        tensors, lasts = self.tensors(candidates), self._lasts(candidates)
        if instead is not None:
            tensors = {name: instead(tensor, name) for name, tensor in tensors.items()}
        return [
            self._laid_out(candidate, path, last, tensors, evidence or {})
            for candidate, path, last in zip(candidates, paths, lasts, strict=True)
        ]

    def tensors(self, candidates: Sequence[Candidate]) -> dict[str, OutTensor]:
        """Return the tensors of candidates by name: row i is of candidate i."""
        return weighted_sums(
            self.lined_up.aligned,
            *[each.row(self.members) for each in candidates],
            dtype=self.dtype or self.lined_up.states[-1].dtype,
            keep_running=self.matching.buffers == "last",
            shared=self.lined_up.shared,
            lasts=self._lasts(candidates),
        )

    def make(
        self,
        candidates: Sequence[Candidate],
        paths: Sequence[Path],
        *,
        on_progress: Progress | None = None,
    ) -> None:
        """Write candidates, reading each input once.

        Raises:
            CkptError: see `engine.run`.
        """
        assemblies = self.planned(candidates, paths)
        read = max(each.bytes_read for each in assemblies)
        size = self.running.gpu_memory
        write_all(
            assemblies,
            self.stamps,
            force=True,
            threads=self.running.threads,
            allow_nonfinite=self.running.allow_nonfinite,
            devices=devices.choose(self.running.device, read),
            gpu_memory=devices.GPU_MEMORY if size is None else parse_size(size, "gpu_memory"),
            **manners(self.running),
            doing="averaging",
            on_progress=on_progress,
        )

    def bytes_moved(self, candidates: Sequence[Candidate], at_once: int = CANDIDATES_PER_READ) -> tuple[int, int]:
        """Return the bytes read and written to make candidates, some at once."""
        read = written = 0
        for begin in range(0, len(candidates), at_once):
            some = candidates[begin : begin + at_once]
            assemblies = self.planned(some, [Path(f"candidate{self.suffix}")] * len(some))
            read += max(each.bytes_read for each in assemblies)
            written += sum(each.nbytes for each in assemblies)
        return read, written

    def spec(self, name: str, member: Member) -> TensorSpec:
        """Return a tensor of a checkpoint; all of them have it."""
        inputs, i = self.lined_up.aligned[name], self.members.index(member)
        if self.lined_up.shared:
            return inputs[-1].placed(lambda path: self.lined_up.shared[path][i])  # type: ignore[union-attr]
        return inputs[i]  # type: ignore[return-value]

    def _weights_of(self, i: int) -> tuple[StateDict, Mapping[str, str]]:
        """Return the weights of checkpoint i, and their names in the output; files with one header have them once."""
        i = min(i, len(self.lined_up.states) - 1)
        return self.lined_up.states[i], self.lined_up.renamed[i]

    def _lasts(self, candidates: Sequence[Candidate]) -> list[int]:
        return [self.members.index(each.members[-1]) for each in candidates]

    @property
    def suffix(self) -> str:
        """Of a candidate's file; empty for a folder."""
        usual = default_target([member.header for member in self.members])
        return "" if usual.folder else "".join(usual.path.suffixes)

    @property
    def stamps(self) -> list[Stamp]:
        """Of all files of the series."""
        return [stamp for member in self.members for stamp in member.header.files]

    def _laid_out(
        self,
        candidate: Candidate,
        path: Path,
        last: int,
        tensors: Mapping[str, OutTensor],
        evidence: Mapping[str, Any],
    ) -> Assembly:
        state, renamed = self._weights_of(last)
        base = self.members[last].header
        own = [self.members.index(member) for member in candidate.members]
        addends = Addends(
            members=candidate.members,
            names=short_names([member.path for member in candidate.members]),
            coefficients=candidate.coefficients,
            matching=self.matching,
            dtype=self.dtype,
            mode=candidate.schedule.mode,
            arguments=arguments_of(candidate.schedule, candidate.numbers, self.matching, self.dtype, self.running),
            ordered_by="",
            notes=(),
            given=(),
        )
        record = record_of(addends, inputs_of(addends, self.lined_up, own), state, **evidence)
        target = Target.of(path)
        writing = Writing(name=target.name, provenance=record, untie=False, max_bytes=None, like=base)
        return assemble(tensors, writing, target=target, base=base, state=state, renamed=renamed)
