"""The last BatchNorm layer alone is measured, behind layers that keep their statistics."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ckpt_tools.batchnorm import recalibrate_bn
from ckpt_tools.tuning.normalisation import last_layer, only
from digits_net import DigitsNet


def test_the_last_layer_alone_gets_the_statistics_of_its_input() -> None:
    torch.manual_seed(0)
    network = DigitsNet().double()
    network(torch.randn(16, 1, 8, 8).double())  # statistics of its own
    network.train()
    before = {name: each.clone() for name, each in network.state_dict().items()}
    batches = [3 * torch.randn(n, 1, 12, 12).double() for n in (8, 8, 5)]
    assert last_layer(network, batches[0], network) == "bn3"
    momenta = [layer.momentum for layer in (network.bn1, network.bn2, network.bn3)]
    with only(network, ["bn3"]):
        recalibrate_bn(network, batches)
    assert [layer.momentum for layer in (network.bn1, network.bn2, network.bn3)] == momenta
    assert network.training

    # By hand: the network in front of the layer, with the statistics that are stored, all images as one set.
    network.eval()
    x = torch.cat(batches)
    with torch.no_grad():
        x = network.bn1(network.conv1(x)).relu()
        x = nn.functional.max_pool2d(network.bn2(network.conv2(x)).relu(), 2)
        seen = network.conv3(x).numpy()
    after = network.state_dict()
    np.testing.assert_allclose(after["bn3.running_mean"].numpy(), seen.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(after["bn3.running_var"].numpy(), seen.var((0, 2, 3), ddof=1), rtol=1e-12)
    assert after["bn3.num_batches_tracked"] == 3
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {f"bn3.{what}" for what in ("running_mean", "running_var", "num_batches_tracked")}


def test_the_last_layer_is_the_one_that_is_called_last() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x))
            return out

    network = Backwards()
    assert last_layer(network, torch.ones(2, 2), network) == "last"
    assert last_layer(nn.Linear(2, 2), torch.ones(2, 2), nn.Linear(2, 2)) is None
    assert not network.first._forward_pre_hooks
