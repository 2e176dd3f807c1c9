"""Data: batches of images from a folder, a tar, a named dataset or a factory of the user.

Images are a seeded random subset, so that they do not all come from the first classes. Batches are planned for all
processes together and dealt out, so that the batches are the same for any number of processes.
"""

from __future__ import annotations

import copy
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..batchnorm.batches import samples_in, tensors_of
from ..batchnorm.processes import gathered_objects
from ..errors import DataError
from .classes import ClassOrder
from .folders import ImageFiles, first_size, read_folder, read_tar
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


class _Unfit(str):
    """Why images do not go into one batch."""


@dataclass(frozen=True)
class _Items:
    """Single images, to be put into batches here.

    Attributes:
        order: the indices in the order of the user; None for a random one.
        batch_size: images per batch.
        collate: from a list of items to a batch.
    """

    source: Any
    order: Sequence[int] | None
    batch_size: int
    collate: Callable[[list[Any]], Any] = default_collate

    def __len__(self) -> int:
        return len(self.source if self.order is None else self.order)

    def batches(self, images: int, loading: Loading) -> list[list[int]]:
        """Return the batches of this process."""
        if self.order is None:
            return plan_batches(len(self.source), images, loading)
        return _dealt(list(self.order[:images]), self.batch_size, loading)


class Batches:
    """Batches of images with labels, to be read any number of times.

    Attributes:
        images: number of images over all processes; None if the data have no length.
        broken: images that could not be decoded, with the reason; complete after a pass.
        once: the data can be read only once, as from an iterator.
        notes: what was left out, in words.
        classes: how many classes there are, if their folders number the labels; else None.
        numbering: how these are numbered, in words.
        first_size: (width, height) of the first image file; None where there are no files.
    """

    def __init__(
        self,
        source: Any,
        loading: Loading,
        *,
        notes: Sequence[str] = (),
        classes: int | None = None,
        numbering: str = "",
        first_size: tuple[int, int] | None = None,
    ) -> None:
        self._source, self._loading = _in_batches(source, loading), loading
        self.broken: list[str] = []
        self.images: int | None = None
        self._most = DEFAULT_IMAGES if loading.images is None else loading.images  # of a stream
        if isinstance(self._source, _Items):
            self.images = _count(len(self._source), loading.images)
        self._all = self.images
        self.once = isinstance(source, Iterator)
        self.notes, self.classes, self.numbering = tuple(notes), classes, numbering
        self.first_size = first_size

    @property
    def steps(self) -> int | None:
        """Number of batches in this process; None if the data have no length."""
        return None if self.images is None else len(self._source.batches(self.images, self._loading))

    def __iter__(self) -> Iterator[Any]:
        return self._from_items(self._source) if isinstance(self._source, _Items) else self._given()

    def first(self, images: int) -> Batches | None:
        """Return the first of these images, as batches of their own; None if the data can be read only once."""
        if self.once:
            return None
        part = copy.copy(self)
        part._loading = replace(self._loading, images=None)
        part._most = images if self._most < 0 else min(images, self._most)
        part.images = None if self.images is None else min(images, self.images)
        return part

    def reordered(self, order: int) -> Batches:
        """Return the same images in another order; data without a length stay in theirs."""
        again = copy.copy(self)
        again._loading = replace(self._loading, order=order)
        again.broken = []
        return again

    def check(self, broken: Sequence[str]) -> None:
        """Refuse data with too many broken images, in one process or in all together.

        Raises:
            DataError: more than 1 % of them.
        """
        if self._all is not None and len(broken) > MOST_BROKEN * self._all:
            raise DataError(
                f"{len(broken)} of {self._all} images cannot be read, more than {MOST_BROKEN:.0%}; "
                f"the first is {broken[0]}. Mend or remove them."
            )

    def _from_items(self, items: _Items) -> Iterator[Any]:
        loading = self._loading
        self.broken = []
        loader: Iterable[Any] = DataLoader(
            _Careful(items.source),
            batch_sampler=items.batches(self.images or 0, loading),
            num_workers=loading.workers,
            pin_memory=loading.pin_memory,
            collate_fn=partial(_collate, items.collate),
            worker_init_fn=_leave_stops,
        )
        for batch, broken in _arriving(loader):
            self.broken += broken
            self.check(self.broken)
            if isinstance(batch, _Unfit):
                raise DataError(
                    f"images do not go into one batch ({batch}). They should have one size; or let the factory return "
                    "a DataLoader with a collate_fn of its own."
                )
            if batch is not None:
                yield batch

    def _given(self) -> Iterator[Any]:
        """Yield batches as they come, up to the number of images; each goes to one of the processes."""
        for turn, batch in _in_turn(self._counted()):
            if turn % self._loading.world == self._loading.rank:
                yield batch

    def _counted(self) -> Iterator[tuple[int, Any]]:
        """Yield the number of images of each batch, and the batch."""
        asked, seen, compared = self._loading.images, 0, False
        arriving = _arriving(self._source)
        while self._most < 0 or seen < self._most:
            batch = next(arriving, None)
            if not compared:
                _compare(batch)
                compared = True
            if batch is None:
                break
            count = samples_in(batch)
            if self._most >= 0 and count > self._most - seen:
                batch, count = _first(batch, self._most - seen), self._most - seen
            seen += count
            if count:
                yield count, batch
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
class _NamedImages(Dataset[Any]):
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
    order: ClassOrder | None = None,
    labelled: bool = False,
) -> Batches:
    """Open data.

    Args:
        source: a folder of images (classes in folders, or flat), a tar of them, a name for
            `timm.data.create_dataset` such as ``hfds/...``, or ``path/to/file.py:factory``, which gives a
            Dataset of (image, label) or an iterable of batches.
        preprocessing: ``config`` of `resolve_preprocessing`; not used for a factory, which gives what the model takes.
        split, root: of a named dataset: which part of it, and the folder that it is in.
        augment: prepare images as timm does for training, at random; not those of a factory.
        order: how class folders are numbered; by their names if None.
        labelled: the labels matter; else they are -1 where the folders cannot be numbered.

    Raises:
        DataError: no such data, no images, fewer than asked for, or folders that cannot be numbered.
        UsageError: the factory cannot be imported.
    """
    if is_factory(source):
        return Batches(_made(source), loading)
    path, named = check_source(source)
    try:
        from timm.data import create_transform
    except ImportError as error:
        raise DataError(f"`data={source!r}`: images need timm and torchvision. Run: {INSTALL}") from error
    settings = dict(preprocessing or {})
    transform = create_transform(**settings, is_training=augment)
    mode = "L" if settings["input_size"][0] == 1 else "RGB"
    if not named and path.is_file() and path.suffix != ".tar":
        raise DataError(f"`data={source!r}`: a file that is neither a .tar nor a factory (file.py:name).")
    try:
        if named:
            return _of_dataset(source, split, root, transform, mode, loading)
        return _of_files(path, order or ClassOrder(), transform, mode, loading, labelled=labelled)
    except (RuntimeError, ValueError, AssertionError, ImportError, OSError) as error:
        raise DataError(f"`data={source!r}`: {str(error) or type(error).__name__}") from error


def _made(source: str) -> Any:
    """Return what a factory of the user gives."""
    factory = load_factory(source, "data")
    try:
        with importable(source):
            return factory()
    except (Exception, SystemExit) as error:  # the user's own code
        raise DataError(f"`data={source!r}`: failed ({type(error).__name__}: {error}).") from error


def _of_files(path: Path, order: ClassOrder, transform: Any, mode: str, loading: Loading, *, labelled: bool) -> Batches:
    """Open a folder of images, or a tar of them."""
    files = read_tar(path) if path.is_file() else read_folder(path)
    numbered = None
    try:
        numbered = order.number(files.folders)
    except DataError:
        if labelled:
            raise
    return Batches(
        ImageFiles(files, numbered, transform, mode),
        loading,
        notes=files.notes,
        classes=None if numbered is None or numbered.listed else len(numbered.folders),
        numbering="" if numbered is None else numbered.note,
        first_size=first_size(files),
    )


def _of_dataset(name: str, split: str, root: str | None, transform: Any, mode: str, loading: Loading) -> Batches:
    """Open a dataset that timm knows by name."""
    from timm.data import create_dataset

    dataset = create_dataset(name, root=root, split=split, input_img_mode=mode, download=False)
    reader = getattr(dataset, "reader", None)
    if reader is not None and _is_map(dataset):
        return Batches(_NamedImages(reader, transform, mode), loading)
    dataset.transform = transform
    # A reader of streams would share them out between the processes, and so does Batches.
    if reader is not None and getattr(reader, "dist_num_replicas", 1) > 1:
        reader.dist_rank, reader.dist_num_replicas = 0, 1
    return Batches(dataset if _is_map(dataset) else _loader(dataset, loading.batch_size, loading), loading)


def check_source(source: str) -> tuple[Path, bool]:
    """Return the path of data, and True if they are a named dataset instead.

    Raises:
        DataError: they are no factory, and there are no such data.
    """
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - keeps a ~user that is none
    named = source.lower().startswith(_NAMED) and not path.exists()
    if not named and not is_factory(source) and not path.exists():
        raise DataError(f"`data={source!r}`: no such folder, tar or dataset.")
    return path, named


def is_factory(source: str) -> bool:
    """Tell ``file.py:name`` and ``module:name`` from paths and dataset names."""
    place, colon, name = source.rpartition(":")
    return bool(colon) and name.isidentifier() and "/" not in name and (place.endswith(".py") or "/" not in place)


def plan_batches(available: int, images: int, loading: Loading) -> list[list[int]]:
    """Return the batches of this process, of a random subset.

    A single image left over is added to the last batch.
    """
    generator = torch.Generator().manual_seed(loading.seed)
    chosen = torch.randperm(available, generator=generator)[:images].tolist()
    if loading.order is not None:
        again = torch.randperm(images, generator=torch.Generator().manual_seed(loading.order))
        chosen = [chosen[i] for i in again.tolist()]
    return _dealt(chosen, loading.batch_size, loading)


def _dealt(chosen: list[int], batch_size: int, loading: Loading) -> list[list[int]]:
    batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches[loading.rank :: loading.world]


def _in_turn(counted: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Number the turns in which processes take batches.

    A batch of a single image, which may have to be joined to a neighbour, has the turn of that neighbour.
    """
    turn, size, single = -1, 0, None
    for count, batch in counted:
        if single is not None:
            turn += 1
            yield turn, single
            yield turn, batch
            single, size = None, count + 1
        elif count > 1:
            turn += 1
            yield turn, batch
            size = count
        elif size > 2:
            yield turn, batch
            size = 0
        else:
            single = batch
    if single is not None:
        yield max(turn, 0), single


def _compare(batch: Any) -> None:
    """Refuse a first batch that is another one in another process of the group: batches are dealt out here.

    Raises:
        DataError: it is.
    """
    mine = None
    if batch is not None:
        images = next((tensor for tensor in tensors_of(batch) if tensor.dim()), torch.empty(0))
        start = images[:1].detach().cpu().contiguous().reshape(-1)
        data = start.view(torch.uint8).long() if start.numel() else start
        mine = (tuple(images.shape), int((data * (torch.arange(len(data)) + 1)).sum()))
    if len(set(gathered_objects(mine))) > 1:
        raise DataError(
            "`data` begins with other images in each process. Let it give all of them in each, in the same order "
            "(without a sampler or node splitter, with a fixed seed): the batches are dealt out here."
        )


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
    """Return `_Items` of what has a length and single images, and an iterable of batches of all else."""
    if _is_map(source):
        return _Items(source, None, loading.batch_size)
    if isinstance(source, IterableDataset):
        source = _loader(source, None if _gives_batches(source) else loading.batch_size, loading)
    if isinstance(source, DataLoader):
        if loading.world > 1 and (whole := _undistributed(source)) is not None:
            return whole
        source.worker_init_fn = partial(_leave_stops, then=source.worker_init_fn)
    if not isinstance(source, Iterable):
        raise DataError(f"the factory gives a {type(source).__name__}: neither a Dataset nor an iterable of batches.")
    return source


def _loader(stream: Any, batch_size: int | None, loading: Loading) -> DataLoader[Any]:
    return DataLoader(stream, batch_size=batch_size, num_workers=min(loading.workers, 1))


def _undistributed(loader: DataLoader[Any]) -> _Items | None:
    """Return all images of a loader whose sampler keeps a share for this process; None if it does not.

    Raises:
        DataError: the sampler has a share, and there is no telling what the whole is.
    """
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if getattr(sampler, "num_replicas", 1) <= 1:
        return None
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    # What DistributedSampler and timm's OrderedDistributedSampler take their share by; it repeats images, too.
    whole: Any = copy.copy(sampler)
    whole.num_replicas, whole.rank = 1, 0
    order: list[int] = []
    data: Any = loader.dataset
    with suppress(Exception):  # a sampler of the user's
        whole.num_samples = whole.total_size = len(data)
        order = [int(index) for index in whole]
    if not order or type(batch_size) is not int or sorted(order) != list(range(len(data))):
        raise DataError(
            f"the sampler of the loader ({type(sampler).__name__}) keeps a share for each process, and batches are "
            "dealt out here. Return a loader without it."
        )
    return _Items(data, order, batch_size, loader.collate_fn)


def _gives_batches(stream: Any) -> bool:
    """Tell a stream of batches from one of single images, by its first item.

    Raises:
        DataError: it may be either.
    """
    if iter(stream) is iter(stream):  # its first item would be lost
        return False
    item = next(iter(stream), None)
    if item is None:
        return False
    images = next(tensors_of(item), torch.empty(0))
    entries = item.values() if isinstance(item, Mapping) else item if isinstance(item, (tuple, list)) else ()
    lengths = [_length(entry) for entry in entries if entry is not images]
    if not lengths:
        return images.dim() == 4
    alike = [length == len(images) for length in lengths]
    if not any(alike) or (None in lengths and images.dim() == 3):
        return False
    if all(alike) and images.dim() in (4, 5):
        return True
    raise DataError(
        f"the first item of the {type(stream).__name__} is {list(images.shape)} with {len(lengths)} more entries: one "
        "image, or a batch? Return a DataLoader of it, with batch_size=None if it gives batches."
    )


def _length(entry: Any) -> int | None:
    """Return the number of entries of a list or a tensor; None for a number or a text."""
    if isinstance(entry, (str, bytes)) or not hasattr(entry, "__len__"):
        return None
    return None if getattr(entry, "shape", None) == () else len(entry)


def _collate(collate: Callable[[list[Any]], Any], items: Sequence[Any]) -> tuple[Any, list[_Broken]]:
    good = [item for item in items if not isinstance(item, _Broken)]
    broken = [item for item in items if isinstance(item, _Broken)]
    try:
        return (collate(good) if good else None), broken
    except Exception as error:  # noqa: BLE001 - it may be the user's own
        return _Unfit(f"{type(error).__name__}: {error}"), broken


def _arriving(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield what a loader gives.

    Raises:
        DataError: one of its workers died, or raised.
    """
    with _deaths_told(), _stops_held():
        arriving = iter(loader)
    while True:
        with _deaths_told():
            try:
                arrived = next(arriving)
            except StopIteration:
                return
        yield arrived


@contextmanager
def _deaths_told() -> Iterator[None]:
    """Tell a worker that died from one that raised.

    Raises:
        DataError: one of both.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if isinstance(error, RuntimeError) and re.match(r"DataLoader worker \(pid", text):
            raise DataError(f"a process that reads images died ({text}). Try fewer with `workers`.") from error
        if re.match(r"Caught \w+ in DataLoader worker process", text):
            raise DataError(f"a worker of the DataLoader failed ({text.strip().splitlines()[-1]}).") from error
        raise


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
