"""Errors: one tree for all refusals and failures.

CkptError                 exit 1: refused or failed; says what, where, and the next step
├── UsageError            exit 2: an invalid argument, whatever the files contain
├── SeriesError           the selection or order of files
├── ReadError             a file cannot be read as a checkpoint
│   ├── NotACheckpointError
│   ├── CorruptError      truncated, or a header that does not match its payload
│   └── UnsupportedError  a known but unsupported content (sparse, quantized, ...)
├── LayoutError           a checkpoint lacks weights, or the requested ones
├── AlignmentError        names, shapes or dtypes differ in the series
├── NumericsError         NaN, infinity, overflow
├── ModelError            no such model, or the weights do not fit it
├── DataError             images or batches are missing or unusable
└── WriteError            the target cannot, or must not, be written

A message names parameters in backticks: `force`, `threads=0`, or a call such as `convert(to='plain')`. The command line
shows its options instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LONGEST_MESSAGE = 4000
"""Characters of a message."""


def shortened(text: str, most: int = 500) -> str:
    """Return a text, without its middle if it has more than so many characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-(most // 2) :]}"


class CkptError(Exception):
    """A job was refused or failed, for a reason on which its user can act."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message, without its middle if it is long: a name in a file may have megabytes."""
        return shortened(super().__str__(), LONGEST_MESSAGE)


class UsageError(CkptError):
    """An argument is invalid."""

    exit_code = 2


class SeriesError(CkptError):
    """The files do not form a series."""


class ReadError(CkptError):
    """A file cannot be read as a checkpoint."""


class NotACheckpointError(ReadError):
    """The file has no known checkpoint format."""


class CorruptError(ReadError):
    """The file is truncated, or its header is inconsistent."""


class UnsupportedError(ReadError):
    """The content is known but not supported."""


class LayoutError(CkptError):
    """A checkpoint lacks the requested weights."""


class AlignmentError(CkptError):
    """Names, shapes or dtypes of tensors differ in the series."""


class NumericsError(CkptError):
    """A value is not finite, or does not fit the output dtype."""


class ModelError(CkptError):
    """The network of the weights cannot be built."""


class DataError(CkptError):
    """The input data of the network is missing, broken or of the wrong shape."""


class WriteError(CkptError):
    """The output cannot be written to its target."""


class WriteWarning(UserWarning):
    """The target is in its place, but something after that failed."""


def did_you_mean(word: object, words: Iterable[str]) -> str:
    """Return a sentence with the word that may be meant, to follow another one; empty if none is near."""
    from difflib import get_close_matches

    near = get_close_matches(str(word).lower(), [*words], n=1)
    return f" Did you mean {near[0]}?" if near else ""


def unknown_word(name: str, value: object, words: Sequence[str], also: Iterable[str] = ()) -> UsageError:
    """Return the error about a value that is none of the words that a parameter takes.

    Args:
        words: all that the message names.
        also: further words, which may be meant, too.
    """
    said = f"`{name}` is one of {', '.join(words)}, not {value!r}."
    return UsageError(said + did_you_mean(value, (*words, *also)))
