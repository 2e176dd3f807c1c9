"""Data: the right images, at random, in whole batches, and a word for each that is broken."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import Photos
from PIL import Image
from timm.data import IterableImageDataset, create_transform, resolve_data_config

from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.evaluation.preprocessing import resolve_preprocessing
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


def test_open_data_numbers_labels_by_folder_in_order(photos: Photos) -> None:
    folder = photos(classes=11, each=2)
    brightness: dict[int, list[float]] = {}
    for images, labels in opened(folder, batch_size=4):
        for image, label in zip(images, labels.tolist(), strict=True):
            brightness.setdefault(label, []).append(image.mean().item())
    assert {label: len(values) for label, values in brightness.items()} == {i: 2 for i in range(11)}
    # class10 comes behind class9, as timm sorts; the classes get brighter by number.
    means = [sum(brightness[label]) for label in range(11)]
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
        ("empty", "Found 0 images"),
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


def test_resolve_preprocessing_overrides_the_models_values_by_options() -> None:
    model = torchvision.models.resnet18()
    assert resolve_preprocessing(model, 3, {"img_size": None})["input_size"] == (3, 224, 224)
    model.pretrained_cfg = PREPROCESSING | {"input_size": (3, 160, 160)}
    found = resolve_preprocessing(model, 3, {"crop_pct": 0.5, "mean": None})
    assert found["input_size"] == (3, 160, 160)
    assert found["crop_pct"] == 0.5
    assert found["mean"] == (0.5, 0.4, 0.3)
    tested = timm.create_model("resnet18")  # trained at 224, tested at 288
    assert resolve_preprocessing(tested, 3, {}) == resolve_data_config({}, model=tested, use_test_size=True)
    assert resolve_preprocessing(tested, 3, {"img_size": 64})["input_size"] == (3, 64, 64)
    gray = resolve_preprocessing(torchvision.models.resnet18(), 1, {})
    assert gray["input_size"] == (1, 224, 224)
    np.testing.assert_allclose(gray["mean"], [np.mean([0.485, 0.456, 0.406])])
    with pytest.raises(UsageError, match="`mean` has 2 numbers for images of 3 channels"):
        resolve_preprocessing(model, 3, {"mean": [0.1, 0.2]})


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
