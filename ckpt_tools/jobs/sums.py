"""The sums of an average: lined up, recorded, and laid out in the files of a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.prefixes import renamed
from ..checkpoints.quantized import without_quantization
from ..errors import UsageError
from ..formats.file_plan import OutTensor
from ..formats.format import Writing
from ..formats.header import Header
from ..formats.sharded import parse_size
from ..series.lora import CONFIG, Adapter, AveragedAdapter, average_adapters, config_text
from ..series.weighted_sums import weighted_sums
from ..storage.source import Stamp
from .addends import Addends, ByTensor, inputs_of, record_of
from .assembly import Assembly, assemble
from .checksums import with_place
from .companions import companions
from .lined_up import LinedUp, line_up
from .options import AveragedOutput
from .outputs import Target, default_target, named_target
from .provenance import Input, provided

if TYPE_CHECKING:
    from .recalibrate import Opened, RecalibrationReport


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """The sums of an average, still without a place.

    Attributes:
        addends: with the coefficients over all values, where tensors have their own.
        lined_up: the weights that are summed.
        by_tensor: coefficients of tensors that have their own.
        adapter: of ``lora="product"``; else empty.
        tensors: name to sum, in the order of the output.
        inputs: to record, oldest first; with the hashes that are known.
        network: on which statistics are measured; None if that is not asked for, or it has none.
        recalibration: how they are measured, and what came of it.
        notes: about that.
    """

    addends: Addends
    lined_up: LinedUp
    by_tensor: ByTensor
    adapter: AveragedAdapter
    tensors: Mapping[str, OutTensor]
    inputs: tuple[Input, ...]
    network: Opened | None = None
    recalibration: RecalibrationReport | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, addends: Addends) -> Sums:
        """Line up the weights, and say how each tensor is summed.

        Raises:
            CkptError: the weights do not line up, or cannot be averaged.
        """
        members, matching = addends.members, addends.matching
        lined_up = line_up(members, addends.names, matching, mixed_dtypes=addends.mixed_dtypes, chosen=addends.chosen)
        by_tensor = ByTensor() if addends.by_tensor is None else addends.by_tensor(lined_up)
        if by_tensor.mean:
            addends = replace(addends, coefficients=by_tensor.mean, notes=(*addends.notes, *by_tensor.notes))
        tensors = weighted_sums(
            lined_up.aligned,
            addends.coefficients,
            dtype=addends.dtype or lined_up.states[-1].dtype,
            keep_running=matching.buffers == "last",
            shared=lined_up.shared,
            by_name={name: (own,) for name, own in by_tensor.coefficients.items()},
        )
        adapter = AveragedAdapter()
        if matching.lora == "product":
            adapter = _adapter(addends, lined_up)
            both = tensors | adapter.tensors
            tensors = {name: both[name] for name in lined_up.renamed[-1].values() if name in both}
        inputs = (*addends.before, *inputs_of(addends, lined_up)[-len(addends.sources) :])
        return cls(addends, lined_up, by_tensor, adapter, tensors, inputs)

    @property
    def base(self) -> Header:
        """The last checkpoint, whose other entries the output has."""
        return self.addends.members[-1].header

    @property
    def unique(self) -> dict[OutTensor, None]:
        """The tensors, tied ones once."""
        return dict.fromkeys(self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, tied ones once."""
        return sum(tensor.nbytes for tensor in self.unique)

    @property
    def bytes_read(self) -> int:
        """Bytes of the tensors that are summed."""
        return sum(tensor.numel * tensor.terms.width for tensor in self.unique)

    @property
    def stamps(self) -> list[Stamp]:
        """Stamps of the files that are read."""
        return [stamp for member in self.addends.members for stamp in member.header.files]

    @property
    def source_files(self) -> list[Path]:
        """Files of the checkpoints; not those of an average that is extended, which are not read again."""
        return [path for member in self.addends.sources for path in member.header.names.values()]

    def target(self, output: AveragedOutput) -> Target:
        """Return where the output goes: in the place of a replayed one, as it is named, else by the checkpoints."""
        headers = [member.header for member in self.addends.members]
        usual = default_target(headers) if self.adapter.config is None else Target.of("averaged/")
        return self.addends.target or named_target(output, headers, usual) or usual

    def hashed(self, found: Mapping[Path, str] | None) -> Sums:
        """Return the sums with the SHA-256 of the source files in the record, or a place for it if it is not known."""
        n = len(self.addends.sources)
        digests = (
            {name: "0" * 64 if found is None else found[path] for name, path in member.header.names.items()}
            for member in self.addends.sources
        )
        hashed = (replace(each, sha256=digest) for each, digest in zip(self.inputs[-n:], digests, strict=True))
        return replace(self, inputs=(*self.inputs[:-n], *hashed))

    def laid_out(self, target: Target, output: AveragedOutput) -> Assembly:
        """Lay the sums out in the files of the target, with a record of the inputs.

        Raises:
            CkptError: the target cannot hold them.
        """
        state, more = self.lined_up.states[-1], {}
        if self.by_tensor.ratios:
            more["ratios"] = self.by_tensor.ratios
        if self.network is not None and self.recalibration is not None:
            more["recalibrated"] = provided(self.network.record(self.recalibration))
        writing = Writing(
            name=self.addends.name or target.name,
            provenance=record_of(self.addends, self.inputs, state, **more),
            untie=output.untie,
            max_bytes=None if output.max_shard_size is None else parse_size(output.max_shard_size),
            like=self.base,
        )
        assembly = assemble(
            self.tensors,
            writing,
            target=target,
            base=self.base,
            state=state,
            renamed=self.lined_up.renamed[-1],
            edited=_edited(self.base, self.adapter, target, dequantize=self.addends.matching.dequantize),
        )
        return with_place(assembly, output.write_checksums)


def _adapter(addends: Addends, lined_up: LinedUp) -> AveragedAdapter:
    """Average the products of the low-rank factors."""
    weights = [renamed(state.tensors, bare) for state, bare in zip(lined_up.states, lined_up.renamed, strict=True)]
    each = zip(addends.members, weights, addends.names, addends.coefficients, strict=True)
    adapters = [Adapter.of(member.header, own, name, coefficient) for member, own, name, coefficient in each]
    return average_adapters(adapters, dtype=addends.dtype, keys=addends.matching.keys)


def _edited(base: Header, adapter: AveragedAdapter, target: Target, *, dequantize: bool) -> dict[str, bytes | None]:
    """Return the files beside the weights that change with these: name to new content, or None for no file.

    Raises:
        UsageError: one of them says how to read the weights, and the target is no folder.
    """
    edited = dict(without_quantization(companions(base, []))) if dequantize and target.folder else {}
    if adapter.config is not None:
        if not target.folder:
            raise UsageError(
                f"{target.path}: the rank and the scale of a PEFT adapter are in its {CONFIG}. Give `out` a name "
                "without suffix, for a folder with both."
            )
        edited[CONFIG] = config_text(adapter.config)
    return edited
