"""Options of a sweep: those of an average, each with several values, and how the averages are evaluated."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ...errors import UsageError
from ...series.candidates import SELECTED, several, values
from ...series.rules.option import ANY, FACTORY, Option
from ...series.schedules import SCHEDULES, Schedule
from ...storage.staged import same_file
from ...tensors import FLOAT_DTYPES
from ..option_groups import Options, option
from ..options import DEVICES, Images, Matching, Network, Output, Selection, Skipping, Statistics, Summing


class Values(Options):
    """Options of which each may have several values; a value that is not given is none."""

    def __init__(self, **given: Any) -> None:
        known = {each.name: each for each in self._single()}
        found = {
            name: values(known[name], each) for name, each in given.items() if each is not None and each is not False
        }
        super().__init__()
        vars(self).update(_values=found)

    @property
    def values(self) -> dict[str, list[Any]]:
        """Option to its values, of those that are given."""
        return dict(vars(self)["_values"])

    @classmethod
    def _single(cls) -> tuple[Option, ...]:
        """Return the options as an average has them."""
        return ()

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """Return the options."""
        return tuple(_plural(each) for each in cls._single())


def _plural(single: Option) -> Option:
    if single.default is False:
        return single
    implied = single.implied if single.default is None else single.default
    return replace(single, type=Any, default=None, implied=implied, offered=single.words)


SWEPT = ("step", "updates")
"""What the rules that are swept need of a checkpoint; the others make averages of their own kind."""


class Rules(Values):
    """How much each checkpoint counts: all combinations of these values."""

    title = "How much each checkpoint counts"

    @classmethod
    def _single(cls) -> tuple[Option, ...]:
        mode, *_ = Schedule.options()
        rules = {name: rule for name, rule in SCHEDULES.items() if rule.needs in SWEPT}
        found = {each.name: each for rule in rules.values() for each in rule.options if several(each)}
        return (replace(mode, help=f"{', '.join(rules)}."), *found.values())


class Selections(Values):
    """Which checkpoints: all combinations of these values."""

    title = "Which checkpoints"

    @classmethod
    def _single(cls) -> tuple[Option, ...]:
        return tuple(each for each in Selection.options() if each.name in SELECTED)


class Order(Skipping):
    """Where the series comes from."""

    title = "The series"

    order: Literal["auto", "given", "natural", "mtime"] = option(
        "auto (stored step or epoch, else numbers in names), given, natural, mtime.", "auto"
    )
    include_outputs: bool = option("Include files that ckpt wrote, and averages by other tools.", False)
    metrics: str | Path | None = option(
        "With `best`: a table of metrics, CSV or JSON lines.", None, metavar="FILE", needs="best"
    )


class Searching(Options):
    """Further candidates that depend on scores."""

    title = "Search"

    greedy: bool = option("Greedy soup: add checkpoints, best first, as long as the score is not worse.", False)
    search: str | None = option(
        "Golden section between the two values of this option, such as decay or sigma_rel.", None, metavar="OPTION"
    )
    evaluations: int = option("Of a search.", 8, metavar="N")


class Evaluation(Options):
    """How a candidate is scored; one of the three."""

    title = "Evaluation"

    eval_data: str | None = option(
        "Labelled images: top-1, top-5 and loss of `model`.", None, metavar="DATA", names_code=FACTORY
    )
    eval_command: str | None = option(
        "'python eval.py {ckpt}': its last line is a number, or a JSON object of metrics.",
        None,
        metavar="COMMAND",
        names_code=ANY,
    )
    eval_function: str | None = option(
        "file.py:fn, which returns a number or a dict of metrics.", None, metavar="FN", names_code=ANY
    )
    in_memory: bool = option("Call the function with the state dict, not the path.", False)
    time_limit: float | None = option("Seconds of one command.", None, metavar="SECONDS")
    jobs: int = option("Commands at a time.", 1, metavar="N")
    metric: str | None = option(
        "The one that decides; also of `best`.", None, implied="top1, or the only one", metavar="KEY"
    )
    lower_is_better: bool | None = option("For a loss.", None, implied="by the name of the metric")


class Honesty(Options):
    """Data that had no part in the choice."""

    title = "Report on other data"

    test: str | None = option(
        "Data, command or function like that of the evaluation; scored once, for the best and the last.",
        None,
        metavar="DATA|COMMAND|FN",
        once_only=True,
    )
    test_split: str | None = option("Split of a named dataset to report on.", None, implied="that of split")
    holdout: float | None = option(
        "Instead: fraction of the samples that is kept for the report, drawn by `seed`.", None, metavar="F"
    )


class SweptImages(Images, more=(Statistics,)):
    """The images of the evaluation, and those for BatchNorm statistics."""

    data: str | None = option(  # type: ignore[assignment]
        "Images for BatchNorm statistics, measured before every score.", None, metavar="DATA", names_code=FACTORY
    )
    seed: int = option("Of the random subset of images, of `holdout` and of the intervals.", 0)


class SweptOutput(Output):
    """Where the results go."""

    title = "Output"

    out: str | Path | None = option(
        "Write the best average, with the evidence in it.", None, metavar="PATH", once_only=True
    )
    dtype: Any = option("Of the averages: float32, bfloat16, ...", None, implied="same", offered=FLOAT_DTYPES)
    scratch: str | Path = option(
        "Folder for results, logs and candidates.", "ckpt-sweep", metavar="DIR", names_place=True
    )
    keep: int = option("Candidates that stay there: the best N.", 1, metavar="N")
    plot: str | Path | None = option(
        "Draw the metric over the candidates, .svg or .png.", None, metavar="FILE", once_only=True
    )
    report: str | Path | None = option(
        "Write a page with all of it, one .html file.", None, metavar="FILE", once_only=True
    )
    csv: str | Path | None = option("Write the ranking as a table.", None, metavar="FILE", once_only=True)


class Sweeping(Summing):
    """How a sweep runs."""

    on_result: Callable[..., None] | None = option(
        "Called after each evaluation with (result, number done, number in all).", None
    )
    on_words: Any = option("How the page speaks, a ckpt_tools.jobs.sweep.page.Wording.", None)
    device: str = option(
        "Of the sums and the network: auto, cpu, cuda, or one such as cuda:1.",
        "auto",
        offered=DEVICES,
        from_environment=True,
    )
    amp: bool = option("Run the network in mixed precision, bfloat16.", False)
    channels_last: bool = option("Memory order of the images.", True)


GROUPS = (
    Rules, Selections, Searching, Order, Matching, Evaluation, Honesty, Network, SweptImages, SweptOutput, Sweeping,
)  # fmt: skip
"""All options of a sweep, in the order of its parameters and of its help."""


def check(
    evaluation: Evaluation,
    honesty: Honesty,
    output: SweptOutput,
    searching: Searching,
    which: Network,
    images: SweptImages,
    running: Sweeping,
) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: they do not.
    """
    given = [name for name in ("eval_data", "eval_command", "eval_function") if getattr(evaluation, name) is not None]
    if len(given) != 1:
        raise UsageError(
            "give one of `eval_data`, `eval_command` and `eval_function`"
            + (f", not {' and '.join(f'`{name}`' for name in given)}" if given else "")
            + ": it says how a candidate is scored."
        )
    for name, owner in (("in_memory", "eval_function"), ("time_limit", "eval_command")):
        if getattr(evaluation, name) and given != [owner]:
            raise UsageError(f"`{name}` goes with `{owner}`.")
    if given != ["eval_data"]:
        # The seed is that of `holdout`, too.
        options = [name for name in given_of(which, images) if name != "seed"] + ["amp"] * running.amp
        if options:
            raise UsageError(
                f"`{options[0]}` goes with `eval_data`: with `{given[0]}`, the model is built, and its statistics are "
                "measured, by your own code."
            )
    for name, value, least in (
        ("jobs", evaluation.jobs, 1),
        ("keep", output.keep, 0),
        ("evaluations", searching.evaluations, 3),
    ):
        if type(value) is not int or value < least:
            raise UsageError(f"`{name}={value!r}`: a whole number, {least} or more.")
    if evaluation.jobs > 1 and given != ["eval_command"]:
        raise UsageError("`jobs` goes with `eval_command`: images and functions use all cores themselves.")
    if honesty.test is not None and honesty.holdout is not None:
        raise UsageError("`test` and `holdout` are two ways to one end: give one of them.")
    if honesty.test_split is not None and (honesty.test is None or given != ["eval_data"]):
        raise UsageError("`test_split` goes with `test` and `eval_data`.")
    same_split = honesty.test_split in (None, images.split)
    if honesty.test is not None and same_split and _same(honesty.test, getattr(evaluation, given[0]), *given):
        raise UsageError(
            f"`test={honesty.test!r}`: the candidates are chosen on the same data. Give other data, or `holdout`."
        )
    if honesty.holdout is not None and not 0 < honesty.holdout < 1:
        raise UsageError(f"`holdout={honesty.holdout!r}`: a part between 0 and 1, such as 0.5.")


def given_of(*groups: Options) -> dict[str, Any]:
    """Return the options that are not at their defaults."""
    return {
        option.name: vars(group)[option.name]
        for group in groups
        for option in group.options()
        if vars(group)[option.name] not in (option.default, [option.default])
    }


def _same(a: str, b: str, name: str) -> bool:
    """Return True if two values of an option name the same data, command or function."""
    return a.strip() == b.strip() or (name == "eval_data" and same_file(Path(a), Path(b)))
