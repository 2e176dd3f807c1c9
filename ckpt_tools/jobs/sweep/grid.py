"""The grid: the candidates that the options of a sweep mean, and those that depend on scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import CkptError, UsageError, unknown_word
from ...series.candidates import Candidate, Combinations, candidates, combination, modes_with, number_of
from ...series.find import Series
from ...series.member import Member
from ...series.schedules import SCHEDULES, Schedule, named
from ...series.search import LOG, SCALES, Optimum, golden_section
from ...series.soup import Soup, greedy
from ..options import Matching
from ..provenance import short_names
from ..weigh import facts_of
from .making import Maker
from .options import SWEPT, Evaluation, Order, Rules, Searching, Selections
from .running_sum import RunningSum
from .scoring import Scoring

SEARCHED = ("decay", "half_life", "sigma_rel", "gamma", "warmup_gamma", "warmup_power", "min_decay")
"""Options that can be searched."""


class Grid:
    """The candidates that the options mean: all combinations, then those that depend on scores.

    Raises:
        UsageError: a mode that is not swept, or a search that cannot be made.
    """

    def __init__(
        self,
        series: Series,
        rules: Rules,
        selections: Selections,
        searching: Searching,
        order: Order,
        matching: Matching,
        evaluation: Evaluation,
    ) -> None:
        self._series, self._matching, self._searching = series, matching, searching
        self._rules, self._selections = rules.values, selections.values
        metrics = None if order.metrics is None else str(order.metrics)
        fixed = {"metrics": metrics, "lower_is_better": evaluation.lower_is_better, "metric": evaluation.metric}
        self._fixed = {name: value for name, value in fixed.items() if value is not None}
        if metrics is not None and "best" not in self._selections:
            raise UsageError("`metrics` goes with `best`.")
        for mode in self._rules.get("mode", ()):
            rule = SCHEDULES.get(named(mode))
            if rule is not None and rule.needs not in SWEPT:
                raise UsageError(f"`mode={mode!r}` is not swept: {', '.join(_swept_modes())} are.")
        self.names = short_names([member.path for member in series.members])
        self._searched = None if searching.search is None else searching.search.replace("-", "_")
        self._range: tuple[float, float] | None = None
        if self._searched is not None:
            self._range = self._ends(self._searched)
            next(self._golden_section(self._range))  # refuses ends in the wrong order
            for end in self._range:
                self._at(end)

    def further(self, maker: Maker) -> tuple[int, int, int]:
        """Return (evaluations, bytes read, bytes written) of candidates that depend on scores, at most."""
        members = self._series.members
        evaluations = read = written = 0
        if self._range is not None:
            once, size = maker.bytes_moved([self._at(self._range[1])])
            evaluations = self._searching.evaluations
            read, written = (evaluations - 1) * once, evaluations * size  # the first two are made together
        if self._searching.greedy:
            n = len(members) - 1
            alone = Candidate("", "checkpoint", {}, Schedule("uniform"), members[-1:], (None,), (1.0,))
            once, size = maker.bytes_moved([alone])
            total = RunningSum.nbytes(maker)
            evaluations += n
            # A soup is read from the sum and one checkpoint, and so is the next sum.
            read, written = read + 2 * n * (total + once), written + n * (total + size)
        return evaluations, read, written

    def candidates(self) -> Combinations:
        """Return the combinations that do not depend on scores."""
        rules = {name: each for name, each in self._rules.items() if name != self._searched}
        if self._range is not None and not rules and not self._selections:
            rules = {"mode": ["uniform"]}
        return candidates(self._series.members, self.names, rules, self._selections, self._facts, **self._fixed)

    def search(self, scoring: Scoring) -> Iterator[str]:
        """Search for the best value of one option, and say what was found."""
        name = self._searched
        if name is None or self._range is None:
            return
        search = self._golden_section(self._range)
        scores: dict[float, float] = {}  # of rounded values, of which neighbours may be one
        asked = next(search)
        while True:
            rounded = [_rounded(name, value) for value in asked]
            new = [value for value in dict.fromkeys(rounded) if value not in scores]
            results = scoring.scores([self._at(value) for value in new])
            scores |= {value: scoring.score(result) for value, result in zip(new, results, strict=True)}
            try:
                asked = search.send([scores[value] for value in rounded])
            except StopIteration as stop:
                yield from _of_optimum(name, stop.value)
                return

    def soup(self, scoring: Scoring, maker: Maker) -> Iterator[str]:
        """Make the greedy soup, and say what is in it."""
        if not self._searching.greedy:
            return
        members = self._series.members
        search = greedy([scoring.score(scoring.alone(member)) for member in members])
        running = RunningSum(maker, scoring.scratch.folder / "sum.safetensors")
        scoring.scratch.announce([running.path])
        try:
            asked = next(search)
            while True:
                running.order = [members[i] for i in asked]
                (result,) = scoring.scores([self._uniform(asked)], running.make)
                asked = search.send(scoring.score(result))
        except StopIteration as stop:
            yield f"Greedy soup: {', '.join(self.names[i] for i in stop.value)}."
        finally:
            running.end()

    def _uniform(self, soup: Soup) -> Candidate:
        members = [self._series.members[i] for i in sorted(soup)]
        label = "greedy " + "+".join(self.names[i] for i in soup)
        steps = [member.step for member in members]
        coefficients = Schedule("uniform").coefficients(steps)
        return Candidate(label, "soup", {}, Schedule("uniform"), tuple(members), steps, coefficients)

    def _facts(self, schedule: Schedule, members: Sequence[Member]) -> Sequence[Any]:
        names = short_names([member.path for member in members])
        return facts_of(schedule, self._series, members, names, self._matching)

    def _golden_section(self, ends: tuple[float, float]) -> Any:
        scale = SCALES.get(self._searched or "", LOG)
        return golden_section(*ends, evaluations=self._searching.evaluations, scale=scale)

    def _at(self, value: float) -> Candidate:
        """Return the candidate of a search at a value.

        Raises:
            UsageError: it cannot be made.
        """
        name = self._searched or ""
        mode = self._mode(name)
        own = {option.name for option in SCHEDULES[mode].options}
        others = {other: each[0] for other, each in self._rules.items() if other in own and other != name}
        picked = {other: each[0] for other, each in self._selections.items()}
        label = f"{name}={value:.12g}"
        try:
            return combination(
                label, mode, {**others, name: value}, picked, self._series.members, self._facts, **self._fixed
            )[0]
        except CkptError as error:
            raise UsageError(f"`search={name!r}` at {value:.12g}: {error}") from error

    def _mode(self, name: str) -> str:
        """Return the mode of a search: the one that is given, else the one that takes the option."""
        takers = [mode for mode in modes_with(name) if SCHEDULES[mode].needs in SWEPT]
        mode = named(self._rules["mode"][0]) if "mode" in self._rules else takers[0]
        if mode not in takers:
            raise UsageError(f"`search={name!r}` goes with {' or '.join(f'`mode={each!r}`' for each in takers)}.")
        return mode

    def _ends(self, name: str) -> tuple[float, float]:
        """Return the ends of a search.

        Raises:
            UsageError: there are none, or other options have several values.
        """
        if name not in SEARCHED:
            raise unknown_word("search", name, SEARCHED)
        others = [
            other
            for each in (self._rules, self._selections)
            for other, values in each.items()
            if other != name and len(values) > 1
        ]
        if others:
            raise UsageError(f"`search={name!r}` takes one value of every other option, and `{others[0]}` has several.")
        given: Sequence[Any] = self._rules.get(name, ())
        if not given and name in ("decay", "sigma_rel"):
            return self._usual_ends(name)
        numbers = [number for number in map(number_of, given) if number is not None]
        if any(share for _, share in numbers):
            raise UsageError(f"`{name}={given[0]!r}`: the ends of a search are numbers of steps, not parts of the run.")
        if len(given) != 2 or len(numbers) != 2:
            raise UsageError(
                f"`search={name!r}` needs two numbers, the ends of the search: `{name}` with one value below and one "
                "above what may be best, and a comma between them."
            )
        return numbers[0][0], numbers[-1][0]

    def _usual_ends(self, name: str) -> tuple[float, float]:
        if name == "sigma_rel":
            return 0.01, 0.28
        n = len(self._series.members)
        low, high = 0.3, 1 - 1 / (2 * n)  # of an update for each checkpoint
        steps = [member.step for member in self._series.members if member.step is not None]
        if (True in self._rules.get("per_step", ()) or "steps" in self._rules.get("by", ())) and len(steps) == n:
            gap = max(1.0, (steps[-1] - steps[0]) / (n - 1))
            low, high = low ** (1 / gap), high ** (1 / gap)
        return _rounded(name, low), _rounded(name, high)


def _swept_modes() -> Iterator[str]:
    return (mode for mode, rule in SCHEDULES.items() if rule.needs in SWEPT)


def _rounded(name: str, value: float) -> float:
    """Round to as many digits as a person would type, so that the command that is shown is the same average."""
    if name == "decay":  # what counts is the distance to 1
        return round(1 - float(f"{1 - value:.4g}"), 12)
    return float(f"{value:.4g}")


def _of_optimum(name: str, found: Optimum) -> Iterator[str]:
    best, low, high = (f"{_rounded(name, value):.12g}" for value in (found.value, *found.bracket))
    yield f"Search of {name}: {best} is best, between {low} and {high} if there is one optimum."
    if found.at_edge:
        yield f"It is at the edge of the search: look beyond it, with other ends of {name}."
    if not found.unimodal:
        yield (
            f"The metric goes up and down more than once over {name}, so there may be better values elsewhere. Give a "
            "range of values in place of a search."
        )
