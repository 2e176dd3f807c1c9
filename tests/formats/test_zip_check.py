"""Zip check: any byte of an archive that changes is found, and archives of other programs are not blamed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from crafting import records_of, zip_of

from ckpt_tools import average, convert
from ckpt_tools.errors import CkptError
from ckpt_tools.formats import read_header
from ckpt_tools.formats.zip_check import archives, check


def fault_of(path: Path) -> str | None:
    """What the reader or the check of the archives finds."""
    try:
        found = [check(place) for place in archives(read_header(path))]
    except CkptError as error:
        return str(error)
    assert found
    return next((records.fault for records in found if records.fault is not None), None)


def saved(path: Path) -> Path:
    torch.save({"w": torch.arange(3.0)}, path)
    return path


@pytest.mark.parametrize("by", ["torch", "ckpt-tools"])
def test_every_changed_byte_is_found(by: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth")
    if by == "ckpt-tools":
        convert(path, out=tmp_path / "b.pth")
        path = tmp_path / "b.pth"
    data, damaged = path.read_bytes(), tmp_path / "damaged.pth"
    assert fault_of(path) is None
    missed = []
    for at in range(len(data)):
        damaged.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        if fault_of(damaged) is None:
            missed.append(at)
    assert missed == []


def test_an_archive_that_is_one_of_several_in_a_file_is_checked_to_its_end(tmp_path: Path) -> None:
    convert(saved(tmp_path / "a.pth"), to="dcp", out=tmp_path / "dcp")
    (payload,) = (tmp_path / "dcp").glob("*.distcp")
    data = payload.read_bytes()
    assert fault_of(tmp_path / "dcp") is None
    payload.write_bytes(data[:-1] + b"\1")
    assert fault_of(tmp_path / "dcp") is not None


def test_archives_with_other_headers_are_not_blamed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth")
    assert fault_of(zip_of(tmp_path / "python.pth", records_of(path))) is None
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "unix.pth", "w") as new:
        for number, name in enumerate(old.namelist()):
            info = zipfile.ZipInfo(name, (2020, 1, 2, 3, 4, 2 * number))
            info.external_attr = (0o600 + number) << 16
            new.writestr(info, old.read(name))
        new.comment = b"repacked"
    assert fault_of(tmp_path / "unix.pth") is None
    from ckpt_tools import fix_prefix

    fix_prefix(path, add=["module."], out=tmp_path / "renamed.pth")
    assert fault_of(tmp_path / "renamed.pth") is None
    average([path, tmp_path / "renamed.pth"], out=tmp_path / "averaged.pth")
    assert fault_of(tmp_path / "averaged.pth") is None


def test_contents_without_a_checksum_are_counted(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        without = sum(info.CRC == 0 for info in archive.infolist())
    (place,) = archives(read_header(path))
    records = check(place)
    assert records.fault is None
    assert records.without == without > 0
