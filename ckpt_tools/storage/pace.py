"""Pace: how many bytes a second a job reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """A rate that all threads of a job keep to together: a token bucket that holds one reading.

    Who takes tokens that are not there yet waits for them, and others wait behind. What was not read while nobody asked
    is not made up for later, so that no second sees more than the rate and the readings that are under way.

    Args:
        rate: bytes a second.
        clock: the time in seconds.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._free = 0.0  # the time from which the next bytes may be read
        self._lock = threading.Lock()

    def take(self, nbytes: int, stop: threading.Event) -> None:
        """Wait until so many bytes may be read, or until the job is stopped."""
        with self._lock:
            now = self._clock()
            begin = max(self._free, now)
            self._free = begin + nbytes / self._rate
        if begin > now:
            stop.wait(begin - now)
