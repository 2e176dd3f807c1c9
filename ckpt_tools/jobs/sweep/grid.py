"""The grid: the candidates that the options of a sweep mean, and those that depend on scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...checkpoints.ema_updates import stored_updates
from ...errors import UsageError
from ...series.candidates import Candidate, candidates
from ...series.find import Series
from ...series.member import Member
from ...series.rules.amounts import parse_span
from ...series.schedules import Schedule
from ...series.search import LOG, SCALES, Optimum, golden_section
from ...series.soup import Soup, greedy
from ..lined_up import selected
from ..options import Matching
from ..provenance import short_names
from .bench import Bench
from .making import Maker
from .options import Evaluation, Order, Rules, Searching, Selections
from .running_sum import RunningSum

SEARCHED = ("decay", "half_life", "sigma_rel", "gamma", "warmup_gamma", "warmup_power", "min_decay")
"""Options that can be searched."""


class Grid:
    """The candidates that the options mean: all combinations, then those that depend on scores."""

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
        self._fixed: dict[str, Any] = {
            "metrics": None if order.metrics is None else str(order.metrics),
            "lower_is_better": evaluation.lower_is_better,
        }
        if evaluation.metric is not None:
            self._fixed["metric"] = evaluation.metric
        self.names = short_names([member.path for member in series.members])
        self._range: tuple[float, float] | None = None
        self._searched = None if searching.search is None else searching.search.replace("-", "_")
        if self._searched is not None:
            self._range = self._bounds(self._searched)

    @property
    def further(self) -> int:
        """Evaluations of candidates that depend on scores, at most."""
        searched = 0 if self._range is None else self._searching.evaluations
        return searched + (len(self._series.members) - 1 if self._searching.greedy else 0)

    def candidates(self) -> tuple[list[Candidate], dict[str, str]]:
        """Return the combinations that do not depend on scores, and why others cannot be made."""
        rules = {name: each for name, each in self._rules.items() if name != self._searched}
        if self._range is not None and not rules and not self._selections:
            rules = {"mode": ["uniform"]}
        return self._made(rules, self._selections)

    def search(self, bench: Bench) -> Iterator[str]:
        """Search for the best value of one option, and say what was found."""
        name = self._searched
        if name is None or self._range is None:
            return
        rules = {other: each for other, each in self._rules.items() if other != name}
        search = golden_section(*self._range, evaluations=self._searching.evaluations, scale=SCALES.get(name, LOG))
        asked = next(search)
        while True:
            made = []
            for value in asked:
                # As many digits as a person would type, so that the command that is shown is the same average.
                short = float(f"{value:.4g}") if name != "decay" else 1 - float(f"{1 - value:.3g}")
                short = round(short, 12)
                found, refused = self._made({**rules, name: [short]}, self._selections)
                if refused:
                    raise UsageError(f"`search={name!r}` at {short:g}: {next(iter(refused.values()))}")
                own = replace(found[0], label=f"{name}={short:g}")
                made.append(own)
            results = bench.scores(made)
            aim = bench.aim
            try:
                asked = search.send([float("nan") if aim is None else aim.score(each) for each in results])
            except StopIteration as stop:
                yield from _of_optimum(name, stop.value)
                return

    def soup(self, bench: Bench, maker: Maker) -> Iterator[str]:
        """Make the greedy soup, and say what is in it."""
        if not self._searching.greedy or bench.aim is None:
            return
        aim = bench.aim
        members = self._series.members
        alone = {each.members[0]: each for each in bench.found if len(each.members) == 1}
        search = greedy([aim.score(bench.found[alone[member]]) for member in members])
        running = RunningSum(maker, bench.folder / "sum.safetensors")
        soup: Soup = ()
        try:
            asked = next(search)
            while True:
                if asked[:-1] != soup:
                    # The last one stays: asked differs from the soup before by one that was added, and one more.
                    running.start(members[asked[0]]) if not soup else running.add(members[asked[-2]])
                soup = asked[:-1]
                (result,) = bench.scores([self._uniform(asked)], running.make)
                asked = search.send(aim.score(result))
        except StopIteration as stop:
            soup = stop.value
        finally:
            running.end()
        yield f"Greedy soup: {', '.join(self.names[i] for i in soup)}."

    def _uniform(self, soup: Soup) -> Candidate:
        members = [self._series.members[i] for i in sorted(soup)]
        label = "greedy " + "+".join(self.names[i] for i in soup)
        steps = [member.step for member in members]
        coefficients = Schedule("uniform").coefficients(steps)
        return Candidate(label, {}, Schedule("uniform"), tuple(members), steps, coefficients)

    def _made(self, rules: Mapping[str, Any], selections: Mapping[str, Any]) -> tuple[list[Candidate], dict[str, str]]:
        fixed = {name: value for name, value in self._fixed.items() if value is not None}
        return candidates(self._series.members, self.names, rules, selections, self._numbers, **fixed)

    def _numbers(self, schedule: Schedule, members: Sequence[Member]) -> Sequence[Any]:
        if schedule.rule.needs == "step":
            return [member.step for member in members]
        states = selected(members, short_names([member.path for member in members]), self._matching)
        return [stored_updates(member.header, state) for member, state in zip(members, states, strict=True)]

    def _bounds(self, name: str) -> tuple[float, float]:
        """Return the ends of a search.

        Raises:
            UsageError: there are none, or other options have several values.
        """
        if name not in SEARCHED:
            raise UsageError(f"`search={name!r}`: one of {', '.join(SEARCHED)}.")
        given = [_number(name, each) for each in self._rules.get(name, ())]
        n = len(self._series.members)
        usual = {"decay": (0.3, 1 - 1 / (2 * n)), "sigma_rel": (0.01, 0.28)}.get(name)
        others = [
            other
            for each in (self._rules, self._selections)
            for other, values in each.items()
            if other != name and len(values) > 1
        ]
        if others:
            raise UsageError(f"`search={name!r}` takes one value of every other option, and `{others[0]}` has several.")
        if not given and usual is not None:
            return usual
        if len(given) != 2:
            raise UsageError(
                f"`search={name!r}` needs two numbers, the ends of the search: `{name}` with one value below and one "
                "above what may be best, and a comma between them."
            )
        return given[0], given[1]


def _number(name: str, value: Any) -> float:
    """Return an end of a search, which may be a number of steps such as 20k."""
    if isinstance(value, str):
        amount = parse_span(name, value)
        if amount.share:
            raise UsageError(f"`{name}={value!r}`: the ends of a search are numbers of steps, not parts of the run.")
        return amount.value
    return float(value)


def _of_optimum(name: str, found: Optimum) -> Iterator[str]:
    yield (
        f"Search of {name}: {found.value:.4g} is best, between {found.bracket[0]:.4g} and {found.bracket[1]:.4g} if "
        "there is one optimum."
    )
    if found.at_edge:
        yield f"It is at the edge of the search: look beyond it, with other ends of {name}."
    if not found.unimodal:
        yield (
            f"The metric goes up and down more than once over {name}, so there may be better values elsewhere. Give a "
            "range of values in place of a search."
        )
