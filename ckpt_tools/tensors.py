"""Tensors on disk: dtypes, shapes, and byte ranges in files.

Nothing here imports torch: names, shapes and offsets come from headers, so that a refused job
and `ckpt inspect` take milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .errors import CorruptError, unknown_word

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: object):
        return lambda decorator: decorator


_T = TypeVar("_T")


class Category(Enum):
    """How a dtype is averaged."""

    FLOAT = "float"
    COMPLEX = "complex"
    INTEGER = "integer"  # bool too: copied from the last checkpoint, never averaged
    PACKED = "packed"  # several values per byte, or codes: refused


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """A torch dtype; one object for each.

    Attributes:
        name: as in ``torch.<name>``.
        itemsize: bytes per element.
        category: how it is averaged.
        safetensors: code in a safetensors header; None if the format has none.
        storage: storage class in torch's pickles (``FloatStorage``); None for a dtype that torch saves as an untyped
            storage and a dtype.
    """

    name: str
    itemsize: int
    category: Category
    safetensors: str | None = None
    storage: str | None = None

    @property
    def averaged(self) -> bool:
        """True if values of this dtype are averaged (floating point and complex)."""
        return self.category in (Category.FLOAT, Category.COMPLEX)

    @property
    def word(self) -> int:
        """Bytes of the unit of byte swapping (a complex number is two words)."""
        return self.itemsize // 2 if self.category is Category.COMPLEX else self.itemsize

    def comparable(self, other: DType) -> bool:
        """True if values can be subtracted: both real, or both complex; packed dtypes only if they are the same."""
        if self is other:
            return True
        return Category.PACKED not in (self.category, other.category) and (self.category is Category.COMPLEX) == (
            other.category is Category.COMPLEX
        )


_F, _C, _I, _P = Category.FLOAT, Category.COMPLEX, Category.INTEGER, Category.PACKED

DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("float64", 8, _F, "F64", "DoubleStorage"),
        DType("float32", 4, _F, "F32", "FloatStorage"),
        DType("float16", 2, _F, "F16", "HalfStorage"),
        DType("bfloat16", 2, _F, "BF16", "BFloat16Storage"),
        DType("float8_e4m3fn", 1, _F, "F8_E4M3"),
        DType("float8_e5m2", 1, _F, "F8_E5M2"),
        DType("float8_e4m3fnuz", 1, _F, "F8_E4M3FNUZ"),
        DType("float8_e5m2fnuz", 1, _F, "F8_E5M2FNUZ"),
        # A power of two without sign or mantissa: the scale of a packed block, never a weight.
        DType("float8_e8m0fnu", 1, _P, "F8_E8M0"),
        DType("float4_e2m1fn_x2", 1, _P, "F4"),
        DType("complex128", 16, _C, None, "ComplexDoubleStorage"),
        DType("complex64", 8, _C, "C64", "ComplexFloatStorage"),
        DType("complex32", 4, _C),
        DType("int64", 8, _I, "I64", "LongStorage"),
        DType("int32", 4, _I, "I32", "IntStorage"),
        DType("int16", 2, _I, "I16", "ShortStorage"),
        DType("int8", 1, _I, "I8", "CharStorage"),
        DType("uint64", 8, _I, "U64"),
        DType("uint32", 4, _I, "U32"),
        DType("uint16", 2, _I, "U16"),
        DType("uint8", 1, _I, "U8", "ByteStorage"),
        DType("bool", 1, _I, "BOOL", "BoolStorage"),
        DType("qint8", 1, _P, None, "QInt8Storage"),
        DType("quint8", 1, _P, None, "QUInt8Storage"),
        DType("qint32", 4, _P, None, "QInt32Storage"),
        DType("quint4x2", 1, _P, None, "QUInt4x2Storage"),
        DType("quint2x4", 1, _P, None, "QUInt2x4Storage"),
    )
}
BY_SAFETENSORS = {d.safetensors: d for d in DTYPES.values() if d.safetensors}
BY_STORAGE = {d.storage: d for d in DTYPES.values() if d.storage}

FLOAT_DTYPES = tuple(d.name for d in DTYPES.values() if d.category is Category.FLOAT)
ALIASES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
"""Further names of dtypes to dtypes."""


def parse_dtype(dtype: object) -> DType | None:
    """Parse a floating-point dtype: a name or a torch.dtype; None or ``same`` mean no change.

    Raises:
        UsageError: unknown, or not floating-point.
    """
    if dtype is None or dtype == "same":
        return None
    text = str(dtype).removeprefix("torch.")
    name = ALIASES.get(text, text)
    if name not in FLOAT_DTYPES:
        raise unknown_word("dtype", text, (*FLOAT_DTYPES, "same"), also=ALIASES)
    return DTYPES[name]


def _refuse_state(self: object, state: object) -> None:
    raise TypeError("the pickle tries to change a tensor")


@dataclass_transform(frozen_default=True)
def _unchanging(cls: type[_T]) -> type[_T]:
    """Make a dataclass that is frozen for the type checker, and that a pickle cannot change.

    There are hundreds of thousands of instances, and a frozen one takes four times as long to create. A pickle could
    change an instance only by BUILD, which calls ``__setstate__``.
    """
    made = dataclass(slots=True, unsafe_hash=True)(cls)
    made.__setstate__ = _refuse_state  # type: ignore[attr-defined]
    return made


@_unchanging
class Storage:
    """A byte range of a file that one or more tensors share.

    Attributes:
        path: the file.
        offset: of the first byte in the file.
        nbytes: length in bytes.
        big_endian: True if the most significant byte of a word is first.
    """

    path: Path
    offset: int
    nbytes: int
    big_endian: bool = False


@_unchanging
class TensorSpec:
    """A tensor as its header describes it, without payload. Equal specs are the same bytes.

    Attributes:
        dtype: element type.
        shape: sizes.
        stride: in elements, one per dimension; elements may overlap or leave gaps.
        start: offset of the first element in the storage, in elements.
        storage: its bytes.
    """

    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    storage: Storage

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of elements times the item size; overlapping elements count each time."""
        return self.numel * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """True if the elements are in C order without gaps (as torch's is_contiguous)."""
        return is_dense(self.shape, self.stride)

    @property
    def as_chunks(self) -> tuple[Chunk, ...]:
        """Its chunks; the tensor itself unless it is chunked."""
        return (((0,) * len(self.shape), self),)

    @property
    def begin(self) -> int:
        """Offset of its first element in the file, in bytes; not for a chunked tensor."""
        return self.storage.offset + self.start * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Bytes from its first element to the end of its last one; not for a chunked tensor."""
        return max(_extent(self.shape, self.stride), 0) * self.dtype.itemsize

    @property
    def swapped(self) -> bool:
        """True if its bytes need swapping: big endian, and words of more than one byte."""
        return self.storage.big_endian and self.dtype.word > 1

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its files."""
        return (self.storage.path,)

    @property
    def computed(self) -> bool:
        """True if no file has its bytes."""
        return False

    @property
    def written(self) -> DType:
        """The dtype in which it is written if no other one is asked for."""
        return self.dtype

    @property
    def width(self) -> int:
        """Bytes read for each element."""
        return self.dtype.itemsize

    def relocated(self, path: Path, shift: int = 0) -> TensorSpec:
        """Return the tensor at the same offset plus `shift` bytes in another file; not for a chunked tensor."""
        at = self.storage
        storage = Storage(path, at.offset + shift, at.nbytes, at.big_endian)
        return TensorSpec(self.dtype, self.shape, self.stride, self.start, storage)

    def placed(self, place: Callable[[Path], tuple[Path, int]]) -> TensorSpec:
        """Return the tensor in other files.

        Args:
            place: from each of its files to the other one, and the bytes by which the payload starts later there.
        """
        return self.relocated(*place(self.storage.path))


@_unchanging
class ChunkedSpec(TensorSpec):
    """A tensor that is stored as several chunks; see `join`.

    Attributes:
        stride, start: of the whole tensor in C order.
        storage: empty; its path is that of the checkpoint, for messages.
        chunks: by index, without overlaps. What is in none of them is 0; `join` makes tensors without such gaps.
    """

    chunks: tuple[Chunk, ...]

    @property
    def contiguous(self) -> bool:
        """False: its bytes are in several ranges."""
        return False

    @property
    def as_chunks(self) -> tuple[Chunk, ...]:
        """Its chunks."""
        return self.chunks

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of the chunks."""
        return tuple(chunk.storage.path for _, chunk in self.chunks)

    def placed(self, place: Callable[[Path], tuple[Path, int]]) -> TensorSpec:
        chunks = tuple((offsets, chunk.placed(place)) for offsets, chunk in self.chunks)
        return ChunkedSpec(self.dtype, self.shape, self.stride, self.start, self.storage, chunks)


Chunk = tuple[tuple[int, ...], TensorSpec]
"""A box of a tensor: (index of its first element, its spec)."""


@_unchanging
class SummedSpec(TensorSpec):
    """A tensor that no file holds: a weighted sum of tensors of its shape; `Terms` takes it apart.

    Attributes:
        dtype: the one to which the sum is rounded.
        stride, start: of the sum in C order.
        storage: empty; its path is that of the first term, for messages.
        terms: (tensor, coefficient) each.
    """

    terms: tuple[tuple[TensorSpec, float], ...]

    @classmethod
    def of(cls, terms: Iterable[tuple[TensorSpec, float]]) -> SummedSpec:
        """Make it of tensors of one shape; the first one's dtype is that of the sum."""
        terms = tuple(terms)
        first = terms[0][0]
        return cls(first.dtype, first.shape, c_strides(first.shape), 0, Storage(first.storage.path, 0, 0), terms)

    @property
    def contiguous(self) -> bool:
        """False: its bytes are computed."""
        return False

    @property
    def computed(self) -> bool:
        """True."""
        return True

    @property
    def as_chunks(self) -> tuple[Chunk, ...]:
        """Those of the first term, which the sum takes the place of."""
        return self.terms[0][0].as_chunks

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of the terms."""
        return tuple(path for spec, _ in self.terms for path in spec.paths)

    def placed(self, place: Callable[[Path], tuple[Path, int]]) -> TensorSpec:
        return SummedSpec.of((spec.placed(place), coefficient) for spec, coefficient in self.terms)


@_unchanging
class ScaledSpec(TensorSpec):
    """A tensor that is stored as codes and scales: each element is the float32 product of its code and of the scale of
    its block.

    Attributes:
        dtype: float32.
        stride, start: of the products in C order.
        storage: empty; its path is that of the codes, for messages.
        codes: of an 8-bit floating-point dtype.
        scales: one for each block, on a grid with as many axes as the codes; or a single one.
        block: elements of a block along each axis; those at the end may be smaller.
    """

    codes: TensorSpec
    scales: TensorSpec
    block: tuple[int, ...]

    @classmethod
    def of(cls, codes: TensorSpec, scales: TensorSpec, block: tuple[int, ...]) -> ScaledSpec:
        """Make it of codes and scales whose shapes fit."""
        storage = Storage(codes.storage.path, 0, 0)
        return cls(DTYPES["float32"], codes.shape, c_strides(codes.shape), 0, storage, codes, scales, block)

    @property
    def contiguous(self) -> bool:
        """False: its bytes are computed."""
        return False

    @property
    def computed(self) -> bool:
        """True."""
        return True

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of codes and scales."""
        return (*self.codes.paths, *self.scales.paths)

    @property
    def written(self) -> DType:
        """bfloat16, the dtype of the models that are published as 8-bit codes."""
        return DTYPES["bfloat16"]

    @property
    def width(self) -> int:
        """Bytes read for each element; scales are few."""
        return self.codes.width

    def placed(self, place: Callable[[Path], tuple[Path, int]]) -> TensorSpec:
        return ScaledSpec.of(self.codes.placed(place), self.scales.placed(place), self.block)


@_unchanging
class UnsupportedTensor:
    """A tensor that cannot be averaged or copied; a job that needs it refuses it with this reason."""

    reason: str


@_unchanging
class RankPart(UnsupportedTensor):
    """What one process saved of a tensor that several processes share: not the tensor, which `join` makes of all parts.

    Attributes:
        dtype, shape: of the whole tensor.
        chunks: what this process has of it; there may be none.
        ranks: the number of processes.
    """

    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    ranks: int

    @property
    def complete(self) -> bool:
        """True if this process has all of it."""
        return sum(chunk.numel for _, chunk in self.chunks) == math.prod(self.shape)


Tensor = TensorSpec | UnsupportedTensor
"""A tensor in the object tree of a header."""


@lru_cache(maxsize=4096)
def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a C-ordered tensor of this shape."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return True if these strides place the elements in C order without gaps."""
    return (
        stride == c_strides(shape)
        or math.prod(shape) == 0
        or all(step == want for size, step, want in zip(shape, stride, c_strides(shape), strict=True) if size != 1)
    )


def in_c_order(spec: TensorSpec) -> bool:
    """Return True if a tensor is one chunk, or its chunks are its elements in C order one behind another."""
    if not isinstance(spec, ChunkedSpec):
        return True
    at = 0
    for index, chunk in spec.chunks:
        first = sum(i * step for i, step in zip(index, spec.stride, strict=True))
        if first != at or not chunk.contiguous or not is_dense(chunk.shape, spec.stride):
            return False
        at += chunk.numel
    return at == spec.numel  # what is in no chunk is 0


def make_spec(
    dtype: DType, shape: tuple[int, ...], storage: Storage, *, stride: tuple[int, ...] | None = None, start: int = 0
) -> TensorSpec:
    """Build a TensorSpec from untrusted numbers.

    Args:
        stride, start: in elements; by default C order from the first element.

    Raises:
        CorruptError: a negative or non-integer size, or elements outside the storage.
    """
    # By type, because 1.0 and True equal 1.
    extent = -1
    if {type(start), *map(type, shape), *map(type, stride or ())} == _INTEGERS and start >= 0:
        stride = c_strides(shape) if stride is None else stride
        extent = _extent(shape, stride)
    if extent < 0:
        raise CorruptError(f"{storage.path}: a tensor claims shape {shape}, stride {stride}, offset {start}.")
    if extent and (start + extent) * dtype.itemsize > storage.nbytes:
        raise CorruptError(
            f"{storage.path}: a tensor of shape {list(shape)} and dtype {dtype.name} reaches beyond its "
            f"storage of {storage.nbytes} bytes. The file is damaged; get a fresh copy."
        )
    return TensorSpec(dtype, shape, stride or (), start, storage)


_INTEGERS = {int}


@lru_cache(maxsize=4096)
def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the number of storage elements that a tensor spans; -1 for invalid sizes or strides."""
    numbers = (*shape, *stride)
    # From 2**61 - 1 on, different integers have one hash.
    if len(shape) != len(stride) or min(numbers, default=0) < 0 or max(numbers, default=0) >= 1 << 60:
        return -1
    if 0 in shape:  # torch and safetensors multiply the sizes from the first on, and refuse too large products
        return 0 if math.prod(shape[: shape.index(0)]) < 1 << 60 else -1
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def join(path: Path, name: str, dtype: DType, shape: tuple[int, ...], chunks: Sequence[Chunk]) -> TensorSpec:
    """Build the spec of a tensor that is stored as chunks, from untrusted numbers.

    Args:
        path: the checkpoint, for messages.
        name: of the tensor, for messages.
        chunks: at least one, all of this dtype; empty ones are ignored.

    Returns:
        The chunk itself if it is the whole tensor.

    Raises:
        CorruptError: the chunks do not fill the tensor exactly, or differ in byte order.
    """
    faulty = f"{path}: '{name}' of shape {list(shape)} is not the sum of its {len(chunks)} chunks: "
    filled = sorted((each for each in chunks if each[1].numel), key=lambda each: each[0])
    for offsets, chunk in chunks:
        if len(offsets) != len(shape) or any(type(n) is not int or n < 0 for n in offsets):
            raise CorruptError(f"{faulty}one has the offset {list(offsets)}. The checkpoint is damaged.")
        if any(n + size > whole for n, size, whole in zip(offsets, chunk.shape, shape, strict=True)):
            raise CorruptError(
                f"{faulty}one of shape {list(chunk.shape)} at {list(offsets)} reaches beyond it. "
                "The checkpoint is damaged."
            )
    missing = math.prod(shape) - sum(chunk.numel for _, chunk in filled)
    try:
        overlapping = _first_overlap(filled)
    except TimeoutError as error:
        raise CorruptError(
            f"{faulty}they lie so irregularly that it would take too long to tell whether they overlap. "
            "The checkpoint is damaged."
        ) from error
    if overlapping is not None:
        raise CorruptError(
            f"{faulty}those at {list(overlapping[0])} and {list(overlapping[1])} overlap. The checkpoint is damaged."
        )
    if missing:
        raise CorruptError(
            f"{faulty}{missing} elements are in no chunk. Was the save interrupted? Get a complete copy."
        )
    if not filled:
        return make_spec(dtype, shape, chunks[0][1].storage)
    if len(filled) == 1:
        return filled[0][1]
    orders = {chunk.storage.big_endian for _, chunk in filled}
    if len(orders) > 1:
        raise CorruptError(f"{faulty}they differ in byte order. The checkpoint is damaged.")
    storage = Storage(path, 0, 0, orders.pop())
    return ChunkedSpec(dtype, shape, c_strides(shape), 0, storage, tuple(filled))


def _first_overlap(chunks: Sequence[Chunk]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Find two overlapping chunks.

    The chunks are cut apart between two of them along an axis, and each part again, until it is one chunk. A grid, of
    chunks that were cut again and again, needs a cut an axis, or one a time: O(n log n). Only in what cannot be cut so,
    all pairs that overlap along an axis are compared.

    Raises:
        TimeoutError: that would take too long, as it does for no grid.
    """
    if len(chunks) < 2:
        return None
    axes = range(len(chunks[0][0]))
    left = _MOST_STEPS * len(chunks)
    parts = [list(chunks)]
    while parts:
        part = parts.pop()
        for axis in axes:
            left -= len(part)
            cut = _cut(part, axis)
            if len(cut) > 1:
                parts += [each for each in cut if len(each) > 1]
                break
        else:
            axis = max(axes, key=lambda i: len({offsets[i] for offsets, _ in part}), default=-1)
            if axis < 0:
                return part[0][0], part[1][0]
            active: list[Chunk] = []
            for offsets, chunk in sorted(part, key=lambda each: each[0][axis]):
                active = [each for each in active if each[0][axis] + each[1].shape[axis] > offsets[axis]]
                for others, other in active:
                    if all(
                        a < b + other_size and b < a + size
                        for a, size, b, other_size in zip(offsets, chunk.shape, others, other.shape, strict=True)
                    ):
                        return others, offsets
                active.append((offsets, chunk))
                left -= len(active)
                if left < 0:
                    raise TimeoutError
        if left < 0:
            raise TimeoutError
    return None


_MOST_STEPS = 100
"""Steps for a chunk; a grid takes three times its number of axes, as often as chunks were cut again."""


def _cut(chunks: list[Chunk], axis: int) -> list[list[Chunk]]:
    """Cut chunks wherever all end along an axis before the others begin."""
    parts: list[list[Chunk]] = []
    end = -1
    for each in sorted(chunks, key=lambda each: each[0][axis]):
        offset = each[0][axis]
        if offset >= end:
            parts.append([])
        parts[-1].append(each)
        end = max(end, offset + each[1].shape[axis])
    return parts
