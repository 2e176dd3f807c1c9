"""Preprocessing: size, crop, interpolation, mean and std of images, and where each of these values is from.

In this order: options, what the run stored in its checkpoint, what the network itself says (timm's configuration of the
model, or the transform of torchvision's weights), and, for crop and interpolation alone, timm's defaults.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..checkpoints.script_arguments import script_arguments
from ..errors import DataError, UsageError
from ..formats.header import Header
from .classes import is_timm_run
from .models import INSTALL

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "nearest-exact")
OPTION, ARGS, DEFAULT = "the options", "the args of the checkpoint", "timm's default"


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How images are prepared.

    Attributes:
        config: arguments of timm's create_transform: ``input_size``, ``crop_pct``, ``crop_mode``, ``interpolation``,
            ``mean``, ``std``.
        sources: ``size``, ``crop``, ``interpolation``, ``mean`` and ``std``, each with where it is from.
    """

    config: Mapping[str, Any]
    sources: Mapping[str, str]


def resolve_preprocessing(
    network: nn.Module, channels: int, options: Mapping[str, Any], header: Header | None = None
) -> Preprocessing:
    """Find out how the images of a network are prepared.

    A run of timm's train.py is resolved as that script does it, at the size of the training, and so is a model of timm
    inside a module of the user; other checkpoints of timm's models as validate.py does it, at the size for tests.

    Args:
        network: a network, or a module around one, of timm or torchvision.
        channels: of its images.
        options: ``img_size``, ``crop_pct``, ``interpolation``, ``mean``, ``std``; None where not given.
        header: of its checkpoint, which may hold the arguments of the run.

    Raises:
        DataError: timm is not installed, or an argument of the run makes no sense.
        UsageError: mean or std has the wrong number of values, or nothing says size, mean and std.
    """
    try:
        from timm.data import resolve_data_config
    except ImportError as error:
        raise DataError(f"images need timm and torchvision. Run: {INSTALL}") from error
    given = {key: value for key, value in options.items() if value is not None}
    for key in ("mean", "std"):
        if key in given and len(given[key]) not in (1, channels):
            raise UsageError(f"`{key}` has {len(given[key])} numbers for images of {channels} channels.")
    stored = {} if header is None else _stored(header, given)
    if "img_size" in given:
        stored.pop("input_size", None)
    args = {**stored, **given}
    lacking = [key for key in ("img_size", "mean", "std") if key not in args]
    if "input_size" in args and "img_size" in lacking:
        lacking.remove("img_size")
    known, source = _of_network(network, complete={"crop_pct", "interpolation"} <= args.keys() and not lacking)
    if lacking and not known:
        raise UsageError(
            f"neither the checkpoint nor {type(network).__name__} says how its images were prepared. "
            f"Give {_listed(lacking)}, as in the training (and `crop_pct` and `interpolation`, if those matter)."
        )
    at_test_size = bool(getattr(network, "pretrained_cfg", None)) and not (header is not None and is_timm_run(header))
    config = dict(resolve_data_config({"in_chans": channels, **args}, pretrained_cfg=known, use_test_size=at_test_size))
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        if len(config[key]) != channels:  # ImageNet's, for a model of another kind of image
            config[key] = (sum(config[key]) / len(config[key]),) * channels

    def origin(*keys: str) -> str:
        for values, where in ((given, OPTION), (stored, ARGS), (known, source)):
            if any(values.get(key) is not None for key in keys):
                return where
        return DEFAULT

    sources = {"size": origin("img_size", "input_size"), "crop": origin("crop_pct")}
    return Preprocessing(config, sources | {key: origin(key) for key in ("interpolation", "mean", "std")})


def described(config: Mapping[str, Any], sources: Mapping[str, str]) -> tuple[str, str]:
    """Return a preprocessing in words, and where its values are from; see `Preprocessing`."""
    size, mean, std = "x".join(map(str, config["input_size"])), _numbers(config["mean"]), _numbers(config["std"])
    crop = f"crop {config['crop_pct']:.4g} ({config['crop_mode']})"
    of = {source: [name for name in sources if sources[name] == source] for source in sources.values()}
    parts = [f"from {source}: {', '.join(names)}" for source, names in of.items()]
    return f"Images: {size}, {crop}, {config['interpolation']}, mean {mean}, std {std}.", f"F{'; '.join(parts)[1:]}."


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _stored(header: Header, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the arguments of a run say of its images, by the names that timm has for it.

    Raises:
        DataError: a value makes no sense, and no option replaces it.
    """
    args = script_arguments(header)
    found = {
        key: args.get(key)
        for key in ("img_size", "input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    }
    if "cache_dataset" in args:  # train.py of torchvision's references; older ones have no options for the sizes
        resized, crop = (342, 299) if args.get("model") == "inception_v3" else (256, 224)
        resized, crop = args.get("val_resize_size", resized), args.get("val_crop_size", crop)
        found |= _IMAGENET | {"img_size": crop, "interpolation": args.get("interpolation", "bilinear")}
        if isinstance(crop, int) and isinstance(resized, int) and min(crop, resized) > 0:
            found["crop_pct"] = _crop_pct(crop, resized)
    size = found["img_size"]
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        found["img_size"] = size[0]
    stored = {}
    for key, value in found.items():
        if value in (None, "", 0) or key in given:
            continue
        if not fits(key, value):
            option = "img_size" if key == "input_size" else key
            raise DataError(f"{header.path}: its args say {key}={value!r}, which is not understood. Give `{option}`.")
        stored[key] = value
    return stored


def fits(key: str, value: Any) -> bool:
    """Return True if an argument of a preprocessing, by timm's name for it, can be one."""
    if key == "img_size":
        return _is_size(value)
    if key == "input_size":
        return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_size, value))
    if key == "crop_pct":
        return type(value) in (int, float) and 0 < value <= 2
    if key == "crop_mode":
        return value in ("center", "squash", "border")
    if key == "interpolation":
        return value in INTERPOLATIONS
    if not isinstance(value, (list, tuple)) or not value:
        return False
    numbers = all(isinstance(each, (int, float)) and type(each) is not bool and math.isfinite(each) for each in value)
    return numbers and (key == "mean" or min(value) > 0)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _crop_pct(crop: int, resized: int) -> float:
    """Return the part by which timm comes to that size before the crop; it rounds down."""
    return crop / resized if int(crop / (crop / resized)) == resized else crop / (resized + 0.5)


def _of_network(network: nn.Module, *, complete: bool) -> tuple[Mapping[str, Any], str]:
    """Return what a network says of its images, as a configuration of timm's, and where that is from; or nothing.

    Args:
        complete: all is known otherwise.

    Raises:
        UsageError: it has parts that say different things.
    """
    found = list(_said(network, set()))
    keys = ("input_size", "test_input_size", "crop_pct", "test_crop_pct", "interpolation", "mean", "std")
    if not found or all(config.get(key) == found[0][0].get(key) for config, _ in found for key in keys):
        return found[0] if found else ({}, "")
    if complete:
        return {}, ""
    raise UsageError(
        f"{type(network).__name__} has parts with images of different kinds ({found[0][1]}, {found[-1][1]}). "
        "Give `img_size`, `crop_pct`, `interpolation`, `mean` and `std`."
    )


def _said(module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield what the outermost modules of timm and torchvision say."""
    if module in seen:
        return
    seen.add(module)
    config = getattr(module, "pretrained_cfg", None)
    if config:
        config = config if isinstance(config, Mapping) else vars(config)
        yield config, f"timm's configuration of {config.get('architecture') or type(module).__name__}"
    elif type(module).__module__.startswith("torchvision.models."):
        yield from _of_torchvision(module)
    else:
        for child in module.children():
            yield from _said(child, seen)


def _of_torchvision(module: nn.Module) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the transform of torchvision's default weights for a network of this class and size."""
    from torchvision.models import get_model_builder, get_model_weights, list_models
    from torchvision.transforms._presets import ImageClassification

    last = [each for each in module.modules() if isinstance(each, (nn.Linear, nn.Conv2d))][-1:]
    if not last:
        return
    classes, *_ = last[0].weight.shape
    a_class = sum(parameter[0].numel() for parameter in last[0].parameters())
    # All but the number of classes has to agree.
    parameters = sum(parameter.numel() for parameter in module.parameters()) + (1000 - classes) * a_class
    for name in list_models():
        build = get_model_builder(name)
        if build.__module__ != type(module).__module__ or build.__annotations__.get("return") is not type(module):
            continue
        weights = get_model_weights(name).DEFAULT
        preset = weights.transforms()
        if weights.meta.get("num_params") == parameters and isinstance(preset, ImageClassification):
            crop, resized = preset.crop_size[0], preset.resize_size[0]
            config = {
                "input_size": (3, crop, crop),
                "crop_pct": _crop_pct(crop, resized),
                "interpolation": preset.interpolation.value,
                "mean": tuple(preset.mean),
                "std": tuple(preset.std),
            }
            yield config, f"torchvision's {weights}"
            return


def _listed(names: list[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
