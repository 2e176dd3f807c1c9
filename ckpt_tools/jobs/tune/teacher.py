"""The teacher: a checkpoint, a timm model with its published weights, or a network of the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.open import Checkpoint
from ...checkpoints.script_arguments import script_arguments
from ...errors import CkptError, ModelError, UsageError
from ...evaluation.data import is_factory
from ...evaluation.models import INSTALL, build_model, load_factory, load_weights, made, stored_arguments
from ...formats import read_header
from ...series.paths import one_checkpoint
from ..options import Network


@dataclass(frozen=True, slots=True)
class Teacher:
    """A network in eval mode that takes the images of the student.

    Attributes:
        name: for messages, such as ``the teacher 'resnet50'``.
        network: on the device of the student.
        scale, shift: [C, 1, 1], from the student's normalisation to its own; None if they are the same.
    """

    name: str
    network: nn.Module
    scale: Tensor | None = None
    shift: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        """Return its logits, [N, C]."""
        if self.scale is not None and self.shift is not None:
            images = images * self.scale + self.shift
        return self.network(images)


def open_teacher(
    spec: str, which: Network, student: nn.Module, preprocessing: Mapping[str, Any], device: torch.device
) -> tuple[Teacher, tuple[str, ...]]:
    """Build the teacher, and load its weights.

    Args:
        spec: a checkpoint, of the model that it records or else that of the student; a timm name; ``file.py:factory``.
        which: how the network of the student is made.
        student: that network.
        preprocessing: of its images; empty if the user's code prepares them.

    Returns:
        (the teacher; notes).

    Raises:
        CkptError: there is no such teacher, or its weights cannot be had.
    """
    try:
        network, normalisation = _network(spec, which, student)
    except UsageError:
        raise
    except CkptError as error:
        raise type(error)(f"`teacher={spec!r}`: {error}") from error
    network.to(device).eval().requires_grad_(False)
    scale, shift = None, None
    notes: tuple[str, ...] = ()
    if normalisation is not None and not preprocessing:
        notes = ("The teacher gets the images as the factory of `data` gives them; are they normalised for it?",)
    elif normalisation is not None:
        own, theirs = (
            [torch.tensor(each[key], dtype=torch.float64).reshape(-1, 1, 1) for key in ("mean", "std")]
            for each in (preprocessing, normalisation)
        )
        if not all(torch.allclose(a, b) for a, b in zip(own, theirs, strict=True)):
            scale = (own[1] / theirs[1]).float().to(device)
            shift = ((own[0] - theirs[0]) / theirs[1]).float().to(device)
            mean, std = (", ".join(f"{x:.4g}" for x in each.flatten().tolist()) for each in theirs)
            notes = (f"The teacher gets the same images with its own mean ({mean}) and std ({std}).",)
    return Teacher(f"the teacher '{spec}'", network, scale, shift), notes


def _network(spec: str, which: Network, student: nn.Module) -> tuple[nn.Module, Mapping[str, Any] | None]:
    """Return a network with weights, and its mean and std where they may differ from those of the student."""
    if Path(spec).expanduser().exists():
        checkpoint = Checkpoint(read_header(one_checkpoint(Path(spec).expanduser())))
        recorded = "arch" in stored_arguments(checkpoint.header)
        model, arguments = (None, {}) if recorded else (which.model, which.model_kwargs or {})
        network = build_model(model, checkpoint.header, arguments, checkpoint.specs)
        try:
            load_weights(network, checkpoint)
        except ModelError as error:
            raise ModelError(
                f"{error} A teacher of another model that it does not record is a file.py:factory."
            ) from error
        said = script_arguments(checkpoint.header)
        if said.get("mean") and said.get("std"):
            return network, said
        own = _published(network)
        return network, None if own == _published(student) else own
    if is_factory(spec):
        return made(load_factory(spec, "teacher")), None
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"a timm model needs timm. Run: {INSTALL}") from error
    if not timm.is_model(spec.split(".")[0]):
        raise UsageError(f"`teacher={spec!r}`: is no checkpoint, no timm model and no file.py:factory.")
    try:
        network = timm.create_model(spec, pretrained=True)
    except Exception as error:  # noqa: BLE001 - a download fails in many types
        raise ModelError(f"its published weights cannot be had ({type(error).__name__}: {error}).") from error
    return network, _published(network)


def _published(network: nn.Module) -> Mapping[str, Any] | None:
    """Return the mean and std that timm knows of a network."""
    cfg = getattr(network, "pretrained_cfg", None)
    found = {key: cfg.get(key) for key in ("mean", "std")} if isinstance(cfg, Mapping) else {}
    return found if all(found.values()) and found else None
