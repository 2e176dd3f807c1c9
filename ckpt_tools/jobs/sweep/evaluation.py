"""The evaluation of a sweep, opened: from its options to what scores a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ...batchnorm.report import BatchNormReport
from ...checkpoints.open import Checkpoint
from ...errors import UsageError
from ...evaluation.evaluators import Command, Evaluator, Function
from ..options import Network
from .options import Evaluation, Honesty, Sweeping, SweptImages


@dataclass(frozen=True, slots=True)
class Opened:
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
    on_progress: Callable[..., None],
) -> Iterator[Opened]:
    """Open an evaluation, with the folders of the user's code on `sys.path` meanwhile.

    Args:
        example: a checkpoint of the series, by which the network is built.
        on_progress: called with (what is done, images done, images in all).

    Raises:
        CkptError: the network, the data, the function or the command cannot be used.
    """
    if evaluation.eval_command is not None:
        command, limit = evaluation.eval_command, evaluation.time_limit
        yield Opened(Command(command, limit), None if honesty.test is None else Command(honesty.test, limit))
    elif evaluation.eval_function is not None:
        from ...evaluation.models import load_factory

        functions = [each for each in (evaluation.eval_function, honesty.test) if each is not None]
        for each in functions:
            load_factory(each, "eval_function")
        first, *others = [Function(each, in_memory=evaluation.in_memory) for each in functions]
        yield Opened(first, others[0] if others else None)
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
    on_progress: Callable[..., None],
) -> Iterator[Opened]:
    from ...batchnorm.layers import find_layers
    from ...batchnorm.recalibrate import check_options
    from ...compute.threads import default_threads
    from ...evaluation.data import Loading, is_factory, open_data, resolve_preprocessing
    from ...evaluation.evaluators import Classifier
    from ...evaluation.models import build_model, call_of, importable, input_channels, load_weights, pick_device
    from ...evaluation.runner import Runner

    check_options(images.passes, images.estimator)
    device = pick_device("auto" if running.device == "cuda" else running.device)
    sources = [each for each in (eval_data, honesty.test, images.data) if each is not None]
    with importable(which.model, which.forward, *filter(is_factory, sources)):
        call = call_of(which.forward, which.inputs, which.mask)
        network = build_model(which.model, example.header, which.model_kwargs or {}, example.specs)
        load_weights(network, example)  # so that what does not fit is told before any work
        layers, _ = find_layers(network)
        network.to(device)
        options = {name: getattr(images, name) for name in ("img_size", "crop_pct", "interpolation", "mean", "std")}
        own = all(map(is_factory, sources))
        preprocessing = {} if own else resolve_preprocessing(network, input_channels(network), options)
        workers = min(8, default_threads()) if images.workers is None else images.workers
        loading = Loading(-1, images.batch_size, workers, images.seed, pin_memory=device.type == "cuda")
        open_batches = partial(open_data, preprocessing=preprocessing, split=images.split, root=images.data_root)
        statistics = None
        if images.data is not None and layers:
            statistics = open_batches(images.data, replace(loading, images=images.images))
        identity = {
            "preprocessing": {name: repr(value) for name, value in sorted(preprocessing.items())},
            "model": which.model or type(network).__name__,
            "called": [which.forward, which.inputs, which.mask],
            "recalibrated": None
            if statistics is None
            else [images.data, statistics.images, images.passes, images.estimator, images.batch_size, images.seed],
            "amp": running.amp,
        }
        runner = Runner(network, device, amp=running.amp, channels_last=running.channels_last, call=call)

        def scoring(data: str) -> Classifier:
            held_out = open_batches(data, loading)
            if held_out.once or (statistics is not None and statistics.once):
                raise UsageError("the data are evaluated many times, and a factory here gives an iterator, not a list.")
            return Classifier(
                network=network,
                runner=runner,
                held_out=held_out,
                images=statistics,
                passes=images.passes,
                estimator=images.estimator,
                identity={"data": data, "images": held_out.images, **identity},
                on_progress=on_progress,
            )

        evaluator = scoring(eval_data)
        yield Opened(
            evaluator,
            None if honesty.test is None else scoring(honesty.test),
            "top1",
            None if statistics is None else partial(evaluator.measured, images=statistics),
            tuple(_notes(images.data, eval_data, has_layers=bool(layers))),
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
