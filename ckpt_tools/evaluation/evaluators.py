"""Evaluators: what a checkpoint scores, by a command, a function, or labelled images."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..batchnorm.recalibrate import Estimator
from ..batchnorm.report import BatchNormReport
from ..checkpoints.open import Checkpoint, open_checkpoint
from ..compute.progress import Progress
from ..errors import CkptError, DataError, NumericsError, UsageError
from ..formats import read_header
from .data import Batches
from .models import importable, load_factory, load_weights
from .runner import Runner

T = TypeVar("T")
R = TypeVar("R")
PER_SAMPLE = "per_sample"
"""Key of the values of each sample, in what a command prints or a function returns."""
_READ = 1 << 28  # bytes at the end of what a command printed, for values of many samples
_PATIENCE = 2.0  # seconds to end by oneself
_SHOWN = 200  # characters of what a command printed, in a message


@dataclass(frozen=True, slots=True)
class Scores:
    """What one checkpoint scores.

    Attributes:
        metrics: name to value, which is finite.
        samples: metric to its value for each sample, float64 [N], whose mean the metric is; of some metrics, or none.
    """

    metrics: Mapping[str, float]
    samples: Mapping[str, Tensor] = field(default_factory=dict)


class Evaluator(Protocol):
    """Scores checkpoints."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the scores depend on, as plain data."""

    def score(self, path: Path, log: Path) -> Scores:
        """Score a checkpoint.

        Args:
            path: of the checkpoint.
            log: a file for what is printed meanwhile.

        Raises:
            CkptError: the evaluation fails, or gives no number.
        """

    def end(self) -> None:
        """End evaluations that are at work in other threads."""


@dataclass(frozen=True, slots=True)
class Command:
    """Scores by a command of the shell, whose last line on stdout is a number or a JSON object of metrics.

    Attributes:
        text: with ``{ckpt}`` where the path belongs.
        limit: seconds until it is ended; None for no limit.
        option: that gave it, for messages.
    """

    text: str
    limit: float | None = None
    option: str = "eval_command"
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set, repr=False, compare=False)

    def __post_init__(self) -> None:
        if "{ckpt}" not in self.text:
            raise UsageError(f"`{self.option}={self.text!r}`: write {{ckpt}} where the path of the checkpoint belongs.")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise UsageError(f"`time_limit={self.limit!r}`: a number of seconds above 0.")

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"command": self.text}

    def score(self, path: Path, log: Path) -> Scores:
        """Run the command; see `Evaluator`. It and all that it started are ended at the limit, and by Ctrl-C."""
        # A path with a dash in front would be an option.
        command = _filled(self.text, f"./{path}" if str(path).startswith("-") else str(path))
        with log.open("w+b") as out, log.with_suffix(".err").open("w+b") as err:
            # A session of its own, so that a signal reaches all that it starts.
            try:
                process = subprocess.Popen(  # noqa: S602 - the user's own command line
                    command, shell=True, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
            except (OSError, ValueError) as error:
                raise UsageError(f"`{self.option}` cannot be started ({error}).") from error
            self._running.add(process)
            try:
                code = process.wait(self.limit)
            except subprocess.TimeoutExpired:
                raise DataError(
                    f"the evaluation takes more than {self.limit:g} s (`time_limit`), and was ended; see {log}."
                ) from None
            finally:
                _end(process)
                self._running.discard(process)
            if code:
                said = _tail(err)
                if code in (126, 127):  # of the shell: no candidate will make it better
                    raise UsageError(
                        f"`{self.option}`: the shell cannot run it ({said}). See {log.with_suffix('.err')}."
                    )
                why = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
                raise DataError(f"the evaluation fails ({why}): {said or 'it printed no error'}. See {log}.")
            last = _tail(out)
        try:
            return parsed(json.loads(last))
        except (ValueError, RecursionError, DataError) as error:
            why = str(error) if isinstance(error, DataError) else f"{last[:_SHOWN]!r} is neither a number nor JSON"
            raise DataError(
                f"the last line of the evaluation should be a number or a JSON object of metrics: "
                f"{why if last else 'it printed nothing'}. See {log}."
            ) from None

    def end(self) -> None:
        """End the commands that run; see `Evaluator`."""
        _end(*self._running)


@dataclass(frozen=True, slots=True)
class Function:
    """Scores by a Python function of the user, which returns a number or a dict of metrics.

    Attributes:
        spec: ``file.py:function`` or ``module:function``.
        in_memory: call it with the state dict, name to tensor, in place of the path.
        option: that gave it, for messages.
        state: the set of weights that is the state dict.
    """

    spec: str
    in_memory: bool = False
    option: str = "eval_function"
    state: str = "auto"

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"function": self.spec, "in_memory": self.in_memory}

    def score(self, path: Path, log: Path) -> Scores:
        """Call the function; see `Evaluator`. What it prints on stderr is not kept."""
        function = load_factory(self.spec, self.option)
        given: Any = str(path)
        if self.in_memory:
            given = dict(open_checkpoint(path, state=self.state))
        # A live table stands on stderr.
        with importable(self.spec), log.open("w") as out, redirect_stdout(out):
            try:
                found = function(given)
            except CkptError:
                raise
            except (Exception, SystemExit) as error:  # the user's own code
                raise DataError(f"{self.spec} fails ({type(error).__name__}: {error}).") from error
        return parsed(found, f"{self.spec} returns ")

    def end(self) -> None:
        """Nothing: a function runs in the thread that calls it."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """Scores a classifier on labelled images: top-1 and top-5 in percent, loss in nats.

    Attributes:
        network: takes the weights of each checkpoint.
        runner: of the network.
        held_out: labelled images.
        images: for BatchNorm statistics, measured before every score; None to take those of the checkpoint.
        passes, estimator, include_frozen, allow_unmeasured: see `recalibrate_bn`.
        identity: what the scores depend on, as plain data.
        on_progress: called with (what is done, images done, images in all).
        state: the set of weights of each checkpoint.
    """

    network: nn.Module
    runner: Runner
    held_out: Batches
    images: Batches | None
    passes: int
    estimator: Estimator
    include_frozen: bool
    allow_unmeasured: bool
    identity: Mapping[str, Any]
    on_progress: Progress
    state: str = "auto"

    def score(self, path: Path, log: Path) -> Scores:
        """Load the weights and run the network; see `Evaluator`. Nothing is logged."""
        if self.images is None:
            load_weights(self.network, Checkpoint(read_header(path), self.state))
        else:
            self.measured(path, self.images)
        found = self.runner.outcomes("evaluating", self.held_out, self.on_progress)
        if not found.loss.isfinite().all():
            raise NumericsError("the loss is NaN or infinity on some images: are these the statistics of its data?")
        samples = found.samples
        return Scores({name: float(each.mean()) for name, each in samples.items()}, samples)

    def measured(self, path: Path, images: Batches) -> BatchNormReport:
        """Load the weights, measure the BatchNorm statistics, and return how far they are from those of the file."""
        load_weights(self.network, Checkpoint(read_header(path), self.state))
        return self.runner.recalibrate(
            images,
            self.passes,
            self.estimator,
            self.on_progress,
            include_frozen=self.include_frozen,
            allow_unmeasured=self.allow_unmeasured,
        )

    def end(self) -> None:
        """Nothing: the network runs in the thread that calls it."""


def scored_together(
    items: Sequence[T], score: Callable[[T], R], jobs: int, end: Callable[[], None]
) -> Iterator[tuple[T, R]]:
    """Yield each item with its score, as they come.

    Args:
        score: called with an item; in threads if there is more than one job.
        jobs: scores at a time.
        end: called if something ends this early, such as Ctrl-C, so that what runs is ended; what waits is not begun.
    """
    if jobs == 1:
        for item in items:
            yield item, score(item)
        return
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[R], T] = {pool.submit(score, item): item for item in items}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for each in done:
                    yield running.pop(each), each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end()
            raise


def parsed(found: Any, who: str = "") -> Scores:
    """Read the metrics in a number, or in a mapping of names to numbers, with the values of samples in ``per_sample``.

    Raises:
        DataError: none of it, or a number that is not finite.
    """
    if isinstance(found, Mapping):
        given = found.get(PER_SAMPLE)
        metrics = {str(name): _number(value) for name, value in found.items() if name != PER_SAMPLE}
    else:
        given, metrics = None, {"metric": _number(found)}
    numbers = {name: value for name, value in metrics.items() if value is not None}
    if not numbers:
        raise DataError(f"{who}{str(found)[:_SHOWN]!r}, in which there is no number")
    unfit = [name for name, value in numbers.items() if not math.isfinite(value)]
    if unfit:
        raise DataError(f"{who}{numbers[unfit[0]]} for '{unfit[0]}'")
    if given is not None and not isinstance(given, Mapping):
        if len(numbers) != 1:
            raise DataError(f"{who}'{PER_SAMPLE}' as a list for {len(numbers)} metrics: give an object, metric to list")
        given = {next(iter(numbers)): given}
    return Scores(numbers, {str(name): _samples(name, each, numbers, who) for name, each in (given or {}).items()})


def _number(value: Any) -> float | None:
    if isinstance(value, (bool, str)):
        return None
    try:
        return float(value)  # of NumPy and torch, too
    except OverflowError:  # an integer too large for a float
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return None


def _samples(name: Any, values: Any, metrics: Mapping[str, float], who: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64).cpu()
    except (TypeError, ValueError, OverflowError, RuntimeError):
        tensor = torch.empty(0, 0)
    if tensor.dim() != 1 or not len(tensor) or not tensor.isfinite().all():
        raise DataError(f"{who}'{PER_SAMPLE}' for '{name}' that is no list of finite numbers")
    mean = metrics.get(str(name))
    if mean is None:
        raise DataError(f"{who}'{PER_SAMPLE}' for '{name}', which is none of the metrics ({', '.join(metrics)})")
    if not math.isclose(float(tensor.mean()), mean, rel_tol=1e-3, abs_tol=1e-6):
        raise DataError(
            f"{who}{mean:g} for '{name}', and values of samples whose mean is {float(tensor.mean()):g}: these two "
            "should agree"
        )
    return tensor


def _filled(command: str, path: str) -> str:
    """Return a command of the shell with a path in place of ``{ckpt}``, quoted as it has to be at each place."""
    filled = quote = ""
    for part in re.split(r"""(\{ckpt\}|\\[^{]|['"])""", command):
        if part == "{ckpt}":
            # In single quotes, only these end; in double ones, four characters have a meaning.
            escaped = path.replace("'", "'\"'\"'") if quote else shlex.quote(path)
            part = re.sub(r'([\\$`"])', r"\\\1", path) if quote == '"' else escaped
        elif part == quote or part == "\\'" and quote == "'":
            quote = ""
        elif part in ("'", '"') and not quote:
            quote = part
        filled += part
    return filled


def _tail(file: BinaryIO) -> str:
    """Return the last line that holds anything, of the end of a file."""
    file.seek(max(0, file.seek(0, io.SEEK_END) - _READ))
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _end(*processes: subprocess.Popen[bytes]) -> None:
    """End processes, and all of their sessions that is left, at the same time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
        until = time.monotonic() + _PATIENCE
        # A process may end before those that it started.
        while number == signal.SIGTERM and any([*map(_left, processes)]) and time.monotonic() < until:
            time.sleep(0.01)
        if not any(map(_left, processes)):
            break
    for process in processes:
        process.wait()


def _left(process: subprocess.Popen[bytes]) -> bool:
    """Return True if anything of the session of a process is left."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
