"""Digits of scikit-learn at other sizes, in memory, and networks that train on them in no time."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from digits_net import DigitsNet


@cache
def digits(size: int) -> tuple[Tensor, Tensor]:
    """Return 600 images [600, 1, size, size] in [0, 1], enlarged bilinearly, and int64 labels [600]."""
    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images[:600]).float().view(-1, 1, 8, 8) / 16
    shown = small if size == 8 else F.interpolate(small, (size, size), mode="bilinear")
    return shown, torch.from_numpy(labels[:600])


def part(size: int, begin: int, end: int) -> TensorDataset:
    images, labels = digits(size)
    return TensorDataset(images[begin:end], labels[begin:end])


def train8() -> TensorDataset:
    return part(8, 0, 300)


def train12() -> TensorDataset:
    return part(12, 0, 300)


def val12() -> TensorDataset:
    return part(12, 300, 600)


def batches12() -> list[tuple[Tensor, Tensor]]:
    """The training images as a list of batches, which has no number of images."""
    images, labels = digits(12)
    return [(images[i : i + 50], labels[i : i + 50]) for i in range(0, 300, 50)]


def stream12() -> object:
    return iter(batches12())


def eleven() -> TensorDataset:
    """Labels that the network does not have."""
    return TensorDataset(digits(12)[0][:40], torch.arange(40) % 11)


class Broken(TensorDataset):
    """One of its images cannot be read."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if index == 7:
            raise OSError("no image")
        return super().__getitem__(index)


def broken12() -> TensorDataset:
    return Broken(*part(12, 0, 300).tensors)


def unlabelled() -> list[Tensor]:
    return [digits(12)[0][:40]]


def failing() -> list[tuple[Tensor, Tensor]]:
    class Failing(list):  # type: ignore[type-arg]
        def __iter__(self) -> object:  # type: ignore[override]
            yield digits(12)[0][:40], digits(12)[1][:40]
            raise OSError("the cable is out")

    return Failing()


@cache
def trained(seed: int = 0) -> DigitsNet:
    """Return a network trained at 8 x 8, four epochs."""
    torch.manual_seed(seed)
    network = DigitsNet(0.1)
    images, labels = digits(8)
    optimizer = torch.optim.SGD(network.parameters(), 0.2, 0.9)
    for _ in range(6):
        for batch in torch.randperm(300).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return network.eval()


class Twelve(DigitsNet):
    """Takes 12 x 12 alone."""

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] != 12:
            raise ValueError(f"a side of {images.shape[2]}, not 12")
        return super().forward(images)


class Late(DigitsNet):
    """Fails after some batches."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        Late.calls += 1
        if Late.calls > 12:
            raise RuntimeError("out of luck")
        return super().forward(images)


class Doubled(DigitsNet):
    """Its output is not that of its last layer."""

    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


class Student(nn.Module):
    """An eighth of DigitsNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(images).mean((2, 3)))
        return logits


def nine() -> nn.Module:
    """A teacher of nine classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 9))


def teacher() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 10))


def raising() -> nn.Module:
    raise RuntimeError("no weights")


def text() -> str:
    return "teacher"


class Tied(DigitsNet):
    """The weights of its classifier stand in a second place."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(32, 10, bias=False)
        self.again.weight = self.head.weight


PHOTOS: list[Tensor] = []


def teacher_of_photos() -> nn.Module:
    """A teacher of three classes that keeps what it sees."""

    class Keeping(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            PHOTOS.append(images)
            return torch.zeros(len(images), 3)

    return Keeping()
