"""Arguments: the options of a command, made of the groups that the library declares, and their values.

Messages of the library name parameters in backticks, such as `threads=0`; `spelled` turns them into options.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from ..errors import UsageError, WriteError
from ..jobs.asked import COMMAND, Asked, alone_among_tasks, started_together
from ..jobs.option_groups import REQUIRED, Group
from ..jobs.options import Pairs, Running, Words
from ..series.rules.option import Numbers, Option
from . import common, completion, console, defaults, progress

R = TypeVar("R")
SPELLINGS = {
    "out": ("--out", "-o"),
    "batch_size": ("--batch-size", "-b"),
    "workers": ("--workers", "-j"),
    "eval_data": ("--eval",),
}
"""Options that are not called like their parameters, or have a short name."""
OPPOSITES = {"lower_is_better": "higher-is-better"}
"""What the option for False is called, where it is not ``--no-`` and the name."""
VERBS = {"average": "avg", "evaluate": "eval", "recalibrate_checkpoint": "recal-bn", "tune_checkpoint": "tune"}
"""Commands that are not called like their functions."""
ONCE = ("state", "state_b")
"""Options that some commands take several times; where they take one, a second is no slip to pass over."""
Reader = Callable[[Any], Any]

Json = Annotated[
    bool, typer.Option("--json", help="The report on stdout.", rich_help_panel=Running.title), common.ONE_RUN
]

Averaged = Annotated[
    str | None,
    typer.Argument(metavar="CKPT", help="The checkpoint.", show_default="averaged.pth, or averaged.safetensors"),
]
"""A checkpoint that is what `ckpt avg` writes if none is given."""


def number_of_images(text: str | None) -> int | None:
    """Read a number of images, or all.

    Returns:
        None if it is not given, -1 for all.

    Raises:
        UsageError: something else.
    """
    if text is None or text == "all":
        return None if text is None else -1
    if not text.isdecimal() or int(text) < 2:
        raise UsageError(f"`images={text!r}`: a number, 2 or more, or all.")
    return int(text)


def with_options(
    *groups: type[Group], **readers: Reader
) -> Callable[[Callable[..., None]], Callable[[], Callable[..., None]]]:
    """Give a function with ``**options`` a parameter for each option of these groups, as Typer wants it.

    It becomes a function that makes it, for the options are known only then: a rule may have been registered meanwhile.

    Args:
        readers: for options whose value the command line writes otherwise; called with text.
    """
    return lambda function: partial(_for_typer, function, groups, readers)


def _for_typer(
    function: Callable[..., None], groups: Sequence[type[Group]], readers: Mapping[str, Reader]
) -> Callable[..., None]:
    options = [(group.title, o) for group in groups for o in group.options() if not o.name.startswith("on_")]

    @wraps(function)
    def call(*, quiet: bool, verbose: bool, show_config: bool, **given: Any) -> None:
        common.speak(quiet=quiet, verbose=verbose, all_rows=given.get("all_", False))
        defaults.say_in_use()
        for _, option in options:
            if option.name in ONCE and _kind(option) is not Words and isinstance(given[option.name], list):
                given[option.name] = _only(option, given[option.name])
            value = _read(option, given[option.name])
            given[option.name] = readers[option.name](value) if option.name in readers else value
        function(**given)

    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    made = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(option),
            annotation=_annotation(title, option, as_text=option.name in readers),
        )
        for title, option in options
    ]
    arguments = [p for p in own if p.kind is not p.KEYWORD_ONLY]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (
            ("quiet", common.Quiet),
            ("verbose", common.Verbose),
            ("show_config", common.ShowConfig),
        )
    ]
    parameters = [*arguments, *made, *own[len(arguments) :], *shared]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _only(option: Option, values: Sequence[str]) -> str | None:
    """Return the value of an option that is given once at most.

    Raises:
        UsageError: it is given several times.
    """
    if len(values) > 1:
        raise UsageError(f"`{option.name}` is given {len(values)} times, and this command takes one set of weights.")
    return next(iter(values), None)


def _default(option: Option) -> Any:
    if option.default in (REQUIRED, ()):
        return None
    listed = _kind(option) is Words or option.name in ONCE
    return [option.default] if listed and isinstance(option.default, str) else option.default


_METAVARS = {int: "N", float: "X", Numbers: "X,X,...", bool: None}


def _annotation(title: str, option: Option, *, as_text: bool) -> Any:
    kind = _kind(option)
    many = kind in (Words, Pairs)
    listed = many or option.name in ONCE
    type_ = bool if kind is bool else list[str] if listed else kind if kind in (int, float) and not as_text else str
    name = option.name.replace("_", "-")
    names = SPELLINGS.get(option.name, (f"--{name}",))
    if option.name in OPPOSITES:
        names = (f"--{name}/--{OPPOSITES[option.name]}",)
    elif kind is bool and option.default:
        names = (f"--{name}/--no-{name}",)
    default: Any = option.default not in (REQUIRED, None, (), False)
    if option.implied is not None:
        default = spelled(str(option.implied))
    info = typer.Option(
        *names,
        help=spelled(option.help.rstrip(".") + "; repeatable." if many else option.help),
        metavar=option.metavar or _METAVARS.get(kind, option.name.rpartition("_")[2].upper()),
        show_default=default,
        rich_help_panel=title,
        autocompletion=completion.values(option) if completion.ASKED else None,
    )
    return Annotated[type_ if option.default not in (REQUIRED, None, ()) else type_ | None, info, option.origins]


def _kind(option: Option) -> Any:
    """Return the type of an option's value as the command line reads it: without None, and text where that is one."""
    kinds = (option.type, *get_args(option.type))
    return next((kind for kind in (Numbers, Words, Pairs, str, bool, int, float) if kind in kinds), str)


def _read(option: Option, value: Any) -> Any:
    kind = _kind(option)
    if value is None:
        return None if option.default is REQUIRED else option.default
    if kind is Numbers:
        return numbers(option.name, value)
    if kind is Pairs:
        return parse_kwargs(value)
    return path(value) if Path in get_args(option.type) else value


def spelled(text: str) -> str:
    """Turn the parameters that a message of the library names into options.

    `name` becomes --name, `name=value` --name value (for each text of a list), `name=True` --name, `name=False`
    --no-name, and `function(name=value)` or `function(...)` the command that does it.
    """
    return re.sub(r"`(?:(\w+)\()?(\w+|\.{3})(?:=([^`]*?))?\)?`", _option, text)


def _option(match: re.Match[str]) -> str:
    function, name, text = match.groups()
    command = "" if function is None else f"ckpt {VERBS.get(function, function).replace('_', '-')} "
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
    if isinstance(value, dict):
        values = [f"{key}={each}" for key, each in value.items()]
    return command + " ".join(f"{option} {quote(each) if isinstance(each, str) else each}" for each in values)


def note_command() -> None:
    """Let the library know that a command runs, and which: a process of torchrun or srun may be one of several."""
    COMMAND[:] = ["ckpt", *_without_part(sys.argv[1:])]


def carried_out(job: Callable[..., R], *inputs: Any, **options: Any) -> tuple[R, float]:
    """Call a function of the library and show its progress; return its report, and the seconds that it took."""
    check_folder()
    note_command()
    if "part" in options:
        _say_if_alone(options)
    started = time.perf_counter()
    with progress.shown(progress.PLANNING) as line:
        if "on_plan" in options:
            options["on_plan"] = line.planned(options["on_plan"])
            report = job(*inputs, **options, on_progress=line.tell)
        else:
            report = job(*inputs, **options, on_progress=line.working)
    return report, time.perf_counter() - started


def _say_if_alone(options: Mapping[str, Any]) -> None:
    """Say what is done if srun runs several tasks, and none of them is this process."""
    asked = options["part"] or options["finish"] or options.get("resume")
    if not asked and started_together() is None and (count := alone_among_tasks()):
        console.say(
            f"srun runs {count} tasks, and did not start ckpt itself: this process does the whole job. To share one "
            "job, start ckpt by srun, in a script with 'exec ckpt', or give --part."
        )


def _without_part(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without those that say which part of a job to do."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            kept += [word, *rest]
        elif word == "--part":
            next(rest, None)
        elif not word.startswith("--part=") and word not in ("--finish", "--resume"):
            kept.append(word)
    return kept


def say_notes(notes: Iterable[str], tell: console.Tell = console.say) -> None:
    """Show notes of a report, with options instead of parameters."""
    tell(*map(spelled, notes))


def say_part(words: str) -> None:
    """Show what became of a part of a job, if there was one."""
    if words:
        console.say(spelled(words))


def started(**options: Any) -> Asked | None:
    """Return the part of a process that was started with others; None if the options of its command say what to do."""
    return None if options["part"] or options["finish"] or options.get("resume") else started_together()


def reports(report: Any, **options: Any) -> bool:
    """Return True if this process tells what became of an output; of several that were started together one does.

    Args:
        options: of the command.
    """
    part = started(**options)
    return part is None or report.written or (not report.part and part.index == 1)


def plain(report: Any) -> dict[str, Any]:
    """Return a report as plain data, with options in its notes instead of parameters."""
    data: dict[str, Any] = report.to_dict()
    data["notes"] = [spelled(note) for note in data["notes"]]
    return data | ({"part": spelled(data["part"])} if "part" in data else {})


def check_folder() -> None:
    """Refuse to start in a folder that was deleted.

    Raises:
        WriteError: it was.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise WriteError("the current folder is gone, and torch cannot start in it. cd to another folder.") from error


def averaged(checkpoint: str | None) -> Path:
    """Return a checkpoint given as an argument, or what `ckpt avg` writes by default.

    Raises:
        UsageError: neither is there.
        SeriesError: the argument is empty.
    """
    from ..series.paths import as_path, default_input, refuse_empty

    if checkpoint is not None:
        refuse_empty(checkpoint)
        return as_path(checkpoint)
    return default_input()


def path(text: str | Path) -> str:
    """Expand the ~ that a shell leaves in quotes; the ~ of an unknown user is kept."""
    return os.path.expanduser(text)  # noqa: PTH111


def numbers(name: str, text: str) -> list[float]:
    """Read numbers with commas between them.

    Raises:
        UsageError: the text is something else; names the parameter.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"`{name}={text!r}`: write numbers with commas, such as 1,2,3.") from error


def parse_kwargs(pairs: Sequence[str]) -> Mapping[str, Any]:
    """Turn ``["num_classes=10", "act=relu"]`` into keyword arguments; other values than Python literals are text.

    Raises:
        UsageError: one without ``=``.
    """
    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise UsageError(f"`model_kwargs={pair!r}`: write name=value.")
        try:
            kwargs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            kwargs[key] = text
    return kwargs
