"""Statistics: moments are those of NumPy in float64, however the values are cut up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.batchnorm import statistics
from ckpt_tools.batchnorm.statistics import Moments, measure, merge


def numpy_moments(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance a channel, by NumPy alone."""
    columns = np.moveaxis(values.double().numpy(), 1, 0).reshape(values.shape[1], -1)
    return columns.mean(1), columns.var(1, ddof=1)


def assert_close(found: Moments, values: torch.Tensor, rtol: float = 1e-12) -> None:
    mean, variance = numpy_moments(values)
    assert found.count == values.numel() // values.shape[1]
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=rtol, atol=1e-13)
    np.testing.assert_allclose(found.variance(correction=1).numpy(), variance, rtol=rtol)


@pytest.mark.parametrize("block", [7, 64, 256 * 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 11), (5, 3, 4, 7), (2, 3, 4, 5, 6), (9, 1, 1, 1), (2, 200, 3, 3)])
def test_measure_agrees_with_numpy_in_every_memory_format(
    shape: tuple[int, ...], dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_BLOCK", block)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    layouts = [values, values.movedim(1, -1).contiguous().movedim(-1, 1), values.flip(-1).transpose(0, -1).clone()]
    layouts[2] = layouts[2].transpose(0, -1)  # neither channels first nor last
    assert_close(measure(layouts[0]), layouts[0])
    assert_close(measure(layouts[1]), layouts[1])
    assert_close(measure(layouts[2]), layouts[2])


@pytest.mark.parametrize("channels_last", [False, True])
def test_measure_keeps_the_variance_exact_at_a_mean_of_3000_sigma(channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (3000 + torch.randn(64, 5, 9, 9, generator=generator, dtype=torch.float64)).float()
    if channels_last:
        values = values.to(memory_format=torch.channels_last)
    parts = merge([measure(part) for part in values.split([2, 2, 4, 8, 16, 32])])
    assert_close(parts, values, rtol=1e-9)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 2**31), st.floats(-1e6, 1e6))
def test_merge_gives_the_whole_from_any_split(sizes: list[int], seed: int, offset: float) -> None:
    values = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    whole, parts = measure(values), merge([measure(part) for part in values.split(sizes)])
    assert parts.count == whole.count == len(values)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.m2, whole.m2, rtol=1e-9 if abs(offset) > 1e3 else 1e-12, atol=1e-12)


def test_moments_have_no_variance_for_no_value_or_one() -> None:
    nothing = measure(torch.zeros(0, 3, 4))
    assert nothing.count == 0
    one = measure(torch.full((1, 3), 2.0))
    for moments in (merge([nothing, one]), merge([one, nothing]), one):
        assert moments.count == 1
        assert moments.mean.tolist() == [2.0] * 3
        assert moments.variance(correction=1).tolist() == [0.0] * 3
    assert merge([nothing, nothing]).count == 0
