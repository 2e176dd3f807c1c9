"""Folders of small random photographs, as a classifier's data are laid out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Photos = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    """Make `<name>/<class>/<number>.png`, seeded; classes differ in brightness."""

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
