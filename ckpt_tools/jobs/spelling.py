"""Spelling: how the command line writes the parameters of the library, which messages name in backticks."""

from __future__ import annotations

import ast
import re

SPELLINGS = {
    "out": ("--out", "-o"),
    "batch_size": ("--batch-size", "-b"),
    "workers": ("--workers", "-j"),
    "eval_data": ("--eval",),
}
"""Options that are not called like their parameters, or have a short name."""
OPPOSITES = {"lower_is_better": "higher-is-better"}
"""What the option for False is called, where it is not ``--no-`` and the name."""


def spelled(text: str) -> str:
    """Turn the parameters that a message of the library names into options.

    `name` becomes --name, `name=value` --name value (for each text of a list), `name=True` --name, `name=False`
    --no-name, and `function(name=value)` or `function(...)` the command that does it.
    """
    return re.sub(r"`(?:(\w+)\()?(\w+|\.{3})(?:=([^`]*?))?\)?`", _option, text)


def _option(match: re.Match[str]) -> str:
    function, name, text = match.groups()
    command = "" if function is None else f"ckpt {function.replace('_', '-')} "
    if name == "...":
        return command.rstrip()
    option = "-o" if name == "out" else SPELLINGS.get(name, (f"--{name.replace('_', '-')}",))[0]
    if text is None or text == "True":
        return command + option
    if text == "False" and name in OPPOSITES:
        return f"{command}--{OPPOSITES[name]}"
    if text == "False":
        return f"{command}--no-{option.removeprefix('--')}"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    from shlex import quote

    values = value if isinstance(value, list) and value and all(isinstance(word, str) for word in value) else [value]
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, (int, float)) for each in value):
        values = [",".join(map(str, value))]
    return command + " ".join(f"{option} {quote(each) if isinstance(each, str) else each}" for each in values)
