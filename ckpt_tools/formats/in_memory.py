"""State dicts in memory, read as if each were a file: no large tensor of the CPU is copied.

Such a file has a first line, and behind it the storages of the tensors. Who reads it reads the memory of the tensors;
the C extension finds them in a table of blocks, of which each is in one storage.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..storage.source import STORES, InputFile, store_of
from ..tensors import DTYPES, Storage, Tensor, TensorSpec, UnsupportedTensor
from .format import Format
from .header import Header
from .torch_zip import TORCH_ZIP

if TYPE_CHECKING:
    import torch

_SCHEME = "memory"
_FIRST = b"a state dict in memory\n"
_ALIGNED = 64  # bytes
_BLOCK = 64 << 10
"""Bytes of a block; smaller storages share one, and are copied."""


class InMemory(Format):
    """A state dict in memory."""

    name = "state dict"
    nests = True

    @property
    def written_as(self) -> Format:
        return TORCH_ZIP

    def sniff(self, path: Path, start: bytes) -> bool:
        return isinstance(store_of(path), _StateDicts)

    def read(self, path: Path) -> Header:
        store: Any = store_of(path)
        with InputFile(path) as file:
            return Header(path, self, store.held[path].tree, (file.stamp,))


IN_MEMORY = InMemory()
_LOCK = threading.Lock()


@contextmanager
def as_files(state_dicts: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[list[Path]]:
    """Hold state dicts as files until the block ends; none of them is changed.

    Args:
        state_dicts: names to tensors, each.

    Yields:
        Their paths: state_dict_1 and so on.

    Raises:
        UsageError: one has something else than tensors, or tensors without values.
    """
    with _LOCK:
        store = STORES.setdefault(_SCHEME, _StateDicts())
        if not isinstance(store, _StateDicts):
            raise UsageError(f"the scheme '{_SCHEME}' belongs to a store of your own, and state dicts need it.")
        folder = store.new_folder()
    paths: list[Path] = []
    try:
        for number, each in enumerate(state_dicts, 1):
            path = folder / f"state_dict_{number}"
            store.held[path] = _Held(path, each)
            paths.append(path)
        yield paths
    finally:
        with _LOCK:
            for path in paths:
                del store.held[path]
            store.folders.remove(folder)
            if not store.folders:
                del STORES[_SCHEME]


class _Held:
    """A state dict as a file; see `storage.source.InMemory`.

    Attributes:
        tree: its names, with the specs of its tensors.
        address: of the table of its blocks, which C reads.
    """

    def __init__(self, path: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
        self._path = path
        self._begins, self._parts = [0], [memoryview(bytearray(_FIRST.ljust(_ALIGNED, b"\0")))]
        self._tensors: list[torch.Tensor] = []
        self._storages: dict[int, Storage] = {}
        self.tree: OrderedDict[str, Tensor] = OrderedDict()
        for name, tensor in state_dict.items():
            self.tree[name] = self._spec(name, tensor)
        self._table = array("q", [self._nbytes, _BLOCK, *chain.from_iterable(self._blocks())])
        self.address = self._table.buffer_info()[0]
        metadata = getattr(state_dict, "_metadata", None)
        if metadata is not None:
            self.tree._metadata = metadata  # type: ignore[attr-defined]

    def _spec(self, name: object, given: torch.Tensor) -> Tensor:
        import torch

        if not (isinstance(name, str) and isinstance(given, torch.Tensor)):
            raise UsageError(
                f"{self._path.name}: {name!r} is a {type(given).__name__}, and a state dict has tensors by name. Give "
                "the state dict itself, or the path of a checkpoint."
            )
        if given.device.type == "meta":
            raise UsageError(f"{self._path.name}: {name!r} is on the device 'meta', and has no values.")
        dtype = DTYPES.get(str(given.dtype).removeprefix("torch."))
        if type(given) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return UnsupportedTensor(f"a {type(given).__name__}")
        if given.layout is not torch.strided or given.is_quantized or dtype is None:
            return UnsupportedTensor(f"{'quantized' if given.is_quantized else given.layout} of dtype {given.dtype}")
        # A copy only where the values are elsewhere, or are not those in memory.
        tensor = given.detach().cpu().resolve_conj().resolve_neg()
        self._tensors.append(tensor)
        storage, start = self._storage(tensor.untyped_storage()), int(tensor.storage_offset())
        return TensorSpec(dtype, tuple(tensor.shape), tuple(tensor.stride()), start, storage)

    def _storage(self, storage: torch.UntypedStorage) -> Storage:
        """Return where the bytes of a storage are in the file; tensors that share one share it there, too."""
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if address not in self._storages or not nbytes:
            data = memoryview((ctypes.c_char * nbytes).from_address(address) if nbytes else b"").cast("B")
            if nbytes < _BLOCK:
                self._storages[address] = Storage(self._path, self._small(data), nbytes)
            else:
                offset = -(-self._nbytes // _BLOCK) * _BLOCK
                self._storages[address] = Storage(self._path, offset, nbytes)
                self._begins.append(offset)
                self._parts.append(data)
        return self._storages[address]

    def _small(self, data: memoryview) -> int:
        """Copy a small storage behind the others in a block; return its offset."""
        start, part = self._begins[-1], self._parts[-1]
        at = -(-len(part) // _ALIGNED) * _ALIGNED
        if isinstance(part.obj, bytearray) and at + len(data) <= _BLOCK:
            self._parts[-1] = memoryview(bytearray(part).ljust(at, b"\0") + data)
            return start + at
        offset = -(-self._nbytes // _BLOCK) * _BLOCK
        self._begins.append(offset)
        self._parts.append(memoryview(bytearray(data or b"\0")))  # a block of its own, even for nothing
        return offset

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield (begin, end, address) of each block of the file."""
        for start, part in zip(self._begins, self._parts, strict=True):
            address = ctypes.addressof(ctypes.c_char.from_buffer(part)) if part else 0
            for begin in range(0, max(len(part), 1), _BLOCK):
                yield start + begin, start + min(begin + _BLOCK, len(part)), address + begin

    @property
    def _nbytes(self) -> int:
        return self._begins[-1] + len(self._parts[-1])

    def stat(self) -> tuple[int, tuple[object, ...]]:
        """Return the size of all storages, and how often the tensors were changed in place."""
        return sum(map(len, self._parts)), tuple(0 if each.is_inference() else each._version for each in self._tensors)

    def read_into(self, offset: int, view: memoryview) -> int:
        end = min(offset + len(view), self._nbytes)
        at = offset
        while at < end:
            data = self._from(at, end)
            view[at - offset : at - offset + len(data)] = data
            at += len(data)
        return max(end - offset, 0)

    def _from(self, begin: int, end: int) -> memoryview | bytes:
        """Return the first bytes of a range: those of one storage, or zeros up to the next one."""
        place = bisect_right(self._begins, begin) - 1
        start, part = self._begins[place], self._parts[place]
        if begin < start + len(part):
            return part[begin - start : end - start]
        return bytes(min(end, self._begins[place + 1]) - begin)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        found = [bytearray(max(min(nbytes, self._nbytes - offset), 0)) for offset, nbytes in ranges]
        for (offset, _), data in zip(ranges, found, strict=True):
            self.read_into(offset, memoryview(data))
        return [bytes(data) for data in found]

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        pass


class _StateDicts:
    """The state dicts that are held; see `storage.source.Store`.

    Attributes:
        folders: one for each job; jobs in other threads have their own.
        held: path to state dict.
    """

    def __init__(self) -> None:
        self.folders: set[Path] = set()
        self.held: dict[Path, _Held] = {}

    def new_folder(self) -> Path:
        """Return a folder that no other job has."""
        here = Path(f"{_SCHEME}:")
        folder = next(each for each in chain([here], (here / str(n) for n in count(1))) if each not in self.folders)
        self.folders.add(folder)
        return folder

    def refresh(self) -> None:
        pass

    def open(self, path: Path) -> _Held:
        if path not in self.held:
            raise FileNotFoundError(2, "no such state dict", str(path))
        return self.held[path]

    def is_file(self, path: Path) -> bool:
        return path in self.held

    def is_folder(self, path: Path) -> bool:
        return any(path in each.parents for each in [*self.held])

    def names(self, folder: Path) -> list[str]:
        return sorted(each.name for each in [*self.held] if each.parent == folder)

    def real_path(self, path: Path) -> Path:
        return path

    def identity(self, path: Path) -> object:
        return path

    def find(self, pattern: Path) -> list[Path]:
        return []
