"""Data: batches of images from a folder, a tar, a named dataset or a factory of the user.

Images are a seeded random subset, so that they do not all come from the first classes. Batches are planned for all
processes together and dealt out, so that the batches are the same for any number of processes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..batchnorm.batches import images_of
from ..errors import DataError, UsageError
from .models import INSTALL, importable, load_factory

DEFAULT_IMAGES = 8192
MOST_BROKEN = 0.01
_NAMED = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")


@dataclass(frozen=True, slots=True)
class Loading:
    """How to read data.

    Attributes:
        images: number of images; None for 8192, or all if there are fewer; -1 for all.
        batch_size: images per batch.
        workers: number of processes that decode images; 0 to use this one.
        seed: of the random subset.
        rank, world: index of this process, and number of processes.
        pin_memory: for copies to a GPU.
        order: seed of another order of the same images; None for that of the subset.
    """

    images: int | None = None
    batch_size: int = 64
    workers: int = 0
    seed: int = 0
    rank: int = 0
    world: int = 1
    pin_memory: bool = False
    order: int | None = None


class _Broken(str):
    """An image that cannot be decoded, and why."""


class Batches:
    """Batches of images with labels, to be read any number of times.

    Attributes:
        images: number of images over all processes; None if the data have no length.
        broken: images that could not be decoded, with the reason; complete after a pass.
        once: the data can be read only once, as from an iterator.
    """

    def __init__(self, source: Any, loading: Loading) -> None:
        self._source, self._loading = _in_batches(source, loading), loading
        self.broken: list[str] = []
        self.images = _count(len(source), loading.images) if _is_map(source) else None
        self.once = isinstance(source, Iterator)

    def __iter__(self) -> Iterator[Any]:
        return self._given() if self.images is None else self._from_items(self.images)

    def reordered(self, order: int) -> Batches:
        """Return the same images in another order; data without a length stay in theirs."""
        return Batches(self._source, replace(self._loading, order=order))

    def check(self, broken: Sequence[str]) -> None:
        """Refuse data with too many broken images, in one process or in all together.

        Raises:
            DataError: more than 1 % of them.
        """
        if self.images is not None and len(broken) > MOST_BROKEN * self.images:
            raise DataError(
                f"{len(broken)} of {self.images} images cannot be read, more than {MOST_BROKEN:.0%}; "
                f"the first is {broken[0]}. Mend or remove them."
            )

    def _from_items(self, images: int) -> Iterator[Any]:
        loading, source = self._loading, self._source
        self.broken = []
        loader: Iterable[Any] = DataLoader(
            _Careful(source),
            batch_sampler=plan_batches(len(source), images, loading),
            num_workers=loading.workers,
            pin_memory=loading.pin_memory,
            collate_fn=_collate,
            worker_init_fn=_leave_stops,
        )
        try:
            with _stops_held():
                arriving = iter(loader)
            for batch, broken in arriving:
                self.broken += broken
                self.check(self.broken)
                if batch is not None:
                    yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a process that reads images died ({error}). Try fewer with `workers`.") from error

    def _given(self) -> Iterator[Any]:
        """Yield batches as they come, up to the number of images; each goes to one of the processes."""
        asked, seen = self._loading.images, 0
        most = DEFAULT_IMAGES if asked is None else asked
        with _stops_held():
            arriving = iter(self._source)
        for number, batch in enumerate(arriving):
            if most >= 0:
                if seen >= most:
                    break
                batch = _first(batch, most - seen)
            seen += len(images_of(batch))
            if number % self._loading.world == self._loading.rank:
                yield batch
        if asked is not None and seen < asked:
            raise DataError(f"`images={asked}`: the data end after {seen}. Ask for fewer, or for all.")


@dataclass(frozen=True)
class _Careful(Dataset[Any]):
    """Items of a dataset; a `_Broken` in place of one that fails."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.source[index]
        except Exception as error:  # noqa: BLE001 - decoders fail in many types
            name = f"item {index}"
            with suppress(Exception):  # a name is only for the message
                name = str(self.source.name(index))
            return _Broken(f"{name} ({type(error).__name__}: {error})")


@dataclass(frozen=True)
class FolderImages(Dataset[Any]):
    """Transformed images of a timm reader; a broken one raises (timm would return its neighbour)."""

    reader: Any
    transform: Any
    mode: str

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        file, label, *_ = self.reader[index]
        with file, Image.open(file) as image:
            return self.transform(image.convert(self.mode)), -1 if label is None else int(label)

    def name(self, index: int) -> str:
        return str(self.reader.filename(index, absolute=True))


def open_data(
    source: str,
    loading: Loading,
    *,
    preprocessing: Mapping[str, Any] | None,
    split: str,
    root: str | None,
    augment: bool = False,
) -> Batches:
    """Open data.

    Args:
        source: a folder of images (classes in folders, or flat), a tar of them, a name for
            `timm.data.create_dataset` such as ``hfds/...``, or ``path/to/file.py:factory``, which gives a
            Dataset of (image, label) or an iterable of batches.
        preprocessing: of `resolve_preprocessing`; not used for a factory, which gives what the model takes.
        split, root: of a named dataset.
        augment: prepare images as timm does for training, at random; not those of a factory.

    Raises:
        DataError: no such data, no images, or fewer than asked for.
        UsageError: the factory cannot be imported.
    """
    if is_factory(source):
        factory = load_factory(source, "data")
        try:
            with importable(source):
                made = factory()
        except (Exception, SystemExit) as error:  # the user's own code
            raise DataError(f"`data={source!r}`: failed ({type(error).__name__}: {error}).") from error
        return Batches(made, loading)
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - keeps a ~user that is none
    named = source.lower().startswith(_NAMED) and not path.exists()
    if not named and not path.exists():
        raise DataError(f"`data={source!r}`: no such folder, tar or dataset.")
    try:
        from timm.data import create_dataset, create_transform
        from timm.data.readers import create_reader
    except ImportError as error:
        raise DataError(f"`data={source!r}`: images need timm and torchvision. Run: {INSTALL}") from error
    settings = dict(preprocessing or {})
    transform = create_transform(**settings, is_training=augment)
    mode = "L" if settings["input_size"][0] == 1 else "RGB"
    try:
        if named:
            dataset = create_dataset(source, root=root, split=split, input_img_mode=mode, download=False)
            reader = getattr(dataset, "reader", None)
            if reader is None or not _is_map(dataset):
                dataset.transform = transform
                # A reader of streams would share them out between the processes, and so does Batches.
                if reader is not None and getattr(reader, "dist_num_replicas", 1) > 1:
                    reader.dist_rank, reader.dist_num_replicas = 0, 1
                return Batches(dataset, loading)
        else:
            if path.is_file() and path.suffix != ".tar":
                raise DataError(f"`data={source!r}`: a file that is neither a .tar nor a factory (file.py:name).")
            # The cache that timm keeps beside large tars is a pickle, and a pickle can run code.
            reader = create_reader("", root=str(path), **({"cache_tarinfo": False} if path.is_file() else {}))
        return Batches(FolderImages(reader, transform, mode), loading)
    except (RuntimeError, ValueError, AssertionError, ImportError, OSError) as error:
        raise DataError(f"`data={source!r}`: {str(error) or type(error).__name__}") from error


def is_factory(source: str) -> bool:
    """Tell ``file.py:name`` and ``module:name`` from paths and dataset names."""
    place, colon, name = source.rpartition(":")
    return bool(colon) and name.isidentifier() and "/" not in name and (place.endswith(".py") or "/" not in place)


def resolve_preprocessing(model: Any, channels: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve size, crop, interpolation, mean and std as timm's validate.py does.

    Args:
        model: its ``pretrained_cfg`` has the values that no option sets.
        channels: of its images.
        options: ``img_size``, ``crop_pct``, ``interpolation``, ``mean``, ``std``; None where not given.

    Raises:
        DataError: timm is not installed.
        UsageError: mean or std has the wrong number of values.
    """
    try:
        from timm.data import resolve_data_config
    except ImportError as error:
        raise DataError(f"images need timm and torchvision. Run: {INSTALL}") from error
    given = {key: value for key, value in options.items() if value is not None}
    for key in ("mean", "std"):
        if key in given and len(given[key]) not in (1, channels):
            raise UsageError(f"`{key}` has {len(given[key])} numbers for images of {channels} channels.")
    config = dict(resolve_data_config({"in_chans": channels, **given}, model=model, use_test_size=True))
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        if len(config[key]) != channels:  # ImageNet's, for a model of another kind of image
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def plan_batches(available: int, images: int, loading: Loading) -> list[list[int]]:
    """Return the batches of this process, of a random subset.

    A single image left over is added to the last batch.
    """
    generator = torch.Generator().manual_seed(loading.seed)
    chosen = torch.randperm(available, generator=generator)[:images].tolist()
    if loading.order is not None:
        again = torch.randperm(images, generator=torch.Generator().manual_seed(loading.order))
        chosen = [chosen[i] for i in again.tolist()]
    batches = [chosen[i : i + loading.batch_size] for i in range(0, images, loading.batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches[loading.rank :: loading.world]


def _count(available: int, asked: int | None) -> int:
    if available == 0:
        raise DataError("the data have no images.")
    if asked is not None and asked > available:
        raise DataError(f"`images={asked}`: there are only {available}. Ask for fewer, or for all.")
    if asked is None:
        return min(DEFAULT_IMAGES, available)
    return available if asked < 0 else asked


def _is_map(source: Any) -> bool:
    return isinstance(source, Dataset) and not isinstance(source, IterableDataset)


def _in_batches(source: Any, loading: Loading) -> Any:
    """Turn a stream of single items into batches; leave datasets and streams of batches as they are."""
    if isinstance(source, IterableDataset):
        source = DataLoader(source, batch_size=loading.batch_size, num_workers=min(loading.workers, 1))
    if isinstance(source, DataLoader):
        source.worker_init_fn = partial(_leave_stops, then=source.worker_init_fn)
    if not isinstance(source, Iterable) and not isinstance(source, Dataset):
        raise DataError(f"the factory gives a {type(source).__name__}: neither a Dataset nor an iterable of batches.")
    return source


def _collate(items: Sequence[Any]) -> tuple[Any, list[_Broken]]:
    good = [item for item in items if not isinstance(item, _Broken)]
    return (default_collate(good) if good else None), [item for item in items if isinstance(item, _Broken)]


_STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextmanager
def _stops_held() -> Iterator[None]:
    """Hold back signals to stop while workers start, so that they do not inherit our handlers."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _leave_stops(worker: int, then: Callable[[int], None] | None = None) -> None:
    """Leave Ctrl-C to the main process, which ends its workers; a terminal sends it to all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    if then is not None:
        then(worker)


def _first(batch: Any, count: int) -> Any:
    """Cut a batch down to its first images, with their labels."""
    if isinstance(batch, Mapping):
        return {key: _first(value, count) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_first(value, count) for value in batch]
    return batch[:count] if isinstance(batch, torch.Tensor) and batch.dim() else batch
