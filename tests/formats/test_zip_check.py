"""Zip check: any byte of an archive that changes is found, and archives of other programs are not blamed."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
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


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("options", [{}, {"thread_count": 2}, {"single_file_per_rank": False}])
def test_bytes_between_the_entries_of_a_folder_and_after_them_are_found(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """torch writes nothing there; the index of torch tells where the second entry begins after some are put before."""
    folder = tmp_path / "folder"
    content = {"w": torch.arange(3.0), "n": torch.ones(2), "step": 7}
    dcp.save(content, storage_writer=dcp.FileSystemWriter(folder, **options))
    assert fault_of(folder) is None
    path = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(data + b"more")
    assert fault_of(folder) == f"{path}: what is after byte {len(data)} belongs to no entry"
    index = dcp.FileSystemReader(folder).read_metadata()
    places = [each for each in index.storage_data.values() if each.relative_path == path.name]
    for gap, refused in ((b"\0" * 63, False), (b"\0" * 62 + b"\1", True), (b"\0" * 64, True)):
        path.write_bytes(gap + data)
        for place in places:
            place.offset += len(gap)
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        at = min(place.offset for place in places)
        wanted = f"{path}: what is before its entry at byte {at} belongs to no entry" if refused else None
        assert fault_of(folder) == wanted
        for place in places:
            place.offset -= len(gap)


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


def test_the_fields_of_a_file_beyond_4_gigabytes_are_known(tmp_path: Path) -> None:
    """As torch writes them for a large tensor: its size, and 0, in the local header; 64 bits in the data descriptor."""
    archive = directory = b""
    records = records_of(saved(tmp_path / "a.pth"))
    for path, data in records.items():
        name, crc, at = path.encode(), zlib.crc32(data), len(archive)
        extra = struct.pack("<2H2Q", 1, 16, len(data), 0)
        common = (0x808, 0, 0, 0)
        archive += struct.pack("<4s5H3L2H", b"PK\3\4", 0, *common, 0, 0, 0, len(name), len(extra)) + name + extra + data
        archive += struct.pack("<4sL2Q", b"PK\7\10", crc, len(data), len(data))
        wide, extra = 0xFFFFFFFF, struct.pack("<2H2Q", 1, 16, len(data), len(data))
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 0, 0, *common, crc, wide, wide, len(name), len(extra), 0, 0, 0, 0, at
        )
        directory += name + extra
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0x31E, 45, 0, 0, *[len(records)] * 2, len(directory), len(archive))
    end += struct.pack("<4sLQL", b"PK\6\7", 0, len(archive) + len(directory), 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[len(records)] * 2, len(directory), wide, 0)
    path = tmp_path / "large.pth"
    path.write_bytes(archive + directory + end)
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
    assert fault_of(path) is None
    path.write_bytes(archive.replace(struct.pack("<2Q", 12, 0), struct.pack("<2Q", 12, 1)) + directory + end)
    assert "the padding" in (fault_of(path) or "")


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
