"""Lists: diffusers' EMAModel and torch_ema keep the averages of ``model.parameters()`` in a list without names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ...errors import LayoutError, ReadError
from ...formats.header import Header
from ...formats.json_file import read_json
from ...tensors import Tensor, TensorSpec
from .layout import AnyOrder, Content, Encoding, Flat, Layout, Names, Sets, StateDict, Weights, is_buffer

_RAW_COPIES = ("collected_params", "temp_stored_params")
"""Keys of raw weights that were put by while the averages were in use."""
_EMA_KEYS = (
    "decay", "num_updates", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma",
    "power",
)  # fmt: skip
SETTINGS = {"min_decay": 0.0, "update_after_step": 0, "use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3}
"""What diffusers' EMAModel starts with."""


def _is_list(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("shadow_params"), (list, tuple))


def _read(node: Any, names: Names, raw: Names) -> Sets:
    shadow = [value for value in node["shadow_params"] if isinstance(value, Tensor)]
    if len(shadow) != len(node["shadow_params"]) or not shadow:
        return {}
    matched, fault = _named(shadow, names if names is not None else raw)
    weights = {**((raw if raw is not None else names) or {}), **matched}
    if fault is not None:
        weights = {f"shadow_params.{i}": tensor for i, tensor in enumerate(shadow)}
    state = StateDict(
        weights,
        other_entries={key: node[key] for key in node if key not in ("shadow_params", *_RAW_COPIES, *_EMA_KEYS)},
        other_set=tuple(key for key in _RAW_COPIES if node.get(key) is not None),
        ema_paths=tuple((key,) for key in _EMA_KEYS if node.get(key) is not None),
        updates=node.get("optimization_step", node.get("num_updates")),
        decay=node.get("decay"),
        settings=_settings(node),
        fault=fault,
    )
    return {"ema": state}


def _settings(source: Mapping[Any, Any]) -> dict[str, Any]:
    if "optimization_step" not in source:
        return {}
    return {key: source[key] for key in SETTINGS if isinstance(source.get(key), (int, float))}


def parameters(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what ``model.parameters()`` would give, as far as a state dict tells: no buffers, tied ones once."""
    unique: dict[Any, str] = {}
    for name, tensor in names.items():
        if not is_buffer(name, tensor):
            empty = isinstance(tensor, TensorSpec) and not tensor.numel  # all alike, and tied to nothing
            unique.setdefault(name if empty else tensor, name)
    return {name: names[name] for name in unique.values()}


def _named(shadow: Sequence[Tensor], names: Names) -> tuple[dict[str, Tensor], str | None]:
    """Give the tensors of a list the names of a state dict's parameters.

    Returns:
        (every name that the tensor goes by, to it; what is wrong).
    """
    if names is None:
        return {}, f"a list of {len(shadow)} tensors without names. Give `names_from`, or `model`, to `convert(...)`."
    if isinstance(names, AnyOrder) and len(shadow) > 1:
        return {}, (
            f"a list of {len(shadow)} tensors in the order of the model's parameters, and the file with the names "
            "keeps names in another order. Give `names_from`, a file that torch.save wrote of the state_dict(), or "
            "`model`."
        )
    own = parameters(names)
    if len(own) != len(shadow):
        return {}, (
            f"a list of {len(shadow)} tensors; the model whose names it should get has {len(own)} parameters. "
            "Give `names_from`, a checkpoint of the same model, or `model`."
        )
    for (name, tensor), averaged in zip(own.items(), shadow, strict=True):
        want, have = (list(getattr(each, "shape", ())) for each in (tensor, averaged))
        if want != have:
            return {}, (
                f"a list, in which a tensor of shape {have} would be '{name}', which has shape {want}. "
                "Give `names_from`, a checkpoint of the same model, or `model`."
            )
    given = dict(zip(own.values(), shadow, strict=True))
    return {name: given[tensor] for name, tensor in names.items() if tensor in given}, None


def _shadow(weights: Weights, content: Content) -> list[Any]:
    if not content.in_order and len(content.parameters) > 1:
        raise LayoutError(
            "the list that it becomes has the parameters in the order of the model, and the checkpoint keeps names in "
            "another order. Give `names_from`, a file that torch.save wrote of the state_dict(), or `model`."
        )
    content.note_lost(set(content.parameters), "the list holds parameters", raw_stays=False)
    return [weights[name] for name in content.parameters]


def _write_pytorch_ema(weights: Weights, content: Content) -> dict[str, Any]:
    shadow = _shadow(weights, content)
    counts = {"decay": content.known_decay(), "num_updates": content.updates}
    return {**counts, "shadow_params": shadow, "collected_params": None}


def _write_diffusers(weights: Weights, content: Content) -> dict[str, Any]:
    shadow = _shadow(weights, content)
    return {**_config(content), "shadow_params": shadow}


def _config(content: Content) -> dict[str, Any]:
    """Return the settings and counts of diffusers' EMAModel, in its state dict and in ``config.json``."""
    counts = {"decay": content.known_decay(), "optimization_step": content.known_updates("diffusers")}
    return {**SETTINGS, **content.settings, **counts}


class Diffusers(Layout):
    """A list in a file, or a folder of weights whose ``config.json`` has the settings of the EMAModel."""

    def flatten(self, content: Content) -> Flat:
        return Flat(content.ema, stem="diffusion_pytorch_model", config=_config(content))

    def ema_file(self, header: Header) -> Mapping[str, Any] | None:
        if header.in_folder:
            with suppress(ReadError):
                config = read_json(header.path / "config.json")
                if "optimization_step" in config:
                    updates, decay = config["optimization_step"], config.get("decay")
                    return {"updates": updates, "decay": decay, "settings": _settings(config)}
        return None


DIFFUSERS_ENCODING = Encoding(
    "diffusers", lambda node: _is_list(node) and "optimization_step" in node, _read, _write_diffusers,
    frozenset({"updates", "decay", "settings"}), flat=False,
)  # fmt: skip
PYTORCH_EMA_ENCODING = Encoding(
    "pytorch-ema", _is_list, _read, _write_pytorch_ema, frozenset({"updates", "decay"}), flat=False
)
DIFFUSERS = Diffusers(
    "diffusers", "diffusers' EMAModel: a folder with its config, or a list of parameters",
    ema=(), ema_encoding=DIFFUSERS_ENCODING, held_by=("nested", "folder"), exponential=True,
)  # fmt: skip
PYTORCH_EMA = Layout(
    "pytorch-ema", "torch_ema: a list of parameters", ema=(), ema_encoding=PYTORCH_EMA_ENCODING, exponential=True
)
