"""Script arguments: what a training script was called with, as its checkpoints store it under ``args``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..formats.header import Header


def script_arguments(header: Header) -> dict[str, Any]:
    """Return the arguments by name, from a Namespace (timm, torchvision) or a dict; empty if there are none."""
    content = header.content if isinstance(header.content, dict) else {}
    stored = content.get("args")
    values = vars(stored) if isinstance(stored, Namespace) else stored
    return values if isinstance(values, dict) else {}
