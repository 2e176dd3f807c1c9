"""Lightning's sharded checkpoints: a DCP folder with weights and optimizers, and all other entries in ``meta.pt``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CorruptError
from ..storage.source import store_of
from .dcp import DCP
from .format import Format
from .header import Header
from .torch_zip import TORCH_ZIP

_META = "meta.pt"


class LightningFolder(DCP):
    """The format of Lightning's FSDP and model-parallel strategies; read as its consolidate_checkpoint gives it."""

    name = "lightning-folder"
    writes = False

    @property
    def written_as(self) -> Format:
        return TORCH_ZIP

    def sniff(self, path: Path, start: bytes) -> bool:
        return not start and store_of(path).is_file(path / _META) and super().sniff(path, start)

    def read(self, path: Path) -> Header:
        header, meta = super().read(path), TORCH_ZIP.read(path / _META)
        entries: dict[Any, Any] = dict(header.tree)
        other = meta.tree if isinstance(meta.tree, dict) else {}
        if "pytorch-lightning_version" in other:  # by the Trainer; Fabric keeps the names of its user
            if "model" in entries:
                entries["state_dict"] = entries.pop("model")
            numbered = [f"optimizer_{n}" for n in range(len(entries)) if f"optimizer_{n}" in entries]
            if numbered:
                entries["optimizer_states"] = [entries.pop(key) for key in numbered]
        both = next((key for key in other if key in entries), None)
        if both is not None:
            raise CorruptError(
                f"{path}: '{both}' is in {_META}, and in the files beside it. Lightning saves each entry once: get a "
                "fresh copy."
            )
        return replace(
            header,
            content={**entries, **other},
            files=(*header.files, *meta.files),
            foreign=header.foreign + meta.foreign,
        )


LIGHTNING_FOLDER = LightningFolder()
