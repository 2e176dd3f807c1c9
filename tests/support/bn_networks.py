"""Small networks with BatchNorm in each of the places where it is found, with batches and the way they are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d, convert_splitbn_model
from timm.layers.evo_norm import EvoNorm2dB0, EvoNorm2dB1
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

relu = torch.relu


def conv(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1), nn.BatchNorm2d(outside), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(channels, channels), nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return relu(x + self.body(x))


class Conformer(nn.Module):
    """Half-step feed-forward, attention, convolution module with BatchNorm1d over time, half-step feed-forward."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.first, self.last = (nn.Sequential(nn.Linear(width, 16), nn.SiLU(), nn.Linear(16, width)) for _ in "ab")
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.pointwise = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, 5, padding=2, groups=width)
        self.bn = nn.BatchNorm1d(width)
        self.out = nn.Conv1d(width, width, 1)
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:  # [N, T, C]
        x = x + self.first(self.norms[0](x)) / 2
        y = self.norms[1](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = F.glu(self.pointwise(self.norms[2](x).transpose(1, 2)), dim=1)
        x = x + self.out(F.silu(self.bn(self.depthwise(y)))).transpose(1, 2)
        return self.head((x + self.last(self.norms[3](x)) / 2).mean(1))


class PointNet(nn.Module):
    """Points [N, 3, P] turned by a network of their own, shared MLP, maximum over the points."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.ReLU())
        self.matrix = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 9))
        self.shared = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 1))
        self.bn = nn.BatchNorm1d(8)

    def forward(self, points: Tensor) -> Tensor:
        turned = self.matrix(self.turn(points).amax(2)).view(-1, 3, 3) @ points
        return self.bn(self.shared(turned)).amax(2)


class UNet(nn.Module):
    """Called by keyword: ``sample`` [N, C, H, W] and ``timestep`` [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.SiLU())
        self.down, self.middle, self.up = conv(2, 4), conv(4, 8, 2), conv(12, 4)

    def forward(self, sample: Tensor, timestep: Tensor, labels: Any = None) -> Tensor:
        assert labels is None
        left = self.down(sample)
        low = self.middle(left) + self.time(timestep[:, None])[..., None, None]
        return self.up(torch.cat([left, F.interpolate(low, scale_factor=2)], 1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.numbers = conv(3, 4), nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        self.both = nn.BatchNorm1d(8)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        return self.both(torch.cat([self.image(image).mean((2, 3)), self.numbers(numbers)], 1))


class Recurrent(nn.Module):
    """One BatchNorm at each step of sequences [N, T, C], T of each batch its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.bn, self.out = nn.GRUCell(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            state = self.bn(self.cell(step, state))
        return self.out(state)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = nn.BatchNorm2d(3)
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in "ab")
        self.out = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(relu(self.other(self.convs[1](relu(self.one(self.convs[0](x)))))))


class TimeLast(nn.BatchNorm1d):
    """Takes [N, T, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Packed(nn.BatchNorm1d):
    """Leaves padding out, in training and in use."""

    def forward(self, x: Tensor, real: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.zeros_like(x)
        out[real] = super().forward(x[real])
        return out


class PackedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear, self.second = Packed(4), nn.Linear(4, 4), Packed(4)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(frames.shape[1]) < lengths[:, None]
        return self.second(self.linear(self.first(frames, real)), real)


class ByHand(nn.Module):
    """Calls functions and methods in place of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        x = F.batch_norm(x, first.running_mean, first.running_var, first.weight, first.bias, eps=first.eps)
        x = second.forward(self.convs[0](x))
        mean, variance = third.running_mean, third.running_var
        x = self.convs[1](x)
        return torch.batch_norm(x, third.weight, third.bias, mean, variance, False, 0.1, third.eps, False)


class OwnNorm(nn.Module):
    """A class of one's own, with statistics [1, C, 1, 1] and arithmetic in place of torch's function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.momentum, self.eps = 0.9, 1e-5
        for name, value in (("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((1, channels, 1, 1), value))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return (x - self.running_mean) / torch.sqrt(self.running_var + self.eps)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        self.running_mean = self.momentum * self.running_mean + (1 - self.momentum) * mean
        self.running_var = self.momentum * self.running_var + (1 - self.momentum) * variance
        return (x - mean) / torch.sqrt(variance + self.eps)


class Gated(nn.Module):
    """Squeeze and excitation, with BatchNorm in the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 6, 1), nn.Sigmoid()
        )
        self.out = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(x * self.gate(x))


class Branches(nn.Module):
    """Inception: branches side by side, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 2, k, padding=k // 2), nn.BatchNorm2d(2), nn.ReLU()) for k in (1, 3, 5)
        )
        self.out = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([branch(x) for branch in self.branches], 1))


class Rep(nn.Module):
    """RepVGG: three branches, one of them BatchNorm alone."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.small, self.skip = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.large(x) + self.small(x) + self.skip(x))


class Causal(nn.Module):
    """Dilated causal convolutions over time, [N, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 2, dilation=2**i) for i in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer, bn in zip(self.convs, self.bns, strict=True):
            x = x + torch.tanh(bn(layer(F.pad(x, (layer.dilation[0], 0)))))
        return x


class Graph(nn.Module):
    """Graph convolutions: nodes [V, C] and an adjacency matrix, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in "ab")
        self.bns = nn.ModuleList(nn.BatchNorm1d(4) for _ in "ab")

    def forward(self, nodes: Tensor, adjacency: Tensor, target: Tensor | None = None) -> Tensor:
        for linear, bn in zip(self.linears, self.bns, strict=True):
            nodes = relu(bn(linear(adjacency @ nodes)))
        return nodes


class Pyramid(nn.Module):
    """One convolution over several scales, with a BatchNorm for each, as in EfficientDet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bns = nn.Conv2d(3, 3, 3, padding=1), nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [bn(self.conv(F.avg_pool2d(x, 2**i))) for i, bn in enumerate(self.bns)]


class Rematerialised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.two, checkpoint(self.one, x, use_reentrant=False), use_reentrant=False)


class Choosing(nn.Module):
    """Takes one of two branches for each batch, by what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = conv(3, 4), conv(3, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.left(x) if x.mean() > 0 else self.right(x))


class Detector(nn.Module):
    """Takes a list of images, each of its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 4), nn.BatchNorm1d(4)

    def forward(self, images: list[Tensor]) -> Tensor:
        height, width = (max(image.shape[i] for image in images) for i in (1, 2))
        padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
        return self.head(self.stem(torch.stack(padded)).mean((2, 3)))


class Inferring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.two(self.one(x))


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.bn = nn.Linear(5, 24), nn.BatchNorm1d(24)
        self.up = nn.Sequential(nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, z: Tensor) -> Tensor:
        return self.up(relu(self.bn(self.start(z))).view(-1, 6, 2, 2))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5 + 0.5


def pictures(channels: int = 3, size: int = 6, n: int = 4) -> Callable[[], list[Any]]:
    return lambda: [random(n, channels, size, size, seed=i) for i in range(3)]


def lengths(n: int, longest: int) -> Tensor:
    return torch.arange(n) % longest + 1


@dataclass(frozen=True)
class Case:
    """A network.

    Attributes:
        make: builds it.
        batches: of float64.
        options: of `recalibrate_bn`.
    """

    make: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    options: dict[str, Any] = field(default_factory=dict)


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(conv(3, 4), Residual(4)))


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(4, (1, 2), 8, bn_size=2, num_classes=5)


def lazy() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.LazyBatchNorm2d())
    model(torch.zeros(2, 3, 6, 6))
    return model


CASES: dict[str, Case] = {
    "MLP": Case(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 4), nn.BatchNorm1d(4)),
        lambda: [random(8, 5, seed=i) for i in range(3)],
    ),
    "CNN": Case(lambda: nn.Sequential(conv(3, 4), nn.Dropout2d(), conv(4, 4)), pictures()),
    "ResNet (timm)": Case(lambda: timm.create_model("test_resnet", num_classes=5), pictures(size=32, n=3)),
    "EfficientNet (timm)": Case(
        lambda: timm.create_model("test_efficientnet", drop_path_rate=0.5), pictures(size=32, n=3)
    ),
    "MobileNetV2 (torchvision)": Case(
        lambda: torchvision.models.mobilenet_v2(
            width_mult=0.1, num_classes=5, inverted_residual_setting=[[1, 8, 1, 1], [6, 8, 2, 2]]
        ),
        pictures(size=16),
    ),
    "DenseNet (torchvision)": Case(densenet, pictures(size=32)),
    "Residual": Case(lambda: nn.Sequential(Residual(3), Residual(3)), pictures()),
    "Squeeze and excitation": Case(Gated, pictures()),
    "Inception": Case(Branches, pictures()),
    "RepVGG": Case(lambda: nn.Sequential(Rep(), Rep()), pictures()),
    "Pyramid": Case(Pyramid, pictures(size=8)),
    "DCGAN generator": Case(Generator, lambda: [random(6, 5, seed=i) for i in range(3)]),
    "Conformer": Case(Conformer, lambda: [random(4, 7, 8, seed=i) for i in range(3)]),
    "Causal convolutions": Case(Causal, lambda: [random(4, 4, 9, seed=i) for i in range(3)]),
    "PointNet": Case(PointNet, lambda: [random(4, 3, 12, seed=i) for i in range(3)]),
    "Video (BatchNorm3d)": Case(
        lambda: nn.Sequential(
            nn.Conv3d(2, 3, 3, padding=1), nn.BatchNorm3d(3), nn.ReLU(), nn.Conv3d(3, 3, 2), nn.BatchNorm3d(3)
        ),
        lambda: [random(2, 2, 4, 5, 5, seed=i) for i in range(3)],
    ),
    "UNet by keyword": Case(
        UNet,
        lambda: [
            {"sample": random(4, 2, 4, 4, seed=i), "timestep": random(4, seed=9 + i), "labels": torch.arange(4)}
            for i in range(3)
        ],
    ),
    "Two inputs": Case(
        TwoInputs,
        lambda: [(random(4, 3, 5, 5, seed=i), random(4, 5, seed=9 + i), torch.arange(4)) for i in range(3)],
        {"inputs": 2},
    ),
    "Two inputs, by a function": Case(
        TwoInputs,
        lambda: [{"a": random(4, 3, 5, 5, seed=i), "b": [random(4, 5, seed=9 + i)]} for i in range(3)],
        {"forward": lambda model, batch: model(batch["a"], batch["b"][0])},
    ),
    "Graph": Case(
        Graph,
        lambda: [{"nodes": random(6, 4, seed=i), "adjacency": random(6, 6, seed=5 + i), "target": 0} for i in range(3)],
    ),
    "Recurrent": Case(Recurrent, lambda: [random(4, t, 3, seed=t) for t in (2, 5, 3)]),
    "Tied": Case(Tied, pictures()),
    "Detector, a list of images": Case(
        Detector, lambda: [([random(3, 5 + i, 6, seed=9 * i + k) for k in range(4)], ["labels"]) for i in range(3)]
    ),
    "Segmentation, one image a batch": Case(
        lambda: nn.Sequential(conv(3, 4), conv(4, 4)), lambda: [random(1, 3, 5 + i, 7, seed=i) for i in range(4)]
    ),
    "Branch by the batch": Case(Choosing, lambda: [random(4, 3, 4, 4, seed=i) - i % 2 * 3 for i in range(4)]),
    "EvoNorm (timm)": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), EvoNorm2dB0(4), nn.Conv2d(4, 4, 1), EvoNorm2dB1(4)), pictures()
    ),
    "BatchNormAct and SplitBatchNorm (timm)": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), convert_splitbn_model(BatchNormAct2d(4), 2)),
        pictures(),
    ),
    "SyncBatchNorm": Case(
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(conv(3, 4), conv(4, 4))), pictures()
    ),
    "Lazy, after its first batch": Case(lazy, pictures()),
    "Subclass that transposes": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), TimeLast(6), nn.Linear(6, 6), TimeLast(6)),
        lambda: [random(4, 6, 4, seed=i) for i in range(3)],
    ),
    "Subclass that leaves padding out": Case(
        PackedNet, lambda: [{"frames": random(4, 5, 4, seed=i), "lengths": lengths(4, 5)} for i in range(3)]
    ),
    "Functions and methods in place of layers": Case(ByHand, pictures()),
    "A class of one's own": Case(lambda: nn.Sequential(OwnNorm(3), nn.Conv2d(3, 4, 3), OwnNorm(4)), pictures()),
    "Checkpointed activations": Case(Rematerialised, pictures()),
    "Traced (torch.fx)": Case(traced, pictures()),
    "inference_mode inside": Case(Inferring, pictures()),
}
