"""Handmade files for the format tests, and comparisons of tensors."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckpt_tools.checkpoints.open import open_checkpoint
from ckpt_tools.compute import engine
from ckpt_tools.compute.work_units import OutFile
from ckpt_tools.formats.file_plan import FilePlan, OutTensor, Terms
from ckpt_tools.tensors import DTYPES, TensorSpec

# The dtypes that torch saves, listed here: the table under test must not select the test cases.
TORCH_DTYPES = [
    "float64", "float32", "float16", "bfloat16",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
    "complex128", "complex64", "complex32",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
]  # fmt: skip

# A float32 tensor of 4 elements in storage "0", in protocol 2.
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0K\4\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR"
PAYLOAD = np.arange(4, dtype="<f4").tobytes()


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Make a tensor of random bits, including NaNs."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    nbytes = int(np.prod(shape)) * torch_dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, nbytes, dtype=np.uint8)
    # Through a storage: torch.frombuffer refuses an empty buffer.
    tensor = torch.empty(0, dtype=torch_dtype)
    return tensor.set_(torch.from_numpy(raw).untyped_storage(), 0, shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of the elements in C order."""
    flat = tensor.detach().contiguous()
    # A single element is contiguous with any stride, but torch views it as bytes only with stride 1.
    flat = flat.as_strided((flat.numel(),), (1,), flat.storage_offset())
    return flat.view(torch.uint8).numpy().tobytes()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and raw_bytes(a) == raw_bytes(b)


def zip_of(path: Path, records: Mapping[str, bytes], *, compress: int = zipfile.ZIP_STORED) -> Path:
    """Write entries into a zip with zipfile."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return path


def torch_zip(path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """Write a torch file with any pickle; by default storage "0" has the float32 numbers 0 to 3."""
    storages = {"0": PAYLOAD} if storages is None else storages
    data = {f"archive/data/{key}": raw for key, raw in storages.items()}
    return zip_of(
        path, {"archive/data.pkl": pickled, "archive/byteorder": b"little", **data, "archive/version": b"3\n"}
    )


def torch_legacy(path: Path, pickled: bytes) -> Path:
    """Write a legacy torch file with any pickle and no storages."""
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue().replace(pickle.dumps({}, 2), pickled))
    return path


def records_of(path: Path) -> dict[str, bytes]:
    """Read all entries of a zip."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def safetensors_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a safetensors file with any header: an object, or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def copies(path: Path) -> dict[str, OutTensor]:
    """Return OutTensors that copy the weights of a checkpoint; names with the same bytes are tied."""
    made: dict[TensorSpec, OutTensor] = {}
    out = {}
    for name, spec in open_checkpoint(path).specs.items():
        assert isinstance(spec, TensorSpec)
        out[name] = made.setdefault(spec, OutTensor(spec.dtype, spec.shape, Terms.copy(spec), name))
    return out


def zeros(path: Path, dtype: str, shape: tuple[int, ...], name: str = "zeros") -> OutTensor:
    """Return an OutTensor of this size, for plans only."""
    return OutTensor(DTYPES[dtype], shape, Terms(), name)


def write(plan: FilePlan, path: Path, *, threads: int = 2) -> Path:
    """Write a plan with the engine, allowing NaN and infinity."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.truncate(fd, plan.size)
        engine.run([OutFile(plan, fd)], threads=threads, allow_nonfinite=True)
    finally:
        os.close(fd)
    return path


@contextmanager
def bounded_memory(extra: int = 512 << 20) -> Iterator[None]:
    """Raise MemoryError for allocations over `extra` bytes, if the system supports it."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextmanager
def bounded_resident(extra: int = 64 << 20) -> Iterator[None]:
    """Fail if the resident memory of this process grows by more than `extra` bytes, if the system reports it.

    Allocated memory that is never touched does not count, unlike in `bounded_memory`.
    """
    forget, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def kilobytes(field: str) -> int:
        return int(status.read_text().partition(f"{field}:")[2].split()[0])

    counted = forget.exists()
    if counted:
        forget.write_text("5")  # resets the peak
        before = kilobytes("VmRSS")
    yield
    if counted:
        assert 1024 * (kilobytes("VmHWM") - before) <= extra
