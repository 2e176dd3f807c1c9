"""Folders: the image files in a folder or a tar, and the class folder of each."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from torch.utils.data import Dataset

from ..errors import DataError
from ..storage.local import scanned
from .classes import Folders, Numbered, natural_key

_USUAL = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".tga", ".qoi",
)  # fmt: skip
"""Suffixes of images. Others that pillow knows are documents, or, like .eps, are read by running another program."""


def image_suffixes() -> Mapping[str, str]:
    """Return the suffixes of images that this pillow reads, each with the format that it stands for."""
    from PIL import Image

    known = Image.registered_extensions()
    return {suffix: known[suffix] for suffix in _USUAL if known.get(suffix) in Image.OPEN}


_TRAINED, _HELD_OUT = ("train", "training"), ("val", "valid", "validation", "test", "testing", "eval")
"""What folders of images for the training, and of others, are called, in lower case."""


def _formats() -> list[str]:
    return sorted({*image_suffixes().values()})


class Reader(Protocol):
    """Image files with the folders that they lie in.

    Attributes:
        folders: those that may name a class.
        notes: what was left out, in words.
    """

    @property
    def folders(self) -> Folders: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def open(self, index: int) -> BinaryIO:
        """Open a file."""

    def name(self, index: int) -> str:
        """Return the name of a file, for messages."""

    def classes(self, index: int) -> tuple[str | None, str | None]:
        """Return the outer and the inner folder of a file; None for a file at the root."""


@dataclass(frozen=True, slots=True)
class FolderReader:
    """The images below a folder, in natural order of their paths; see `Reader`."""

    root: str
    files: tuple[str, ...]
    folders: Folders
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> BinaryIO:
        return Path(self.root, self.files[index]).open("rb")

    def name(self, index: int) -> str:
        return str(Path(self.root, self.files[index]))

    def classes(self, index: int) -> tuple[str | None, str | None]:
        return _classes(self.files[index])


def read_folder(path: Path) -> FolderReader:
    """List the images below a folder.

    Links are followed, except those that lead back into the folder: what they lead to is there already.

    Raises:
        DataError: there is no image.
    """
    suffixes = image_suffixes()
    root = os.path.realpath(path)
    files: list[str] = []
    folders: list[str] = []
    others: list[str] = []
    back: list[str] = []
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (root,))]  # folders with the real paths of those around them
    while waiting:
        inside, around = waiting.pop()
        with scanned(os.path.join(path, inside)) as entries:  # noqa: PTH118 - a million paths
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_dir():
                    real = os.path.realpath(entry.path) if entry.is_symlink() else f"{around[-1]}/{entry.name}"
                    within = entry.is_symlink() and os.path.commonpath((real, root)) == root
                    if within or real in around or root.startswith(f"{real}/"):
                        back.append(name)
                        continue
                    folders.append(name)
                    waiting.append((name, (*around, real)))
                elif os.path.splitext(entry.name)[1].lower() in suffixes:  # noqa: PTH122
                    files.append(name)
                elif not entry.name.startswith("."):
                    others.append(name)
    if not files:
        found = _others(others) if others else ""
        raise DataError(f"`data={str(path)!r}`: no images in it; known are {', '.join(suffixes)}. {found}")
    notes = [_others(others)] if others else []
    if back:
        left = _count(back, "link leads back into the folder and is", "links lead back into the folder and are")
        notes.append(f"{left} not followed, such as {min(back)}.")
    notes += _splits(path, files)
    return FolderReader(str(path), tuple(sorted(files, key=natural_key)), _folders(folders, files), tuple(notes))


def first_size(reader: Reader) -> tuple[int, int] | None:
    """Return (width, height) of the first image; None if it cannot be read, which is told where it is used."""
    from PIL import Image

    with suppress(Exception), reader.open(0) as file, Image.open(file, formats=_formats()) as image:
        return image.size
    return None


def _splits(path: Path, files: Iterable[str]) -> Iterator[str]:
    """Yield a warning if the folders below the root are no classes, but the splits of a dataset."""
    outer = sorted({file.partition("/")[0] for file in files if "/" in file})
    trained, held_out = ([name for name in outer if name.lower() in known] for known in (_TRAINED, _HELD_OUT))
    if trained and held_out:
        listed = " and ".join(f"{name}/" for name in (*trained, *held_out))
        one, other = path / trained[0], path / held_out[0]
        yield f"it holds {listed}, and all of their images are used. Did you mean {one} or {other}?"


@dataclass(frozen=True, slots=True)
class TarReader:
    """The images in a tar, or in the tars in it, as timm reads them; see `Reader`."""

    reader: Any
    folders: Folders
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.reader)

    def open(self, index: int) -> BinaryIO:
        file: BinaryIO = self.reader[index][0]
        return file

    def name(self, index: int) -> str:
        return str(self.reader.filename(index, absolute=True))

    def classes(self, index: int) -> tuple[str | None, str | None]:
        name = self.reader.class_idx_to_name[int(self.reader.targets[index])] or None
        return name, name


def read_tar(path: Path) -> TarReader:
    """List the images in a tar. Their innermost folder is their class, since a tar has no root.

    Raises:
        DataError: it has no images, or is no tar.
    """
    from timm.data.readers import create_reader

    suffixes = image_suffixes()
    try:
        with _read_by_timm(suffixes):
            # The cache that timm keeps beside large tars is a pickle, and a pickle can run code.
            reader: Any = create_reader("", root=str(path), cache_tarinfo=False)
        with tarfile.open(path) as tar:
            members = [(each.name, each.isdir()) for each in tar if each.isdir() or each.isfile()]
    except (tarfile.TarError, ValueError, OSError) as error:
        raise DataError(f"`data={str(path)!r}`: no tar of images ({str(error) or type(error).__name__}).") from error
    folders = [name.removeprefix("./") for name, is_dir in members if is_dir and name not in (".", "./")]
    files = [name.removeprefix("./") for name, is_dir in members if not is_dir]
    known = (*suffixes, ".tar")
    others = [name for name in files if PurePosixPath(name).suffix.lower() not in known]
    images = [name for name in files if PurePosixPath(name).suffix.lower() in suffixes]
    inner = tuple({*_folders(folders, images).inner, *filter(None, reader.class_name_to_idx)})
    return TarReader(reader, Folders(inner, inner), (_others(others),) if others else ())


@contextmanager
def _read_by_timm(suffixes: Collection[str]) -> Iterator[None]:
    """Let timm take files with these suffixes for images meanwhile."""
    from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions

    before = get_img_extensions()
    try:
        set_img_extensions(tuple(suffixes))
        yield
    finally:
        set_img_extensions(before)


@dataclass(frozen=True)
class ImageFiles(Dataset[Any]):
    """Transformed images with their labels; a broken one raises.

    Attributes:
        numbered: their classes; None for labels of -1.
        transform: from a PIL image to a tensor.
        mode: of PIL: RGB, or L for a network of one channel.
    """

    reader: Reader
    numbered: Numbered | None
    transform: Any
    mode: str

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with self.reader.open(index) as file, Image.open(file, formats=_formats()) as image:
            return self.transform(image.convert(self.mode)), self.label(index)

    def label(self, index: int) -> int:
        """Return the number of the class of an image; -1 if it has none."""
        if self.numbered is None:
            return -1
        outer, inner = self.reader.classes(index)
        name = inner if self.numbered.inner else outer
        return -1 if name is None else self.numbered.index[name]

    def name(self, index: int) -> str:
        return self.reader.name(index)


def _classes(path: str) -> tuple[str | None, str | None]:
    """Return the outer and the inner folder of a path from the root."""
    *folders, _ = path.split("/")
    return (folders[0], folders[-1]) if folders else (None, None)


def _folders(folders: Sequence[str], files: Iterable[str]) -> Folders:
    """Find the folders that may name a class, those without images among them."""
    around = {folder.rpartition("/")[0] for folder in folders}
    holding = {file.rpartition("/")[0] for file in files}
    inner = {name for folder in folders if folder in holding or folder not in around for name in [_last(folder)]}
    hidden = {_last(folder) for folder in folders if folder not in holding and _last(folder).startswith(".")}
    return Folders(tuple(name for name in folders if "/" not in name), tuple(inner - hidden))


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _others(names: Sequence[str]) -> str:
    return f"{_count(names, 'file is no image', 'files are no images')}, such as {min(names)}."


def _count(names: Sequence[str], one: str, many: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else many}"
