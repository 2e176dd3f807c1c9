"""Errors: everything the toolkit refuses to do, in one tree.

CkptError                 exit 1: refused or failed; says what, where, and the next step
├── UsageError            exit 2: an argument makes no sense, whatever the files hold
├── SeriesError           which files, in which order
├── ReadError             a file is not what it should be
│   ├── NotACheckpointError
│   ├── CorruptError      truncated, or a header that does not fit its payload
│   └── UnsupportedError  known, but not averaged or read here (sparse, quantized, ...)
├── LayoutError           no weights, or not the asked ones, inside a checkpoint
├── AlignmentError        names, shapes or dtypes do not line up over the series
├── NumericsError         NaN, infinity, overflow
├── ModelError            no such model, or the weights do not fit it
├── DataError             images or batches are missing or unusable
└── WriteError            the target cannot, or must not, be written

A message names parameters in backticks: `force`, `threads=0`, or a call such as `convert(to='plain')`. The command line
shows options in their place.
"""

from __future__ import annotations


class CkptError(Exception):
    """A job was refused or failed for a reason that its user can act on."""

    exit_code = 1


class UsageError(CkptError):
    """An argument is outside what is allowed."""

    exit_code = 2


class SeriesError(CkptError):
    """The files do not form a series."""


class ReadError(CkptError):
    """A file cannot be read as a checkpoint."""


class NotACheckpointError(ReadError):
    """The content is of no known checkpoint format."""


class CorruptError(ReadError):
    """The file contradicts itself: truncated, overlapping, or with a lying header."""


class UnsupportedError(ReadError):
    """The content is known, but of a kind that is refused by name."""


class LayoutError(CkptError):
    """The wanted weights are not where they should be inside a checkpoint."""


class AlignmentError(CkptError):
    """Tensors do not line up over the series."""


class NumericsError(CkptError):
    """A value is not finite, or does not fit the output dtype."""


class ModelError(CkptError):
    """The network that the weights belong to cannot be built."""


class DataError(CkptError):
    """The data to run the network on are missing, broken or of the wrong shape."""


class WriteError(CkptError):
    """The output cannot be written where it was asked for."""
