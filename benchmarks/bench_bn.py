"""BatchNorm recalibration beside torch's update_bn and fvcore's update_bn_stats: images a second.

    python benchmarks/bench_bn.py                            # ResNet-50 at 224, CPU, fp32
    python benchmarks/bench_bn.py --device cuda --amp --batch-size 256 --batches 20

Every way gets the same network and the same batches, which lie in memory, in a fresh process; rounds are
interleaved. The first batch warms up and is not timed. `forward` is the network alone, in eval mode, with the
same memory order, allocator settings and precision as `ckpt`: a rate that nothing which looks at all layers beats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from harness import make_console, run

WAYS = ("forward", "update_bn", "fvcore", "ckpt", "ckpt, 2 passes")


def measure(way: str, options: argparse.Namespace) -> float:
    """Return images a second of one way, in this process."""
    import torch
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.get_model(options.model).to(options.device)
    shape = (options.batch_size, 3, options.size, options.size)
    batches = [torch.randn(shape).to(options.device) for _ in range(options.batches)]
    count = options.batch_size * options.batches
    amp = torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16, enabled=options.amp)

    def timed(work: Callable[[Any], object]) -> float:
        with amp:
            work(batches[:1])
            if options.device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work(batches)
            if options.device != "cpu":
                torch.cuda.synchronize()
            return count / (time.perf_counter() - start)

    if way == "update_bn":
        return timed(lambda data: torch.optim.swa_utils.update_bn(data, network))
    if way == "fvcore":
        from fvcore.nn.precise_bn import update_bn_stats

        network.train()
        with torch.no_grad():
            return timed(lambda data: update_bn_stats(network, data, num_iters=len(data)))
    from ckpt_tools.batchnorm import recalibrate_bn
    from ckpt_tools.batchnorm.running import keep_large_blocks

    if options.device == "cpu":
        keep_large_blocks()
    network.to(memory_format=torch.channels_last)
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    if way == "forward":
        network.eval()
        with torch.no_grad():
            return timed(lambda data: [network(batch) for batch in data])
    passes = 2 if way.endswith("2 passes") else 1
    return passes * timed(lambda data: recalibrate_bn(network, data, passes=passes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="of torchvision")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        sys.stdout.write(json.dumps(measure(options.way, options)) + "\n")
        return
    console = make_console()
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    load: dict[str, float] = dict.fromkeys(WAYS, 0.0)
    child = [sys.executable, str(Path(__file__).absolute()), *sys.argv[1:]]
    for number in range(options.rounds):
        for way in WAYS:
            done = run([*child, "--way", way])
            rates[way].append(json.loads(done.stdout.strip().splitlines()[-1]))
            load[way] = max(load[way], done.others)
        shown = "; ".join(f"{way} {found[-1]:.1f}" for way, found in rates.items())
        console.print(f"round {number + 1} of {options.rounds}, images/s: {shown}")
    faster = max(statistics.median(rates[way]) for way in ("update_bn", "fvcore"))
    table = Table(title=f"{options.model} at {options.size}, batches of {options.batch_size}, {options.device}")
    for title in ("way", "images/s, median (min-max)", "÷ faster of update_bn, fvcore", "÷ forward", "other load"):
        table.add_column(title, justify="left" if title == "way" else "right")
    forward = statistics.median(rates["forward"])
    for way, found in rates.items():
        median = statistics.median(found)
        span = f"{median:.1f} ({min(found):.1f}-{max(found):.1f})"
        table.add_row(way, span, f"{median / faster:.2f}", f"{median / forward:.2f}", f"{load[way]:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
