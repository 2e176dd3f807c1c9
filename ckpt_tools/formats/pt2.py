"""torch.export's archives: a zip with a program, which is not run, and the weights of its module. Read only.

Three layouts. Until torch 2.7 ``serialized_state_dict.pt`` is a file of `torch.save` inside the zip; in 2.8 that file
is ``<root>/data/weights/<model>.pt``; since 2.9 each storage is an entry ``<root>/data/weights/weight_<n>``, and
``<root>/data/weights/<model>_weights_config.json`` says which tensors are in it. Constants are no weights.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

from ..errors import CorruptError, NotACheckpointError, UnsupportedError
from ..storage.source import InputFile
from ..tensors import DTYPES, Storage, Tensor, UnsupportedTensor, make_spec
from .format import Format
from .header import Header
from .json_file import parse_json
from .torch_zip import TORCH_ZIP, is_big_endian, read_archive
from .zip import Archive

_OLDEST = ("serialized_state_dict.pt", "serialized_state_dict.json")
_PROGRAMS = "/archive_format"
_WEIGHTS = "data/weights/"
_CONFIG = "_weights_config.json"
# Numbers of torch._export.serde.schema.ScalarType.
_DTYPES = dict(
    enumerate(
        ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex32", "complex64",
         "complex128", "bool", "bfloat16"),
        start=1,
    )
) | dict(
    enumerate(
        ("uint16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "uint32",
         "uint64"),
        start=28,
    )
)  # fmt: skip
_STRIDED = 7  # of the same schema's Layout


class Pt2(Format):
    """What `torch.export.save` writes."""

    name = "pt2"
    suffixes = (".pt2",)
    nests = True
    export = True

    @property
    def written_as(self) -> Format:
        return TORCH_ZIP

    def sniff(self, path: Path, start: bytes) -> bool:
        return start.startswith(b"PK\3\4")

    def read(self, path: Path) -> Header:
        """Read the weights of the exported program; of several programs, a dict of theirs by name.

        Raises:
            NotACheckpointError: another zip.
            UnsupportedError: no program with weights is inside.
            CorruptError: truncated or damaged.
        """
        with InputFile(path) as file:
            archive = Archive(file, where=str(path))
            oldest = next((name for name in _OLDEST if name in archive.entries), None)
            if oldest is not None:
                tree, foreign = _file_inside(archive, oldest, path)
                return Header(path, self, tree, (file.stamp,), foreign)
            root = next((name.removesuffix(_PROGRAMS) for name in archive.entries if name.endswith(_PROGRAMS)), None)
            if root is None or "/" in root:
                raise NotACheckpointError(f"{path}: a zip file, but not one that torch.export wrote.")
            models, foreign = _models(archive, root, path)
        if not models:
            raise UnsupportedError(
                f"{path}: a .pt2 archive without the weights of an exported program, such as one of AOTInductor, which "
                "holds compiled code. Give the file that torch.export.save wrote."
            )
        tree = models.popitem()[1] if len(models) == 1 else models
        return Header(path, self, tree, (file.stamp,), foreign)


def _models(archive: Archive, root: str, path: Path) -> tuple[dict[str, Any], Counter[str]]:
    models: dict[str, Any] = {}
    foreign: Counter[str] = Counter()
    lead = f"{root}/{_WEIGHTS}"
    for name in archive.entries:
        model = name.removeprefix(lead)
        if model == name or "/" in model:
            continue
        if model.endswith(_CONFIG):
            models[model.removesuffix(_CONFIG)] = _tensors(archive, root, name, path)
        elif model.endswith(".pt"):
            models[model.removesuffix(".pt")], more = _file_inside(archive, name, path)
            foreign += more
    return models, foreign


def _file_inside(archive: Archive, name: str, path: Path) -> tuple[Any, Counter[str]]:
    """Read a file of `torch.save` that is an entry."""
    where = f"{path}: {name}"
    inner = Archive(archive.file, archive.offset_of(name), archive.entries[name].size, where=where)
    return read_archive(inner, path, where=where)[1:]


def _tensors(archive: Archive, root: str, name: str, path: Path) -> OrderedDict[str, Tensor]:
    damaged = f"{path}: {name} does not describe weights. The file is damaged."
    try:
        config = parse_json(archive.read(name))["config"]
        big_endian = is_big_endian(archive, root)
        return OrderedDict((key, _tensor(archive, root, meta, path, big_endian)) for key, meta in config.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(damaged) from error


def _tensor(archive: Archive, root: str, meta: Any, path: Path, big_endian: bool) -> Tensor:
    """Describe one tensor; anything but numbers in it raises one of the errors that `_tensors` catches."""
    if meta["use_pickle"]:
        return UnsupportedTensor("a tensor subclass")
    of = meta["tensor_meta"]
    dtype = DTYPES.get(_DTYPES.get(of["dtype"], ""))
    if dtype is None:
        return UnsupportedTensor("of an unknown dtype")
    if of["layout"] != _STRIDED:
        return UnsupportedTensor("sparse")
    shape, stride = (tuple(size["as_int"] for size in of[key]) for key in ("sizes", "strides"))
    record = f"{root}/{_WEIGHTS}{meta['path_name']}"
    nbytes = archive.entries[record].size
    if not nbytes and 0 not in shape:
        return UnsupportedTensor("without values, as a fake tensor is saved")
    storage = Storage(path, archive.offset_of(record), nbytes, big_endian)
    return make_spec(dtype, shape, storage, stride=stride, start=of["storage_offset"]["as_int"])


PT2 = Pt2()
