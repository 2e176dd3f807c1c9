"""The bench: candidates are made some at a time, scored, and all but the best of them deleted."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import CkptError, DataError, UsageError, WriteError
from ...evaluation.evaluators import Evaluator, Scores
from ...series.candidates import Candidate
from ...series.metrics import lower_by_name
from ...storage.journal import make_folder
from ...storage.staged import remove
from .making import MOST
from .results import Result, Results, key_of
from .verdict import apart

Make = Callable[[Sequence[Candidate], Sequence[Path]], None]


@dataclass(frozen=True, slots=True)
class Aim:
    """The metric that decides.

    Attributes:
        metric: its name.
        lower: True if lower is better.
        why: how that is known, in words.
    """

    metric: str
    lower: bool
    why: str

    def score(self, result: Result) -> float:
        """Return a number of which higher is better; NaN for a failed evaluation."""
        value = result.metrics.get(self.metric, math.nan)
        return -value if self.lower else value


def aim_of(metrics: Sequence[str], asked: str | None, usual: str | None, *, lower: bool | None) -> Aim:
    """Choose the metric that decides.

    Args:
        metrics: that an evaluation gave.
        asked, lower: as the user says; None if not.
        usual: of this kind of evaluation; None if it has none.

    Raises:
        UsageError: there is no such metric, or there are several and none is asked for.
    """
    name = asked or (usual if usual in metrics else metrics[0] if len(metrics) == 1 else None)
    if name is None:
        raise UsageError(f"the evaluation gives {', '.join(metrics)}: choose the one that decides with `metric`.")
    if name not in metrics:
        raise UsageError(f"`metric={name!r}`: the evaluation gives {', '.join(metrics)}.")
    if lower is not None:
        return Aim(name, lower, "as you say")
    return Aim(name, lower_by_name(name), "by its name")


@dataclass(slots=True)
class Bench:
    """Makes candidates and scores them.

    Attributes:
        make: writes candidates to paths, reading the inputs once.
        nbytes: of a candidate.
        suffix: of its file; empty for a folder.
        made: what else their bytes depend on, as plain data.
        evaluator: scores them.
        usual: metric of its kind of evaluation.
        results: of this sweep and those before it.
        folder: for candidates and logs.
        keep: candidates that stay.
        asked, lower: the metric that decides, as the user says.
        holdout: part of the samples that has no part in the choice, and the seed by which it is drawn.
        jobs: evaluations at a time.
        on_result: called after each with (result, number done, number in all).
    """

    make: Make
    nbytes: int
    suffix: str
    made: Mapping[str, str]
    evaluator: Evaluator
    usual: str | None
    results: Results
    folder: Path
    keep: int
    asked: str | None
    lower: bool | None
    holdout: tuple[float, int] | None = None
    jobs: int = 1
    on_result: Callable[[Result, int, int], None] | None = None
    aim: Aim | None = None
    found: dict[Candidate, Result] = field(default_factory=dict)
    reused: int = 0
    _lacking: int = 0

    def scores(self, candidates: Sequence[Candidate], make: Make | None = None) -> list[Result]:
        """Score candidates; those whose result is known are neither made nor scored again.

        Args:
            make: takes the place of the bench's own.

        Raises:
            UsageError: of the metric that decides.
            CkptError: the first error, if all evaluations fail.
        """
        waiting = []
        for candidate in candidates:
            if candidate in self.found:
                continue
            known = self.results.get(self.key(candidate))
            # A holdout is of samples, whose file may be gone.
            if known is None or (self.holdout is not None and not known.samples):
                waiting.append(candidate)
            else:
                self.reused += 1
                self._take(candidate, replace(known, label=candidate.label))
        total = len(self.found) + len(waiting)
        at = 0
        while at < len(waiting):
            some = waiting[at : at + self._at_a_time()]
            self._score(some, total, make or self.make)
            at += len(some)
        if waiting and all(self.found[each].error is not None for each in self.found):
            first = next(iter(self.found.values()))
            raise DataError(f"no candidate could be scored; {first.label}: {first.error}")
        return [self.found[each] for each in candidates]

    def key(self, candidate: Candidate) -> str:
        """Return the key of a candidate's result."""
        return self.key_by({**self.evaluator.identity, "holdout": self.holdout}, candidate)

    def key_by(self, evaluation: Mapping[str, Any], candidate: Candidate) -> str:
        """Return the key of a candidate's result by an evaluation."""
        return key_of(candidate.members, candidate.coefficients, {**evaluation, "made": dict(self.made)})

    @property
    def chosen(self) -> Aim:
        """The metric that decides, once a candidate is scored."""
        if self.aim is None:
            raise DataError("no candidate is scored yet")
        return self.aim

    def ranking(self) -> list[Candidate]:
        """Return the candidates with a score, best first; of equal ones that of lower loss, then the earlier one."""
        aim = self.aim
        if aim is None:
            return []
        scored = [each for each in self.found if not math.isnan(aim.score(self.found[each]))]
        return sorted(
            scored, key=lambda each: (-aim.score(self.found[each]), self.found[each].metrics.get("loss", 0.0))
        )

    def path(self, candidate: Candidate) -> Path:
        """Return where the file of a candidate is, while it is there."""
        name = re.sub(r"[^A-Za-z0-9.=_-]+", "-", candidate.label)[:60].strip("-.")
        return self.folder / f"{name}-{self.key(candidate)[:8]}{self.suffix}"

    def log(self, candidate: Candidate, what: str = "") -> Path:
        """Return where what an evaluation prints is kept."""
        return self.folder / "logs" / f"{self.path(candidate).name}{what and '-'}{what}.log"

    def selection(self, scores: Scores) -> Scores:
        """Return the scores on the samples that have a part in the choice."""
        return scores if self.holdout is None else apart(scores, *self.holdout, held_out=False)

    def _at_a_time(self) -> int:
        free = shutil.disk_usage(self.folder).free
        room = int(0.95 * free / max(self.nbytes, 1))
        if room < 1:
            raise WriteError(
                f"{self.folder}: {free:,} bytes are free, and a candidate takes {self.nbytes:,}. "
                "Choose another place with `scratch`."
            )
        return min(MOST, room)

    def _score(self, candidates: Sequence[Candidate], total: int, make: Make) -> None:
        make_folder(self.folder / "logs")
        paths = [self.path(each) for each in candidates]
        for path in paths:  # of a sweep that was killed
            remove(path)
        try:
            make(candidates, paths)
            for candidate, result in self._evaluated(candidates, paths):
                self.results.add(result)
                self._take(candidate, result)
                self._tidy()
                if self.on_result is not None:
                    self.on_result(result, len(self.found), total)
        finally:
            for candidate, path in zip(candidates, paths, strict=True):
                if candidate not in self.ranking()[: self.keep]:
                    remove(path)

    def _evaluated(self, candidates: Sequence[Candidate], paths: Sequence[Path]) -> Iterator[tuple[Candidate, Result]]:
        if self.jobs == 1:
            for candidate, path in zip(candidates, paths, strict=True):
                yield candidate, self._result(candidate, path)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            running: dict[Future[Result], Candidate] = {
                pool.submit(self._result, candidate, path): candidate
                for candidate, path in zip(candidates, paths, strict=True)
            }
            try:
                while running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for each in done:
                        yield running.pop(each), each.result()
            except BaseException:  # Ctrl-C, too: what runs is ended, and what waits is not begun
                pool.shutdown(wait=False, cancel_futures=True)
                self.evaluator.end()
                raise

    def _result(self, candidate: Candidate, path: Path) -> Result:
        began = time.perf_counter()
        metrics: Mapping[str, float] = {}
        scores, error = Scores({}), None
        try:
            scores = self.evaluator.score(path, self.log(candidate))
            metrics = self.selection(scores).metrics
        except UsageError:
            raise  # it will not get better with the next one
        except CkptError as failed:
            scores, error = Scores({}), str(failed)
        return Result(
            key=self.key(candidate),
            label=candidate.label,
            checkpoints=tuple(member.path.name for member in candidate.members),
            coefficients=candidate.coefficients,
            metrics=dict(metrics),
            seconds=time.perf_counter() - began,
            error=error,
            samples=scores.samples,
        )

    def _take(self, candidate: Candidate, result: Result) -> None:
        if result.error is None:
            wanted = self.asked if self.aim is None else self.aim.metric
            # The first one alone may lack it; when two do, it is a slip.
            if wanted is not None and wanted not in result.metrics and (self.aim is not None or not self._lacking):
                self._lacking += self.aim is None
                result = replace(result, error=f"the evaluation gives no '{wanted}'", metrics={})
            elif self.aim is None:
                self.aim = aim_of([*result.metrics], self.asked, self.usual, lower=self.lower)
        self.found[candidate] = result

    def _tidy(self) -> None:
        """Delete the files of all that were scored but the best."""
        for candidate in self.ranking()[self.keep :]:
            remove(self.path(candidate))
