"""Scoring: candidates are made some at a time, scored, and all but the best of them deleted."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...compute.progress import Activity, Progress, counted
from ...errors import CkptError, DataError, UsageError, WriteError
from ...evaluation.evaluators import Evaluator, Scores, scored_together
from ...series.candidates import Candidate, joined
from ...series.member import Member
from .aim import Aim, aim_of
from .making import CANDIDATES_PER_READ
from .results import Result, Results, key_of
from .scratch import Scratch
from .verdict import split_samples

_EVALUATING = Activity("evaluating", "candidates")
Make = Callable[[Sequence[Candidate], Sequence[Path]], None]


@dataclass(slots=True)
class Scoring:
    """Makes candidates and scores them.

    Attributes:
        make: writes candidates to paths, reading the inputs once.
        nbytes: of a candidate.
        suffix: of its file; empty for a folder.
        made: what else their bytes depend on, as plain data.
        evaluator: scores them.
        usual: metric of its kind of evaluation.
        results: of this sweep and those before it.
        scratch: for candidates and logs.
        keep: candidates that stay.
        metric, lower_is_better: the metric that decides, as the user says.
        holdout: part of the samples that has no part in the choice, and the seed by which it is drawn.
        jobs: evaluations at a time.
        planned: evaluations of the sweep, at most.
        on_result: called after each with (result, number done, number in all).
        on_progress: told of evaluations; None if these tell of their own progress.
        found: candidates that are no other one again, with their results; with values of samples of the metric that
            decides, alone.
        reused: results known from before.
    """

    make: Make
    nbytes: int
    suffix: str
    made: Mapping[str, str]
    evaluator: Evaluator
    usual: str | None
    results: Results
    scratch: Scratch
    keep: int
    metric: str | None
    lower_is_better: bool | None
    holdout: tuple[float, int] | None = None
    jobs: int = 1
    planned: int = 0
    on_result: Callable[[Result, int, int], None] | None = None
    on_progress: Progress | None = None
    aim: Aim | None = None
    found: dict[Candidate, Result] = field(default_factory=dict)
    reused: int = 0
    _lacking: int = 0
    _by_key: dict[str, Candidate] = field(default_factory=dict)  # key to the one in `found`
    _keys: dict[Candidate, str] = field(default_factory=dict)

    def scores(self, candidates: Sequence[Candidate], make: Make | None = None) -> list[Result]:
        """Score candidates; those whose result is known are neither made nor scored again.

        Args:
            make: takes the place of the usual one.

        Raises:
            UsageError: of the metric that decides.
            CkptError: the first error, if all evaluations fail.
        """
        waiting = []
        for candidate in candidates:
            if self._joined(candidate):
                continue
            known = self.results.get(self.key(candidate))
            # A holdout is of samples, whose file may be gone.
            if known is None or (self.holdout is not None and not known.samples):
                waiting.append(candidate)
            else:
                self.reused += 1
                self._take(candidate, replace(known, label=candidate.label))
        best = self.ranking()[: self.keep]
        self.scratch.remove(*(self.path(each) for each in self.found if each not in best))
        at = 0
        while at < len(waiting):
            some = waiting[at : at + self._at_a_time()]
            self._score(some, make or self.make)
            at += len(some)
        if waiting and all(self.found[each].error is not None for each in self.found):
            first = next(iter(self.found.values()))
            raise DataError(f"no candidate could be scored; {first.label}: {first.error}")
        return [self.found[self._by_key[self.key(each)]] for each in candidates]

    def alone(self, member: Member) -> Result:
        """Return the result of a checkpoint alone."""
        return next(result for each, result in self.found.items() if each.members == (member,))

    def score(self, result: Result) -> float:
        """Return a number of which higher is better; NaN for a failed evaluation."""
        return math.nan if self.aim is None else self.aim.score(result.metrics)

    def key(self, candidate: Candidate) -> str:
        """Return the key of a candidate's result."""
        if candidate not in self._keys:
            self._keys[candidate] = self.key_by({**self.evaluator.identity, "holdout": self.holdout}, candidate)
        return self._keys[candidate]

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
        scored = [each for each in self.found if not math.isnan(aim.score(self.found[each].metrics))]
        return sorted(
            scored, key=lambda each: (-aim.score(self.found[each].metrics), self.found[each].metrics.get("loss", 0.0))
        )

    def path(self, candidate: Candidate) -> Path:
        """Return where the file of a candidate is, while it is there."""
        name = re.sub(r"[^A-Za-z0-9.=_-]+", "-", candidate.label)[:60].strip("-.")
        return self.scratch.folder / f"{name}-{self.key(candidate)[:8]}{self.suffix}"

    def log(self, candidate: Candidate, what: str = "") -> Path:
        """Return where what an evaluation prints is kept."""
        return self.scratch.logs / f"{self.path(candidate).name}{what and '-'}{what}.log"

    def samples(self, candidate: Candidate) -> Scores:
        """Return the scores of a candidate with the values of samples of all metrics."""
        known = self.results.get(self.key(candidate)) or self.found[candidate]
        return Scores(known.metrics, known.samples)

    def selection(self, scores: Scores) -> Scores:
        """Return the scores on the samples that have a part in the choice."""
        return scores if self.holdout is None else split_samples(scores, *self.holdout, held_out=False)

    def clear(self, candidates: Iterable[Candidate]) -> None:
        """Delete the files of all candidates but these, of this sweep and of earlier ones."""
        self.scratch.clear([self.path(each) for each in candidates])

    def keep_best(self) -> Iterator[str]:
        """Make the best candidates that are not there, as after a sweep that kept fewer; say what cannot be done."""
        best = self.ranking()[: self.keep]
        self.clear(best)
        lacking = [each for each in best if not self.path(each).exists()]
        try:
            for begin in range(0, len(lacking), CANDIDATES_PER_READ):
                self._write(lacking[begin : begin + CANDIDATES_PER_READ], self.make)
        except WriteError as error:  # the scores are worth more than these
            yield f"Not all of the best {len(best)} are kept: {error}"

    def _joined(self, candidate: Candidate) -> bool:
        """Return True if a candidate is one again that is in `found`; it then has the names of both."""
        key = self.key(candidate)
        known = self._by_key.get(key)
        if known is None or known is candidate:
            return known is candidate
        both = joined(known, candidate)
        self._by_key[key], self._keys[both] = both, key
        self.found = {both if each is known else each: result for each, result in self.found.items()}
        return True

    def _at_a_time(self) -> int:
        free = shutil.disk_usage(self.scratch.folder).free
        room = int(0.95 * free / max(self.nbytes, 1))
        if room < 1:
            raise WriteError(
                f"{self.scratch.folder}: {free:,} bytes are free, and a candidate takes {self.nbytes:,}. "
                "Choose another place with `scratch`."
            )
        return min(CANDIDATES_PER_READ, room)

    def _score(self, candidates: Sequence[Candidate], make: Make) -> None:
        try:
            failed = self._write(candidates, make)
            for candidate, reason in failed.items():
                self._done(candidate, self._unscored(candidate, reason))
            rest = [each for each in candidates if each not in failed]
            tell = counted(self.on_progress, _EVALUATING, len(rest))
            results = scored_together(rest, self._result, self.jobs, self.evaluator.end)
            for done, (candidate, result) in enumerate(results, 1):
                self._done(candidate, result)
                if tell is not None:
                    tell(done)
        finally:
            best = self.ranking()[: self.keep]
            self.scratch.remove(*(self.path(each) for each in candidates if each not in best))

    def _write(self, candidates: Sequence[Candidate], make: Make) -> dict[Candidate, str]:
        """Write candidates together; where that fails, in two halves, so that one cannot keep the others from it.

        Returns:
            Those that cannot be made, with the reasons.

        Raises:
            WriteError: there is no place for them.
        """
        paths = [self.path(each) for each in candidates]
        self.scratch.announce(paths)
        try:
            make(candidates, paths)
        except WriteError:
            raise
        except CkptError as error:
            if len(candidates) == 1:
                return {candidates[0]: f"cannot be made: {error}"}
            half = len(candidates) // 2
            return self._write(candidates[:half], make) | self._write(candidates[half:], make)
        return {}

    def _done(self, candidate: Candidate, result: Result) -> None:
        self.results.add(result)
        self._take(candidate, result)
        ranking = self.ranking()
        best = ranking[: self.keep]
        self.scratch.remove(*(self.path(each) for each in (candidate, *ranking[self.keep :][:1]) if each not in best))
        if self.on_result is not None:
            self.on_result(result, len(self.found), max(self.planned, len(self.found)))

    def _result(self, candidate: Candidate) -> Result:
        began = time.perf_counter()
        metrics: Mapping[str, float] = {}
        scores, error = Scores({}), None
        try:
            scores = self.evaluator.score(self.path(candidate), self.log(candidate))
            metrics = self.selection(scores).metrics
        except UsageError:
            raise  # it will not get better with the next one
        except CkptError as failed:
            scores, error = Scores({}), str(failed)
        return replace(
            self._unscored(candidate, error),
            metrics=dict(metrics),
            seconds=time.perf_counter() - began,
            samples=scores.samples,
        )

    def _unscored(self, candidate: Candidate, error: str | None) -> Result:
        return Result(
            key=self.key(candidate),
            label=candidate.label,
            checkpoints=tuple(member.path.name for member in candidate.members),
            coefficients=candidate.coefficients,
            metrics={},
            seconds=0.0,
            error=error,
        )

    def _take(self, candidate: Candidate, result: Result) -> None:
        if result.error is None:
            wanted = self.metric if self.aim is None else self.aim.metric
            # The first one alone may lack it; when two do, it is a slip.
            if wanted is not None and wanted not in result.metrics and (self.aim is not None or not self._lacking):
                self._lacking += self.aim is None
                result = replace(result, error=f"the evaluation gives no '{wanted}'", metrics={})
            elif self.aim is None:
                self.aim = aim_of([*result.metrics], self.metric, self.usual, lower=self.lower_is_better)
        deciding = {name: values for name, values in result.samples.items() if self.aim and name == self.aim.metric}
        self.found[candidate] = replace(result, samples=deciding)
        self._by_key[self.key(candidate)] = candidate
