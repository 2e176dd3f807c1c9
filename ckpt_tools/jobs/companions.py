"""Companions: the small files beside weights without which `from_pretrained` loads no model or tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import ReadError
from ..formats import holds_weights
from ..formats.header import Header
from ..formats.json_file import LARGEST, read_json
from ..formats.sharded import stays_inside
from ..storage.source import LOCAL, stamp_at, store_of

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".spm")
"""Of what a checkpoint has in its own folder: configuration, tokenizer, chat template, card."""
_OF_TRAINING = re.compile(r"trainer_state\.json|\w+_results\.json|zero_to_fp32\.py")
# In a folder around the checkpoint there may be anything, so only what transformers and PEFT write counts.
_KNOWN = re.compile(
    r"((adapter|generation|tokenizer|((image|video)_)?(pre)?processor)_)?config\.json"
    r"|(tokenizer|vocab|added_tokens|special_tokens_map|chat_template|normalizer)\.json"
    r"|(vocab|merges)\.txt|chat_template\.jinja|\w+\.tiktoken|(source|target)\.spm"
    r"|(spiece|spm|tokenizer|sentencepiece(\.bpe)?)\.model"
)
_CONFIGS = ("config.json", "adapter_config.json")
_MARKS = {"model_type", "architectures", "peft_type", "auto_map", "_class_name"}
_ABOVE = 2
"""Levels: Accelerate's FSDP has its weights in checkpoint-500/pytorch_model_fsdp_0, and the model is in the run."""


def companions(base: Header, dropped: list[str]) -> list[Path]:
    """Find the companions of a checkpoint: in its folder, or else in one around it that has a model's configuration.

    Args:
        dropped: receives the names of files that are too large, or links out of their folder.
    """
    found: list[Path] = []
    around = base.path.absolute().parents if store_of(base.path) is LOCAL else base.path.parents
    if base.in_folder and not base.format.keeps_folder:
        found = [*_files(base.path, _is_own)]
        if base.ranks or any(path.name in _CONFIGS for path in found):
            return [*_safe(found, dropped)]
    for folder in [*around][: _ABOVE if base.in_folder else _ABOVE + 1]:
        if _configuration(folder):
            names = {path.name for path in found}
            found += (path for path in _files(folder, _KNOWN.fullmatch) if path.name not in names)
            break
    return [*_safe(found, dropped)]


def _is_own(name: str) -> bool:
    return name.endswith(_SUFFIXES) and not holds_weights(name) and not _OF_TRAINING.fullmatch(name)


def _files(folder: Path, wanted: Callable[[str], object]) -> Iterator[Path]:
    """Yield the files of a folder, with the code of the model if its configuration refers to some."""
    store = store_of(folder)
    code = "auto_map" in _configuration(folder)
    for name in store.names(folder):
        python = code and name.endswith(".py") and not _OF_TRAINING.fullmatch(name)
        if (wanted(name) or python) and store.is_file(folder / name):
            yield folder / name


def _configuration(folder: Path) -> Mapping[str, Any]:
    """Return the configuration of a model in a folder; empty if there is none."""
    for path in (folder / name for name in _CONFIGS):
        with suppress(ReadError, OSError):  # a signed address opens nothing beside its file
            content = read_json(path)
            if not _MARKS.isdisjoint(content):
                return content
    return {}


def _safe(paths: list[Path], dropped: list[str]) -> Iterator[Path]:
    for path in paths:
        if not stays_inside(path):
            dropped.append(f"{path.name} (a link out of its folder)")
        elif stamp_at(path).nbytes > LARGEST:
            dropped.append(f"{path.name} (too large for a companion)")
        else:
            yield path
