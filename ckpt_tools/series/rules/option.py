"""Option: a parameter of a public function and the option of its command, declared once for both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

Numbers = Sequence[float]
"""Type of an option that is a list of numbers."""
FACTORY, ANY = ":", ""
"""What tells a value that names code, for `Origins.names_code`: that of ``module:factory``, and every value."""


@dataclass(frozen=True, slots=True)
class Origins:
    """Where the value of an option may come from, apart from the command line, and when such a default counts.

    A file (ckpt.toml) may set most options, but it may have come with a download. `ckpt_tools.cli.defaults` reads them.

    Attributes:
        once_only: it belongs to one run: what is made, of what, and where it goes. No default sets it.
        from_environment: it is about how a command runs, and the variable CKPT_NAME sets it. No other variable is read:
            scripts of other people may have a CKPT_EVERY or CKPT_MODEL of their own, which would change an average.
        names_code: a value with this text in it names code to run, which no file may; if None, no value does.
        names_place: it says where to write, which no file may.
        needs: name of the option without which it is refused, and its default does not count.
        overrules: options beside which it decides, so that their defaults do not count: their names, or groups.
    """

    once_only: bool = False
    from_environment: bool = False
    names_code: str | None = None
    names_place: bool = False
    needs: str = ""
    overrules: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Option:
    """A parameter of a public function, and the option of its command.

    Attributes:
        name: of the parameter.
        type: of its values, such as ``float``, ``Numbers`` or ``Literal["name", "order"]``;
            None is allowed where it is the default.
        default: the default value.
        help: one line; names other parameters in backticks, like messages.
        implied: the meaning of a default of None, as a value or in words.
        metavar: placeholder of the value in the help of the command.
        origins: where its value may come from, apart from the command line.
        offered: words that it takes, or a function that returns them; if empty, those of the type.
    """

    name: str
    type: Any
    default: Any
    help: str
    implied: Any = None
    metavar: str | None = None
    origins: Origins = Origins()
    offered: Sequence[str] | Callable[[], Sequence[str]] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The words that it takes, as a shell completes them; empty if there are none, or any number."""
        own = self.offered() if callable(self.offered) else self.offered
        closed = (each for each in (self.type, *get_args(self.type)) if get_origin(each) is Literal)
        return tuple(own) or tuple(word for each in closed for word in get_args(each))

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have; one of a closed set of words is text."""
        own = (self.type, *get_args(self.type))
        return (*own, str) if any(get_origin(each) is Literal for each in own) else own


def one_of(words: Iterable[str]) -> Any:
    """Return the type of an option that takes one of these words."""
    return Literal[tuple(words)]
