"""Shared fixtures: the real training series, and generated checkpoints and photographs."""

from __future__ import annotations

import errno
import os

# Tests run in parallel, one process per core: more torch threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

# No test depends on the speed of the machine. All examples of a test share a folder, and each rewrites its files.
# Of examples there are few in each run, and others in the next; HYPOTHESIS_PROFILE=thorough takes many.
settings.register_profile(
    "any machine",
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("any machine"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "any machine"))

# A sync waits for the disk, thousands of times in all, and no test pulls the plug. A bad descriptor is still an error.
# Processes that tests start do sync, and the test that asks for `synced`.
_fsync = os.fsync
os.fsync = lambda fd: os.fstat(fd) and None

FIXTURES = Path(__file__).parent.parent / "fixtures"

# The real dtypes that are averaged, listed here: the table under test must not select the test cases.
FLOATS = [
    "float64", "float32", "float16", "bfloat16",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
]  # fmt: skip


@pytest.fixture(scope="session")
def runs() -> list[Path]:
    """The 12 checkpoints of the digits run, in training order."""
    return [FIXTURES / "runs" / f"checkpoint-{i}.pth" for i in range(1, 13)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's folder, as the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are on the disk when a job has ended, so that the page cache can let go of them."""
    monkeypatch.setattr(os, "fsync", _fsync)


@pytest.fixture
def unsynced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, which the system cannot sync: what fails once an output is in its place."""
    fsync = os.fsync

    def failing(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), here.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)


@pytest.fixture
def old_folder(here: Path) -> Callable[..., Path]:
    """Make an old sharded output in the current folder."""

    def make(name: str = "out") -> Path:
        folder = Path(name)
        folder.mkdir()
        for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json"):
            (folder / file).write_text("old")
        return folder

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write an object with torch.save under a name in the test's folder."""

    def write(name: str, obj: Any, **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(obj, path, **options)
        return path

    return write


@pytest.fixture
def plain(save: Callable[..., Path]) -> Callable[..., list[Path]]:
    """Write checkpoints without any counter inside, each of its own content."""

    def write(*names: str) -> list[Path]:
        return [save(name, {"w": torch.full((2, 3), float(i))}) for i, name in enumerate(names)]

    return write


Photos = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    """Make `<name>/<class>/<number>.png`, random but seeded; classes differ in brightness."""

    def make(name: str = "photos", *, classes: int = 3, each: int = 4, size: int = 40, flat: bool = False) -> Path:
        generator = np.random.default_rng(0)
        folder = tmp_path / name
        for i in range(classes):
            inside = folder if flat else folder / f"class{i}"
            inside.mkdir(parents=True, exist_ok=True)
            for j in range(each):
                pixels = generator.integers(20 * i, 20 * i + 50, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(inside / f"{i}-{j}.png")
        return folder

    return make


def load(path: Path) -> Any:
    """Read a checkpoint with torch, weights only."""
    return torch.load(path, weights_only=True, mmap=True)


def same_bits(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Compare two state dicts by name, dtype, shape and bytes; NaN and the sign of zero count."""
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and a[k].contiguous().reshape(-1).view(torch.uint8).equal(b[k].contiguous().reshape(-1).view(torch.uint8))
        for k in a
    )


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test of sums holds with the C extension and without it."""
    from ckpt_tools.compute import native

    if request.param == "torch":
        monkeypatch.setattr(native, "_native", None)
    elif native._native is None:
        pytest.skip("installed without a C compiler")
    return str(request.param)
