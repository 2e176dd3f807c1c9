"""Plain weights: names to tensors, in one file or in a folder of torch.distributed.checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...formats.dcp import DCP_FOLDER
from ...formats.header import Header
from .layout import Layout

# Files of guided-diffusion with one set; of the raw weights, the name is model010000.pt.
_EMA_FILE = re.compile(r"ema_[\d.]+_\d+\.pt")


class Plain(Layout):
    """The whole file is one set of weights."""

    def ema_file(self, header: Header) -> Mapping[str, Any] | None:
        return {} if _EMA_FILE.fullmatch(header.path.name) else None


PLAIN = Plain("plain", "names to tensors: one set of weights", raw=(), alone="plain")
DCP = Layout(
    "dcp",
    "torch.distributed.checkpoint: a folder, names to tensors",
    raw=(),
    alone="dcp",
    held_by=("folder",),
    folder_format=DCP_FOLDER,
)
