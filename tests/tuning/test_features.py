"""Features lie in files without names, in the order of the images, and never on a disk that is too small."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from ckpt_tools.errors import DataError, WriteError
from ckpt_tools.storage import staged
from ckpt_tools.tuning import features as module
from ckpt_tools.tuning.examples import Example
from ckpt_tools.tuning.features import Features, Row, check_space, mapped, stored

ROWS = (Row((3,), torch.float32), Row((2,), torch.bfloat16))


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(n, 3, generator=generator),
            torch.randint(9, (n,), generator=generator),
            torch.randn(n, 2, generator=generator).bfloat16(),
        )
        for n in (4, 4, 3)
    ]


def test_features_come_back_bit_for_bit_from_a_file_without_a_name(tmp_path: Path) -> None:
    given = examples()
    with mapped(tmp_path, 12, ROWS) as (inputs, teacher):
        assert not [*tmp_path.iterdir()]
        if sys.platform == "linux":
            maps = Path("/proc/self/maps").read_text()
            assert maps.count(f"{tmp_path}/.ckpt-features.") == 2
        found = stored(given, inputs, teacher)
        assert found.sizes == (4, 4, 3)
        assert found.inputs.shape == (12, 3)
        for got, want in zip(found.epoch(0, seed=5), given, strict=True):
            assert all(a is not None and b is not None and a.equal(b) for a, b in zip(got, want, strict=True))


def test_later_epochs_have_the_same_images_in_an_order_of_the_seed() -> None:
    inputs = torch.arange(11.0).reshape(11, 1)
    features = Features(inputs, torch.arange(11), None, (4, 4, 3))

    def order(number: int, seed: int) -> list[int]:
        batches = [*features.epoch(number, seed)]
        assert [len(labels) for _, labels, _ in batches] == [4, 4, 3]
        assert all(found[:, 0].equal(labels.float()) and teacher is None for found, labels, teacher in batches)
        return [label for _, labels, _ in batches for label in labels.tolist()]

    assert order(0, 3) == [*range(11)]
    assert sorted(order(1, 3)) == sorted(order(2, 3)) == [*range(11)]
    assert order(1, 3) != order(2, 3)
    assert order(1, 3) == order(1, 3)
    assert order(1, 3) != order(1, 77)


def test_a_file_in_place_of_a_folder_for_features_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"`scratch='.*file'`: is no folder that can be written"):
        check_space(file, 1)


def test_features_that_do_not_fit_the_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 80, 20))
    with pytest.raises(WriteError, match=r"`scratch='.*'`: the features take 21 bytes, and 20 are free.*`augment`"):
        check_space(tmp_path, 21)
    with pytest.raises(WriteError, match="the features take 192 bytes"), mapped(tmp_path, 12, ROWS):
        pass
    check_space(tmp_path, 20)


def test_a_disk_that_fills_up_meanwhile_is_an_error_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, nbytes: int, name: object) -> None:
        raise staged.write_failed(name, "No space left on device")

    monkeypatch.setattr(module, "reserve", full)
    with pytest.raises(WriteError, match=r"`scratch='.*'`: the disk is full"), mapped(tmp_path, 12, ROWS):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_scratch_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"`scratch='.*nowhere'`: No such file"):
        check_space(tmp_path / "nowhere", 1)


def test_more_images_than_were_counted_and_none_at_all_are_errors() -> None:
    with pytest.raises(DataError, match="more than the 10 images"):
        stored(examples(), torch.empty(10, 3), None)
    with pytest.raises(DataError, match="no image could be read"):
        stored([], torch.empty(10, 3), None)
