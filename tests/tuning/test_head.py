"""The classifier is found, or asked for, and what stands in front of it is named."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from ckpt_tools.errors import ModelError, NumericsError, UsageError
from ckpt_tools.tuning.head import Head, Tap, find_head, last_block
from digits_net import DigitsNet


def of_timm(name: str, num_classes: int = 3) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=num_classes)


def of_torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=3)


class Unusual(nn.Module):
    """Its classifier has no usual name, and is not the last linear layer that it lists."""

    def __init__(self, *, scaled: bool = False) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)
        self.into = nn.Linear(6, 4)
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.into(x).relu())
        return 2 * out if self.scaled else out


@pytest.mark.parametrize(
    ("make", "head", "block"),
    [
        (of_timm("test_resnet"), "fc", ("layer4.0",)),
        (of_timm("test_vit"), "head", ("blocks.5", "norm")),
        (of_timm("test_convnext"), "head.fc", ("stages.3", "head.norm")),
        (of_timm("test_efficientnet"), "classifier", ("conv_head", "bn2")),
        (of_torchvision("resnet18"), "fc", ("layer4.1",)),
        (of_torchvision("mobilenet_v3_small"), "classifier.3", ("classifier.0",)),
        (DigitsNet, "head", ("conv3", "bn3")),
        (
            lambda: nn.Sequential(
                OrderedDict(a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4), c=nn.Flatten(), d=nn.Linear(3600, 3))
            ),
            "d",
            ("a", "b"),
        ),
    ],
)
def test_the_classifier_and_the_last_block_are_found(
    make: Callable[[], nn.Module], head: str, block: tuple[str, ...]
) -> None:
    network = make().eval()
    size = 8 if isinstance(network, DigitsNet) else 160 if hasattr(network, "patch_embed") else 32
    images = torch.randn(2, 1 if isinstance(network, DigitsNet) else 3, size, size)
    found = find_head(network)
    assert (found.name, found.module) == (head, network.get_submodule(head))
    assert last_block(network, head, images) == (*block, head)
    with Tap(network, found).open() as tap:
        features, logits = tap(images)
    assert found.module(features).equal(logits)
    assert logits.equal(network(images))
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in network.modules())


def test_a_classifier_that_is_not_the_last_operation_is_refused_when_the_network_runs() -> None:
    for network, head in ((Unusual(), "into"), (Unusual(scaled=True), "out")):
        with (
            Tap(network, find_head(network, head)).open() as tap,
            pytest.raises(ModelError, match=rf"output of Unusual is not that of '{head}', so this layer .*`head`"),
        ):
            tap(torch.randn(2, 6))
    with (
        Tap(Unusual(), Head("out", Unusual().out)).open() as tap,
        pytest.raises(ModelError, match=r"is called 0 times"),
    ):
        tap(torch.randn(2, 6))


def test_the_last_linear_layer_is_only_a_guess_that_the_run_proves() -> None:
    network = Unusual()
    assert find_head(network).name == "into"
    named = find_head(network, "out")
    with Tap(network, named).open() as tap:
        features, logits = tap(torch.randn(2, 6))
    assert network.out(features).equal(logits)


def test_features_that_are_not_finite_are_refused() -> None:
    network = Unusual()
    with (
        Tap(network, find_head(network, "out")).open() as tap,
        pytest.raises(NumericsError, match="input of 'out' holds NaN"),
    ):
        tap(torch.full((2, 6), torch.nan))


@pytest.mark.parametrize(
    ("make", "name", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten()), None, ModelError, "it has no linear layer"),
        (of_timm("test_resnet", num_classes=0), None, ModelError, r"no classifier was found in ResNet"),
        (Unusual, "last", UsageError, r"`head='last'`: Unusual has no such module; it has the linear layers out, into"),
        (Unusual, "", UsageError, r"`head=''`: Unusual has no such module"),
        (DigitsNet, "dropout", UsageError, r"`head='dropout'`: is a Dropout without weights"),
    ],
)
def test_no_classifier_is_an_error_with_the_way_on(
    make: Callable[[], nn.Module], name: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        find_head(make(), name)


def test_several_classifiers_are_asked_about() -> None:
    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, depth=1, embed_dim=12)
    with pytest.raises(ModelError, match=r"several classifiers \(the linear layers .*head, head_dist\).*`head`"):
        find_head(network)


def test_a_classifier_with_nothing_in_front_of_it_has_no_last_block() -> None:
    with pytest.raises(ModelError, match="no block stands in front of '1'"):
        last_block(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), "1", torch.ones(2, 4))


def test_a_block_that_does_not_run_and_a_scale_are_no_last_block() -> None:
    class Auxiliary(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.scale(self.body(x)))
            return out

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    layers = {"body": nn.Linear(4, 4), "scale": Scale(), "aux": nn.Linear(4, 3), "head": nn.Linear(4, 3)}
    network = Auxiliary(OrderedDict(layers))
    assert last_block(network, "head", torch.ones(2, 4)) == ("body", "scale", "head")


def test_a_network_that_gives_more_than_logits_is_told_so() -> None:
    class Pair(DigitsNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images), 1  # type: ignore[return-value]

    network = Pair().eval()
    with (
        Tap(network, Head("head", network.head)).open() as tap,
        pytest.raises(ModelError, match="Pair gives tuple in place of logits"),
    ):
        tap(torch.zeros(2, 1, 8, 8))


def test_a_network_that_moves_its_data_to_another_device_is_refused() -> None:
    class Moving(DigitsNet):
        def forward(self, images: Tensor) -> Tensor:
            self.to("meta")
            return super().forward(images.to("meta"))

    network = Moving().eval()
    with (
        Tap(network, Head("head", network.head)).open() as tap,
        pytest.raises(ModelError, match="the forward pass of Moving moves its data from cpu to meta"),
    ):
        tap(torch.zeros(2, 1, 8, 8))
