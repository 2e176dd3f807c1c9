"""Paths: where a folder holds no series, the message points to the one below it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckpt_tools.errors import SeriesError
from ckpt_tools.series.find import find_series


def test_find_series_names_a_file_where_each_folder_has_several_kinds_of_files(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / f"CKPT+{step}"
        folder.mkdir()
        for name in ("counter.ckpt", "my_model.ckpt", "normalizer.ckpt", "optimizer.ckpt"):
            torch.save({"w": torch.ones(2) * step}, folder / name)
    with pytest.raises(SeriesError, match=r"several in .*CKPT\+1; if my_model\.ckpt .*'.*CKPT\+\*/my_model\.ckpt'\.$"):
        find_series([tmp_path])
    assert len(find_series([tmp_path / "CKPT+*" / "my_model.ckpt"]).members) == 2
