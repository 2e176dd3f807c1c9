"""BatchNorm statistics of ResNet-50 at 224 pixels: ``python bn.py WAY BATCHES DEVICE``, in a new process.

Every way gets the same network and the same batches, which are in memory; the first batch warms up. `forward` is the
network alone, in eval mode, with the memory order and allocator settings of `ckpt`: the upper bound of the rate.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torchvision

BATCH = 32


def measure(way: str, count: int, device: str) -> dict[str, float]:
    torch.manual_seed(0)
    network = torchvision.models.get_model("resnet50").to(device)
    batches = [torch.randn(BATCH, 3, 224, 224).to(device) for _ in range(count)]

    def timed(work: Callable[[Any], object], passes: int = 1) -> dict[str, float]:
        seconds = 0.0
        for data in (batches[:1], batches):
            start = time.perf_counter()
            work(data)
            if device != "cpu":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "images": passes * BATCH * count}

    if way == "update_bn":
        return timed(lambda data: torch.optim.swa_utils.update_bn(data, network))
    if way == "fvcore":
        from fvcore.nn.precise_bn import update_bn_stats

        network.train()
        with torch.no_grad():
            return timed(lambda data: update_bn_stats(network, data, num_iters=len(data)))
    from ckpt_tools.batchnorm import recalibrate_bn
    from ckpt_tools.evaluation.runner import large_blocks_kept

    network.to(memory_format=torch.channels_last)
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    if way == "forward":
        network.eval()
        with torch.no_grad(), large_blocks_kept() if device == "cpu" else nullcontext():
            return timed(lambda data: [network(batch) for batch in data])
    passes = 2 if way.endswith("2 passes") else 1
    with large_blocks_kept() if device == "cpu" else nullcontext():
        return timed(lambda data: recalibrate_bn(network, data, passes=passes), passes)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3])) + "\n")
