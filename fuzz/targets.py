"""Targets: what the bytes of an input become, and what is done with them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import seeds
from ckpt_tools.formats.header import Header
from oracles import safetensors_agrees, shards_agree, torch_agrees
from properties import Watch, look

Lay = Callable[[bytes, Path], Path]
"""From an input and a folder, which may have another input in it, to the path of the checkpoint."""
Oracle = Callable[[Header, Path, bytes], None]
Fuzz = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        seeds: sound inputs, by name.
        start: from a folder for files, and what watches over the process, to the function that takes an input.
    """

    seeds: seeds.Seeds
    start: Callable[[Path, Watch], Fuzz]


def _reader(inputs: seeds.Seeds, lay: Lay, oracle: Oracle | None = None) -> Target:
    def start(folder: Path, watch: Watch) -> Fuzz:
        kept = []
        for number, data in enumerate(inputs.values()):
            apart = folder / str(number)
            apart.mkdir()
            path = lay(data, apart)
            kept.append(look(path))
            if oracle is not None and kept[-1] is not None:
                oracle(kept[-1], path, data)

        # As long as the headers of seeds are kept, those that differ in a few bytes alone share their templates.
        def fuzz(data: bytes, kept: Sequence[Header | None] = tuple(kept)) -> None:
            path = lay(data, folder)
            with watch.watching(folder):
                header = look(path, None if watch.patient else zlib.crc32(data))
            if oracle is not None and header is not None:
                oracle(header, path, data)

        return fuzz

    return Target(inputs, start)


def _file(name: str, made: Callable[[bytes], bytes] = bytes) -> Lay:
    def lay(data: bytes, folder: Path) -> Path:
        path = folder / name
        path.write_bytes(made(data))
        return path

    return lay


def _folder(files: Mapping[str, bytes], made: Callable[[bytes], tuple[str, bytes]]) -> Lay:
    def lay(data: bytes, folder: Path) -> Path:
        path = folder / "folder"
        path.mkdir(exist_ok=True)
        name, changed = made(data)
        for each, content in {**files, name: changed}.items():
            if not (path / each).exists() or (path / each).read_bytes() != content:
                (path / each).write_bytes(content)
        return path

    return lay


def _as_torch(header: Header, path: Path, data: bytes) -> None:
    torch_agrees(header, path)


def _pickle() -> Target:
    stored = {f"archive/data/{key}": data for key, data in seeds.storages().items()}

    def in_archive(data: bytes) -> bytes:
        return seeds.archive(
            {"archive/data.pkl": data, "archive/byteorder": b"little", "archive/version": b"3", **stored}
        )

    return _reader(seeds.pickles(), _file("a.pth", in_archive), _as_torch)


def _safetensors() -> Target:
    def with_length(data: bytes) -> bytes:
        """An input has no length of the header, which would not fit a header that has changed."""
        return struct.pack("<Q", data.rfind(b"}") + 1) + data

    inputs = {name: data[8:] for name, data in seeds.safetensors().items()}
    lay = _file("a.safetensors", with_length)
    return _reader(inputs, lay, lambda header, path, _: safetensors_agrees(header, path))


def _index() -> Target:
    def oracle(header: Header, path: Path, data: bytes) -> None:
        shards_agree(header, data, seeds.SHARDS)

    name = "model.safetensors.index.json"
    return _reader(seeds.indexes(), _folder(seeds.shards(), lambda data: (name, data)), oracle)


def _dcp() -> Target:
    files, inputs = seeds.dcp()
    return _reader(inputs, _folder(files, lambda data: (".metadata", data)))


def _zero(stage: int) -> Target:
    files = seeds.zero(stage)

    def made(data: bytes) -> tuple[str, bytes]:
        """The first byte says which file has the rest as its pickle."""
        name = [*files][data[0] % len(files)] if data else next(iter(files))
        (pickled,) = (entry for entry in files[name] if entry.endswith("/data.pkl"))
        return name, seeds.archive({**files[name], pickled: data[1:]})

    inputs = {
        name: bytes([number]) + data
        for number, (name, records) in enumerate(files.items())
        for entry, data in records.items()
        if entry.endswith("/data.pkl")
    }
    return _reader(inputs, _folder({name: seeds.archive(records) for name, records in files.items()}, made))


def _native() -> Target:
    import native_calls

    return Target(native_calls.seeds(), native_calls.start)


TARGETS: Mapping[str, Callable[[], Target]] = {
    "torch_zip": lambda: _reader(seeds.torch_zips(), _file("a.pth"), _as_torch),
    "torch_legacy": lambda: _reader(seeds.torch_legacy(), _file("a.pth"), _as_torch),
    "pickle": _pickle,
    "safetensors": _safetensors,
    "index": _index,
    "dcp_metadata": _dcp,
    "zero_2": partial(_zero, 2),
    "zero_3": partial(_zero, 3),
    "torch_script": lambda: _reader(seeds.torch_scripts(), _file("a.pt")),
    "pt2": lambda: _reader(seeds.pt2(), _file("a.pt2")),
    "nemo": lambda: _reader(seeds.nemo(), _file("a.nemo")),
    "native": _native,
}
