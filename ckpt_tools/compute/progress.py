"""Progress: how a job tells how far it is, in the same way everywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import UsageError


class Activity(str):
    """The name of a kind of work.

    Attributes:
        unit: what it is counted in, such as ``bytes``; empty if it has no count, and is 0 of 1, then 1 of 1.
        step: the name without what tells it from other work of its kind, such as the checkpoint or the epoch.
    """

    unit: str
    step: str

    def __new__(cls, name: str, unit: str = "bytes", *, step: str | None = None) -> Activity:
        """Name a kind of work; without a `step` the name is that, too."""
        activity = super().__new__(cls, name)
        activity.unit, activity.step = unit, name if step is None else step
        return activity


Progress = Callable[[Activity, int, int | None], None]
"""Called in the thread of the caller with (what is done, how much of it so far, all of it).

All of it is None as long as it is not known. Each activity is told when it begins, and its last call has all of it
twice.
"""
LOADING_TORCH = "loading torch"
LOADING_MODEL = "loading the model"
OPENING_IMAGES = "opening the images"
HEADERS = Activity("reading headers", "files")
HASHING = Activity("hashing inputs")
HASHING_OUTPUT = Activity("hashing the output")
SYNCING = Activity("syncing to disk", "files")
WRITING = Activity("writing")


def counted(on_progress: Progress | None, activity: Activity, total: int | None) -> Callable[[int], None] | None:
    """Tell that work begins, and return what tells how much of it is done; None if nobody is told.

    Args:
        total: all of it; None if that is not known.
    """
    if on_progress is None:
        return None
    on_progress(activity, 0, total)
    return lambda done: on_progress(activity, done, total)


@contextmanager
def uncounted(on_progress: Progress | None, name: str) -> Iterator[None]:
    """Tell that work without a count begins, and at the end of the block that it is done."""
    tell = counted(on_progress, Activity(name, ""), 1)
    yield
    if tell is not None:
        tell(1)


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
