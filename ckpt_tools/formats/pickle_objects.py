"""The objects of a pickle: what each name in one becomes when it is read.

A few names stand for plain data, and are made here: dicts, sets, arrays of numbers, tensors, storages (`GLOBALS`). Any
other becomes a subclass of `Inert`, which stores its arguments and does nothing.

Every object that a pickle can reach is immutable, sealed (`Sealed`), or made for this file alone, because the BUILD
opcode can set attributes of any object, classes included.
"""

from __future__ import annotations

import argparse
import math
import pickle
import struct
from collections import OrderedDict
from contextvars import ContextVar
from typing import Any

from ..tensors import BY_STORAGE, DTYPES, DType, Storage, TensorSpec, UnsupportedTensor, make_spec
from .pickle_check import LARGEST_KEY, MOST_EQUAL_HASHES
from .rank_parts import part_of


class Sealed(type):
    """A class whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: object) -> None:
        # Python's own caches on classes (abc, copyreg) fail here, too; any other call is a pickle's BUILD.
        raise pickle.UnpicklingError(f"the pickle tries to change the class {cls.__name__}")


class Inert(metaclass=Sealed):
    """An object that was not constructed: the name of its class, its arguments and its state.

    Attributes:
        args: positional arguments of the constructor, then keyword arguments as a dict, if any.
        state: the argument of ``__setstate__``, from BUILD.
        items: the items appended, added or set.
    """

    __slots__ = ("args", "items", "state")
    global_name = ""

    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        inert = object.__new__(cls)
        inert.args = (*args, kwargs) if kwargs else args
        inert.state = None
        inert.items = []
        return inert

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept any arguments; `__new__` has stored them."""

    def __call__(self, *args: Any) -> Inert:
        return Inert(self, *args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    add = append

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"<{type(self).global_name or 'unknown object'}, not loaded>"


def inert_class(global_name: str, base: type = Inert) -> type:
    return Sealed("Inert", (base,), {"__slots__": (), "global_name": global_name})


class InertGetattr(Inert):
    """builtins.getattr(class, name), by which protocol 2 writes a class inside a class: such a class, inert too.

    Nothing is looked up. A name is cut, because a few bytes of a pickle can double it.
    """

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        match args:
            case (Sealed() as outer, str(name)) if issubclass(outer, Inert):
                return inert_class(f"{outer.global_name}.{name}"[:_LONGEST_NAME])
        return super().__new__(cls, *args, **kwargs)


_LONGEST_NAME = 1000


_MOST_COPIED = 1_000_000
_COPIED: ContextVar[int] = ContextVar("items that may still be copied from containers while a pickle is read")


_HASHES: ContextVar[dict[int, set[Any]]] = ContextVar("values that may be keys, by their hashes, of a pickle")


def distinct(value: Any) -> Any:
    """Return a value that may be a key; n values of one hash take n^2 comparisons.

    Raises:
        pickle.UnpicklingError: there are too many of its hash.
    """
    known = _HASHES.get().setdefault(hash(value), set())
    known.add(value)
    if len(known) > MOST_EQUAL_HASHES:
        raise pickle.UnpicklingError("too many values with one hash")
    return value


def _keys(source: Any) -> Any:
    """Return a container that is about to be copied, and whose items are hashed then.

    Raises:
        pickle.UnpicklingError: see `_copied` and `distinct`.
    """
    for item in _copied(source):
        if type(item) in _COMPOUND:
            distinct(item)
    return source


_COMPOUND = (tuple, frozenset)


def _copied(source: Any) -> Any:
    """Return a container that is about to be copied.

    A pickle can copy a container again and again by a few bytes each time. An honest one copies each item once.

    Raises:
        pickle.UnpicklingError: too many are copied, or an item takes long to hash.
    """
    if not isinstance(source, (list, tuple, set, frozenset, dict)):
        raise pickle.UnpicklingError("a container made of what is none")
    left = _COPIED.get() - 1 - len(source)
    for item in source if tuple in set(map(type, source)) else ():
        left -= _size(item)
    if left < 0:
        raise pickle.UnpicklingError("containers that are copied too often")
    _COPIED.set(left)
    return source


def _size(key: Any) -> int:
    """Return the number of values that are visited when a key is hashed."""
    count, waiting = 0, [key]
    while waiting:
        node = waiting.pop()
        count += 1
        if count > LARGEST_KEY:
            raise pickle.UnpicklingError("a key that is too large")
        if isinstance(node, tuple):
            if len(node) > LARGEST_KEY:
                raise pickle.UnpicklingError("a key that is too large")
            waiting += node
    return count


class _Set(metaclass=Sealed):
    def __new__(cls, source: Any = (), /) -> Any:
        return set(_keys(source))


class _FrozenSet(metaclass=Sealed):
    def __new__(cls, source: Any = (), /) -> Any:
        return distinct(frozenset(_keys(source)))


class _Complex(metaclass=Sealed):
    """builtins.complex(real, imaginary), each of which is a number."""

    def __new__(cls, real: Any = 0.0, imaginary: Any = 0.0) -> Any:
        if not (isinstance(real, (int, float)) and isinstance(imaginary, (int, float))):
            raise pickle.UnpicklingError("a complex number made of what is no number")
        return distinct(complex(real, imaginary))


class Namespace(argparse.Namespace, metaclass=Sealed):
    """argparse.Namespace, sealed; timm and Megatron store their arguments in it."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a namespace without names")
        vars(self).update(_keys(state))


def _pair(pair: Any) -> tuple[Any, Any]:
    key, value = _copied(pair)
    return distinct(key) if type(key) in _COMPOUND else key, value


class SealedDict(OrderedDict[Any, Any], metaclass=Sealed):
    """collections.OrderedDict with torch's `_metadata`; any other attribute is dropped, as it could hide a method."""

    def __init__(self, *source: Any) -> None:
        if source:
            (pairs,) = source
            super().__init__(pairs if isinstance(pairs, dict) and _keys(pairs) else map(_pair, _copied(pairs)))

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and "_metadata" in state:
            self._metadata = state["_metadata"]


class PlainDict(dict[Any, Any], metaclass=Sealed):
    """collections.Counter or defaultdict as a dict; a default factory is dropped."""

    __slots__ = ()

    def __init__(self, source: Any = None, /) -> None:
        super().__init__(_keys(source) if isinstance(source, dict) else ())


_ENCODINGS = {
    **dict.fromkeys(("latin1", "latin-1", "latin_1", "iso-8859-1", "iso8859-1"), "latin-1"),
    **dict.fromkeys(("utf-8", "utf8", "utf_8"), "utf-8"),
    "ascii": "ascii",
}
"""Encodings by the names that pickles have for them. Any other name is not looked up: that imports a module of it."""


class _Bytes(metaclass=Sealed):
    """Bytes as protocol 2 writes them: ``_codecs.encode(text, 'latin1')``, ``bytearray(text, 'latin-1')``."""

    def __new__(cls, source: Any = b"", encoding: Any = "latin1") -> Any:
        if isinstance(source, str):
            if not isinstance(encoding, str) or encoding.lower() not in _ENCODINGS:
                raise pickle.UnpicklingError("bytes made from text by an encoding that is not latin-1")
            return source.encode(_ENCODINGS[encoding.lower()])
        if isinstance(source, bytes):
            return source
        raise pickle.UnpicklingError("bytes made from a value that is not text")


class _ByteArray(metaclass=Sealed):
    def __new__(cls, source: Any = b"", encoding: str = "latin1") -> Any:
        return bytearray(_Bytes(source, encoding))


class _NumpyDtype(metaclass=Sealed):
    """numpy.dtype of a scalar: a code such as 'f8', and a byte order."""

    __slots__ = ("code", "order")
    code: str
    order: str

    def __new__(cls, code: Any = "", *_: Any) -> _NumpyDtype:
        dtype = object.__new__(cls)
        dtype.code, dtype.order = code if isinstance(code, str) else "", "<"
        return dtype

    def __init__(self, *_: Any) -> None:
        """`__new__` has stored the code."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


_NUMPY_CODES = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
    "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?",
}  # fmt: skip


class _NumpyScalar(metaclass=Sealed):
    """numpy.core.multiarray.scalar(dtype, raw bytes), as a Python number."""

    def __new__(cls, dtype: Any, raw: Any = b"") -> Any:
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        code = _NUMPY_CODES.get(getattr(dtype, "code", ""))
        if code is None or not isinstance(raw, bytes) or struct.calcsize(code) != len(raw):
            return Inert(dtype, raw)
        return struct.unpack(dtype.order + code, raw)[0]


# By these NumPy 1 and 2 pickle an array; the last two since protocol 5.
_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_FROM_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
NUMPY_ARRAYS = (*_RECONSTRUCT, *_FROM_BUFFER)
_LARGEST_ARRAY = 1 << 20  # bytes; a configuration has small ones


def numbers_of(inert: Inert) -> Any:
    """Return a small NumPy array of numbers as nested lists, one without dimensions as a number; None for others."""
    match inert:
        case Inert(state=(_, tuple() as shape, _NumpyDtype() as dtype, bool(fortran), raw)):
            names = _RECONSTRUCT
        case Inert(args=(raw, _NumpyDtype() as dtype, tuple() as shape, str(order))):
            names, fortran = _FROM_BUFFER, order == "F"
        case _:
            return None
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if type(inert).global_name not in names or not isinstance(raw, (bytes, bytearray)) or len(raw) > _LARGEST_ARRAY:
        return None
    if not (len(shape) <= 64 and all(type(size) is int and 0 <= size <= _LARGEST_ARRAY for size in shape)):
        return None
    count = math.prod(shape)
    parts = 2 if dtype.code in ("c8", "c16") else 1
    code = {"c8": "f", "c16": "d"}.get(dtype.code) or _NUMPY_CODES.get(dtype.code)
    if code is None or parts * count * struct.calcsize(code) != len(raw):
        return None
    values = struct.unpack(f"{dtype.order}{parts * count}{code}", raw)
    if parts == 2:
        values = tuple(map(complex, values[::2], values[1::2]))
    steps = [math.prod(shape[:axis] if fortran else shape[axis + 1 :]) for axis in range(len(shape))]

    def nested(axis: int, at: int) -> Any:
        if axis == len(shape):
            return values[at]
        return [nested(axis + 1, at + i * steps[axis]) for i in range(shape[axis])]

    return nested(0, 0) if values else []


class Size(metaclass=Sealed):
    """torch.Size of a tuple or list of integers."""

    def __new__(cls, sizes: Any = ()) -> Any:
        import torch

        if _ints(sizes) == (-1,):
            raise pickle.UnpicklingError("a torch.Size of what are no sizes")
        return distinct(torch.Size(sizes))


class StorageType(metaclass=Sealed):
    """The storage class in a persistent id, with the dtype of its elements; None if untyped."""

    dtype: DType | None = None


def _storage_type(dtype: DType | None) -> type:
    return Sealed("StorageType", (StorageType,), {"dtype": dtype})


class TypedStorage:
    __slots__ = ("dtype", "storage")

    def __init__(self, storage: Storage, dtype: DType | None) -> None:
        self.storage = storage
        self.dtype = dtype

    def __setstate__(self, state: object) -> None:  # which BUILD calls, instead of setting attributes
        raise pickle.UnpicklingError("the pickle tries to change a storage")


def _ints(values: Any) -> tuple[int, ...]:
    """Return a size or stride as a tuple; an invalid value becomes one that `make_spec` refuses.

    The value itself goes into no message: a few bytes of a pickle can make a number of gigabytes of digits.
    """
    if isinstance(values, (tuple, list)) and len(values) <= _MOST_AXES and _INTEGERS.issuperset(map(type, values)):
        return tuple(values)
    return (-1,)


_INTEGERS = frozenset({int})
_MOST_AXES = 64  # torch's own limit


_LARGEST_RATIO = 1024
_MOST_EXPANDED = 1 << 30
_EXPANDED: ContextVar[int] = ContextVar("bytes to which small storages may still be expanded while a pickle is read")
_VIEWED: ContextVar[dict[Storage, int]] = ContextVar("bytes of the views of each storage in a pickle")


class _Tensor(metaclass=Sealed):
    """torch._utils._rebuild_tensor(storage, offset, size, stride), _v2 (with metadata) and _v3 (with a dtype)."""

    def __new__(cls, storage: Any, start: Any, size: Any, stride: Any, *rest: Any) -> Any:
        if not isinstance(storage, TypedStorage):
            raise pickle.UnpicklingError("a tensor without a storage")
        dtype = storage.dtype
        metadata = None
        if len(rest) > 2:
            metadata = rest[2]
            if _dtype_of(metadata) is not None:  # _v3: requires_grad, hooks, dtype, metadata
                dtype = _dtype_of(metadata)
                metadata = rest[3] if len(rest) > 3 else None
        if dtype is None:
            return UnsupportedTensor("of an unknown dtype")
        if isinstance(metadata, dict):
            for view in ("conj", "neg"):
                if metadata.get(view):
                    return UnsupportedTensor(f"a lazy {view} view")
        first = start if type(start) is int else -1
        spec = make_spec(dtype, _ints(size), storage.storage, stride=_ints(stride), start=first)
        return spec if spec.nbytes == spec.storage.nbytes else _bounded(spec)


def _bounded(view: TensorSpec) -> TensorSpec | UnsupportedTensor:
    """Return a view of a storage, unless the views of small storages take too many bytes when they are written out."""
    viewed, whole = _VIEWED.get(), view.storage.nbytes
    total = viewed[view.storage] = viewed.get(view.storage, 0) + view.nbytes
    if total > _LARGEST_RATIO * whole:
        left = _EXPANDED.get() - view.nbytes
        if left < 0:
            return UnsupportedTensor(f"expanded from {whole} bytes to {total}; save it as it is needed, not expanded")
        _EXPANDED.set(left)
    return view


class _Parameter(metaclass=Sealed):
    """torch._utils._rebuild_parameter(data, requires_grad, hooks[, state]): the data."""

    def __new__(cls, data: Any, *_: Any) -> Any:
        if not isinstance(data, (TensorSpec, UnsupportedTensor, Inert)):  # a tuple would evade `pickle_check`
            raise pickle.UnpicklingError("a parameter made of what is no tensor")
        return data


class _FromType(metaclass=Sealed):
    """torch._tensor._rebuild_from_type_v2(function, type, arguments, state): the result of a known function."""

    def __new__(cls, function: Any, type_: Any, args: Any, state: Any = None) -> Any:
        if function in (_Tensor, _Parameter) or function in _UNSUPPORTED_TYPES:
            return function(*args)
        if function is _Wrapper:
            return part_of(type_, _dtype_of(args[1]), _ints(args[2]), state)
        return UnsupportedTensor(f"a tensor subclass ({getattr(type_, 'global_name', '') or 'unknown'})")


class _Wrapper(metaclass=Sealed):
    """torch._utils._rebuild_wrapper_subclass, which makes a tensor without values for `_FromType` to fill."""

    def __new__(cls, *_: Any) -> Any:
        return UnsupportedTensor("a tensor subclass without values")


class _Unsupported(metaclass=Sealed):
    reason = ""

    def __new__(cls, *_: Any) -> Any:
        return UnsupportedTensor(cls.reason)


_UNSUPPORTED = {
    f"torch._utils.{name}": Sealed("Unsupported", (_Unsupported,), {"reason": reason})
    for name, reason in {
        "_rebuild_sparse_tensor": "sparse",
        "_rebuild_sparse_csr_tensor": "sparse",
        "_rebuild_qtensor": "quantized",
        "_rebuild_nested_tensor": "nested",
        "_rebuild_meta_tensor_no_storage": "on the meta device, without data",
        "_rebuild_device_tensor_from_numpy": "an array of another device",
        "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    }.items()
}
_UNSUPPORTED_TYPES = frozenset(_UNSUPPORTED.values())


class DtypeName:
    """A torch.dtype while a pickle is read without torch, for the tensors of it; see `load`."""

    __slots__ = ("dtype",)
    __hash__ = None  # type: ignore[assignment]  # so that it is no key, which no walk would find

    def __init__(self, dtype: DType) -> None:
        self.dtype = dtype

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("the pickle tries to change a dtype")


def _dtype_of(value: Any) -> DType | None:
    """Return the DType of a torch.dtype, or None, without importing torch."""
    if type(value) is DtypeName:
        return value.dtype
    return DTYPES.get(str(value).removeprefix("torch.")) if type(value).__module__ == "torch" else None


# TorchScript calls storages by C++ names of dtypes; torch.save has no class for these.
_OF_TORCHSCRIPT = {
    "ComplexHalf": "complex32", "Float8_e4m3fn": "float8_e4m3fn", "Float8_e5m2": "float8_e5m2",
    "Float8_e4m3fnuz": "float8_e4m3fnuz", "Float8_e5m2fnuz": "float8_e5m2fnuz", "Float8_e8m0fnu": "float8_e8m0fnu",
    "Float4_e2m1fn_x2": "float4_e2m1fn_x2", "UInt16": "uint16", "UInt32": "uint32", "UInt64": "uint64",
}  # fmt: skip

GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": SealedDict,
    "collections.defaultdict": Sealed(
        "DefaultDict",
        (PlainDict,),
        {"__slots__": (), "__init__": lambda self, factory=None, source=None: PlainDict.__init__(self, source)},
    ),
    "collections.Counter": PlainDict,
    "builtins.set": _Set,
    "builtins.frozenset": _FrozenSet,
    "builtins.complex": _Complex,
    "builtins.bytearray": _ByteArray,
    "builtins.bytes": _Bytes,
    "_codecs.encode": _Bytes,
    "argparse.Namespace": Namespace,
    "numpy.dtype": _NumpyDtype,
    "numpy.core.multiarray.scalar": _NumpyScalar,
    "numpy._core.multiarray.scalar": _NumpyScalar,
    "torch._utils._rebuild_tensor": _Tensor,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_tensor_v3": _Tensor,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_parameter_with_state": _Parameter,
    "torch._tensor._rebuild_from_type_v2": _FromType,
    "torch._utils._rebuild_wrapper_subclass": _Wrapper,
    **_UNSUPPORTED,
    **{f"torch.{name}": _storage_type(dtype) for name, dtype in BY_STORAGE.items()},
    **{f"torch.{name}Storage": _storage_type(DTYPES[dtype]) for name, dtype in _OF_TORCHSCRIPT.items()},
    **{f"torch.cuda.{name}": _storage_type(dtype) for name, dtype in BY_STORAGE.items()},
    "torch.storage.UntypedStorage": _storage_type(None),
    "torch.UntypedStorage": _storage_type(None),
}
# Immutable types of torch whose values are plain data. torch is imported only if a file contains one.
TORCH_VALUES = {"torch.Size", "torch.device", *(f"torch.{name}" for name in DTYPES)}


def begin(size: int) -> None:
    """Set what the objects of the next pickle may cost, before it is read.

    Args:
        size: of the pickle, in bytes.
    """
    _COPIED.set(size + _MOST_COPIED)
    _EXPANDED.set(_MOST_EXPANDED)
    _VIEWED.set({})
    _HASHES.set({})
