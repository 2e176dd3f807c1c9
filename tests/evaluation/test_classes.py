"""Classes: the numbers that torchvision's ImageFolder and timm give to folders, or those that a list says."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

from ckpt_tools.errors import DataError
from ckpt_tools.evaluation.classes import class_order, read_class_map
from ckpt_tools.evaluation.folders import ImageFiles, read_folder
from ckpt_tools.formats import read_header

Save = Callable[..., Path]
NAMES = ("1", "2", "10", "b", "B", "a b", "é", "n01", "n1")
TIMM: dict[str, Any] = {"arch": "resnet18", "args": argparse.Namespace(model="resnet18")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for each name, with two images in all but one of them."""
    for name in NAMES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(0 if name == "2" else 2):
            (tmp_path / "photos" / name / f"{i}.png").touch()
    return tmp_path / "photos"


def labels(folder: Path, path: Path, class_map: Path | None = None) -> tuple[dict[str, int], str]:
    """The label of each image by its path, and how they are numbered, with the checkpoint at `path`."""
    reader = read_folder(folder)
    numbered = class_order(read_header(path), class_map).number(reader.folders)
    files = ImageFiles(reader, numbered, None, "RGB")
    return {files.name(i): files.label(i) for i in range(len(files))}, numbered.note


def test_class_order_is_that_of_torchvision_also_with_an_empty_class(folder: Path, save: Save) -> None:
    (folder / "b" / "deeper").mkdir()
    (folder / "b" / "deeper" / "0.png").touch()
    found, note = labels(folder, save("a.pth", {"state_dict": {"w": torch.zeros(1)}}))
    assert found == dict(ImageFolder(str(folder), allow_empty=True).samples)
    assert note.startswith("9 class folders, numbered in the order of their text, as torchvision does (timm numbers ")


def test_class_order_of_a_timm_run_is_that_of_timm(folder: Path, save: Save) -> None:
    (folder / "2" / "0.png").touch()
    (folder / "b" / "deeper" / "er").mkdir(parents=True)  # the innermost folder is the class
    (folder / "b" / "deeper" / "er" / "0.png").touch()
    path = save("a.pth", TIMM | {"state_dict": {"w": torch.zeros(1)}})
    with pytest.raises(DataError, match="'B' and 'b' are the same name to timm, which numbers them by chance"):
        labels(folder, path)
    shutil.rmtree(folder / "B")
    shutil.rmtree(folder / "n01")  # as n1
    found, note = labels(folder, path)
    assert found == dict(create_dataset("", root=str(folder)).reader.samples)
    assert "numbered in natural order, as timm does (torchvision numbers " in note
    args = argparse.Namespace(model="resnet18", dataset="torch/image_folder")
    path = save("b.pth", TIMM | {"args": args, "state_dict": {"w": torch.zeros(1)}})
    assert labels(folder, path)[0] == dict(ImageFolder(str(folder), allow_empty=True).samples)


def test_class_order_is_silent_where_both_are_the_same(tmp_path: Path, save: Save) -> None:
    for name in "abc":
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.png").touch()
    _, note = labels(tmp_path / "photos", save("a.pth", {"w": torch.zeros(1)}))
    assert note == "3 class folders, numbered in the order of their text, as torchvision does"


def test_class_order_is_that_of_the_checkpoint_if_it_lists_the_folders(folder: Path, save: Save) -> None:
    listed = {name: 2 * i for i, name in enumerate(reversed(NAMES))} | {"unused": 1}
    want = {str(path): listed[path.parent.name] for path in folder.glob("*/*.png")}
    for place, stored in {
        "class_to_idx": {"class_to_idx": listed},
        "args.class_to_idx": {"args": argparse.Namespace(class_to_idx=listed)},
        "hyper_parameters.idx_to_class": {"hyper_parameters": {"idx_to_class": {i: n for n, i in listed.items()}}},
    }.items():
        found, note = labels(folder, save("a.pth", {"state_dict": {"w": torch.zeros(1)}, **stored}))
        assert found == want
        assert note == f"9 class folders, numbered by '{place}' of the checkpoint"
    found, note = labels(folder, save("a.pth", {"state_dict": {"w": torch.zeros(1)}, "classes": list(NAMES)}))
    assert found == {str(path): NAMES.index(path.parent.name) for path in folder.glob("*/*.png")}


def test_class_order_passes_over_names_that_are_none_of_the_folders(folder: Path, save: Save) -> None:
    path = save("a.pth", {"state_dict": {"w": torch.zeros(1)}, "classes": ["tench", "goldfish"]})
    found, note = labels(folder, path)
    assert found == dict(ImageFolder(str(folder), allow_empty=True).samples)
    assert note.endswith("'classes' of the checkpoint has other names than these folders, and is not used")
    path = save("a.pth", {"state_dict": {"w": torch.zeros(1)}, "classes": ["tench", "1", "10"]})
    with pytest.raises(DataError, match=r"'classes' of the checkpoint: '2' \(and 6 others\) of the folders is not"):
        labels(folder, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("map.txt", lambda index: "\n".join(sorted(index, key=index.__getitem__))),
        ("map.tsv", lambda index: "\n".join(f"{name}\t{i}" for name, i in index.items())),
        ("map.txt", lambda index: "\n".join(f"{name} {i}" for name, i in index.items()) + "\n\n"),
        ("map.json", json.dumps),
        ("map.json", lambda index: json.dumps(sorted(index, key=index.__getitem__))),
    ],
)
def test_class_map_says_the_numbers(folder: Path, save: Save, tmp_path: Path, name: str, write: Any) -> None:
    index = {name: i for i, name in enumerate(reversed(NAMES))}
    file = tmp_path / name
    file.write_text(write(index))
    found, note = labels(folder, save("a.pth", TIMM | {"state_dict": {"w": torch.zeros(1)}}), file)
    assert found == {str(path): index[path.parent.name] for path in folder.glob("*/*.png")}
    assert note == f"9 class folders, numbered by `class_map={str(file)!r}`"


def test_class_map_of_names_with_numbers_is_read_by_the_folders(tmp_path: Path, save: Save) -> None:
    """ "class 10" may be a folder of this name, or the folder "class" with the number 10."""
    for name in ("part 7", "piece 3"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.png").touch()
    (tmp_path / "map.txt").write_text("piece 3\npart 7\n")
    path = save("a.pth", {"w": torch.zeros(1)})
    found, _ = labels(tmp_path / "photos", path, tmp_path / "map.txt")
    assert sorted(found.values()) == [0, 1]
    assert found[str(tmp_path / "photos" / "piece 3" / "0.png")] == 0
    for name in ("part", "piece"):
        (tmp_path / "others" / name).mkdir(parents=True)
        (tmp_path / "others" / name / "0.png").touch()
    found, _ = labels(tmp_path / "others", path, tmp_path / "map.txt")
    assert {Path(name).parent.name: label for name, label in found.items()} == {"part": 7, "piece": 3}


def test_class_map_of_the_run_is_asked_for(folder: Path, save: Save) -> None:
    args = argparse.Namespace(model="resnet18", class_map="imagenet22k.txt")
    path = save("a.pth", TIMM | {"args": args, "state_dict": {"w": torch.zeros(1)}})
    with pytest.raises(DataError, match=r"its run numbered the classes by 'imagenet22k\.txt'\. Give that file"):
        labels(folder, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "should have a folder name on each line"),
        ("a\na\n", "none twice"),
        ('{"a": "b"}', "should be an object of folder names to numbers"),
        ('{"a": -1}', "should be an object of folder names to numbers"),
        ("[1, 2]", "should be an object of folder names to numbers"),
        ('{"a"', "is no JSON"),
        ("x\ny\n", r"'1' \(and 8 others\) of the folders is not in it\. Name each class"),
    ],
)
def test_class_map_that_does_not_say_the_classes_is_refused(
    folder: Path, save: Save, tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "map").write_text(text)
    with pytest.raises(DataError, match=r"`class_map='.*map'`: .*" + message):
        labels(folder, save("a.pth", {"w": torch.zeros(1)}), tmp_path / "map")


def test_class_map_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("\ufeffa\nb\n")
    assert read_class_map(tmp_path / "map.txt") == ({"a": 0, "b": 1},)
