"""Folders and tars: every image once, whatever its suffix, and a word on what is none."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from ckpt_tools.errors import DataError
from ckpt_tools.evaluation.data import Loading, open_data
from ckpt_tools.evaluation.folders import image_suffixes, read_folder, read_tar

PREPROCESSING = {
    "input_size": (3, 8, 8), "interpolation": "bilinear", "mean": (0,), "std": (1,), "crop_pct": 1.0,
    "crop_mode": "center",
}  # fmt: skip
SUFFIXES = ("png", "jpg", "JPEG", "webp", "bmp", "tif", "TIFF", "gif", "ppm", "pgm", "avif")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """An image of each suffix, in a class of its own, beside files that are none."""
    pixels = np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    for suffix in SUFFIXES:
        inside = tmp_path / "mixed" / suffix
        inside.mkdir(parents=True)
        Image.fromarray(pixels).convert("L" if suffix == "pgm" else "RGB").save(inside / f"0.{suffix}")
    for name in ("labels.csv", "png/readme.txt", ".hidden", "png/a.eps"):
        (tmp_path / "mixed" / name).write_text("no image")
    return tmp_path / "mixed"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves its tar open
def test_open_data_takes_images_of_every_usual_suffix(mixed: Path, tmp_path: Path) -> None:
    """As many as pillow itself can open."""
    with tarfile.open(tmp_path / "mixed.tar", "w") as tar:
        tar.add(mixed, arcname="mixed")
    before = get_img_extensions()
    for source, hidden in ((mixed, 0), (tmp_path / "mixed.tar", 1)):
        batches = open_data(str(source), Loading(), preprocessing=PREPROCESSING, split="", root=None)
        assert batches.images == len(SUFFIXES)
        assert sorted(int(label) for _, labels in batches for label in labels) == list(range(len(SUFFIXES)))
        assert batches.broken == []
        (note,) = batches.notes
        assert note.startswith(f"{3 + hidden} files are no images, such as ")
    assert get_img_extensions() == before


def test_a_folder_of_splits_is_told_from_a_folder_of_classes(mixed: Path) -> None:
    for name in ("train", "Val"):
        (mixed.parent / "data" / name).mkdir(parents=True)
        (mixed / "png" / "0.png").rename(mixed.parent / "data" / name / "0.png")
        assert not any("train" in note for note in read_folder(mixed.parent / "data").notes)
        (mixed.parent / "data" / name / "0.png").rename(mixed / "png" / "0.png")
    for name in ("train", "Val"):
        (mixed.parent / "data" / name / "0.png").write_bytes((mixed / "png" / "0.png").read_bytes())
    assert read_folder(mixed.parent / "data").notes == (
        f"it holds train/ and Val/, and all of their images are used. "
        f"Did you mean {mixed.parent}/data/train or {mixed.parent}/data/Val?",
    )


def test_image_suffixes_are_of_formats_that_need_no_other_program() -> None:
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"} <= set(image_suffixes())
    assert not {".eps", ".ps", ".pdf", ".txt"} & set(image_suffixes())


def test_open_data_reads_no_document_under_the_name_of_an_image(tmp_path: Path) -> None:
    """Pillow would hand a PostScript file to Ghostscript, whatever its suffix."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with Image.open(tmp_path / "a" / "0.png") as image:
        assert image.format == "EPS"
    batches = open_data(str(tmp_path), Loading(), preprocessing=PREPROCESSING, split="", root=None)
    with pytest.raises(DataError, match="UnidentifiedImageError"):
        list(batches)


def test_a_link_back_into_the_folder_does_not_multiply_images(tmp_path: Path) -> None:
    root, store = tmp_path / "root", tmp_path / "store"
    for folder in (root / "a" / "deep", store / "b", tmp_path / "one"):
        folder.mkdir(parents=True)
        (folder / "0.png").touch()
    (root / "a" / "again").symlink_to(root)
    (root / "twice").symlink_to(root / "a")
    (root / "up").symlink_to(tmp_path)
    (root / "store").symlink_to(store)  # elsewhere, and so followed; it has a link to itself
    (store / "round").symlink_to(store)
    (root / "1.png").symlink_to(tmp_path / "one" / "0.png")
    found = read_folder(root)
    assert sorted(found.files) == ["1.png", "a/deep/0.png", "store/b/0.png"]
    assert found.notes == ("4 links lead back into the folder and are not followed, such as a/again.",)


def test_a_folder_that_is_a_link_itself_is_read(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "0.png").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_folder(tmp_path / "link").files == ("b/0.png",)


def test_data_without_images_say_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no images in it; known are \.png, .*1 file is no image, such as notes\.txt"):
        read_folder(tmp_path)
    (tmp_path / "broken.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match=r"broken\.tar'`: no tar of images"):
        read_tar(tmp_path / "broken.tar")
