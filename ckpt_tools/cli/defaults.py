"""Defaults: values of options from the environment, from ckpt.toml, or from [tool.ckpt] of pyproject.toml."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError, did_you_mean
from . import console
from .words import COMMANDS

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Default(NamedTuple):
    """A value for an option, and where it is from, in words."""

    value: Any
    origin: str


in_use: dict[str, Default] = {}
"""The defaults that count in this run: those of options that its command line does not give."""
unread: list[str] = []
"""Variables that are called like options of the command, and set none."""


def read(
    command: str, options: Mapping[str, Any], of_command: Callable[[str], Mapping[str, Any]], words: Sequence[str]
) -> dict[str, Default]:
    """Read the defaults of a command; the environment counts before the files.

    Args:
        options: its options by name, each with its `Origins`.
        of_command: returns the options of any command; KeyError for what is none.
        words: of the command line. A default that would be refused for what they say is left out.

    Raises:
        UsageError: a file cannot be read, or has a key that no option has.
    """
    found = dict(_from_file(command, options, of_command))
    found |= _from_environment(options)
    given = {name for name, option in options.items() if _said(name, option, words)}
    overruled = {name for each in given for name in _names(options[each].origins.overrules)}
    return {
        name: default
        for name, default in found.items()
        if name not in overruled and (options[name].origins.needs or name) in {*found, *given}
    }


def _said(name: str, option: Any, words: Sequence[str]) -> bool:
    """Return True if an option is given on the command line, or before the command."""
    spellings = (*option.opts, *option.secondary_opts)
    return getattr(console.manner, name, False) or any(word.partition("=")[0] in spellings for word in words)


def _names(overruled: Iterable[Any]) -> Iterator[str]:
    for each in overruled:
        yield from [each] if isinstance(each, str) else (option.name for option in each.options())


def variable(name: str) -> str:
    """Return the name of the variable that sets an option."""
    return f"CKPT_{name.upper()}"


def _from_environment(options: Mapping[str, Any]) -> dict[str, Default]:
    names = [name for name, option in options.items() if option.origins.from_environment]
    return {name: Default(value, variable(name)) for name in names if (value := os.environ.get(variable(name)))}


def variables(commands: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return what the environment sets; no other variable, which may be a key of something else.

    Args:
        commands: the options of each.
    """
    found = {"CKPT_NO_CONFIG": os.environ.get("CKPT_NO_CONFIG", "")}
    for options in commands:
        found |= {default.origin: default.value for default in _from_environment(options).values()}
    return {name: value for name, value in found.items() if value}


def unread_of(options: Mapping[str, Any]) -> list[str]:
    """Return the variables that are called like one of these options, and do not set it."""
    others = (variable(name) for name, option in options.items() if not option.origins.from_environment)
    return [name for name in others if os.environ.get(name)]


def _from_file(
    command: str, options: Mapping[str, Any], of_command: Callable[[str], Mapping[str, Any]]
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
                hint = did_you_mean(key, COMMANDS)
                if key == "tool":
                    hint = " This file has its options at the top, without [tool.ckpt]."
                raise UsageError(f"{where}: [{prefix}{key}] is no command of ckpt.{hint}") from None
            inner = value if key == command else inner
            continue
        option = options.get(name) or next(filter(None, (of_command(other).get(name) for other in COMMANDS)), None)
        if option is None:
            hint = _hint(key, [each for other in COMMANDS for each in of_command(other)])
            raise UsageError(f"{where}: '{key}' is no option of ckpt.{hint}")
        _refuse(where, key, value, option)
        if name in options:
            yield name, Default(value, where)
    for key, value in inner.items():
        name = key.replace("-", "_")
        if name not in options:
            hint = _hint(key, options)
            raise UsageError(f"{where}: [{prefix}{command}] '{key}' is no option of ckpt {command}.{hint}")
        _refuse(where, key, value, options[name])
        yield name, Default(value, where)


def _hint(key: str, names: Iterable[str]) -> str:
    return did_you_mean(key.replace("_", "-"), {name.replace("_", "-") for name in names})


def _refuse(where: str, key: str, value: Any, option: Any) -> None:
    origins = option.origins
    if origins.once_only:
        raise UsageError(f"{where}: '{key}' belongs to one run, and has no default. Give it on the command line.")
    code = origins.names_code is not None and origins.names_code in str(value)
    if code or origins.names_place:
        what = "names code to run" if code else "says where to write"
        raise UsageError(
            f"{where}: '{key}' {what}, and no file may, for it may come with a download. Give it on the command line."
        )


def config() -> tuple[Path | None, Mapping[str, Any]]:
    """Return the file with defaults that is nearest to the current folder, upwards, and its table; (None, {}) if none.

    Raises:
        UsageError: it is not TOML.
    """
    if os.environ.get("CKPT_NO_CONFIG", "").lower() not in ("", *_FALSE):
        return None, {}
    try:
        here = Path.cwd()
    except OSError:  # the folder was deleted
        return None, {}
    for path in (folder / name for folder in (here, *here.parents) for name in ("ckpt.toml", "pyproject.toml")):
        try:
            if not path.is_file():  # a pipe would be waited for
                continue
            content = path.read_bytes()
        except OSError:
            continue
        if path.name == "ckpt.toml":
            return path, _parsed(path, content)
        if b"ckpt" in content:
            tools = _parsed(path, content).get("tool")
            if isinstance(tools, dict) and (table := tools.get("ckpt")) is not None:
                if not isinstance(table, dict):
                    raise UsageError(f"{path}: tool.ckpt = {table!r} is no table of options: write [tool.ckpt].")
                return path, table
    return None, {}


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(content.decode())
    except ValueError as error:  # also a number with more digits than Python reads
        raise UsageError(f"{path}: not TOML: {error}.") from error
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply.") from error


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
    if many and isinstance(value, dict):
        return [f"{key}={each}" for key, each in value.items()]
    if many:
        return [str(each) for each in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, (bool, dict)):
        raise UsageError(f"{origin}: {name} = {value!r} is no value of this option.")
    return str(value)


def say_in_use() -> None:
    """Show which options have a value that is not on the command line, and which variables give none."""
    if in_use:
        from ..series.paths import shown

        each = (
            f"{name.replace('_', '-')} {shown(default.value)} ({default.origin})" for name, default in in_use.items()
        )
        console.say(f"Defaults: {', '.join(each)}.")
    if unread:
        console.say(f"Not read: {', '.join(unread)}. The environment says how a command runs, not what it makes.")


def blamed(message: str) -> str:
    """Return where the options are from that a message names, if that is not the command line."""
    named = [
        f"--{option} is from {default.origin}"
        for name, default in in_use.items()
        if re.search(rf"--{(option := name.replace('_', '-'))}(?![\w-])", message)
    ]
    return f" ({'; '.join(named)}.)" if named else ""
