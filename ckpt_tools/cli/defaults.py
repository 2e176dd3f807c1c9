"""Defaults: values of options from the environment, from ckpt.toml, or from [tool.ckpt] of pyproject.toml."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
FROM_ENVIRONMENT = frozenset(
    {"cache", "device", "drop_cache", "gpu_memory", "max_read_rate", "quiet", "threads", "verbose", "workers"}
)
"""Options about how a command runs. No other is read from the environment, where scripts of other people may have a
CKPT_EVERY or CKPT_MODEL of their own, which would change an average."""
_CODE = frozenset(
    {"data", "eval_command", "eval_data", "eval_function", "forward", "model", "recal_bn", "recalibrate", "teacher"}
)
_PLACES = frozenset({"cache", "scratch"})
"""No file runs code or chooses where to write: it may be one of a folder that was downloaded."""
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Default(NamedTuple):
    """A value for an option, and where it is from, in words."""

    value: Any
    origin: str


in_use: dict[str, Default] = {}
"""The defaults that count in this run: those of options that its command line does not give."""


def read(
    command: str, options: Collection[str], of_command: Callable[[str], Collection[str]], words: Sequence[str]
) -> dict[str, Default]:
    """Read the defaults of a command; the environment counts before the files.

    Args:
        options: names of its options.
        of_command: returns the names of the options of any command; KeyError for what is none.
        words: of the command line. A default that would be refused for what they say is left out.

    Raises:
        UsageError: a file cannot be read, or has a key that no option has.
    """
    found = dict(_from_file(command, options, of_command))
    for name in FROM_ENVIRONMENT.intersection(options):
        if value := os.environ.get(_variable(name)):
            found[name] = Default(value, _variable(name))
    for name, other in (("quiet", "verbose"), ("verbose", "quiet")):
        if getattr(console.manner, other) or not {f"--{other}", f"-{other[0]}"}.isdisjoint(words):
            found.pop(name, None)
    if command == "avg":
        given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
        idle = _idle({*found, *given})
        found = {name: default for name, default in found.items() if name not in idle}
    return found


def _variable(name: str) -> str:
    return f"CKPT_{name.upper()}"


def _idle(given: Collection[str]) -> set[str]:
    """Return the options of `ckpt avg` that are refused without another, or beside the record of an average."""
    from ..jobs.options import AveragedOutput, Group, Matching, Recalibration, Selection
    from ..series.schedules import Schedule

    idle: set[str] = set()
    if "best" not in given:
        idle |= {"metric", "metrics", "lower_is_better"}
    if "recal_bn" not in given:
        idle |= {option.name for option in Recalibration.options()}
    if not {"replay", "update"}.isdisjoint(given):
        groups: list[type[Group]] = [Schedule, Matching, AveragedOutput]
        groups += [Selection] if "replay" in given else []
        idle |= {option.name for group in groups for option in group.options()}
    return idle


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
                hint = " This file has its options at the top, without [tool.ckpt]." if key == "tool" else ""
                raise UsageError(f"{where}: [{prefix}{key}] is no command of ckpt.{hint}") from None
            inner = value if key == command else inner
            continue
        if name not in options and not _anywhere(name, of_command):
            raise UsageError(f"{where}: '{key}' is no option of ckpt.")
        _refuse(where, key, value)
        if name in options:
            yield name, Default(value, where)
    for key, value in inner.items():
        name = key.replace("-", "_")
        if name not in options:
            raise UsageError(f"{where}: [{prefix}{command}] '{key}' is no option of ckpt {command}.")
        _refuse(where, key, value)
        yield name, Default(value, where)


def _anywhere(name: str, of_command: Callable[[str], Collection[str]]) -> bool:
    from .commands import COMMANDS

    return any(name in of_command(command) for command in COMMANDS)


def _refuse(where: str, key: str, value: Any) -> None:
    name = key.replace("-", "_")
    if name in ONE_OFF:
        raise UsageError(f"{where}: '{key}' belongs to one run, and has no default. Give it on the command line.")
    code = name in _CODE and (name in ("eval_command", "forward") or ":" in str(value))
    if code or name in _PLACES:
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
    if many and isinstance(value, dict):
        return [f"{key}={each}" for key, each in value.items()]
    if many:
        return [str(each) for each in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, (bool, dict)):
        raise UsageError(f"{origin}: {name} = {value!r} is no value of this option.")
    return str(value)


def say_in_use(options: Iterable[str]) -> None:
    """Show which options have a value that is not on the command line, and which variables give none.

    Args:
        options: of the command.
    """
    if in_use:
        from ..series.paths import shown

        each = (
            f"{name.replace('_', '-')} {shown(default.value)} ({default.origin})" for name, default in in_use.items()
        )
        console.say(f"Defaults: {', '.join(each)}.")
    unread = [_variable(name) for name in options if name not in FROM_ENVIRONMENT and os.environ.get(_variable(name))]
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


def variables() -> dict[str, str]:
    """Return what the environment sets; no other variable, which may be a key of something else."""
    names = ["CKPT_NO_CONFIG", *map(_variable, sorted(FROM_ENVIRONMENT))]
    return {name: value for name in names if (value := os.environ.get(name))}
