"""Progress: how a job tells how far it is, in the same way everywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from ..errors import UsageError

Progress = Callable[[str, int, int | None], None]
"""Called in the thread of the caller with (what is done, how much of it so far, all of it): bytes, or images where a
network is shown some. All of it is None as long as it is not known. The last call of each kind of work has it twice."""


def check_progress(name: str, given: object) -> None:
    """Refuse a function that cannot be called like this, before any work is done.

    Args:
        name: of the parameter, for the message.

    Raises:
        UsageError: it takes other arguments, or is no function.
    """
    if not callable(given):
        raise UsageError(f"`{name}` is a function, not {given!r}.")
    try:
        signature = inspect.signature(given)
    except ValueError:  # of a function in C, which does not tell
        return
    try:
        signature.bind("", 0, None)
    except TypeError as error:
        raise UsageError(
            f"`{name}` is called with (what is done, how much of it so far, all of it), and {given!r} does not take "
            f"that ({error})."
        ) from None
