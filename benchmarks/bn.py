"""BatchNorm statistics of ResNet-50 at 224 pixels, beside the forward pass alone.

    python benchmarks/bn.py                      # all ways in turns, in one process: a table
    python benchmarks/bn.py --rounds 9 --batches 2 --device cuda
    python benchmarks/bn.py --way forward        # one way, for bench.py, which wants a new process for each: JSON

Every way gets the same network and the same batches, which are in memory; one batch before them is not counted.
`forward` is the network alone, in eval mode, with the memory order and allocator settings of `ckpt`: the upper bound of
the rate. Ratios in the table are medians of those within a round, which other work on the machine changes less. fvcore
is left out if it is not installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
import torchvision

BATCH = 32
WAYS = ("forward", "update_bn", "fvcore", "ckpt", "ckpt, 2 passes")
Work = Callable[[list[torch.Tensor]], object]


class Way:
    """One way, with a network of its own."""

    def __init__(self, name: str, batches: list[torch.Tensor], device: str) -> None:
        torch.manual_seed(0)
        self.network = torchvision.models.get_model("resnet50").to(device)
        self.device = device
        self.passes = 2 if name.endswith("2 passes") else 1
        self.batches = [batch.to(device) for batch in batches]
        self.settings: Callable[[], AbstractContextManager[None]] = nullcontext
        if name == "forward" or name.startswith("ckpt"):
            from ckpt_tools.evaluation.runner import large_blocks_kept

            self.network.to(memory_format=torch.channels_last)
            self.batches = [batch.contiguous(memory_format=torch.channels_last) for batch in self.batches]
            self.settings = large_blocks_kept if device == "cpu" else nullcontext
        self.work: Work = {"forward": self.forward, "update_bn": self.update_bn, "fvcore": self.fvcore}.get(
            name, self.ckpt
        )

    def forward(self, batches: list[torch.Tensor]) -> None:
        self.network.eval()
        with torch.no_grad():
            for batch in batches:
                self.network(batch)

    def update_bn(self, batches: list[torch.Tensor]) -> None:
        torch.optim.swa_utils.update_bn(batches, self.network)

    def fvcore(self, batches: list[torch.Tensor]) -> None:
        from fvcore.nn.precise_bn import update_bn_stats

        self.network.train()
        with torch.no_grad():
            update_bn_stats(self.network, batches, num_iters=len(batches))

    def ckpt(self, batches: list[torch.Tensor]) -> None:
        from ckpt_tools.batchnorm import recalibrate_bn

        recalibrate_bn(self.network, batches, passes=self.passes)

    def run(self) -> dict[str, float]:
        """Return wall seconds, CPU seconds and images of all batches, after one batch that is not counted."""
        with self.settings():
            self.work(self.batches[:1])
            self.wait()
            start, cpu = time.perf_counter(), time.process_time()
            self.work(self.batches)
            self.wait()
            found = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        return found | {"images": self.passes * BATCH * len(self.batches)}

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def in_turns(names: list[str], batches: list[torch.Tensor], device: str, rounds: int) -> None:
    """Print a table of all ways: medians over the rounds."""
    ways = {name: Way(name, batches, device) for name in names}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs[name].append(ways[name].run())
    head = ["way", "images a second", "/ forward", "CPU ms an image", "/ forward, by CPU time"]
    lines = ["| " + " | ".join(head) + " |", "| --- | ---: | ---: | ---: | ---: |"]
    for name in names:
        rates = {unit: [run["images"] / run[unit] for run in runs[name]] for unit in ("seconds", "cpu")}
        bare = {unit: [run["images"] / run[unit] for run in runs["forward"]] for unit in ("seconds", "cpu")}
        ratios = {
            unit: statistics.median(a / b for a, b in zip(rates[unit], bare[unit], strict=True)) for unit in rates
        }
        rate, cpu = (statistics.median(rates[unit]) for unit in ("seconds", "cpu"))
        lines.append(f"| {name} | {rate:.1f} | {ratios['seconds']:.2f} | {1e3 / cpu:.1f} | {ratios['cpu']:.2f} |")
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(1)
    batches = [torch.randn(BATCH, 3, 224, 224) for _ in range(options.batches)]
    if options.way is not None:
        sys.stdout.write(json.dumps(Way(options.way, batches, options.device).run()) + "\n")
        return
    names = [name for name in WAYS if name != "fvcore" or find_spec("fvcore")]
    in_turns(names, batches, options.device, options.rounds)


if __name__ == "__main__":
    main()
