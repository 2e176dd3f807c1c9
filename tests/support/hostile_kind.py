"""A kind of hostile file, and the opcodes of pickles, out of which many are made."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crafting import TENSOR, torch_zip


@dataclass(frozen=True)
class Kind:
    """A kind of hostile file.

    Attributes:
        name: what is hostile.
        group: the format, or the part of it, that is attacked.
        make: writes it into an empty folder of its own, and returns the path to give to a command.
        read: `ckpt inspect` shows it, as there is something to show; otherwise it refuses it.
    """

    name: str
    group: str
    make: Callable[[Path], Path]
    read: bool


def kinds(
    group: str, read: bool, table: Mapping[str, Any], make: Callable[[Path, Any], Path | None], name: str = "a.pth"
) -> list[Kind]:
    """Return a kind for each entry of a table; `make` gets the path of a file of this name, and the entry."""

    def maker(content: Any) -> Callable[[Path], Path]:
        return lambda folder: make(folder / name, content) or folder / name

    return [Kind(title, group, maker(content), read) for title, content in table.items()]


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def global_(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def dumped(value: Any) -> bytes:
    """Return the opcodes of a plain value, without a protocol and an end."""
    return pickle.dumps(value, 2)[2:-1]


def dict_of(**items: bytes) -> bytes:
    return b"}" + b"".join(text(key) + value + b"s" for key, value in items.items())


def object_(name: str, state: bytes) -> bytes:
    """Return the opcodes of an object of a class with this state."""
    return global_(name) + b")\x81" + state + b"b"


def whole(opcodes: bytes) -> bytes:
    return b"\x80\4" + opcodes + b"."


def as_value(path: Path, opcodes: bytes) -> None:
    """Write a torch file with a tensor, and a value made by these opcodes."""
    torch_zip(path, whole(b"}" + text("x") + opcodes + b"s" + text("w") + TENSOR + b"s"))


def as_key(path: Path, opcodes: bytes) -> None:
    """Write a torch file with a tensor, and a key made by these opcodes."""
    torch_zip(path, whole(b"}" + opcodes + b"K\1s" + text("w") + TENSOR + b"s"))


def as_tensor(path: Path, opcodes: bytes) -> None:
    """Write a torch file with a tensor of the name w that is made by these opcodes."""
    torch_zip(path, whole(b"}" + text("w") + opcodes + b"s"))


def as_name(path: Path, opcodes: bytes) -> None:
    """Write a torch file with two tensors, one of a name that is made by these opcodes."""
    torch_zip(path, whole(dict_of(state_dict=b"}" + text("w") + TENSOR + b"s" + opcodes + TENSOR + b"s")))


def as_checkpoint(path: Path, opcodes: bytes) -> None:
    """Write a torch file with an object that is made by these opcodes."""
    torch_zip(path, whole(opcodes))
