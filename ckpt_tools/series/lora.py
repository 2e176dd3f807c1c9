"""LoRA: the average of low-rank updates, as one update whose rank is the sum of theirs.

An update is s B A, with s the scale that the adapter names. The factors of sum c_i s_i B_i A_i are the rows of all A_i
one below the other, and the columns of all c_i (s_i / s) B_i side by side, where s is the scale of the new adapter.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeGuard

from ..checkpoints.quantized import configuration
from ..checkpoints.scalars import as_number
from ..errors import AlignmentError, LayoutError, UnsupportedError, UsageError
from ..formats.file_plan import OutTensor, Terms
from ..formats.header import Header
from ..tensors import ChunkedSpec, DType, ScaledSpec, Storage, SummedSpec, Tensor, TensorSpec, c_strides

LORA = ("factors", "product")
CONFIG = "adapter_config.json"
"""PEFT's configuration of an adapter, which has rank and scale."""

# Factors, as PEFT, loralib, torchtune, kohya, diffusers and XLabs name them.
_FACTOR = r"lora(?:\d*|_linear_layer)[._](?:embedding_)?"
_EITHER = re.compile(rf"(?<![A-Za-z]){_FACTOR}(?:[AaBb]|down|up)(?:[._]|$)")
# The first one: before, name, and after it.
_FIRST = re.compile(
    rf"((?:.*(?<![A-Za-z]))?)({_FACTOR}(?:A|a|down))((?:\.\w+)?(?:\.weight)?)",
    re.DOTALL,
)
_SECOND = {"A": "B", "a": "b", "down": "up"}
# Parts of an update that is no product of two factors.
_OTHERS = re.compile(
    r"(?:.*[._])?(lora_magnitude_vector|dora_scale|lora_E|lora_mid|lora_ranknum|lora_\w+_adapter"  # the last of NeMo
    r"|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|oft_(?:blocks|diag|r)|boft_\w+|vera_lambda_\w+)(?:\..*)?",
    re.DOTALL,
)
# Of PEFT: starts that change the base by as much as the rank says, and adapters of other forms.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OTHER_FORMS = (
    "use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "target_parameters",
    "layer_replication",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A checkpoint with LoRA updates, in an average.

    Attributes:
        header: of the checkpoint.
        tensors: its weights, by names without wrappers.
        name: for messages.
        coefficient: of the average.
        config: PEFT's configuration of it; empty if there is none.
    """

    header: Header
    tensors: Mapping[str, Tensor]
    name: str
    coefficient: float
    config: Mapping[str, Any]

    @classmethod
    def of(cls, header: Header, tensors: Mapping[str, Tensor], name: str, coefficient: float) -> Adapter:
        """Read the configuration of an adapter, if PEFT wrote it.

        Raises:
            UnsupportedError: it is no plain LoRA, or its scale is where it cannot be changed.
        """
        of_peft = any("lora_A" in each or "lora_embedding_A" in each for each in tensors)
        config = configuration(header, CONFIG) if of_peft else {}
        if config:
            _check_config(header, config)
        elif "lora_adapter_metadata" in header.metadata:
            raise UnsupportedError(
                f"{header.path}: the scale of its updates is in its __metadata__, as text that `lora='product'` "
                "does not rewrite. Save the adapter with PEFT first."
            )
        return cls(header, tensors, name, coefficient, config)


@dataclass(frozen=True, slots=True, eq=False)
class _Update:
    """The names of what one update consists of.

    Attributes:
        module: what it is added to.
        first, second: the factors.
        bias: of the second factor; None if it has none.
        alpha: the scale times the rank; None if the adapter has none among its tensors.
    """

    module: str
    first: str
    second: str
    bias: str | None
    alpha: str | None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.first, self.second, self.bias, self.alpha) if name is not None]


@dataclass(slots=True, eq=False)
class AveragedAdapter:
    """An average of adapters, which is one itself.

    Attributes:
        tensors: by name.
        left_out: names that only some checkpoints have.
        config: PEFT's configuration for them; None if the checkpoints have none.
        notes: what a user may not expect, in words.
    """

    tensors: dict[str, OutTensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    config: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def is_factor(name: str) -> bool:
    """Return True for a factor of an update, by its name."""
    return _EITHER.search(name) is not None


def factor_names(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names of all that updates consist of.

    Raises:
        UnsupportedError: an update that is no product of two factors.
    """
    return {name for update in _updates(tensors).values() for name in update.names}


def average_adapters(adapters: Sequence[Adapter], *, dtype: DType | None, keys: str) -> AveragedAdapter:
    """Average LoRA updates exactly, but for the rounding of the factors to their dtype.

    Args:
        adapters: oldest first; the output has the names of the last one.
        dtype: of the factors; as in the checkpoints if None.
        keys: ``strict`` or ``intersection``.

    Raises:
        AlignmentError: the updates are of different modules, or of other shapes but for their rank.
        LayoutError, UnsupportedError, UsageError: no updates; of another form; `keys` is ``union``.
    """
    updates = [_updates(adapter.tensors) for adapter in adapters]
    if not all(updates):
        lacking = next(adapter.name for adapter, found in zip(adapters, updates, strict=True) if not found)
        raise LayoutError(f"{lacking}: holds no LoRA factors, so `lora='product'` has nothing to average.")
    if keys == "union":
        raise UsageError("`lora='product'` goes with `keys='strict'` or `keys='intersection'`.")
    configured = [bool(adapter.config) for adapter in adapters]
    if any(configured) and not all(configured):
        raise LayoutError(
            f"{adapters[configured.index(False)].name}: has no {CONFIG} beside it, which has the scale of its updates; "
            f"{adapters[configured.index(True)].name} has one."
        )
    made = AveragedAdapter()
    counts = Counter(key for found in updates for key in found)
    for key, count in counts.items():
        if count == len(adapters):
            continue
        names = next(found[key].names for found in updates if key in found)
        if keys == "strict":
            lacking = next(adapter.name for adapter, found in zip(adapters, updates, strict=True) if key not in found)
            raise AlignmentError(
                f"{lacking} has no LoRA factor '{names[0]}' ({count} of {len(adapters)} checkpoints have it). "
                "Use `keys='intersection'` to average what all share."
            )
        made.left_out += names
    shared = [key for key in updates[-1] if counts[key] == len(adapters)]
    weighing = [i for i, adapter in enumerate(adapters) if adapter.coefficient] or [len(adapters) - 1]
    adapters, updates = [adapters[i] for i in weighing], [updates[i] for i in weighing]
    ranks: dict[str, tuple[int, float]] = {}
    for key in shared:
        _average(made, ranks, adapters, [found[key] for found in updates], dtype)
    if adapters[-1].config:
        made.config = _configuration(adapters[-1], ranks)
    elif any(update.alpha is None for found in updates for update in found.values()):
        made.notes.append(
            "No alpha is stored, so each update counts as the plain product of its factors. Where the scale is alpha "
            "divided by the rank, multiply alpha by as much as the rank has grown."
        )
    return made


def _updates(tensors: Mapping[str, Tensor]) -> dict[str, _Update]:
    found: dict[str, _Update] = {}
    for name in tensors:
        if (other := _OTHERS.fullmatch(name)) is not None:
            raise UnsupportedError(
                f"'{name}' belongs to an update that is more than the product of two factors ({other[1]}), so "
                "`lora='product'` cannot average it. Merge each adapter into its model, and average these."
            )
        if (match := _FIRST.fullmatch(name)) is None:
            continue
        lead, kind, tail = match.groups()
        second = re.sub(r"(A|a|down)$", lambda end: _SECOND[end[1]], kind)
        if lead + second + tail not in tensors:
            raise UnsupportedError(
                f"'{name}' has no '{lead}{second}{tail}' beside it, so it is no factor of an update."
            )
        module = lead.rstrip("._")
        bias = lead + second + tail.removesuffix(".weight") + ".bias"
        alphas = (f"{lead}alpha", f"{module}.alpha", f"{lead}lora.alpha")
        found[f"{module} {kind} {tail}"] = _Update(
            module,
            name,
            lead + second + tail,
            bias if bias in tensors else None,
            next((alpha for alpha in alphas if alpha in tensors), None),
        )
    return found


def _average(
    made: AveragedAdapter,
    ranks: dict[str, tuple[int, float]],
    adapters: Sequence[Adapter],
    updates: Sequence[_Update],
    dtype: DType | None,
) -> None:
    """Make the tensors of one update.

    Args:
        ranks: receives the rank and alpha of the module.
        updates: of each adapter.
    """
    last = updates[-1]
    factors = [_factors(adapter, update, dtype) for adapter, update in zip(adapters, updates, strict=True)]
    for adapter, (first, second) in zip(adapters, factors, strict=True):
        for own, other, axis in ((first, factors[-1][0], 0), (second, factors[-1][1], 1)):
            shapes = [[size for i, size in enumerate(each.shape) if i != axis] for each in (own, other)]
            if shapes[0] != shapes[1] or (own.dtype is not other.dtype and dtype is None):
                raise AlignmentError(
                    f"the LoRA update of '{last.module}' is {own.dtype.name} of shape {[*own.shape]} in {adapter.name} "
                    f"but {other.dtype.name} of shape {[*other.shape]} in {adapters[-1].name}."
                    + (" Choose the dtype of the average, such as `dtype='float32'`." if shapes[0] == shapes[1] else "")
                )
    sizes = [first.shape[0] for first, _ in factors]
    rank = sum(sizes)
    scales = [_scale(adapter, update, size) for adapter, update, size in zip(adapters, updates, sizes, strict=True)]
    rooted = bool(adapters[-1].config.get("use_rslora"))
    new_scale = scales[-1] or 1.0
    alpha = _round_number(new_scale * (math.sqrt(rank) if rooted else rank))
    shares = [scale / new_scale for scale in scales]
    if not all(map(math.isfinite, (alpha, *shares))):
        raise LayoutError(
            f"{adapters[-1].name}: the scale of '{last.module}', {new_scale:g}, is too large, or too small beside "
            f"those of the other checkpoints. Look at lora_alpha in {CONFIG}, or at the alpha tensors."
        )
    if adapters[-1].config:
        new_scale = alpha / (math.sqrt(rank) if rooted else rank)
        ranks[last.module] = rank, alpha
    elif last.alpha is not None:
        new_scale, made.tensors[last.alpha] = _alpha(adapters[-1], last.alpha, alpha, rank)
    shares = [adapter.coefficient * (scale / new_scale) for adapter, scale in zip(adapters, scales, strict=True)]
    for name, axis, coefficients in ((last.first, 0, [1.0] * len(adapters)), (last.second, 1, shares)):
        specs = _side_by_side([each[axis] for each in factors], axis, rank)
        terms = Terms.of(zip(specs, coefficients, strict=True))
        made.tensors[name] = OutTensor(dtype or specs[-1].dtype, specs[-1].shape, terms, name)
    if last.bias is not None:
        made.tensors[last.bias] = _bias(adapters, updates, shares, last.bias, dtype)


def _bias(
    adapters: Sequence[Adapter], updates: Sequence[_Update], shares: Sequence[float], name: str, dtype: DType | None
) -> OutTensor:
    """Sum the biases of the second factors, which are scaled as these are."""
    specs: list[TensorSpec] = []
    for adapter, update in zip(adapters, updates, strict=True):
        spec = None if update.bias is None else adapter.tensors[update.bias]
        if not isinstance(spec, TensorSpec) or (specs and specs[0].shape != spec.shape):
            raise AlignmentError(f"{adapter.name} has no '{name}', or one of another shape.")
        specs.append(spec)
    terms = Terms.of(zip(specs, shares, strict=True))
    return OutTensor(dtype or specs[-1].dtype, specs[-1].shape, terms, name)


def _factors(adapter: Adapter, update: _Update, dtype: DType | None) -> tuple[TensorSpec, TensorSpec]:
    first, second = adapter.tensors[update.first], adapter.tensors[update.second]
    sound = isinstance(first, TensorSpec) and isinstance(second, TensorSpec)
    if not (
        sound and len(first.shape) > 1 and len(second.shape) > 1 and 0 < first.shape[0] == second.shape[1]  # type: ignore[union-attr]
        and first.dtype.averaged and second.dtype.averaged  # type: ignore[union-attr]
        and ScaledSpec not in (type(first), type(second)) and ChunkedSpec not in (type(first), type(second))
    ):  # fmt: skip
        raise UnsupportedError(
            f"{adapter.name}: '{update.first}' and '{update.second}' are no factors of a plain product, or "
            "their inner sizes differ. Merge each adapter into its model, and average these."
        )
    return first, second  # type: ignore[return-value]


def _side_by_side(specs: Sequence[TensorSpec], axis: int, rank: int) -> list[TensorSpec]:
    """Widen each tensor to the whole rank along an axis; it is 0 outside of its own part."""
    if len(specs) == 1:
        return [*specs]
    made: list[TensorSpec] = []
    at = 0
    for spec in specs:
        made.append(_widened(spec, axis, at, rank))
        at += spec.shape[axis]
    return made


def _widened(spec: TensorSpec, axis: int, at: int, rank: int) -> TensorSpec:
    if isinstance(spec, SummedSpec):
        return SummedSpec.of((_widened(each, axis, at, rank), coefficient) for each, coefficient in spec.terms)
    shape = (*spec.shape[:axis], rank, *spec.shape[axis + 1 :])
    offsets = tuple(at if i == axis else 0 for i in range(len(shape)))
    storage = Storage(spec.storage.path, 0, 0, spec.storage.big_endian)
    return ChunkedSpec(spec.dtype, shape, c_strides(shape), 0, storage, ((offsets, spec),))


def _scale(adapter: Adapter, update: _Update, rank: int) -> float:
    """Return by what the product of an update is multiplied."""
    if adapter.config:
        alpha = _of_module(adapter.config.get("alpha_pattern"), update.module, adapter.config.get("lora_alpha"))
        if not _is_number(alpha):
            raise LayoutError(f"{adapter.name}: its {CONFIG} has no number as lora_alpha.")
        return alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
    if update.alpha is None:
        return 1.0
    alpha = as_number(adapter.header, adapter.tensors[update.alpha])
    if not _is_number(alpha):
        raise LayoutError(f"{adapter.name}: its '{update.alpha}' is not one number.")
    return alpha / rank


def _of_module(pattern: Any, module: str, default: Any) -> Any:
    """Return what a pattern of PEFT has for a module: the first key that is the end of its name."""
    for key, value in pattern.items() if isinstance(pattern, dict) else ():
        if _compiled(key).match(module.removeprefix(_PEFT)):
            return value
    return default


@lru_cache(maxsize=1 << 16)
def _compiled(key: str) -> re.Pattern[str]:
    """Compile a key of a pattern as PEFT has it; not one that can take for ever, as `(a+)+` or many `.*`."""
    if re.search(r"\)[*+{]", key) or len(re.findall(r"[*+}]", key)) > 3:
        raise LayoutError(f"{CONFIG}: the pattern {key!r} repeats too much. Write it without repeated groups.")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise LayoutError(f"{CONFIG}: the pattern {key!r} is no regular expression ({error}).") from error


_PEFT = "base_model.model."


def _alpha(adapter: Adapter, name: str, value: float, rank: int) -> tuple[float, OutTensor]:
    """Return the scale that an alpha tensor gives, and the tensor, in the dtype that it has."""
    import torch

    from ..compute.payload import torch_dtype

    spec = adapter.tensors[name]
    if not isinstance(spec, TensorSpec):
        raise LayoutError(f"{adapter.name}: its '{name}' is not one number.")
    made = torch.tensor(value, dtype=torch.float64).to(torch_dtype(spec.dtype)).reshape(spec.shape)
    if not math.isfinite(float(made)) or not float(made):
        raise LayoutError(f"{adapter.name}: its '{name}' would be {value:g}, which {spec.dtype.name} cannot hold.")
    data = made.reshape(-1).view(torch.uint8).numpy().tobytes()
    return float(made) / rank, OutTensor(spec.dtype, spec.shape, Terms(), name, finite=False, data=data)


def _is_number(value: Any) -> TypeGuard[float]:
    """True for what a float64 can hold; JSON may have any digits, and NaN."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _round_number(value: float) -> float:
    """Return a whole number where it is one but for rounding."""
    if math.isinf(value):
        return value
    return round(value) if abs(value - round(value)) <= 1e-9 * abs(value) else value


def _configuration(adapter: Adapter, ranks: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Return PEFT's configuration with new ranks and alphas; those of single modules are in its patterns."""
    config = dict(adapter.config)
    (rank, alpha), _ = Counter(ranks.values()).most_common(1)[0]
    names = {module: module.removeprefix(_PEFT) for module in ranks}
    config["r"], config["lora_alpha"] = rank, alpha
    config["rank_pattern"] = _pattern({names[module]: own for module, (own, _) in ranks.items()}, rank)
    config["alpha_pattern"] = _pattern({names[module]: own for module, (_, own) in ranks.items()}, alpha)
    return config


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Return the pattern from which PEFT takes these values, by the names of modules."""
    found = {module: value for module, value in values.items() if value != default}
    for module, value in values.items() if found else ():
        parts = module.split(".")
        ends = (".".join(parts[i:]) for i in range(1, len(parts)))
        if any(found.get(end, value) != value for end in ends):
            # A key is also the end of other names. One that begins with ^, which older releases do not know, is not.
            return {f"^{re.escape(name)}": own for name, own in found.items()}
    return found


def _check_config(header: Header, config: Mapping[str, Any]) -> None:
    """Refuse an adapter of PEFT that is no plain LoRA.

    Raises:
        UnsupportedError: it is not.
    """
    kind, start = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    other = next((key for key in _OTHER_FORMS if config.get(key)), None)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        other = f"init_lora_weights={start}"
    if kind != "LORA" or other is not None:
        raise UnsupportedError(
            f"{header.path}: its {CONFIG} says {other or f'peft_type={kind}'}, and `lora='product'` averages plain "
            "LoRA alone. Merge each adapter into its model, and average these."
        )


def config_text(config: Mapping[str, Any]) -> bytes:
    """Return a configuration as PEFT writes it."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
