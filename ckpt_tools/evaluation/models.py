"""Models: the network of a checkpoint, from a timm name or a factory of the user.

A name in a checkpoint is only looked up as a timm name; it never decides what code runs.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..batchnorm.calls import Call
from ..checkpoints.open import Checkpoint
from ..checkpoints.prefixes import unwrap
from ..checkpoints.script_arguments import script_arguments
from ..errors import ModelError, UsageError
from ..formats.header import Header
from ..tensors import TensorSpec

INSTALL = "pip install 'ckpt-tools[vision]'"


@contextmanager
def importable(*specs: str | None) -> Iterator[None]:
    """Let the code of the user find its neighbours: the folder of each factory leads `sys.path` meanwhile.

    Modules that were imported stay in `sys.modules`, where their classes are found again by name.

    Args:
        specs: ``module:name`` or ``path/to/file.py:name``; anything else is passed over.
    """
    # A console script does not look into the current folder by itself.
    places = [spec.rpartition(":")[0] for spec in specs if spec is not None and ":" in spec]
    folders = [str(Path(place).resolve().parent) if place.endswith(".py") else "" for place in places]
    sys.path[:0] = folders
    try:
        yield
    finally:
        for folder in folders:
            with suppress(ValueError):  # the user's own code may have taken it out
                sys.path.remove(folder)


def load_factory(spec: str, parameter: str) -> Any:
    """Import ``module:name`` or ``path/to/file.py:name``, which only arguments of the user name, never a checkpoint.

    Raises:
        UsageError: no such file, module or name; names the parameter that asked for it.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(f"`{parameter}={spec!r}`: names no function. Write path/to/file.py:name or module:name.")
    try:
        with importable(spec):
            module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a user's own code fails as it likes
        raise UsageError(f"`{parameter}={spec!r}`: cannot be imported ({type(error).__name__}: {error}).") from error
    if not hasattr(module, name):
        known = difflib.get_close_matches(name, dir(module), n=3)
        hint = f" Did you mean {' or '.join(known)}?" if known else ""
        raise UsageError(f"`{parameter}={spec!r}`: {place} has no '{name}'.{hint}")
    return getattr(module, name)


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    # Under its own name, unless that is taken, so that what it defines can be found again by name.
    found = importlib.util.spec_from_file_location(path.stem if known is None else f"_{path.stem}", path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def call_of(forward: str | None, inputs: int, mask: str | None) -> Call:
    """Return how a model is called, with a function of the user's, ``module:name`` or ``path/to/file.py:name``.

    Raises:
        UsageError: no such function, or options that do not go together.
    """
    return Call(None if forward is None else load_factory(forward, "forward"), inputs, mask)


def build_model(spec: str | None, header: Header, kwargs: Mapping[str, Any], specs: Mapping[str, Any]) -> nn.Module:
    """Make the network of a checkpoint, without its weights.

    Args:
        spec: a timm name, ``module:factory`` or ``path/to/file.py:factory``; the ``arch`` of the checkpoint if None.
        header: of the checkpoint.
        kwargs: for the factory; they override arguments in the checkpoint.
        specs: the tensors of the checkpoint by name; their shapes give the number of classes if nothing else does.

    Raises:
        UsageError: no such model or factory.
        ModelError: the model is unknown, or cannot be made.
    """
    said = stored_arguments(header)
    if spec is not None and ":" in spec:
        factory = load_factory(spec, "model")
        with importable(spec):
            return _made(spec, lambda: factory(**kwargs))
    name = spec if spec is not None else said.get("arch")
    if name is None:
        raise ModelError(
            f"{header.path}: does not record its model. Use `model`, with a timm name or path/to/file.py:factory."
        )
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"'{name}' is a timm model, and timm is not installed. Run: {INSTALL}") from error
    if not timm.is_model(name):
        own_factory = "Use `model='path/to/file.py:factory'`"
        if spec is None:  # nobody typed it, so do not suggest another
            raise ModelError(f"{header.path}: its arch '{name}' is not a timm model. {own_factory}.")
        known = difflib.get_close_matches(name, timm.list_models(), n=3)
        advice = f"Did you mean {', '.join(known)}?" if known else f"{own_factory} for a model of your own."
        raise UsageError(f"`model={name!r}`: timm has no such model. {advice}")
    # Options of timm itself (such as a file to load) are for the user to set, not for the checkpoint.
    own = inspect.signature(timm.create_model).parameters
    stored = {key: value for key, value in said.items() if name == said.get("arch") and key not in ("arch", *own)}
    shapes = _shapes(timm.get_pretrained_cfg(name), specs)
    if "num_classes" in shapes:
        stored.pop("num_classes", None)
    arguments = {**shapes, **stored, **kwargs}
    tensors = [spec for spec in specs.values() if isinstance(spec, TensorSpec)]
    with _no_larger_than(sum(spec.numel for spec in tensors), len(tensors)):
        return _made(name, lambda: timm.create_model(name, pretrained=False, **arguments))


_FACTORIES = {
    torch.empty, torch.empty_strided, torch.zeros, torch.ones, torch.full, torch.eye, torch.rand, torch.randn,
    torch.arange, torch.linspace,
}  # fmt: skip
_SPARE = 1 << 26, 10_000  # elements and tensors of any network, such as masks and what is made to be thrown away
_TIMES = 4


class _no_larger_than(TorchFunctionMode):  # noqa: N801 - used as a context
    """Refuse to make the tensors of a network that has far more of them than the checkpoint.

    The arguments in a checkpoint could ask for any size. It is known from the calls that make tensors; each is made
    without memory first, on the meta device.

    Args:
        elements, tensors: of the weights.
    """

    def __init__(self, elements: int, tensors: int) -> None:
        super().__init__()
        self._elements = _TIMES * elements + _SPARE[0]
        self._tensors = _TIMES * tensors + _SPARE[1]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            shape = {key: value for key, value in kwargs.items() if key not in ("out", "generator", "pin_memory")}
            self._elements -= func(*args, **{**shape, "device": "meta"}).numel()
            self._tensors -= 1
            if min(self._elements, self._tensors) < 0:
                raise ModelError("far larger than the weights of the checkpoint, which would not fit")
        return func(*args, **kwargs)


def _made(name: str, make: Callable[[], Any]) -> nn.Module:
    try:
        return made(make, "See `model_kwargs`.")
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error


def made(make: Callable[[], Any], advice: str = "") -> nn.Module:
    """Call a factory of the user.

    Raises:
        ModelError: it fails, which `advice` is for, or gives no network; does not name it.
    """
    try:
        model = make()
    except (Exception, SystemExit) as error:  # a user's own code
        raise ModelError(f"cannot be made ({type(error).__name__}: {error}). {advice}".rstrip()) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"gives a {type(model).__name__}, not a torch.nn.Module.")
    return model


def stored_arguments(header: Header) -> dict[str, Any]:
    """Return the arguments of the model in a checkpoint: ``arch``, ``num_classes``, ``in_chans`` and others."""
    tree = header.tree if isinstance(header.tree, dict) else {}
    args = script_arguments(header)
    arch = next((a for a in (tree.get("arch"), args.get("model"), args.get("arch")) if isinstance(a, str)), None)
    kwargs = args.get("model_kwargs")
    said = dict(kwargs) if isinstance(kwargs, dict) else {}
    for source in (args, tree):
        said |= {key: source[key] for key in ("num_classes", "in_chans") if type(source.get(key)) is int}
    return said if arch is None else {**said, "arch": arch}


def _shapes(cfg: Any, specs: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of classes and of input channels, from the shapes of the weights of a timm model."""
    bare = {new: specs[old] for old, new in unwrap(specs).items()}
    found = {}
    for key, layer, axis in (("num_classes", "classifier", 0), ("in_chans", "first_conv", 1)):
        name = getattr(cfg, layer, None)
        ends = [full for full in bare if isinstance(name, str) and f".{full}".endswith(f".{name}.weight")]
        tensor = bare[ends[0]] if len(ends) == 1 else bare.get(f"{name}.weight")  # it may have a prefix
        if isinstance(tensor, TensorSpec) and len(tensor.shape) > axis:
            found[key] = tensor.shape[axis]
    return found


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights of a checkpoint in a network.

    Attributes:
        names: in the model to in the checkpoint; they differ by prefixes.
        added: names in the model to what they would be called in the checkpoint, which does not have them.
        notes: decisions, in words.
    """

    names: Mapping[str, str]
    added: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, measured: Collection[str] = ()) -> Loaded:
    """Fill a model with the weights of a checkpoint, strictly.

    The names in the checkpoint may begin with wrapper prefixes, or with one that all names of the model get, as
    ``model.`` in Lightning's; what lies beside that, such as the weights of a loss, is not the model's.

    Args:
        measured: names of buffers in the model that are measured anyway. A checkpoint without any running variance, as
            an average of parameters alone, may lack them.

    Raises:
        ModelError: names or shapes differ; the message has the first of each.
    """
    stored = {bare: name for name, bare in unwrap(checkpoint).items()}
    wanted = model.state_dict()
    own = {bare: name for name, bare in unwrap(wanted).items()}
    # Files from before torch 0.4.1 have no such counter, and torch itself passes over that.
    if any(name.endswith("running_var") for name in stored):
        measured = ()
    needed = {bare for bare, name in own.items() if name not in measured and not bare.endswith(_COUNTER)}
    lead = _lead(needed, own, wanted, stored, checkpoint)
    notes = []
    if lead:
        notes.append(f"The names of the model begin with '{lead}' in the checkpoint.")
    inside = {name.removeprefix(lead): full for name, full in stored.items() if name.startswith(lead)}
    beside = [name for name in stored if not name.startswith(lead)]
    beside += [lead + name for name in inside if name not in own and _of_a_loss(name, own)]
    unexpected = [name for name in inside if name not in own and lead + name not in beside]
    missing = [name for name in own if name in needed and name not in inside]
    shared = [name for name in own if name in inside]
    shapes = [
        f"'{name}' is {list(spec.shape)}, the model's {list(wanted[own[name]].shape)}"
        for name in shared
        if isinstance(spec := checkpoint.specs[inside[name]], TensorSpec) and spec.shape != wanted[own[name]].shape
    ]
    parts = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if parts:
        fit = f"{checkpoint.path}: the weights do not fit {_called(model)}"
        if (lacks := _lacking(stored, own)) is not None:
            raise ModelError(f"{fit}: its names lack '{lacks}'. Run `fix_prefix(add=[{lacks!r}])` first.")
        statistics = ("running_mean", "running_var")
        if len(parts) == 1 and missing and all(name.endswith(statistics) for name in missing):
            raise ModelError(f"{fit}: {parts[0]}. Run recal-bn first, which measures them.")
        arch = stored_arguments(checkpoint.header).get("arch")
        said = "" if arch is None else f"The checkpoint says that its model is {arch}. "
        raise ModelError(
            f"{fit}: {'; '.join(parts)}. {said}"
            "Is it the right `model`, with the right `model_kwargs` (num_classes=..., in_chans=...)?"
        )
    if beside:
        more = ", ..." if len(beside) > 3 else ""
        notes.append(
            f"{len(beside)} tensors are not the model's, and stay as they are ({', '.join(beside[:3])}{more})."
        )
    added = {}
    for name in own:
        if own[name] in measured and name not in inside:
            layer, dot, leaf = name.rpartition(".")
            # Another tensor of the layer tells what is before its name; if there is none, any other.
            near = next((other for other in inside if other.startswith(layer + dot)), None)
            other, tail = (next(iter(inside)), name) if near is None else (near, leaf)
            before = inside[other].removesuffix(other if near is None else other.removeprefix(layer + dot))
            added[own[name]] = before + tail
    if added:
        notes.append("These weights have no BatchNorm statistics; the measured ones are added to them.")
    model.load_state_dict({own[name]: checkpoint[inside[name]] for name in shared}, strict=False)
    return Loaded({own[name]: inside[name] for name in shared}, added, tuple(notes))


def _called(model: nn.Module) -> str:
    """Name a network by its class, and one of timm by its name there: many have one class."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    return f"{name} ({type(model).__name__})" if name else type(model).__name__


_COUNTER = "num_batches_tracked"
_LOSS = re.compile(r"(^|_)(loss|losses|criterion|criteria|metrics?|(class|pos)_weights?)(_|$)")
"""What the modules and buffers of a loss or a metric are called."""


def _of_a_loss(name: str, own: Iterable[str]) -> bool:
    """Return True if a tensor is beside the modules of the model, and called as those of a loss are."""
    first = name.split(".")[0]
    return bool(_LOSS.search(first)) and all(each.split(".")[0] != first for each in own)


def _lead(
    needed: AbstractSet[str],
    own: Mapping[str, str],
    wanted: Mapping[str, Tensor],
    stored: Mapping[str, str],
    checkpoint: Checkpoint,
) -> str:
    """Return what all names of the model have before them in the checkpoint; nothing, also where that fits nowhere.

    Raises:
        ModelError: the model fits in several places.
    """
    if not needed or needed <= stored.keys():
        return ""
    one = min(needed)
    leads = [name.removesuffix(one) for name in stored if name.endswith(f".{one}")]
    named = [lead for lead in leads if all(lead + name in stored for name in needed)]
    if not named:  # some are missing, and the message should name those alone
        named = [lead for lead in leads if all(n.removeprefix(lead) in own for n in stored if n.startswith(lead))]
        return named[0] if len(named) == 1 else ""

    def fits(lead: str) -> bool:
        specs = ((checkpoint.specs[stored[lead + name]], wanted[own[name]].shape) for name in needed)
        return all(not isinstance(spec, TensorSpec) or spec.shape == shape for spec, shape in specs)

    fitting = [lead for lead in named if fits(lead)]
    if len(fitting) > 1:
        raise ModelError(
            f"{checkpoint.path}: the model fits in {len(fitting)} places, such as '{fitting[0]}' and '{fitting[1]}'. "
            "Use a `model` whose names begin so, too: a module around it."
        )
    return next(iter(fitting or named), "")


def _lacking(stored: Iterable[str], own: Iterable[str]) -> str | None:
    """Return the prefix that all names of the model have, and none in the checkpoint; None if there is none."""
    found = {name for name in stored if not name.endswith(_COUNTER)}
    wanted = {name for name in own if not name.endswith(_COUNTER)}
    one = min(found, default=None)
    leads = {name.removesuffix(one) for name in wanted if one is not None and name.endswith(f".{one}")}
    return next((lead for lead in leads if {f"{lead}{name}" for name in found} == wanted), None)


def input_channels(model: nn.Module) -> int:
    """Return the number of input channels of the first convolution; 3 if there is none."""
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    return 3 if first is None else first.in_channels


def pick_device(name: str) -> torch.device:
    """Return the device of this name; ``auto`` is a GPU where there is one.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"`device={name!r}`: not usable here ({str(error).splitlines()[0]}).") from error
    return device
