"""What tests share: the real training series, and small checkpoints and photographs made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

FIXTURES = Path(__file__).parent.parent / "fixtures"

# The real dtypes that are averaged, spelled out: the table under test must not choose what is tested.
FLOATS = [
    "float64", "float32", "float16", "bfloat16",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
]  # fmt: skip


@pytest.fixture(scope="session")
def runs() -> list[Path]:
    """The 12 checkpoints of the digits run, in training order."""
    return [FIXTURES / "runs" / f"checkpoint-{i}.pth" for i in range(1, 13)]


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write an object with torch.save under a name in the test's folder."""

    def write(name: str, obj: Any, **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(obj, path, **options)
        return path

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
    """Read a checkpoint with torch itself, as safely as it can."""
    return torch.load(path, weights_only=True, mmap=True)


def same_bits(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Compare two state dicts by name, dtype, shape and bytes; NaN and the sign of zero count."""
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and a[k].contiguous().reshape(-1).view(torch.uint8).equal(b[k].contiguous().reshape(-1).view(torch.uint8))
        for k in a
    )
