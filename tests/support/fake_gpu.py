"""Devices in place of a GPU: the CPU, and one that works only when it is waited for (a missing wait: wrong bytes)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Done:
    """A stream or an event whose work is already done."""

    def record_event(self, event: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Cpu:
    """The CPU in place of a GPU: all work is done when it is queued."""

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self) -> Any:
        return _Done()

    def event(self) -> Any:
        return _Done()

    def using(self, stream: Any) -> AbstractContextManager[object]:
        return nullcontext()

    def release(self) -> None:
        pass


class LateEvent:
    def __init__(self) -> None:
        self.reach: Callable[[], None] = lambda: None

    def synchronize(self) -> None:
        self.reach()


class LateStream:
    """A queue of work, done in order and only as far as someone waits."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], object]] = deque()
        self.done = 0

    def push(self, work: Callable[[], object]) -> None:
        self.waiting.append(work)

    def record_event(self, event: LateEvent) -> None:
        end = self.done + len(self.waiting)
        event.reach = lambda: self._reach(end)

    def wait_event(self, event: LateEvent) -> None:
        self.push(event.reach)

    def synchronize(self) -> None:
        self._reach(self.done + len(self.waiting))

    def _reach(self, end: int) -> None:
        while self.done < end:
            self.done += 1
            self.waiting.popleft()()


class _HandOver(TorchDispatchMode):
    """Defers torch operations, except views and allocations."""

    def __init__(self, stream: LateStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if is_view or not any(isinstance(a, torch.Tensor) for a in args):
            return func(*args, **kwargs)
        if written:
            (out,) = written
            self._stream.push(lambda: func(*args, **kwargs))
            return kwargs[out.name] if out.name in kwargs else args[schema.arguments.index(out)]
        results = func(*args, **kwargs)  # the inputs are not ready: right shapes, wrong values

        def redo() -> None:
            for old, new in zip(results, func(*args, **kwargs), strict=True):
                old.copy_(new)

        self._stream.push(redo)
        return results


class Late(Cpu):
    """A device with late streams."""

    def __init__(self) -> None:
        self.streams: list[LateStream] = []

    def stream(self) -> LateStream:
        self.streams.append(LateStream())
        return self.streams[-1]

    def event(self) -> LateEvent:
        return LateEvent()

    def using(self, stream: Any) -> AbstractContextManager[object]:
        return _HandOver(stream)
