"""Recalibration: new statistics against NumPy and brute force in float64; everything borrowed comes back."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from timm.layers import BatchNormAct2d, convert_splitbn_model
from timm.layers.evo_norm import EvoNorm2dB0, EvoNorm2dB1
from torch import Tensor, nn

from ckpt_tools.batchnorm import recalibrate_bn
from ckpt_tools.errors import DataError, ModelError, NumericsError, UsageError


def images(n: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_layer(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels)).double()


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0.0, "atol": 0.0}))


def brute_force(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Population statistics of every BatchNorm input, with the layers in train mode as torch has it, by NumPy."""
    model = copy.deepcopy(model).eval()
    seen: dict[str, list[np.ndarray]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train()

            def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen.setdefault(name, []).append(args[0].double().movedim(1, 0).flatten(1).numpy())

            layer.register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    whole = {name: np.concatenate(parts, axis=1) for name, parts in seen.items()}
    return {name: (values.mean(1), values.var(1, ddof=1)) for name, values in whole.items()}


def test_recalibrate_bn_gives_uneven_batches_the_statistics_of_one() -> None:
    data = images(128, 3, 5, 5, dtype=torch.float64) * 3 + 7
    uneven, whole = one_layer(), one_layer()
    recalibrate_bn(uneven, data.split([2, 2, 4, 8, 16, 32, 64]))
    recalibrate_bn(whole, [data])
    columns = data.movedim(1, 0).flatten(1).numpy()
    for model in (uneven, whole):
        np.testing.assert_allclose(model[0].running_mean.numpy(), columns.mean(1), rtol=1e-12)
        np.testing.assert_allclose(model[0].running_var.numpy(), columns.var(1, ddof=1), rtol=1e-12)
    assert uneven[0].num_batches_tracked.equal(torch.tensor(7))


def test_recalibrate_bn_keeps_the_variance_exact_at_a_mean_of_3000_sigma() -> None:
    data = 3000 + images(64, 4, 6, 6)
    model = nn.Sequential(nn.BatchNorm2d(4))
    recalibrate_bn(model, data.split(8))
    want = data.double().movedim(1, 0).flatten(1).numpy().var(1, ddof=1)
    np.testing.assert_allclose(model[0].running_var.numpy(), want, rtol=1e-6)


def test_recalibrate_bn_agrees_with_brute_force_on_a_whole_network() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18().double()
    batches = list(images(20, 3, 48, 48, dtype=torch.float64).split([6, 2, 12]))
    want = brute_force(model, batches)
    report = recalibrate_bn(model, batches)
    assert {layer.name for layer in report.layers} == want.keys()
    assert report.images == 20
    for name, (mean, variance) in want.items():
        layer = model.get_submodule(name)
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.running_var.numpy(), variance, rtol=1e-9)


class Line(nn.Module):
    """Three layers in line, with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = self.dropout(torch.relu(bn(conv(x))))
        return x


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_recalibrate_bn_frees_the_first_p_layers_from_the_batches_in_p_passes(passes: int) -> None:
    torch.manual_seed(0)
    model = Line().double()
    data = images(60, 3, 6, 6, dtype=torch.float64)
    shuffled = data[torch.randperm(60)]
    found = []
    for batches in (data.split(60), data.split(7), shuffled.split([2, 28, 30])):
        copied = copy.deepcopy(model)
        recalibrate_bn(copied, batches, passes=passes)
        found.append([layer.running_var for layer in copied.bns])
    for layer in range(3):
        equal = [torch.allclose(found[0][layer], other[layer], rtol=1e-11) for other in found[1:]]
        assert equal == [layer < passes] * 2


@pytest.mark.parametrize("passes", [1, 2, 3, 7])
def test_pass_p_has_stored_statistics_in_the_first_p_layers_but_one_and_those_of_the_batch_behind(passes: int) -> None:
    torch.manual_seed(0)
    model = Line().double()
    batches = [(images(n, 3, 6, 6, seed=n, dtype=torch.float64) + n).numpy() for n in (6, 9, 4)]
    weights = [(conv.weight.detach(), conv.bias.detach()) for conv in model.convs]
    stored: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(3), np.ones(3))] * 3
    for number in range(1, min(passes, 3) + 1):
        seen: list[list[np.ndarray]] = [[], [], []]
        for x in batches:
            for layer, (weight, bias) in enumerate(weights):
                x = torch.conv2d(torch.tensor(x), weight, bias, padding=1).numpy()
                columns = x.swapaxes(0, 1).reshape(3, -1)
                seen[layer].append(columns)
                mean, variance = stored[layer] if layer < number - 1 else (columns.mean(1), columns.var(1))
                x = (x - mean[:, None, None]) / np.sqrt(variance[:, None, None] + 1e-5)
                x = np.maximum(x, 0)
        for layer in range(number - 1, 3):
            whole = np.concatenate(seen[layer], 1)
            stored[layer] = whole.mean(1), whole.var(1, ddof=1)
    calls: list[tuple[str, int, int | None]] = []
    recalibrate_bn(model, list(map(torch.tensor, batches)), passes=passes, on_progress=lambda *each: calls.append(each))
    told = [f"measuring, pass {number} of {passes}" if passes > 1 else "measuring" for number in range(1, 4)]
    first = [(told[0], done, None) for done in (0, 6, 15, 19)]
    later = [(what, done, 19) for what in told[1:passes] for done in (0, 6, 15, 19)]
    assert calls == [*first, (told[0], 19, 19), *later]  # when all layers are exact, there is nothing more to measure
    for bn, (mean, variance) in zip(model.bns, stored, strict=True):
        np.testing.assert_allclose(bn.running_mean.numpy(), mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(bn.running_var.numpy(), variance, rtol=1e-9)


class Either(nn.Module):
    """Calls one layer or the other in front of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.low, self.high = (nn.BatchNorm1d(2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.high if x.mean() > 5 else self.low)(x).relu())


def test_recalibrate_bn_merges_layers_and_their_order_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one after the other, with what the other one sent; each meets one layer of two."""
    low, high = images(8, 2, dtype=torch.float64), images(6, 2, seed=1, dtype=torch.float64) + 10
    sent: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr("ckpt_tools.batchnorm.recalibrate.gathered", lambda mine: sent.append(mine.clone()) or [mine])
        recalibrate_bn(Either().double(), [high])
    models = [Either().double() for _ in range(2)]
    calls = iter([sent[0]])
    monkeypatch.setattr("ckpt_tools.batchnorm.recalibrate.gathered", lambda mine: [mine, next(calls)])
    report = recalibrate_bn(models[0], [low])
    monkeypatch.undo()
    recalibrate_bn(models[1], [low, high])  # the same in one process
    assert (report.images, report.batches) == (14, 2)
    assert_same(buffers(models[0]), buffers(models[1]), rtol=1e-12, atol=1e-12)


def test_recalibrate_bn_repeats_exactly_with_dropout() -> None:
    torch.manual_seed(0)
    first, second = Line(), Line()
    second.load_state_dict(first.state_dict())
    batches = images(12, 3, 6, 6).split(4)
    for model in (first, second):
        model.train()
        recalibrate_bn(model, batches, passes=2)
    assert_same(buffers(first), buffers(second))


def test_recalibrate_bn_by_batch_mean_agrees_with_torchs_update_bn() -> None:
    torch.manual_seed(0)
    ours, theirs = Line().double(), Line().double()
    ours.dropout = theirs.dropout = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    batches = list(images(24, 3, 6, 6, dtype=torch.float64).split(8))
    recalibrate_bn(ours, batches, estimator="batch-mean")
    torch.optim.swa_utils.update_bn(batches, theirs)
    assert_same(buffers(ours), buffers(theirs), rtol=1e-10, atol=1e-12)
    assert ours.bns[0].num_batches_tracked.equal(theirs.bns[0].num_batches_tracked)


def sync(_: int) -> nn.Module:
    return nn.SyncBatchNorm(4)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), ()),
        (nn.BatchNorm1d(4), (5,)),
        (nn.BatchNorm2d(4, affine=False), (5, 6)),
        (nn.BatchNorm3d(4), (2, 3, 4)),
        (nn.SyncBatchNorm(4), (5, 6)),
        (BatchNormAct2d(4), (5, 6)),
        (convert_splitbn_model(BatchNormAct2d(4), 2), (5, 6)),
        (nn.BatchNorm2d(4, momentum=None), (5, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_recalibrate_bn_measures_every_class_of_batchnorm(layer: Any, shape: tuple[int, ...]) -> None:
    data = images(10, 4, *shape) * 2 + 1
    recalibrate_bn(nn.Sequential(layer), data.split([4, 4, 2]))
    columns = data.double().movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(layer.running_mean.numpy(), columns.mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), columns.var(1, ddof=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((8, 6, 5, 7), lambda x: x[:, 1:5]),
        ((8, 6, 5, 7), lambda x: x.contiguous(memory_format=torch.channels_last)[:, 1:5]),
        ((8, 6, 9), lambda x: x[:, 1:5]),
        ((8, 9, 4), lambda x: x.transpose(1, 2)),
        ((4, 8, 5, 7), lambda x: x.transpose(0, 1)),
        ((8, 1, 5, 7), lambda x: x.expand(-1, 4, -1, -1)),
        ((8, 8), lambda x: x[:, ::2]),
    ],
)
def test_recalibrate_bn_accepts_any_view(shape: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> None:
    layer = nn.BatchNorm2d(4).double() if len(shape) == 4 else nn.BatchNorm1d(4).double()
    data = images(*shape, dtype=torch.float64)
    model = nn.Sequential(nn.Identity(), layer)
    model[0].register_forward_hook(lambda _, args, out: view(out))
    recalibrate_bn(model, [data])
    columns = view(data).movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(layer.running_mean.numpy(), columns.mean(1), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var.numpy(), columns.var(1, ddof=1), rtol=1e-12)


@pytest.mark.parametrize("layer", [EvoNorm2dB0(4), EvoNorm2dB1(4)], ids=["B0", "B1"])
def test_recalibrate_bn_measures_the_variance_of_evonorm(layer: Any) -> None:
    data = images(10, 4, 5, 6)
    report = recalibrate_bn(nn.Sequential(layer), data.split(5))
    want = data.double().movedim(1, 0).flatten(1).numpy().var(1, ddof=1)
    np.testing.assert_allclose(layer.running_var.numpy(), want, rtol=1e-6)
    assert report.statistics["0"][0] is None


class Odd(nn.Module):
    """A layer used twice, one never reached, and some that look like BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.BatchNorm2d(2)
        self.unused = nn.BatchNorm2d(2)
        self.stateless = nn.BatchNorm2d(2, track_running_stats=False)
        self.frozen = torchvision.ops.FrozenBatchNorm2d(2)
        self.instance = nn.InstanceNorm2d(2, track_running_stats=True)
        self.scalar = nn.Identity()
        self.scalar.register_buffer("running_var", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.instance(self.frozen(self.stateless(self.twice(self.twice(x) + 3))))


def test_recalibrate_bn_names_skipped_layers_with_the_reason() -> None:
    model = Odd().double()
    model.unused.running_mean.fill_(9)
    data = images(6, 2, 3, 3, dtype=torch.float64)
    before = buffers(model)
    report = recalibrate_bn(model, [data])
    assert {name: reason for name, _, reason in report.skipped} == {
        "unused": "never reached",
        "stateless": "keeps no running statistics",
        "frozen": "frozen: its class never updates them",
        "instance": "normalises each image by itself",
        "scalar": "keeps no statistics for each channel",
    }
    for name, buffer in model.named_buffers():
        assert name.startswith("twice") or buffer.equal(before[name])
    mean, biased = data.mean((0, 2, 3), keepdim=True), data.var((0, 2, 3), unbiased=False, keepdim=True)
    both = torch.cat([data, (data - mean) / (biased + model.twice.eps).sqrt() + 3]).movedim(1, 0).flatten(1)
    torch.testing.assert_close(model.twice.running_mean, both.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.twice.running_var, both.var(1), rtol=1e-12, atol=0)
    assert [layer.count for layer in report.layers] == [2 * 6 * 9]


def test_recalibrate_bn_clears_old_nans() -> None:
    model = Line()
    for layer in model.bns:
        layer.running_mean.fill_(float("nan"))
        layer.running_var.fill_(float("inf"))
    report = recalibrate_bn(model, images(8, 3, 6, 6).split(4), passes=2)
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())
    assert all(layer.mean_before == float("inf") for layer in report.layers)


def test_recalibrate_bn_reports_an_old_nan_as_moved_by_infinity() -> None:
    model = one_layer()
    model[0].running_mean[0] = model[0].running_var[0] = float("nan")
    layer = recalibrate_bn(model, [images(8, 3, 6, 6, dtype=torch.float64)]).layers[0]
    assert (layer.mean_moved, layer.variance_moved) == (float("inf"), float("inf"))


class Fickle(nn.Module):
    """Runs its second layer for every other batch alone."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.calls = itertools.count(start)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if next(self.calls) % 2 == 0 else self.first(x)


@pytest.mark.parametrize("start", [0, 1])
def test_recalibrate_bn_measures_a_layer_on_the_batches_that_reach_it(start: int) -> None:
    report = recalibrate_bn(Fickle(start), images(12, 3).split(3))
    assert [layer.count for layer in report.layers] == [12, 6]


@pytest.mark.parametrize("wrap", [torch.compile, lambda model, **options: model.compile(**options) or model])
def test_recalibrate_bn_measures_a_compiled_model_that_has_run(wrap: Callable[..., Any]) -> None:
    model = Line().eval()
    plain, data = copy.deepcopy(model), images(8, 3, 6, 6)
    compiled = wrap(model, backend="eager")
    with torch.no_grad():
        compiled(data)
    recalibrate_bn(plain, [data])
    recalibrate_bn(compiled, [data])  # of the same shape, so nothing is compiled anew
    assert_same(buffers(model), buffers(plain))


class Boom(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model", "data"])
def test_recalibrate_bn_restores_the_model_after_an_error(where: str, error: type[BaseException]) -> None:
    model = Line()
    model.bns[1].eval()
    model.dropout.eval()
    modes = [module.training for module in model.modules()]
    before = buffers(model)

    def batches() -> Iterator[Tensor]:
        for i in range(9):
            if i == 5 and where == "data":
                raise error
            yield images(4, 3, 6, 6, seed=i)

    def fail_in_batch_5(_: nn.Module, __: Any, calls: Any = itertools.count(1)) -> None:  # noqa: B008
        if next(calls) == 5:
            raise error

    hook = model.convs[0].register_forward_pre_hook(fail_in_batch_5) if where == "model" else None
    with pytest.raises(error):
        recalibrate_bn(model, batches())
    if hook is not None:
        hook.remove()
    assert_same(buffers(model), before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(layer.momentum == 0.1 for layer in model.bns)


def test_recalibrate_bn_restores_modes_and_gradients() -> None:
    model = Line().train()
    model.bns[1].eval()
    recalibrate_bn(model, images(8, 3, 6, 6).split(4))
    assert model.training
    assert model.dropout.training
    assert not model.bns[1].training
    assert torch.is_grad_enabled()
    model(images(4, 3, 6, 6)).sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_recalibrate_bn_names_layer_and_batch_of_an_input_that_is_not_finite(value: float) -> None:
    data = images(12, 3, 6, 6)
    data[7, 1, 2, 3] = value
    model = Line()
    before = buffers(model)
    with pytest.raises(NumericsError, match=r"batch 2: the input of 'bns\.0' holds NaN or infinity"):
        recalibrate_bn(model, data.split(4))
    assert_same(buffers(model), before)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, 0), lambda x: [x], lambda x: {"label": 0, "pixel_values": x}]
)
def test_recalibrate_bn_accepts_tensors_tuples_and_dicts(wrap: Callable[[Tensor], Any]) -> None:
    data = images(8, 3, 2, 2)
    model = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate_bn(model, [wrap(part) for part in data.split(4)])
    torch.testing.assert_close(model[0].running_mean, data.mean((0, 2, 3)))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], DataError, "yield no batch"),
        ([torch.zeros(0, 3)], DataError, "yield no batch"),
        ([torch.zeros(1, 3)], DataError, "single image"),
        ([torch.zeros(1, 3), torch.zeros(4, 3, 5)], DataError, "batch 1: '0' sees a single value a channel"),
        ([{"pixels": torch.zeros(2, 3)}], DataError, "dict of pixels; expected one of image"),
        (["ab"], DataError, "a str that starts with no tensor"),
        ([torch.zeros(4, 5)], RuntimeError, "should contain 5 elements"),
    ],
)
def test_recalibrate_bn_rejects_unusable_batches(batches: Any, error: Any, message: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = buffers(model)
    with pytest.raises(error, match=message):
        recalibrate_bn(model, batches)
    assert_same(buffers(model), before)


def test_recalibrate_bn_rejects_statistics_that_overflow_the_dtype_of_the_model() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).half()
    before = buffers(model)
    with pytest.raises(NumericsError, match=r"the new statistics of '0' overflow torch\.float16"):
        recalibrate_bn(model, [images(8, 3, 4, 4).half() * 500])
    assert_same(buffers(model), before)


def test_recalibrate_bn_rejects_a_model_that_reaches_no_layer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.forward = lambda x: x
    with pytest.raises(ModelError, match="the data reach none of the BatchNorm layers, such as '0'"):
        recalibrate_bn(model, [images(4, 3)])


def test_recalibrate_bn_rejects_impossible_options() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(UsageError, match="`passes=0`"):
        recalibrate_bn(model, [], passes=0)
    with pytest.raises(UsageError, match="`estimator` is one of"):
        recalibrate_bn(model, [], estimator="median")
    with pytest.raises(UsageError, match="can be read again"):
        recalibrate_bn(model, iter([images(4, 3)]), passes=2)


def test_recalibrate_bn_reads_no_data_for_a_model_without_batchnorm() -> None:
    def never() -> Iterator[Tensor]:
        raise AssertionError("data were read")
        yield

    report = recalibrate_bn(nn.Sequential(nn.LayerNorm(3)), never())
    assert report.layers == ()
    assert report.batches == 0


def test_recalibrate_bn_reports_change_and_standard_error_of_each_layer() -> None:
    data = images(4096, 2, seed=3, dtype=torch.float64) * torch.tensor([2.0, 0.5]) + torch.tensor([10.0, 0.0])
    model = nn.Sequential(nn.BatchNorm1d(2)).double()
    layer = recalibrate_bn(model, data.split(64)).layers[0]
    assert (layer.mean_before, layer.variance_before) == (0.0, 1.0)
    assert layer.mean_after == pytest.approx(10, rel=0.02)
    assert layer.mean_moved == pytest.approx(5, rel=0.05)  # 10 of its own standard deviations of 2
    assert layer.variance_moved == pytest.approx(4, rel=0.1)
    # Independent values: the standard error of a mean is sigma / sqrt(n), of a variance var * sqrt(2 / n).
    assert layer.mean_error == pytest.approx(4096**-0.5, rel=0.3)
    assert layer.variance_error == pytest.approx((2 / 4096) ** 0.5, rel=0.3)
