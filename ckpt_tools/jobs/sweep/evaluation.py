"""The evaluation of a sweep, opened: from its options to what scores a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...batchnorm.report import BatchNormReport
from ...checkpoints.open import Checkpoint
from ...compute.progress import LOADING_TORCH, Progress, uncounted
from ...evaluation.evaluators import Command, Evaluator, Function
from ..options import Network, Numerics, Statistics
from .options import Evaluation, Honesty, Sweeping, SweptImages


@dataclass(frozen=True, slots=True)
class Evaluators:
    """What scores a checkpoint.

    Attributes:
        evaluator: on the data of the choice.
        test: on the data of the report; None if there are none.
        usual: the metric that decides if none is asked for.
        measured: measures the BatchNorm statistics of a checkpoint, as before every score; None if that is not done.
        notes: decisions, in words.
    """

    evaluator: Evaluator
    test: Evaluator | None
    usual: str | None = None
    measured: Callable[[Path], BatchNormReport] | None = None
    notes: tuple[str, ...] = ()

    @property
    def recalibrates(self) -> bool:
        """True if BatchNorm statistics are measured before every score."""
        return self.measured is not None


@contextmanager
def opened(
    evaluation: Evaluation,
    honesty: Honesty,
    which: Network,
    images: SweptImages,
    running: Sweeping,
    example: Checkpoint,
    on_progress: Progress,
) -> Iterator[Evaluators]:
    """Open an evaluation, with the folders of the user's code on `sys.path` meanwhile.

    Args:
        example: a checkpoint of the series, by which the network is built.
        on_progress: called with (what is done, images done, images in all).

    Raises:
        CkptError: the network, the data, the function or the command cannot be used.
    """
    if evaluation.eval_command is not None:
        limit = evaluation.time_limit
        test: Evaluator | None = None if honesty.test is None else Command(honesty.test, limit, option="test")
        yield Evaluators(Command(evaluation.eval_command, limit), test, notes=_not_measured(example))
    elif evaluation.eval_function is not None:
        from ...evaluation.models import load_factory

        given = {"eval_function": evaluation.eval_function, "test": honesty.test}
        functions = {name: spec for name, spec in given.items() if spec is not None}
        for name, spec in functions.items():
            load_factory(spec, name)
        first, *others = [
            Function(spec, in_memory=evaluation.in_memory, option=name) for name, spec in functions.items()
        ]
        yield Evaluators(first, others[0] if others else None, notes=_not_measured(example))
    elif evaluation.eval_data is not None:
        with _classifier(evaluation.eval_data, honesty, which, images, running, example, on_progress) as found:
            yield found


@contextmanager
def _classifier(
    eval_data: str,
    honesty: Honesty,
    which: Network,
    images: SweptImages,
    running: Sweeping,
    example: Checkpoint,
    on_progress: Progress,
) -> Iterator[Evaluators]:
    with uncounted(on_progress, LOADING_TORCH):
        from ..classifiers import opened_classifiers

    given = {"eval_data": eval_data, "test": honesty.test}
    labelled = {option: source for option, source in given.items() if source is not None}
    with opened_classifiers(
        example,
        which,
        images,
        Statistics(**vars(images)),
        Numerics(**vars(running)),
        labelled,
        ("data", images.data),
        state="auto",
        seed=images.seed,
        device=running.device,
        on_progress=on_progress,
    ) as classifiers:
        classifiers.notes.extend(_notes(images.data, eval_data, has_layers=classifiers.has_layers))
        evaluator = classifiers.on(eval_data, "eval_data", images.split)
        test = None
        if honesty.test is not None:
            test = classifiers.on(honesty.test, "test", honesty.test_split or images.split)
        statistics = classifiers.statistics
        measured = None if statistics is None else partial(evaluator.measured, images=statistics)
        yield Evaluators(evaluator, test, "top1", measured, tuple(classifiers.notes))


def _not_measured(example: Checkpoint) -> tuple[str, ...]:
    """Tell that an evaluation by the user's code is of averaged statistics, if there are any."""
    if not any(name.endswith("running_var") for name in example):
        return ()
    return (
        "The weights have BatchNorm statistics, which are averaged, not measured: averages look worse than they are. "
        "Let the evaluation measure them before it scores, or score by `eval_data` with `data`.",
    )


def _notes(data: str | None, eval_data: str, *, has_layers: bool) -> Iterator[str]:
    if has_layers and data is None:
        yield (
            "The model has BatchNorm, and its statistics are averaged, not measured: averages look worse than they "
            "are. Give images to measure them with `data`, before every score."
        )
    elif not has_layers and data is not None:
        yield "The model has no BatchNorm, so `data` has no effect."
    elif data == eval_data:
        yield "The statistics are measured on the images of the evaluation: scores are higher than on other images."
