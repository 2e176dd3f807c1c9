"""What cannot be measured is named or refused; what is frozen stays; what a forward pass moves comes back."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from ckpt_tools.batchnorm import recalibrate_bn
from ckpt_tools.errors import ModelError

DATA = torch.randn(24, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 4
BATCHES = DATA.split(8)


def normalised(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (x - mean.view(1, -1, 1)) / (variance.view(1, -1, 1) + 1e-5).sqrt()


class Masked(nn.BatchNorm1d):
    """In training it measures what is not 0; in use it normalises all."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            real = x.movedim(1, -1)[(x != 0).all(1)]
            self.running_mean.lerp_(real.mean(0), self.momentum)
            self.running_var.lerp_(real.var(0), self.momentum)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class OverTime(nn.BatchNorm1d):
    """Arithmetic of its own, over the last axis in place of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean.lerp_(x.mean((0, 1)), 0.1)
            self.running_var.lerp_(x.var((0, 1)), 0.1)
        return (x - self.running_mean) / (self.running_var + self.eps).sqrt()


class Failing(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("no training here")
        return super().forward(x)


class Threaded(nn.Module):
    """Calls its layer in a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: list[Tensor] = []
        thread = threading.Thread(target=lambda: out.append(self.bn(x)))
        thread.start()
        thread.join()
        return out[0].detach()


class Folding(nn.Module):
    """Uses the statistics of its layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self.bn.running_mean, self.bn.running_var)


class Listing(Folding):
    def forward(self, x: Tensor) -> Tensor:
        mean, variance = torch.stack([self.bn.running_mean, self.bn.running_var])
        return normalised(x, mean, variance)


class Numbers(Folding):
    def forward(self, x: Tensor) -> Tensor:
        mean, variance = (x.new_tensor(each.tolist()) for each in (self.bn.running_mean, self.bn.running_var))
        return normalised(x, mean, variance)


class HalfGiven(Folding):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, torch.zeros_like(self.bn.running_mean), self.bn.running_var)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: Masked(3), "in train mode its statistics do not move to those of what it normalises"),
        (lambda: OverTime(3), "in train mode its statistics do not move to those of what it normalises"),
        (lambda: Failing(3), r"it cannot be tried in train mode \(RuntimeError: no training here\)"),
        (Threaded, "its forward normalises by no function that torch lets us see"),
        (Folding, "'view' takes its statistics outside of it"),
        (Listing, "'stack' takes its statistics outside of it"),
        (Numbers, "'tolist' takes its statistics outside of it"),
        (HalfGiven, "'(zeros_like|batch_norm)' takes its statistics outside of it"),
    ],
)
def test_a_layer_that_runs_unmeasured_in_front_of_another_is_refused_or_left_if_allowed(
    layer: Callable[[], nn.Module], reason: str
) -> None:
    model = nn.Sequential(layer(), nn.BatchNorm1d(3)).double()
    batches = [torch.where(torch.arange(5) < 3, batch, 0.0) for batch in BATCHES]
    if isinstance(model[0], OverTime):
        batches = [batch[:, :, :3] for batch in batches]
    with pytest.raises(ModelError, match=rf"'0[.bn]*' \(\w+\) runs unmeasured.*: ({reason}).*`allow_unmeasured=True`"):
        recalibrate_bn(model, batches)
    assert model[1].running_var.equal(torch.ones(3, dtype=torch.float64))
    report = recalibrate_bn(model, batches, allow_unmeasured=True)
    assert [each.name for each in report.layers] == ["1"]
    ((name, _, said),) = report.skipped
    assert name.startswith("0")
    assert said.startswith("ran unmeasured: ")
    assert model.get_submodule(name).running_var.equal(torch.ones(3, dtype=torch.float64))


def test_a_class_of_its_own_with_channels_elsewhere_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'0' .*: its input of shape \[8, 5, 3\] has its channels elsewhere"):
        recalibrate_bn(nn.Sequential(OverTime(3)).double(), [batch.transpose(1, 2) for batch in BATCHES])


def test_a_layer_that_runs_unmeasured_behind_all_others_is_named() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), Folding()).double()
    report = recalibrate_bn(model, BATCHES)
    assert report.skipped == (("1.bn", "BatchNorm1d", "ran unmeasured: 'view' takes its statistics outside of it"),)


class Looking(nn.Module):
    """Looks at its layer, which changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.bn.register_forward_hook(self.log)
        self.bn.register_forward_pre_hook(self.log)

    @staticmethod
    def log(layer: Any, *_: Any) -> None:
        layer.running_var.sum().item()

    def forward(self, x: Tensor) -> Tensor:
        variance = self.bn.running_var
        assert variance.shape == (3,)
        assert variance.dtype == x.dtype
        assert variance.device == x.device
        assert len(variance) == variance.numel() == variance.size(0)
        return self.bn(x)


def test_shape_dtype_and_hooks_of_the_user_are_no_use_of_the_statistics() -> None:
    report = recalibrate_bn(nn.Sequential(Looking(), nn.BatchNorm1d(3)).double(), BATCHES)
    assert [layer.name for layer in report.layers] == ["0.bn", "1"]


def test_what_a_hook_of_the_user_makes_of_an_input_is_what_a_class_of_its_own_sees() -> None:
    class Own(OverTime):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(Own(3)).double()
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * 10,))
    recalibrate_bn(model, BATCHES)
    columns = DATA.movedim(1, 0).flatten(1).numpy() * 10
    np.testing.assert_allclose(model[0].running_var.numpy(), columns.var(1, ddof=1), rtol=1e-12)


class Still(nn.BatchNorm1d):
    """Frozen the usual way."""

    def train(self, mode: bool = True) -> Still:
        return super().train(False)


class Backbone(nn.Module):
    """Keeps its layers in eval mode, as `norm_eval` does."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)


class Never(nn.BatchNorm1d):
    """Never updates."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def without_tracking() -> nn.Module:
    layer = nn.BatchNorm1d(3)
    layer.track_running_stats = False
    return layer


def torchvisions() -> nn.Module:
    return nn.Sequential(nn.Unflatten(2, (5, 1)), torchvision.ops.FrozenBatchNorm2d(3), nn.Flatten(2))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Still(3), "train() leaves it in eval mode"),
        (Backbone, "train() leaves it in eval mode"),
        (lambda: nn.BatchNorm1d(3, momentum=0.0), "its momentum is 0"),
        (without_tracking, "its track_running_stats is False"),
        (lambda: Never(3), "its class never updates them"),
        (torchvisions, "its class never updates them"),
    ],
)
def test_frozen_layers_are_left_alone_and_named_or_included(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make(), nn.BatchNorm1d(3)).double().train()
    model[0].requires_grad_(False)
    modes = [module.training for module in model.modules()]
    report = recalibrate_bn(model, BATCHES)
    ((name, _, said),) = report.skipped
    assert said == f"frozen: {reason}"
    layer = model.get_submodule(name)
    assert layer.running_var.equal(torch.ones(3, dtype=torch.float64))
    np.testing.assert_allclose(model[1].running_mean, DATA.mean((0, 2)) / np.sqrt(1 + 1e-5), rtol=1e-4)

    report = recalibrate_bn(model, BATCHES, include_frozen=True)
    assert report.skipped == ()
    columns = DATA.movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(layer.running_mean.numpy(), columns.mean(1), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var.numpy(), columns.var(1, ddof=1), rtol=1e-12)
    assert [module.training for module in model.modules()] == modes


class SquaredFrozen(torchvision.ops.FrozenBatchNorm2d):
    """Divides by the variance, so that what it has is no variance."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean.view(1, -1, 1)) / self.running_var.view(1, -1, 1)


def test_a_frozen_class_that_does_not_normalise_by_its_statistics_is_refused() -> None:
    model = nn.Sequential(SquaredFrozen(3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ModelError, match="'0' .*its output has not mean 0 and variance 1"):
        recalibrate_bn(model, BATCHES, include_frozen=True)


class Fusing(nn.Module):
    """Puts its layer into the weights of its convolution in eval mode, and takes it out in train mode."""

    def __init__(self, *, really: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.really = nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), really
        self.fused = False

    def train(self, mode: bool = True) -> Fusing:
        if self.really and self.fused == mode:
            scale = (self.bn.running_var + self.bn.eps).sqrt().view(-1, 1, 1)
            self.conv.weight.data = self.conv.weight.data * scale if mode else self.conv.weight.data / scale
        self.fused = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.fused else self.bn(self.conv(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_fuses_comes_back_as_it_was(training: bool) -> None:
    model = nn.Sequential(Fusing(really=False), nn.BatchNorm1d(3)).double().train(training)
    model[1].training = not training
    report = recalibrate_bn(model, BATCHES)
    assert (model[0].fused, model[0].training, model[1].training) == (not training, training, not training)
    assert report.skipped == (("0.bn", "BatchNorm1d", "never reached"),)


def test_statistics_that_eval_folds_into_weights_are_refused() -> None:
    model = nn.Sequential(Fusing(really=True), nn.BatchNorm1d(3)).double()
    model[0].bn.running_var.fill_(4)
    weight = model[0].conv.weight.clone()
    with pytest.raises(ModelError, match=r"eval\(\) folds '0\.bn' into other weights"):
        recalibrate_bn(model, BATCHES)
    torch.testing.assert_close(model[0].conv.weight, weight, rtol=1e-12, atol=0)
    assert not model[0].fused


class Moving(nn.Module):
    """An observer, a codebook that is replaced, one changed through `.data`, and a layer put into train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.inner = nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=0.0)
        for name in ("observed", "codes", "hidden"):
            self.register_buffer(name, torch.zeros(3))
        self.register_buffer("large", torch.zeros(1 << 21))

    def forward(self, x: Tensor) -> Tensor:
        self.observed.copy_(torch.maximum(self.observed, x.amax((0, 2))))
        self.codes = self.codes * 0.9 + x.mean((0, 2)) * 0.1
        self.hidden.data.add_(1)
        self.inner.train()
        return self.inner(self.bn(x) + self.large[0])


def test_other_buffers_that_a_forward_pass_moves_are_put_back() -> None:
    model = Moving().double()
    objects = {name: id(buffer) for name, buffer in model.named_buffers()}
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    recalibrate_bn(model, BATCHES, passes=2)
    assert {name for name, buffer in model.named_buffers() if not buffer.equal(before[name])} == {
        "bn.running_mean", "bn.running_var", "bn.num_batches_tracked",
    }  # fmt: skip
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == objects


class MovingLate(Moving):
    def forward(self, x: Tensor) -> Tensor:
        if self.observed.any():
            self.large.add_(1)
        return super().forward(x)


def test_a_large_buffer_that_moves_after_the_first_batch_is_refused() -> None:
    with pytest.raises(ModelError, match="changes the buffer 'large' after the first batch"):
        recalibrate_bn(MovingLate().double(), BATCHES)


def test_a_layer_that_is_called_more_often_in_a_later_batch_is_measured_in_all_of_it() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.bn(step) for step in x.unbind(1)])

    batches = [torch.randn(8, t, 2, dtype=torch.float64) + torch.arange(float(t))[:, None] for t in (2, 9, 9)]
    model = Cell().double()
    recalibrate_bn(model, batches)
    rows = torch.cat([batch.reshape(-1, 2) for batch in batches]).numpy()
    np.testing.assert_allclose(model.bn.running_mean.numpy(), rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(model.bn.running_var.numpy(), rows.var(0, ddof=1), rtol=1e-12)


def test_a_network_that_reads_the_statistics_of_a_scripted_layer_is_refused() -> None:
    class Using(nn.Module):
        def __init__(self, other: Any) -> None:
            super().__init__()
            self.other, self.bn = other, nn.BatchNorm1d(3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(normalised(x, self.other.running_mean, self.other.running_var))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Using(torch.jit.script(nn.BatchNorm1d(3).double()))
    with pytest.raises(ModelError, match=r"'other' \(BatchNorm1d\) runs unmeasured, in front of 'bn': 'view' takes"):
        recalibrate_bn(model, BATCHES)


def test_an_exported_model_is_refused() -> None:
    class Exported(nn.Sequential):
        """As `torch.export` makes them."""

        def train(self, mode: bool = True) -> Exported:
            raise NotImplementedError("Calling train() is not supported yet.")

    with pytest.raises(ModelError, match=r"cannot be put into train and eval mode \(Calling train"):
        recalibrate_bn(Exported(nn.BatchNorm1d(3)), BATCHES)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int64])
def test_buffers_of_any_dtype_are_kept(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3).double())
    model.register_buffer("other", torch.ones(4).to(dtype))
    recalibrate_bn(model, BATCHES)
    assert model.other.to(torch.complex64).equal(torch.ones(4, dtype=torch.complex64))


class Rousing(nn.Module):
    """Puts itself into train mode as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        self.inner.train()
        return self.inner(x)


def test_a_model_that_puts_itself_into_train_mode_is_refused_and_as_before() -> None:
    model = Rousing().double().eval()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ModelError, match="the forward pass puts 'inner' into train mode, where dropout is on"):
        recalibrate_bn(model, BATCHES)
    assert not any(module.training for module in model.modules())
    assert all(each.equal(before[name]) for name, each in model.state_dict().items())
