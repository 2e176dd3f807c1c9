"""Groups of options: the keyword arguments of the public functions, declared once for library and command line.

`takes` gives a function the flat keyword signature of its groups; the command line makes its options of the same ones.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ClassVar, TypeVar, get_args

from ..compute.progress import Progress, check_progress
from ..series.rules.option import Option, Origins
from ..series.schedules import Schedule

R = TypeVar("R")
REQUIRED = inspect.Parameter.empty
USUAL = "auto"
"""Default of an option whose value is chosen by what it is for."""


def option(
    help: str,  # noqa: A002
    default: Any = REQUIRED,
    *,
    implied: Any = None,
    metavar: str | None = None,
    offered: Sequence[str] | Callable[[], Sequence[str]] = (),
    **origins: Any,
) -> Any:
    """Declare an option of a group; see `Option`, and `Origins` for `origins`. Without a default it is required."""
    return Option("", None, default, help, implied, metavar, Origins(**origins), offered)


class Options:
    """Options that belong together, with a title for the help; declared like a dataclass: frozen, keyword-only.

    It is not one, because a dataclass compiles code: a dozen of them would be a tenth of the start-up of `ckpt avg`.
    """

    title: ClassVar[str]
    _options: ClassVar[Mapping[str, Option]] = {}

    def __init_subclass__(
        cls, more: Sequence[type["Options"]] = (), without: Sequence[str] = (), needs: str = ""
    ) -> None:
        """Gather the options: those of the base, those declared, and those of `more` groups but for some names.

        Args:
            needs: the option without which those of the other groups are refused, see `Origins`.
        """
        declared = inspect.get_annotations(cls)
        own = {name: replace(vars(cls)[name], name=name, type=type_) for name, type_ in declared.items()}
        others = {name: each for group in more for name, each in group._options.items() if name not in without}
        if needs:
            others = {n: replace(each, origins=replace(each.origins, needs=needs)) for n, each in others.items()}
        cls._options = {**cls._options, **own, **others}

    def __init__(self, **values: Any) -> None:
        vars(self).update({name: values.get(name, option.default) for name, option in self._options.items()})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """Return the options, in the order of the help."""
        return tuple(cls._options.values())


Group = Options | Schedule
"""Holds the values of its options; `options` declares them, and `title` is theirs in the help."""


def takes(*groups: type[Group]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Let a function whose last parameters are groups take the options of these as keyword arguments instead.

    The line ``{options}`` in its docstring becomes a line for each option.
    """

    def flat(function: Callable[..., R]) -> Callable[..., R]:
        @wraps(function)
        def call(*arguments: Any, **given: Any) -> R:
            filled = []
            for group in groups:
                options = group.options()
                for option in options:
                    if option.default is REQUIRED and option.name not in given:
                        raise TypeError(f"{function.__name__}() lacks the keyword argument '{option.name}'")
                for option in options:
                    if option.type == Progress | None and given.get(option.name) is not None:
                        check_progress(option.name, given[option.name])
                filled.append(group(**{o.name: given.pop(o.name) for o in options if o.name in given}))
            try:
                positional = signature.bind(*arguments, **given).args
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(*positional, *filled)

        full = inspect.signature(function)
        parameters = list(full.parameters.values())[: -len(groups)]
        signature = full.replace(parameters=parameters)
        options = [option for group in groups for option in group.options()]
        keywords = [
            inspect.Parameter(o.name, inspect.Parameter.KEYWORD_ONLY, default=o.default, annotation=_annotation(o))
            for o in options
        ]
        call.__signature__ = full.replace(parameters=[*parameters, *keywords])  # type: ignore[attr-defined]
        lines = [
            f"{o.help} If {o.default!r}: {o.implied}." if o.default in (None, USUAL) and o.implied else o.help
            for o in options
        ]
        text = "\n        ".join(f"{o.name}: {line}" for o, line in zip(options, lines, strict=True))
        call.__doc__ = (function.__doc__ or "").replace("{options}", text)
        return call

    return flat


def _annotation(option: Option) -> Any:
    return option.type | None if option.default is None and type(None) not in get_args(option.type) else option.type
