"""Data: the right images, at random, in whole batches, and a word for each that is broken."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Photos
from PIL import Image
from timm.data import IterableImageDataset, create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from ckpt_tools.batchnorm.batches import images_of
from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.evaluation.data import (
    DEFAULT_IMAGES,
    Batches,
    Loading,
    is_factory,
    open_data,
    plan_batches,
)

PREPROCESSING: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "interpolation": "bilinear",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def opened(source: str | Path, **loading: Any) -> Batches:
    return open_data(str(source), Loading(**loading), preprocessing=PREPROCESSING, split="validation", root=None)


def images_in(batches: Batches) -> torch.Tensor:
    return torch.cat([images for images, _ in batches])


def sorted_rows(images: torch.Tensor) -> list[float]:
    return sorted(images.double().sum((1, 2, 3)).tolist())


def test_open_data_applies_timms_evaluation_transform(photos: Photos) -> None:
    folder = photos()
    transform = create_transform(**PREPROCESSING, is_training=False)
    want = torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*/*.png"))])
    found = images_in(opened(folder, batch_size=5))
    assert sorted_rows(found) == sorted_rows(want)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves its tar open
def test_open_data_gives_the_same_images_from_folder_tar_and_workers(photos: Photos, tmp_path: Path) -> None:
    folder, flat = photos(), photos("flat", flat=True)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(folder, arcname="photos")
    want = sorted_rows(images_in(opened(folder)))
    assert len(want) == 12
    assert sorted_rows(images_in(opened(flat))) == want
    assert sorted_rows(images_in(opened(folder, workers=2, batch_size=5))) == want
    before = sorted(tmp_path.iterdir())
    assert sorted_rows(images_in(opened(tmp_path / "photos.tar"))) == want
    assert sorted(tmp_path.iterdir()) == before


def test_open_data_opens_a_dataset_of_timm_by_name(photos: Photos) -> None:
    folder = photos()
    named = open_data(
        "torch/image_folder", Loading(), preprocessing=PREPROCESSING, split="validation", root=str(folder)
    )
    assert sorted_rows(images_in(named)) == sorted_rows(images_in(opened(folder)))


def test_open_data_numbers_labels_by_folder(photos: Photos) -> None:
    """In the order of their text, as ImageFolder does; see test_classes for other orders."""
    brightness: dict[int, list[float]] = {}
    for images, labels in opened(photos(classes=11, each=2), batch_size=4):
        for image, label in zip(images, labels.tolist(), strict=True):
            brightness.setdefault(label, []).append(image.mean().item())
    assert {label: len(values) for label, values in brightness.items()} == {i: 2 for i in range(11)}
    # The classes get brighter by number: class0, class1, class10, class2, ...
    by_text = sorted(range(11), key=str)
    means = [sum(brightness[by_text.index(number)]) for number in range(11)]
    assert means == sorted(means)


def test_open_data_takes_a_random_seeded_subset_of_all_classes(photos: Photos) -> None:
    folder = photos(classes=6, each=10, size=8)

    def labels(seed: int) -> list[int]:
        return [int(label) for _, part in opened(folder, images=30, batch_size=7, seed=seed) for label in part]

    assert labels(0) == labels(0)
    assert labels(0) != labels(1)
    assert len(labels(0)) == 30
    assert set(labels(0)) == set(range(6))


def test_batches_hold_8192_images_by_default(photos: Photos) -> None:
    class Many(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, index: int) -> Any:
            return torch.zeros(1), index

    assert Batches(Many(), Loading()).images == DEFAULT_IMAGES == 8192
    assert Batches(Many(), Loading(images=-1)).images == 10_000
    assert opened(photos()).images == 12


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("images", "batch"), [(9, 4), (17, 4), (16, 4), (3, 64), (101, 10)])
def test_plan_batches_deals_out_whole_batches_and_none_of_one_image(images: int, batch: int, world: int) -> None:
    alone = plan_batches(200, images, Loading(batch_size=batch))
    dealt = [plan_batches(200, images, Loading(batch_size=batch, rank=r, world=world)) for r in range(world)]
    assert sorted(map(tuple, alone)) == sorted(tuple(b) for part in dealt for b in part)
    assert all(len(b) > 1 for b in alone)
    counts = Counter(i for b in alone for i in b)
    assert len(counts) == sum(counts.values()) == images


def test_batches_leave_out_broken_images_and_name_them(photos: Photos) -> None:
    folder = photos(classes=2, each=60, size=8)
    (folder / "class1" / "1-7.png").write_bytes(b"no image")
    batches = opened(folder, batch_size=16, workers=2)
    for _ in range(2):  # counted anew each time
        assert len(images_in(batches)) == 119
        assert len(batches.broken) == 1
        assert "1-7.png (UnidentifiedImageError" in batches.broken[0]


def test_batches_reject_more_than_one_percent_of_broken_images(photos: Photos) -> None:
    folder = photos(classes=2, each=60, size=8)
    for j in (3, 5):
        (folder / "class0" / f"0-{j}.png").write_bytes((folder / "class0" / "0-1.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"2 of 120 images cannot be read, more than 1%; the first is .*0-[35]\.png"):
        images_in(opened(folder))


def test_batches_count_broken_images_of_all_processes_together(photos: Photos) -> None:
    folder = photos(classes=2, each=60, size=8)
    (folder / "class1" / "1-7.png").write_bytes(b"no image")
    parts = [opened(folder, batch_size=16, rank=rank, world=2) for rank in range(2)]  # 1 of 60 is more than 1 %
    assert sum(len(images_in(part)) for part in parts) == 119
    with pytest.raises(DataError, match="2 of 120 images cannot be read"):
        parts[0].check(2 * [broken for part in parts for broken in part.broken])


def test_open_data_gives_gray_images_to_a_model_of_one_channel(photos: Photos) -> None:
    gray = PREPROCESSING | {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    batches = open_data(str(photos()), Loading(), preprocessing=gray, split="validation", root=None)
    assert images_in(batches).shape == (12, 1, 32, 32)


FACTORIES = """
import torch
from torch.utils.data import Dataset, DataLoader, IterableDataset

class Items(Dataset):
    def __len__(self):
        return 10
    def __getitem__(self, i):
        return torch.full((2, 3), float(i)), i

class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.full((2, 3), float(i)), i) for i in range(10)])

def items(): return Items()
def stream(): return Stream()
def endless(): return (torch.zeros(100, 3) for _ in iter(int, 1))
def loader(): return DataLoader(Items(), batch_size=3)
def batches(): return [torch.full((2, 2, 3), float(i)) for i in range(5)]
def nothing(): return None
def broken(): raise KeyError("path")
def leaves(): raise SystemExit(0)
"""


@pytest.mark.parametrize("name", ["items", "stream", "loader"])
def test_open_data_takes_a_dataset_or_batches_from_a_factory(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.py").write_text(FACTORIES)
    batches = opened(f"{tmp_path}/mine.py:{name}", batch_size=4)
    for _ in range(2):
        assert sorted(images[0, 0].item() for part, _ in batches for images in part) == list(range(10))
    some = opened(f"{tmp_path}/mine.py:{name}", batch_size=4, images=7)
    assert sum(len(images) for images, _ in some) == 7
    with pytest.raises(DataError, match="`images=11`"):
        list(opened(f"{tmp_path}/mine.py:{name}", images=11))


def test_open_data_takes_the_default_number_from_endless_data(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORIES)
    assert sum(map(len, opened(f"{tmp_path}/mine.py:endless"))) == DEFAULT_IMAGES


def test_open_data_shares_a_stream_of_timm_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:  # as those of timm for wds/, tfds/ and hfids/ do in a process group
        dist_rank, dist_num_replicas = 1, 2

        def __iter__(self) -> Any:
            return iter([(torch.zeros(1), i) for i in range(self.dist_rank, 12, self.dist_num_replicas)])

    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: IterableImageDataset("", reader=Reader()))
    monkeypatch.setattr("timm.data.create_transform", lambda **_: None)
    parts = [opened("wds/any", batch_size=2, rank=rank, world=2) for rank in range(2)]
    assert sorted(int(label) for part in parts for _, labels in part for label in labels) == list(range(12))


def test_batches_deal_a_list_out_to_processes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORIES)
    parts = [list(opened(f"{tmp_path}/mine.py:batches", rank=rank, world=2)) for rank in range(2)]
    assert [[batch[0, 0, 0].item() for batch in part] for part in parts] == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "no such folder, tar or dataset"),
        ("empty", "no images in it; known are"),
        ("text.txt", r"neither a \.tar nor a factory"),
        ("mine.py:nothing", "gives a NoneType: neither"),
        ("mine.py:broken", "failed \\(KeyError: 'path'\\)"),
        ("mine.py:leaves", "failed \\(SystemExit: 0\\)"),
        ("hfds/nobody/nothing", "`data='hfds/nobody/nothing'`: "),
    ],
)
def test_open_data_rejects_unusable_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "mine.py").write_text(FACTORIES)
    with pytest.raises(DataError, match=message):
        opened(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mine.py:itmes", "mine.py has no 'itmes'. Did you mean items"),
        ("absent.py:items", r"cannot be imported \(FileNotFoundError"),
        ("wrong.py:items", r"cannot be imported \(SyntaxError"),
        ("leaves.py:items", r"cannot be imported \(SystemExit: 0"),
        ("no_such_module:items", r"cannot be imported \(ModuleNotFoundError"),
    ],
)
def test_open_data_rejects_a_missing_factory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FACTORIES)
    (tmp_path / "wrong.py").write_text("def")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    with pytest.raises(UsageError, match=message):
        opened(source)


def test_open_data_rejects_more_images_than_there_are(photos: Photos) -> None:
    folder = photos()
    with pytest.raises(DataError, match="`images=13`: there are only 12"):
        opened(folder, images=13)
    assert opened(folder, images=-1).images == 12


@pytest.mark.parametrize(
    ("source", "yes"),
    [
        ("file.py:factory", True),
        ("dir/file.py:factory", True),
        ("package.module:factory", True),
        ("folder", False),
        ("hfds/user/name", False),
        ("C:", False),
        ("a/b:c", False),
    ],
)
def test_is_factory_tells_factories_from_paths(source: str, yes: bool) -> None:
    assert is_factory(source) is yes


def test_batches_report_a_worker_that_dies_as_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os, signal, torch\n"
        "class Deadly(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, i):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "def make(): return Deadly()\n"
    )
    with pytest.raises(DataError, match="a process that reads images died"):
        list(opened(f"{tmp_path}/deadly.py:make", workers=1))


UNEVEN = """
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import Dataset
class Uneven(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.zeros(3, 4 + i % 2, 4), i
def make(): return Uneven()
def loader():  # as a DataLoader with workers does, whose end would take torch five seconds
    try:
        torch.utils.data.default_collate([Uneven()[i] for i in range(2)])
    except RuntimeError:
        failed = ExceptionWrapper(where="in DataLoader worker process 0")
    class Loader:
        def __iter__(self):
            yield from [torch.zeros(2, 3)]
            failed.reraise()
    return Loader()
"""


@pytest.mark.parametrize(
    ("factory", "workers", "message"),
    [
        ("make", 0, r"^images do not go into one batch \(RuntimeError: stack expects each tensor to be equal size"),
        ("make", 1, r"^images do not go into one batch \(RuntimeError: stack expects each tensor to be equal size"),
        ("loader", 0, r"^a worker of the DataLoader failed \(RuntimeError: stack expects each tensor to be equal size"),
    ],
)
def test_batches_tell_images_of_other_sizes_from_a_process_that_died(
    tmp_path: Path, factory: str, workers: int, message: str
) -> None:
    (tmp_path / "uneven.py").write_text(UNEVEN)
    with pytest.raises(DataError, match=message):
        list(opened(f"{tmp_path}/uneven.py:{factory}", batch_size=4, workers=workers))


class Stream(IterableDataset[Any]):
    """Ten images, single or in batches of four, with or without labels."""

    def __init__(self, *, batch: int | None, labels: str, shape: tuple[int, ...] = (3, 4, 4)) -> None:
        self.batch, self.labels, self.shape = batch, labels, shape

    def __iter__(self) -> Iterator[Any]:
        images = [torch.full(self.shape, float(i)) for i in range(10)]
        if self.batch is None:
            yield from (self.item(image, i) for i, image in enumerate(images))
        else:
            for i in range(0, 10, self.batch):
                part = range(i, min(10, i + self.batch))
                yield self.item(torch.stack([images[j] for j in part]), torch.tensor(part))

    def item(self, images: Any, label: Any) -> Any:
        if self.labels == "dict":
            return {"image": images, "label": label}
        return (images, label) if self.labels == "tuple" else images


@pytest.mark.parametrize("labels", ["tuple", "dict", "none"])
@pytest.mark.parametrize("batch", [None, 4, 2])
def test_a_stream_of_batches_is_not_put_into_batches_once_more(batch: int | None, labels: str) -> None:
    found = [images_of(each) for each in Batches(Stream(batch=batch, labels=labels), Loading(batch_size=4))]
    assert [tuple(images.shape) for images in found] == [(n, 3, 4, 4) for n in ((2,) * 5 if batch == 2 else (4, 4, 2))]
    assert torch.cat(found)[:, 0, 0, 0].tolist() == list(range(10))


def test_a_stream_that_may_be_of_either_kind_is_a_question() -> None:
    for stream in (Stream(batch=3, labels="tuple", shape=(5, 6)), Stream(batch=4, labels="tuple", shape=(7,))):
        with pytest.raises(DataError, match=r"one image, or a batch\? Return a DataLoader of it, with batch_size=None"):
            Batches(stream, Loading())
        loader = DataLoader(stream, batch_size=None)
        assert sum(len(images) for images, _ in Batches(loader, Loading())) == 10


@pytest.mark.parametrize("sizes", [(4, 4, 4, 1), (3, 3, 1), (1,) * 5, (4, 1, 4, 1, 1), (1, 4, 4), (2, 1, 1, 4), (1,)])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_batch_of_one_image_goes_where_a_neighbour_goes(sizes: tuple[int, ...], world: int) -> None:
    """No process gets a single image alone, unless there is no other."""
    starts = np.cumsum([0, *sizes])
    batches = [torch.arange(a, b) for a, b in zip(starts, starts[1:], strict=False)]
    dealt = [list(Batches(batches, Loading(rank=rank, world=world))) for rank in range(world)]
    assert sorted(int(i) for part in dealt for batch in part for i in batch) == list(range(sum(sizes)))
    for part in dealt:
        assert sum(map(len, part)) != 1 or sum(sizes) == 1
        assert part == sorted(part, key=lambda batch: int(batch[0]))


@pytest.mark.parametrize("sampler", [DistributedSampler, OrderedDistributedSampler])
@pytest.mark.parametrize("count", [37, 33])
def test_a_loader_with_a_distributed_sampler_is_read_whole(sampler: Any, count: int) -> None:
    """Each image once, though the sampler repeats some and the last batch would be of one image."""
    data = TensorDataset(torch.arange(count).float()[:, None])
    dealt = []
    for rank in range(4):
        loader = DataLoader(data, batch_size=8, sampler=sampler(data, num_replicas=4, rank=rank))
        batches = Batches(loader, Loading(rank=rank, world=4))
        assert batches.images == count
        dealt.append([batch for (batch,) in batches])
    assert sorted(int(i) for part in dealt for batch in part for i in batch) == list(range(count))
    assert all(len(batch) > 1 for part in dealt for batch in part)


def test_a_sampler_that_cannot_be_made_whole_is_refused() -> None:
    class Half(DistributedSampler[Any]):
        def __iter__(self) -> Iterator[int]:
            return iter([self.rank])

    data = TensorDataset(torch.arange(8).float()[:, None])
    loader = DataLoader(data, batch_size=2, sampler=Half(data, num_replicas=2, rank=1))
    with pytest.raises(DataError, match=r"the sampler of the loader \(Half\) keeps a share for each process"):
        Batches(loader, Loading(rank=1, world=2))
    assert len(list(Batches(loader, Loading()))) == 1  # of one process alone it is as the user wants it


def test_the_first_images_are_some_of_those_that_are_measured(photos: Photos) -> None:
    batches = opened(photos(classes=6, each=10, size=8), images=30, batch_size=7)
    some = batches.first(10)
    assert some is not None
    assert some.images == 10
    assert set(sorted_rows(images_in(some))) < set(sorted_rows(images_in(batches)))
    assert len(images_in(batches)) == 30
    stream = Batches([torch.zeros(4, 2)] * 3, Loading()).first(6)
    assert stream is not None
    assert sum(map(len, stream)) == 6
    assert Batches(iter([torch.zeros(4, 2)]), Loading()).first(2) is None
