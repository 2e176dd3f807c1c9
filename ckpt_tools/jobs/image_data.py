"""The images of a job: its sources, opened with one preprocessing and one order of classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..batchnorm.processes import Group
from ..compute.threads import default_threads
from ..errors import UsageError
from ..evaluation.classes import ClassOrder, class_order, is_timm_run
from ..evaluation.data import Batches, Loading, check_source, is_factory, open_data
from ..evaluation.models import input_channels
from ..evaluation.preprocessing import ARGS, INTERPOLATIONS, OPTION, Preprocessing, fits, resolve_preprocessing
from ..formats.header import Header
from .options import Images
from .outputs import named

_ENLARGED = 1.5
"""By more, images are hardly enlarged on purpose."""
_PREPARED = {
    "img_size": "must be a whole number from 1 on",
    "crop_pct": "must be above 0 and at most 2; 1 keeps all of the image",
    "interpolation": f"must be one of {', '.join(INTERPOLATIONS)}",
    "mean": "must be finite numbers, one for each channel or one for all",
    "std": "must be finite numbers above 0, one for each channel or one for all",
}
"""The options of a preprocessing, and what is said of one that cannot be."""


@dataclass(frozen=True, slots=True)
class ImageData:
    """How the sources of a job are opened.

    Attributes:
        images: the options.
        loading: of the source for the statistics.
        order: how class folders are numbered.
        preprocessing: of the images; None if the user's code prepares all of them.
        of_timm: the run was one of timm's train.py, which takes the size of the model unless its args say another.
    """

    images: Images
    loading: Loading
    order: ClassOrder
    preprocessing: Preprocessing | None
    of_timm: bool

    @property
    def config(self) -> Mapping[str, Any]:
        """The preprocessing as plain data; empty if the user's code prepares the images."""
        return {} if self.preprocessing is None else self.preprocessing.config

    @property
    def config_from(self) -> Mapping[str, str]:
        """Where each value of the preprocessing is from."""
        return {} if self.preprocessing is None else self.preprocessing.sources

    def statistics(self, source: str) -> Batches:
        """Open the images for BatchNorm statistics."""
        return self._opened(source, self.loading, self.images.split, labelled=False)

    def trained(self, source: str, *, augment: bool = False) -> Batches:
        """Open labelled images to train on: all of them, unless a number is given."""
        images = -1 if self.images.images is None else self.images.images
        loading = replace(self.loading, images=images)
        return self._opened(source, loading, self.images.split, labelled=True, augment=augment)

    def evaluated(self, source: str, split: str | None = None) -> Batches:
        """Open labelled images, all of them; of a named dataset those of another split if it is given."""
        return self._opened(source, replace(self.loading, images=-1), split or self.images.split, labelled=True)

    def _opened(self, source: str, loading: Loading, split: str, *, labelled: bool, augment: bool = False) -> Batches:
        batches = open_data(
            source,
            loading,
            preprocessing=self.config,
            split=split,
            augment=augment,
            root=self.images.data_root,
            order=self.order,
            labelled=labelled,
        )
        batches.notes += tuple(self._enlarged(batches))
        return batches

    def _enlarged(self, batches: Batches) -> Iterator[str]:
        """Yield a warning if images are enlarged to a size that neither an option nor the run asks for."""
        if batches.first_size is None or self.of_timm or (size_from := self.config_from["size"]) in (OPTION, ARGS):
            return
        width, height = batches.first_size
        rows, columns = self.config["input_size"][-2:]
        if min(rows, columns) > _ENLARGED * min(width, height):
            yield (
                f"the first image has {width}x{height} pixels, and is enlarged to {columns}x{rows}, the size in "
                f"{size_from}. If the network was trained at another size, give `img_size`."
            )


def image_data(
    network: nn.Module,
    header: Header,
    images: Images,
    sources: Mapping[str, str],
    labelled: Sequence[str],
    *,
    seed: int,
    group: Group,
    pin_memory: bool,
) -> ImageData:
    """Find out how the images of a job are prepared, and how their classes are numbered.

    Args:
        network: with the weights of the checkpoint with this header.
        sources: all data of the job, by their options.
        labelled: those whose labels matter.

    Raises:
        CkptError: the preprocessing is unknown, or the list of classes cannot be read.
    """
    if images.class_map is not None and all(map(is_factory, labelled)):
        raise UsageError("`class_map` goes with labelled images in folders.")
    workers = min(8, default_threads()) if images.workers is None else images.workers
    loading = Loading(images.images, images.batch_size, workers, seed, group.rank, group.world, pin_memory=pin_memory)
    options = {name: getattr(images, name) for name in _PREPARED}
    for option, source in sources.items():  # a name that is mistyped is told before what it would need
        with named(option, "data"):
            check_source(source)
    prepared = not all(map(is_factory, sources.values()))
    return ImageData(
        images,
        loading,
        class_order(header, images.class_map),
        resolve_preprocessing(network, input_channels(network), options, header) if prepared else None,
        is_timm_run(header),
    )


def check_images(images: Images) -> None:
    """Refuse impossible options before anything is read.

    Raises:
        UsageError: a batch or a subset of less than two images, less than no workers, or an impossible preprocessing.
    """
    for name, value, least in (("batch_size", images.batch_size, 2), ("workers", images.workers or 0, 0)):
        if type(value) is not int or value < least:
            raise UsageError(f"`{name}={value!r}`: must be a whole number from {least} on.")
    if images.images is not None and (type(images.images) is not int or images.images < -1 or images.images in (0, 1)):
        raise UsageError(f"`images={images.images!r}`: must be 2 or more, or all (-1).")
    for name, needed in _PREPARED.items():
        value = getattr(images, name)
        if value is not None and not fits(name, value):
            raise UsageError(f"`{name}={value!r}`: {needed}.")


def same_data(source: str, other: str) -> bool:
    """Return True if two sources have one name, or are one folder or file."""
    with suppress(OSError, RuntimeError):
        return source == other or Path(source).resolve() == Path(other).resolve()
    return False


def notes_of(source: str, batches: Batches, images: Images, *, labelled: bool) -> Iterator[str]:
    """Yield what is to be said of opened data, in words."""
    if is_factory(source) and any(getattr(images, name) is not None for name in _PREPARED):
        yield f"{source} is a factory, which prepares its images itself; size, crop, mean and std have no effect there."
    yield from (f"{source}: {note}" for note in batches.notes)
    if labelled and batches.numbering:
        yield f"{source}: {batches.numbering}."


def fewer_classes(source: str, batches: Batches, outputs: int) -> Iterator[str]:
    """Yield a warning if the network tells more classes apart than the data have."""
    if batches.classes is not None and batches.classes < outputs:
        yield (
            f"{source} has {batches.classes} class folders, and the network {outputs} outputs: the accuracy is right "
            "only if the folders are the first classes. Else say which they are with `class_map`."
        )
