"""What a pass is worth: the distance of BatchNorm statistics to their fixed point, on three networks of the digits.

``python bn_passes.py`` prints, for batches of 64 and 256 images and some numbers of passes, the factor between the
variances and those of the fixed point: the geometric mean over layers and channels, and that of the worst layer. At the
fixed point each layer has the statistics of its inputs when all layers use theirs; it is found layer by layer. The
weights are averages of three branches of a short training.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ckpt_tools.batchnorm import recalibrate_bn

BATCHES = (64, 256)


class Convolving(nn.Module):
    """Convolution modules of a Conformer, over the rows of an image."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.start, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(6))
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(6))
        self.depthwise = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1, groups=width) for _ in range(6))
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(6))
        self.outs = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x[:, 0])
        for norm, gate, depthwise, bn, out in zip(
            self.norms, self.gates, self.depthwise, self.bns, self.outs, strict=True
        ):
            y = F.glu(gate(norm(x).transpose(1, 2)), 1)
            x = x + out(F.silu(bn(depthwise(y)))).transpose(1, 2)
        return self.head(x.mean(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*_layer(16, 16), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def _layer(inside: int, outside: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]


def _with_head(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain, 12 layers": lambda: _with_head(
        *_layer(1, 16), *(part for i in range(1, 12) for part in _layer(16, 16, 2 if i in (3, 7) else 1))
    ),
    "residual, 11 layers": lambda: _with_head(*_layer(1, 16), *(Residual() for _ in range(5))),
    "Conformer's modules, 6 layers": Convolving,
}


def averaged(make: Callable[[], nn.Module], images: Tensor, labels: Tensor) -> nn.Module:
    """Train a start and three branches of it, and average these, statistics included."""

    def trained(model: nn.Module, steps: int, lr: float, seed: int) -> nn.Module:
        model = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        for rows in torch.randint(0, len(images), (steps, 64), generator=torch.Generator().manual_seed(seed)):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
        return model

    torch.manual_seed(0)
    start = trained(make(), 80, 0.05, 0)
    states = [trained(start, 60, 0.1, seed).state_dict() for seed in (1, 2, 3)]
    start.load_state_dict({name: sum(state[name] for state in states) / 3 for name in states[0]})
    return start.double()


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def fixed_point(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the variances of the fixed point, layer by layer in the order of the calls."""
    model = copy.deepcopy(model).eval()
    for layer in layers_of(model):
        seen: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(images)
        hook.remove()
        columns = seen[0].movedim(1, 0).flatten(1)
        layer.running_mean.copy_(columns.mean(1))
        layer.running_var.copy_(columns.var(1))
    return [layer.running_var for layer in layers_of(model)]


def main() -> None:
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images[:1280] / 16, dtype=torch.float32)[:, None]
    for name, make in NETWORKS.items():
        model = averaged(make, images, torch.tensor(digits.target[:1280]))
        want = fixed_point(model, images.double())
        for batch in BATCHES:
            sys.stdout.write(f"{name}, batches of {batch}:")
            for passes in (1, 2, 4, 8, len(want)):
                measured = copy.deepcopy(model)
                recalibrate_bn(measured, images.double().split(batch), passes=passes)
                pairs = zip(layers_of(measured), want, strict=True)
                logs = torch.stack([(layer.running_var / right).log().abs().mean() for layer, right in pairs])
                sys.stdout.write(f"  {passes}: {logs.mean().exp():.4f} ({logs.max().exp():.3f})")
            sys.stdout.write("\n")


if __name__ == "__main__":
    main()
