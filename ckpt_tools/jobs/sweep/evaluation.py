"""The evaluation of a sweep, opened: from its options to what scores a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...batchnorm.report import BatchNormReport
from ...checkpoints.open import Checkpoint
from ...compute.progress import Progress
from ...errors import UsageError
from ...evaluation.evaluators import Command, Evaluator, Function
from ..options import Network, Statistics
from ..outputs import named
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
    from ...batchnorm.layers import find_layers
    from ...batchnorm.processes import Group
    from ...batchnorm.recalibrate import check_options
    from ...evaluation.data import is_factory
    from ...evaluation.evaluators import Classifier
    from ...evaluation.models import build_model, call_of, importable, load_weights, pick_device
    from ...evaluation.preprocessing import described
    from ...evaluation.runner import Runner
    from ..image_data import fewer_classes, image_data, notes_of

    measuring = Statistics(**vars(images))
    check_options(measuring.passes, measuring.estimator)
    device = pick_device("auto" if running.device == "cuda" else running.device)
    given = {"eval_data": eval_data, "test": honesty.test, "data": images.data}
    sources = {option: source for option, source in given.items() if source is not None}
    with importable(which.model, which.forward, *filter(is_factory, sources.values())):
        call = call_of(which.forward, which.inputs, which.mask)
        network = build_model(which.model, example.header, which.model_kwargs or {}, example.specs)
        loaded = load_weights(network, example)  # so that what does not fit is told before any work
        layers, _ = find_layers(network, include_frozen=measuring.include_frozen)
        network.to(device)
        labelled = [each for each in (eval_data, honesty.test) if each is not None]
        how = image_data(
            network, example.header, images, sources, labelled,
            seed=images.seed, group=Group(), pin_memory=device.type == "cuda",
        )  # fmt: skip
        prepared = [] if how.preprocessing is None else [" ".join(described(how.config, how.config_from))]
        notes = [*loaded.notes, *prepared, *_notes(images.data, eval_data, has_layers=bool(layers))]
        statistics = None
        if images.data is not None and layers:
            statistics = how.statistics(images.data)
            notes += notes_of(images.data, statistics, images, labelled=False)
        identity = {
            "preprocessing": {name: repr(value) for name, value in sorted(how.config.items())},
            "classes": [dict(reading) for reading in how.order.readings] or how.order.natural,
            "model": which.model or type(network).__name__,
            "model_kwargs": {name: repr(value) for name, value in sorted((which.model_kwargs or {}).items())},
            "data_root": images.data_root,
            "called": [which.forward, which.inputs, which.mask],
            "recalibrated": None
            if statistics is None
            else [images.data, statistics.images, images.batch_size, images.seed, images.split, vars(measuring)],
            "amp": running.amp,
        }
        runner = Runner(network, device, amp=running.amp, channels_last=running.channels_last, call=call)

        def classifier(data: str, option: str, split: str) -> Classifier:
            with named(option, "data"):
                held_out = how.evaluated(data, split)
            notes.extend(note for note in notes_of(data, held_out, images, labelled=True) if note not in notes)
            notes.extend(fewer_classes(data, held_out, getattr(network, "num_classes", 0)))  # timm's models have it
            if held_out.once or (statistics is not None and statistics.once):
                raise UsageError("the data are evaluated many times, and a factory here gives an iterator, not a list.")
            return Classifier(
                network=network,
                runner=runner,
                held_out=held_out,
                images=statistics,
                **vars(measuring),
                identity={"data": data, "split": split, "images": held_out.images, **identity},
                on_progress=on_progress,
            )

        evaluator = classifier(eval_data, "eval_data", images.split)
        yield Evaluators(
            evaluator,
            None if honesty.test is None else classifier(honesty.test, "test", honesty.test_split or images.split),
            "top1",
            None if statistics is None else partial(evaluator.measured, images=statistics),
            tuple(notes),
        )


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
