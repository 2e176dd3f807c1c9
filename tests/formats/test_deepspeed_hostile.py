"""DeepSpeed: any value in the files is read or refused."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zero_files import edit, full

from ckpt_tools import open_checkpoint
from ckpt_tools.errors import (
    CkptError,
)
from ckpt_tools.formats import read_header
from ckpt_tools.jobs.inspect import describe

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=3),
    st.integers(),
    st.sampled_from([-1, 1 << 31, 1 << 64, 10**5000]),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.builds(lambda n: torch.zeros(n), st.integers(0, 50)),
)
KEYS = (
    "module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params",
    "mp_world_size", "global_steps", "ds_config", "ds_autoep_layers",
    "zero_stage", "partition_count", "param_alignment_paddings", "param_slice_mappings",
    "single_partition_of_fp32_groups", "fp32_flat_groups", "base_optimizer_state", "optimizer_state_dict",
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {stage: full(tmp_path_factory.mktemp("sound") / "step", stage=stage, ranks=2) for stage in (2, 3)}


@settings(max_examples=60)
@given(st.sampled_from([2, 3]), st.sampled_from(KEYS), HOSTILE, st.data())
def test_any_value_in_the_files_is_read_or_refused(
    sound: dict[int, Path], tmp_path_factory: pytest.TempPathFactory, stage: int, key: str, value: Any, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    for path in sound[stage].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    deeper = data.draw(st.booleans())

    def change(states: dict[str, Any]) -> None:
        inner = states.get(key)
        if deeper and isinstance(inner, list) and inner:
            inner[0] = value
        elif deeper and isinstance(inner, dict) and inner:
            inner[next(iter(inner))] = value
        else:
            states[key] = value

    edit(path, change)
    with suppress(CkptError):
        describe(read_header(folder))
        for name in (found := open_checkpoint(folder)):
            assert found[name].shape == found.specs[name].shape
