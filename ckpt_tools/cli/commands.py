"""Commands: made by Typer when they are called for, so that a run of one does not pay for the others.

Three things differ from what Typer does by itself, each for the time that it takes. Only the command that runs is
imported. Its help is plain text in groups: rich would need 400 modules to draw boxes around them. And values are read
here: Typer (0.29) makes a pydantic adapter for each option, and pydantic takes as long to import as all of an average.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, get_args

import typer.core
import typer.main

from ..errors import UsageError
from ..series.rules.option import Origins
from . import common, console, defaults
from .words import COMMANDS, MEANT, OPTIONS

NotUsable: Any = typer.BadParameter.__base__
"""Typer's errors about the words of a command line."""


class _QuickHelp:
    """A command whose --help has a quick value."""

    _help: _Option | None = None

    def get_help_option(self, ctx: Any) -> Any:
        """Return --help; the same one each time."""
        if self._help is None:
            self._help = _Option(super().get_help_option(ctx), bool)  # type: ignore[misc]
        return self._help


class Commands(_QuickHelp, typer.core.TyperGroup):
    """The commands by name, each imported and made when it is asked for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rich_markup_mode = None
        # For lists of them: none of these is imported.
        self.commands = {name: typer.core.TyperCommand(name, short_help=line) for name, line in COMMANDS.items()}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what stands before the command."""
        words = [*args]
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except NotUsable as error:
            _explain(ctx, error, words)
            raise
        return rest

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return name, command and arguments of what is called; say what a word of another tool is called here."""
        word, *rest = args
        if word == "version" and set(rest) <= {"-v", "--verbose", "-q", "--quiet"}:
            common.show_version(verbose=ctx.params["verbose"] or not {"-v", "--verbose"}.isdisjoint(rest))
        if word == "help":
            word, *rest = [*rest[:1], "--help"]
        if word in ("--help", "help"):
            typer.echo(ctx.get_help())
            raise typer.Exit
        if word not in COMMANDS and not ctx.resilient_parsing:
            ctx.fail(_unknown(word, rest))
        return word, made(word) if word in COMMANDS else None, rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, as wide as the terminal."""
        _fit(formatter)
        super().format_help(ctx, formatter)


def made(name: str) -> Any:
    """Import a command, and make it."""
    module = name.replace("-", "_")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command = getattr(import_module(f".{module}", __package__), module)
    app.command(name, cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})(command())
    return typer.main.get_command(app)


def options_of(name: str) -> dict[str, Any]:
    """Return the options of a command by name; KeyError if there is none of this name."""
    COMMANDS[name]
    return _options(made(name))


def _options(command: Any) -> dict[str, Any]:
    return {_name(param): param for param in command.params if isinstance(param, _Option)}


def _name(param: Any) -> str:
    """Return the name of a parameter without the _ that tells it from a name of Python, such as `all`."""
    return str(param.name).rstrip("_")


def show_defaults(asked: bool) -> None:
    """Show the defaults that files and the environment set, and end the run."""
    if asked:
        from ..series.paths import shown

        path, table = defaults.config()
        console.show(f"# {path or 'no ckpt.toml, and no pyproject.toml with [tool.ckpt], from here upwards'}")
        for key, value in table.items():
            inner = value.items() if isinstance(value, dict) else ()
            lines = [f"{key}.{name} = {each!r}" for name, each in inner] or [f"{key} = {value!r}"]
            console.show(*map(shown, lines))
        variables = defaults.variables(map(options_of, COMMANDS))
        console.show(*[f"{name}={shown(value)}" for name, value in variables.items()])
        raise typer.Exit


def _unknown(word: str, rest: Sequence[str]) -> str:
    """Say which command may be meant by a word."""
    import shlex
    from difflib import get_close_matches

    said = f"No such command '{word}'."
    if (meant := MEANT.get(word.lower().replace("_", "-"))) is not None:
        name, *options = meant.split()
        return f"{said} Did you mean '{shlex.join(['ckpt', name, *rest, *options])}'?"
    close = get_close_matches(word.lower(), [*COMMANDS, *MEANT], 3)
    names = dict.fromkeys(MEANT.get(each, each).split()[0] for each in close)
    return f"{said} Did you mean {' or '.join(map(repr, names))}?" if names else said


def _explain(ctx: Any, error: Any, args: Sequence[str]) -> None:
    """Say more than Typer does of an option that there is not, of one without its value, and of a missing argument.

    Raises:
        UsageError: of Typer; there is more to say.
    """
    error.ctx = error.ctx or ctx  # not every error of Typer knows its command
    word = getattr(error, "option_name", "")
    options = {name: param for param in ctx.command.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
    if hasattr(error, "possibilities"):
        if word[:2] != "--":  # the first letter of -last, say
            word = next((arg.partition("=")[0] for arg in args if re.match(rf"-\w*{re.escape(word[1:])}", arg)), word)
        said = _near(word, [name for name in options if name[:2] == "--"])
        if not said and isinstance(ctx.command, Commands):
            said = f" Options of a command stand after it: ckpt COMMAND {word}."
        ctx.fail(f"No such option: {word}.{said}")
    if word in options and not options[word].is_flag:
        ctx.fail(f"{word} lacks its value: {word} {options[word].metavar or 'VALUE'}.")
    if hasattr(error, "param_type"):  # an argument is missing
        example = str(ctx.command.help).rpartition("Example: ")[2].strip()
        ctx.fail(f"{error.param.metavar.rstrip('.')} is missing. Example: {example}.")


def _near(word: str, options: Sequence[str]) -> str:
    """Say which option may be meant: one alone, for a list of guesses helps nobody."""
    from difflib import get_close_matches

    full = f"--{word.lstrip('-')}" if len(word) > 2 else word
    longer = sorted((name for name in options if len(full) > 4 and name.startswith(full)), key=len)
    near = full if full in OPTIONS else next(iter(longer or get_close_matches(full, [*options, *OPTIONS], 1)), None)
    return "" if near is None else f" Did you mean {OPTIONS.get(near, near)}?"


def _fit(formatter: Any) -> None:
    formatter.width = min(console.columns(), 100)
    if formatter.width < 80:  # names of options would leave no room for what they mean
        formatter.write_dl = partial(formatter.write_dl, col_max=formatter.width // 3)


class _Command(_QuickHelp, typer.core.TyperCommand):
    """A command whose values are read quickly and whose help is plain text."""

    def __init__(self, name: str, *, callback: Callable[..., Any], params: list[Any], **options: Any) -> None:
        notes = {
            parameter.name: get_args(parameter.annotation)
            for parameter in inspect.signature(callback, eval_str=True).parameters.values()
        }
        quick: list[Any] = [
            (_Option if isinstance(param, typer.core.TyperOption) else _Argument)(param, *notes[param.name])
            for param in params
        ]
        super().__init__(name, callback=callback, params=quick, **options)
        self.rich_markup_mode = None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, as wide as the terminal."""
        _fit(formatter)
        super().format_help(ctx, formatter)

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the arguments, with defaults from files and the environment."""
        if not extra.get("resilient_parsing"):
            options = _options(self)
            found = defaults.read(str(self.name), options, options_of, args)
            defaults.in_use.clear()
            defaults.in_use.update(found)
            defaults.unread[:] = defaults.unread_of(options)
            extra["default_map"] = {
                name: defaults.as_typed(name, default, flag=options[name].is_flag, many=options[name].multiple)
                for name, default in found.items()
            }
        return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; say what an option of another tool is called here."""
        words = [*args]  # which reading takes out of `args`
        shown = "--show-config" in args
        ctx.resilient_parsing |= shown  # what is missing or wrong is shown as it is
        try:
            rest = super().parse_args(ctx, args)
            for name in [*defaults.in_use]:
                if ctx.get_parameter_source(name).name == "COMMANDLINE":
                    del defaults.in_use[name]
            if shown:
                self._show_config(ctx)
            return rest
        except NotUsable as error:
            named = getattr(getattr(error, "param", None), "name", None)
            if named in defaults.in_use and ctx.get_parameter_source(named).name != "COMMANDLINE":
                value, origin = defaults.in_use[named]
                raise UsageError(f"{origin}: {named.replace('_', '-')} = {value!r}: {error.message}") from error
            _explain(ctx, error, words)
            raise

    def _show_config(self, ctx: Any) -> None:
        """Show each option that has a value, with where it is from, and end the run."""
        from ..series.paths import shown

        for param in self.params:
            value = ctx.params.get(param.name)
            if param.name == "show_config" or not isinstance(param, typer.core.TyperOption) or value in (None, ()):
                continue
            given = ctx.get_parameter_source(param.name).name == "COMMANDLINE"
            default = defaults.in_use.get(param.name)
            origin = "the command line" if given else "default" if default is None else default.origin
            said = shown(value) if isinstance(value, str) else value
            console.show(f"{_name(param).replace('_', '-')} = {json.dumps(said)}  # {origin}")
        raise typer.Exit

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options under the titles of their groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                title = "Arguments" if isinstance(param, typer.core.TyperArgument) else "Options"
                groups.setdefault(getattr(param, "rich_help_panel", None) or title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _read(value: Any, type_: Any) -> Any:
    """Read a value of the command line that is there, and right; ValueError for any other."""
    if isinstance(value, bool):
        return value
    kinds = {type_, *get_args(type_)}
    if isinstance(value, str):
        if str in kinds:
            return value
        if int in kinds and value.isascii():
            return int(value)
        if float in kinds and value.isascii():
            return float(value)
    elif value and isinstance(value, (list, tuple)) and list[str] in (type_, *kinds):
        return list(value)
    elif isinstance(value, (int, float)) and type(value) in kinds:
        return value
    raise ValueError(f"{value!r} is of another type")


class _Quick:
    """An option or argument as Typer made it, with quick values."""

    def __init__(self, made: Any, plain_type: Any, *notes: Any) -> None:
        origins = next((note for note in notes if isinstance(note, Origins)), Origins())
        vars(self).update(vars(made), plain_type=plain_type, origins=origins)

    def process_value(self: Any, ctx: Any, value: Any) -> Any:
        """Return a value of the command line as the command wants it."""
        if value is None and not self.required:
            value = () if self.multiple or self.nargs == -1 else None
        else:
            try:
                value = _read(value, self.plain_type)
            except ValueError:
                self._refuse_number(ctx, value)
                return super().process_value(ctx, value)  # type: ignore[misc]
        return value if self.callback is None else self.callback(ctx, self, value)

    def _refuse_number(self: Any, ctx: Any, value: Any) -> None:
        kinds = {self.plain_type, *get_args(self.plain_type)}
        if not isinstance(value, str) or str in kinds or not kinds & {int, float}:
            return
        hint = " Write a point, not a comma." if float in kinds and re.fullmatch(r"-?\d+,\d+", value) else ""
        what = "number" if float in kinds else "whole number"
        raise typer.BadParameter(f"{value!r} is not a {what}.{hint}", ctx, self)


class _Option(_Quick, typer.core.TyperOption):
    """An option whose help names the variable that sets it, too."""

    def get_help_record(self: Any, ctx: Any) -> tuple[str, str] | None:
        """Return its spellings and help."""
        record = super().get_help_record(ctx)
        if record is None or not self.origins.from_environment:
            return record
        return record[0], f"{record[1]}  [env: {defaults.variable(self.name)}=]"


class _Argument(_Quick, typer.core.TyperArgument):
    """An argument whose help is its name alone."""

    def get_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what stands for it in the usage line."""
        shown = self._shown + ("..." if self.nargs == -1 and not self._shown.endswith("...") else "")
        return [shown if self.required else f"[{shown}]"]

    def get_help_record(self, ctx: Any) -> tuple[str, str] | None:
        """Return its name and help."""
        record = super().get_help_record(ctx)
        return None if record is None else (self._shown, record[1])

    @property
    def _shown(self) -> str:
        return self.metavar or str(self.name).upper()
