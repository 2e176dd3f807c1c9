"""Statistics: moments are those of NumPy in float64, however the values are cut up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.batchnorm import statistics
from ckpt_tools.batchnorm.statistics import LayerMoments, Moments, measure, measure_by_image, merge
from ckpt_tools.compute import native

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["C", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to measure on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_native", None)
    elif native._native is None:
        pytest.skip("installed without a C compiler")
    else:
        monkeypatch.setattr(statistics, "_by_torch", None)
    return str(request.param)


def columns_of(values: torch.Tensor) -> np.ndarray:
    """[C, values] in NumPy's long double, which has 64 bits of significand on x86."""
    return np.moveaxis(values.double().numpy(), 1, 0).reshape(values.shape[1], -1).astype(np.longdouble)


def assert_close(found: Moments, values: torch.Tensor, rtol: float = 1e-12) -> None:
    columns = columns_of(values)
    assert found.count == columns.shape[1]
    np.testing.assert_allclose(found.mean.numpy(), columns.mean(1).astype(float), rtol=rtol, atol=1e-13)
    variance = columns.var(1, ddof=1).astype(float)
    np.testing.assert_allclose(found.variance(correction=1).numpy(), variance, rtol=rtol)


def in_order(values: torch.Tensor, *, last: bool) -> torch.Tensor:
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if last else values.contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(5, 3), (5, 3, 11), (5, 3, 4, 7), (2, 3, 4, 5, 6), (9, 1, 1, 1), (2, 200, 3, 3), (1, 37, 70, 30)]
)
def test_measure_agrees_with_numpy_in_every_memory_format(
    shape: tuple[int, ...], dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    neither = values.flip(-1).transpose(0, -1).clone().transpose(0, -1)  # channels are neither first nor last
    for layout in (
        in_order(values, last=False),
        in_order(values, last=True),
        neither,
        values[:, 1:] if shape[1] > 1 else values,
    ):
        for block in (64, 256 * 1024) if way == "torch" else (None,):
            monkeypatch.setattr(statistics, "_BLOCK", block)
            assert_close(measure(layout), layout)


@pytest.mark.parametrize("last", [False, True])
def test_measure_keeps_the_variance_exact_at_a_mean_of_3000_sigma(last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (3000 + torch.randn(64, 5, 9, 9, generator=generator, dtype=torch.float64)).float()
    parts = merge([measure(in_order(part, last=last)) for part in values.split([2, 2, 4, 8, 16, 32])])
    assert_close(parts, values, rtol=1e-9)


def adverse(case: str) -> torch.Tensor:
    """Values that a careless sum of squares gets wrong, [16, 3, 40, 40]."""
    noise = torch.randn(16, 3, 40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if case == "mean of 1e8 sigma":
        return 1e6 + 0.01 * noise
    if case == "first value far away":
        noise[0, :, 0, 0] = -1e6
        return noise
    if case == "first image far away":
        noise[0] -= 1e6
        return noise
    if case == "last value far away":
        noise[-1, :, -1, -1] = 1e6
        return noise
    if case == "mean that drifts":
        return noise + 1e4 * torch.arange(16.0).double().view(-1, 1, 1, 1)
    if case == "two values":
        return torch.where(noise > 0, 1.0, -1.0) * 1e30
    return noise.float().mul(1e-42).double()  # subnormal numbers of float32


CASES = ["mean of 1e8 sigma", "first value far away", "first image far away", "last value far away"]
CASES += ["mean that drifts", "two values", "subnormal"]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_measure_is_exact_for_adverse_values(case: str, last: bool, way: str) -> None:
    for dtype in (torch.float64, torch.float32):
        values = in_order(adverse(case).to(dtype), last=last)
        columns, found = columns_of(values), measure(values)
        sigma = columns.std(1)
        # To round the mean itself costs half a unit in its last place; what torch adds up at 1e8 sigma, some more.
        rounding = (1 if way == "C" else 30) * np.spacing(np.abs(columns.mean(1)).astype(float))
        assert (np.abs(found.mean.numpy() - columns.mean(1)) <= rounding + 1e-14 * sigma).all()
        m2 = np.square(columns - columns.mean(1, keepdims=True)).sum(1)
        exact = 1e-13 if way == "C" or case != "mean of 1e8 sigma" else 1e-9
        assert (np.abs(found.m2.numpy() - m2) <= exact * m2).all()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_measure_finds_no_variance_in_constant_channels(dtype: torch.dtype, last: bool) -> None:
    constants = torch.tensor([1 / 3, -0.1, 5e4, 0.0, 6e-8], dtype=dtype)
    found = measure(in_order(constants.view(1, -1, 1, 1).expand(9, -1, 30, 31), last=last))
    assert found.mean.tolist() == constants.double().tolist()
    assert found.m2.tolist() == [0.0] * 5


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_measure_finds_what_is_not_finite_in_its_channel_alone(bad: float, last: bool, way: str) -> None:
    clean = torch.randn(6, 5, 12, 13, generator=torch.Generator().manual_seed(2))
    for image, row, column in ((0, 0, 0), (5, 11, 12), (3, 7, 1)):
        values = clean.clone()
        values[image, 2, row, column] = bad
        found = measure(in_order(values, last=last))
        assert torch.isfinite(found.mean + found.m2).tolist() == [True, True, False, True, True]


def test_measure_takes_the_values_that_a_tensor_has_for_torch() -> None:
    values = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(3))
    assert_close(measure(torch._neg_view(values)), -values)
    assert_close(measure(torch.nn.Parameter(values)), values)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mean", [0.0, 3.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_measure_by_image_is_within_the_bound_that_it_states(
    dtype: torch.dtype, mean: float, last: bool, device: str
) -> None:
    generator = torch.Generator().manual_seed(4)
    for shape in ((32, 6, 28, 28), (500, 6), (64, 6, 2)):
        values = in_order((mean + torch.randn(shape, generator=generator)).to(dtype), last=last)
        found, exact = measure_by_image(values.to(device)), columns_of(values)
        unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        largest, sigma = np.abs(exact).max(1), exact.std(1)
        merging = len(values) * 2.0**-53
        assert found.count == exact.shape[1]
        assert (np.abs(found.mean.cpu().numpy() - exact.mean(1)) <= (4 * unit + merging) * largest).all()
        bound = unit * (sigma**2 + largest * sigma) + (unit * largest) ** 2
        assert (np.abs(found.variance(correction=0).cpu().numpy() - exact.var(1)) <= 8 * bound).all()


def test_layer_moments_do_not_depend_on_when_batches_are_merged() -> None:
    values = torch.randn(41, 3, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    batches = [part.numpy() for part in values.split(1)]
    looked_at, at_once = (LayerMoments(3, torch.device("cpu")) for _ in range(2))
    for part in values.split(1):
        looked_at.add(measure(part))
        assert looked_at.population.count == 7 * looked_at.means.count
        at_once.add(measure(part))
    for moments in (looked_at, at_once):
        assert_close(moments.population, values)
        means, variances = (np.array([each(batch[0]) for batch in batches]) for each in (_mean, _variance))
        np.testing.assert_allclose(moments.estimate("batch-mean")[0].numpy(), means.mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(moments.estimate("batch-mean")[1].numpy(), variances.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.means.variance(correction=1).numpy(), means.var(0, ddof=1), rtol=1e-12)
        np.testing.assert_allclose(moments.variances.variance(correction=1), variances.var(0, ddof=1), rtol=1e-12)


def _mean(image: np.ndarray) -> np.ndarray:
    return np.asarray(image.mean(1))


def _variance(image: np.ndarray) -> np.ndarray:
    return np.asarray(image.var(1, ddof=1))


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
