"""Runner: shows batches to a network, with progress, mixed precision, and messages for errors."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..batchnorm.batches import mapped, samples_in, tensors_of
from ..batchnorm.calls import Call
from ..batchnorm.recalibrate import Estimator, recalibrate_bn
from ..batchnorm.report import BatchNormReport
from ..compute.progress import Activity, Progress
from ..errors import CkptError, DataError, ModelError
from .data import Batches
from .scores import Accuracy, Fit, Outcomes, evaluate, fit, outcomes

T = TypeVar("T")


class Runner:
    """Runs one network on one device, with the allocator of glibc set meanwhile.

    Attributes:
        autocast: mixed precision on this device; without effect if `amp` is off.

    Args:
        network: on that device.
        call: how it is called.
        amp: use bfloat16 where torch.autocast does.
        channels_last: put images, and the weights of convolutions over them, in channels-last order. Only those of
            four dimensions have it; volumes and their weights stay as they are.
    """

    def __init__(
        self, network: nn.Module, device: torch.device, *, amp: bool, channels_last: bool, call: Call | None = None
    ) -> None:
        self._network = network
        self._call = call or Call()
        self.autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp)
        self._channels_last = channels_last
        self._shape: list[int] | None = None  # of the batch at work, for messages
        self._on_cpu = device.type == "cpu"
        for module in network.modules() if channels_last else ():
            if isinstance(module, nn.modules.conv._ConvNd):
                module.weight.data = self.ordered(module.weight.data)

    def recalibrate(
        self,
        batches: Batches,
        passes: int,
        estimator: Estimator,
        on_progress: Progress,
        *,
        include_frozen: bool = False,
        allow_unmeasured: bool = False,
    ) -> BatchNormReport:
        """Measure the statistics of the network; see `recalibrate_bn`.

        Raises:
            DataError, NumericsError: of the data and the values.
            ModelError: the network itself fails.
        """

        def show(what: Activity, done: int, total: int | None) -> None:
            on_progress(what, done, batches.images if total is None else total)

        fed = _Fed(batches, self._prepare)
        call = self._call
        return self._run(
            lambda: recalibrate_bn(
                self._network,
                fed,
                forward=call.forward,
                inputs=call.inputs,
                mask=call.mask,
                passes=passes,
                estimator=estimator,
                include_frozen=include_frozen,
                allow_unmeasured=allow_unmeasured,
                on_progress=show,
            )
        )

    def evaluate(self, what: str, batches: Batches, on_progress: Progress) -> Accuracy:
        """Evaluate the network; see `ckpt_tools.evaluation.scores.evaluate`."""
        return self._scored(evaluate, what, batches, on_progress)

    def outcomes(self, what: str, batches: Batches, on_progress: Progress) -> Outcomes:
        """Evaluate the network image by image; see `ckpt_tools.evaluation.scores.outcomes`."""
        return self._scored(outcomes, what, batches, on_progress)

    def fit(self, what: str, batches: Batches, on_progress: Progress) -> Fit | None:
        """See how the network fits images; see `ckpt_tools.evaluation.scores.fit`."""
        return self._scored(fit, what, batches, on_progress)

    def _scored(
        self, score: Callable[[nn.Module, _Fed, Call], T], what: str, batches: Batches, on_progress: Progress
    ) -> T:
        fed = _Fed(batches, self._prepare, partial(on_progress, Activity(what, "images")))
        return self._run(lambda: score(self._network, fed, self._call))

    def _run(self, work: Callable[[], T]) -> T:
        self._shape = None
        try:
            with self.autocast, large_blocks_kept() if self._on_cpu else nullcontext():
                return work()
        except CkptError:
            raise
        except (Exception, SystemExit) as error:  # the code of the user may raise anything
            shape = "" if self._shape is None else f" on a batch of shape {self._shape}"
            fit = "Do the images fit the model (`img_size`, `data`)?"
            raise ModelError(
                f"{type(self._network).__name__} failed{shape} ({type(error).__name__}: {error}). "
                f"{fit if self._call.forward is None else 'Does `forward` take such batches?'}"
            ) from error

    def _prepare(self, batch: Any) -> Any:
        """Return a batch in the memory order of the network, and note its shape for messages."""
        self._shape = next((list(tensor.shape) for tensor in tensors_of(batch)), None)
        return mapped(batch, self.ordered)

    def ordered(self, tensor: Tensor) -> Tensor:
        """Return images, or weights of a convolution, in the memory order of this network."""
        last = self._channels_last and tensor.dim() == 4 and tensor.is_floating_point()
        return tensor.contiguous(memory_format=torch.channels_last) if last else tensor


@dataclass(frozen=True, slots=True)
class _Fed:
    """Prepared batches for the network; can be iterated any number of times if the data can."""

    batches: Batches
    prepare: Callable[[Any], Any]
    on_images: Callable[[int, int | None], None] | None = None

    def __iter__(self) -> Iterator[Any]:
        done = 0
        if self.on_images is not None:
            self.on_images(0, self.batches.images)
        try:
            for batch in self.batches:
                yield self.prepare(batch)
                done += samples_in(batch)
                if self.on_images is not None:
                    self.on_images(done, self.batches.images)
            if self.on_images is not None and done != self.batches.images:
                self.on_images(done, done)
        except CkptError:
            raise
        except (Exception, SystemExit) as error:  # a dataset of the user's
            raise DataError(f"the data failed after {done} images ({type(error).__name__}: {error}).") from error


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Settings of glibc's allocator, by mallopt(3)."""
_DEFAULT_THRESHOLD = 128 * 1024


@contextmanager
def large_blocks_kept() -> Iterator[None]:
    """Let glibc keep the memory of large activations for the next batch; afterwards it does as by default.

    By default it gives blocks above 32 MB back to the system at once, and the page faults of fresh memory then
    take longer than a normalisation does. Two things stay: glibc cannot tell which thresholds were set before, so
    those become its defaults, and it no longer adapts them to the blocks that it sees.
    """
    _set_thresholds(1 << 30, (1 << 31) - 1)
    try:
        yield
    finally:
        _set_thresholds(_DEFAULT_THRESHOLD, _DEFAULT_THRESHOLD, trim_now=True)


def _set_thresholds(mmap: int, trim: int, *, trim_now: bool = False) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, mmap)
            libc.mallopt(_M_TRIM_THRESHOLD, trim)
            if trim_now:
                libc.malloc_trim(0)
