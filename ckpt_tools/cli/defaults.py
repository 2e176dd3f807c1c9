"""Defaults: values of options from the environment, from ckpt.toml, or from [tool.ckpt] of pyproject.toml."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError
from . import console

ONE_OFF = frozenset(
    {
        "add",
        "all_",
        "base",
        "csv",
        "dry_run",
        "expect_sha256",
        "finish",
        "force",
        "from_step",
        "inputs",
        "json",
        "list_",
        "names_from",
        "out",
        "part",
        "plot",
        "replay",
        "report",
        "resume",
        "show_config",
        "sign_off",
        "state_b",
        "strip",
        "tensors",
        "test",
        "to_step",
        "update",
        "weights",
    }
)
"""Options that belong to one run: what it makes, of what, and where it goes. No default sets them."""
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Default(NamedTuple):
    """A value for an option, and where it is from, in words."""

    value: Any
    origin: str


in_use: dict[str, Default] = {}
"""The defaults that count in this run: those of options that its command line does not give."""


def read(command: str, options: Collection[str], of_command: Callable[[str], Collection[str]]) -> dict[str, Default]:
    """Read the defaults of a command; the environment counts before the files.

    Args:
        options: names of its options.
        of_command: returns the names of the options of any command; KeyError for what is none.

    Raises:
        UsageError: a file cannot be read, or has a key that no option has.
    """
    found = {name: default for name, default in _from_file(command, options, of_command)}
    for name in options:
        variable = f"CKPT_{name.upper()}"
        if os.environ.get(variable) and name not in ONE_OFF:
            found[name] = Default(os.environ[variable], variable)
    return found


def _from_file(
    command: str, options: Collection[str], of_command: Callable[[str], Collection[str]]
) -> Iterator[tuple[str, Default]]:
    path, table = config()
    if path is None:
        return
    where = path.name if path.parent == Path.cwd() else str(path)
    prefix = "" if path.name == "ckpt.toml" else "tool.ckpt."
    inner: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            try:
                of_command(key)
            except KeyError:
                raise UsageError(f"{where}: [{prefix}{key}] is no command of ckpt.") from None
            inner = value if key == command else inner
            continue
        if name not in options and not _anywhere(name, of_command):
            raise UsageError(f"{where}: '{key}' is no option of ckpt.")
        _refuse_one_off(where, key)
        if name in options:
            yield name, Default(value, where)
    for key, value in inner.items():
        name = key.replace("-", "_")
        if name not in options:
            raise UsageError(f"{where}: [{prefix}{command}] '{key}' is no option of ckpt {command}.")
        _refuse_one_off(where, key)
        yield name, Default(value, where)


def _anywhere(name: str, of_command: Callable[[str], Collection[str]]) -> bool:
    from .commands import COMMANDS

    return any(name in of_command(command) for command in COMMANDS)


def _refuse_one_off(where: str, key: str) -> None:
    if key.replace("-", "_") in ONE_OFF:
        raise UsageError(f"{where}: '{key}' belongs to one run, and has no default. Give it on the command line.")


def config() -> tuple[Path | None, Mapping[str, Any]]:
    """Return the file with defaults that is nearest to the current folder, upwards, and its table; (None, {}) if none.

    Raises:
        UsageError: it is not TOML.
    """
    if os.environ.get("CKPT_NO_CONFIG"):
        return None, {}
    try:
        here = Path.cwd()
    except OSError:  # the folder was deleted
        return None, {}
    for path in (folder / name for folder in (here, *here.parents) for name in ("ckpt.toml", "pyproject.toml")):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if path.name == "ckpt.toml":
            return path, _parsed(path, content)
        if b"ckpt" in content and (table := _parsed(path, content).get("tool", {}).get("ckpt")) is not None:
            return path, table
    return None, {}


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML: {error}.") from error


def as_typed(name: str, default: Default, *, flag: bool, many: bool) -> Any:
    """Return a default as the command line would give it: text, or True and False for a flag.

    Raises:
        UsageError: it is of another kind.
    """
    value, origin = default
    if flag:
        if isinstance(value, bool):
            return value
        if str(value).lower() in (*_TRUE, *_FALSE):
            return str(value).lower() in _TRUE
        raise UsageError(f"{origin}: {name} = {value!r} is neither true nor false.")
    if many:
        return [str(each) for each in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, (bool, dict)):
        raise UsageError(f"{origin}: {name} = {value!r} is no value of this option.")
    return str(value)


def say_in_use() -> None:
    """Show which options have a value that is not on the command line."""
    if in_use:
        each = (f"{name.replace('_', '-')} {default.value} ({default.origin})" for name, default in in_use.items())
        console.say(f"Defaults: {', '.join(each)}.")


def blamed(message: str) -> str:
    """Return where the options are from that a message names, if that is not the command line."""
    named = [
        f"--{option} is from {default.origin}"
        for name, default in in_use.items()
        if f"--{(option := name.replace('_', '-'))} " in f"{message} "
    ]
    return f" ({'; '.join(named)}.)" if named else ""
