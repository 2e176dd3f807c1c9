"""Measure `ckpt avg` on the CPU and on a GPU, and the rates that bound it; needs only torch and this checkout.

    python benchmarks/bench_gpu.py                 # 6 files of 1.2 GB; 10 GB of disk
    python benchmarks/bench_gpu.py --scale 0.05 --device cpu --rounds 1   # a test of the script

Rates count the bytes of the inputs. `without start-up` leaves out the imports and the first use of the device; `whole`
is the whole process. The exit code is 1 if the outputs of the devices differ in a byte.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import GB, cool, facts, run, run_job, warm
from series import BY_NAME

CHUNK = 4 << 20


def pinned(device: str) -> None:
    """Print GB/s from pinned memory of the host to the device and back; 256 MB at a time."""
    import torch

    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    rates = {}
    for name, target, source in (("to the device", there, host), ("from it", host, there)):
        target.copy_(source)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(16):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates[name] = 16 * host.numel() / (time.perf_counter() - start) / GB
    sys.stdout.write(json.dumps({"device": torch.cuda.get_device_name(device), "torch": torch.__version__, **rates}))


def read(paths: list[str]) -> float:
    """Return GB/s of plain reads into reused buffers, one thread for each core that this process may use."""
    places = iter([(path, at) for path in paths for at in range(0, Path(path).stat().st_size, CHUNK)])
    lock, done = threading.Lock(), []

    def work() -> None:
        buffer, opened, count = bytearray(CHUNK), {path: os.open(path, os.O_RDONLY) for path in paths}, 0
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                break
            count += os.preadv(opened[place[0]], [buffer], place[1])  # without the interpreter's lock
        for descriptor in opened.values():
            os.close(descriptor)
        done.append(count)

    threads = [threading.Thread(target=work) for _ in os.sched_getaffinity(0)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - start) / GB


@contextmanager
def confined(cores: int) -> Iterator[None]:
    """Limit this process and its children to some cores, as `taskset` does."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", choices=BY_NAME, default="vit-l-st")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the file size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the files here (default: a temporary folder)")
    parser.add_argument("--device", action="append", help="repeatable (default: cpu and cuda)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--pinned", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pinned:
        pinned(options.pinned)
        return 0
    devices, cores, say = options.device or ["cpu", "cuda"], len(os.sched_getaffinity(0)), sys.stdout.write
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        series = BY_NAME[options.series]
        paths = series.paths(folder, options.scale)
        run_job("make", series.name, str(options.scale), *(path for path in paths if not Path(path).exists()))
        size = sum(Path(path).stat().st_size for path in paths) / GB
        found: dict[str, object] = {"facts": facts(folder), "input GB": size}
        for device in devices:
            if device != "cpu":
                rates = run([sys.executable, __file__, "--pinned", device])[1]
                found[f"pinned memory, GB/s, {device}"] = json.loads(rates)
        warm(paths)
        wanted = sorted({min(2, cores), cores}, reverse=True)
        for count in wanted:
            with confined(count):
                found[f"page cache, GB/s, {count} cores"] = max(read(paths) for _ in range(options.rounds))
        say(json.dumps(found, indent=1) + "\n")
        say("| cores | page cache | device | without start-up, s | input GB/s | whole, s | peak RSS, GB |\n")
        say("|---:|---|---|---:|---:|---:|---:|\n")
        outputs, rows = {}, []
        for count in wanted:
            for state in ("warm", "cold"):
                samples: dict[str, list[tuple[float, float, float]]] = {device: [] for device in devices}
                for number in range(options.rounds + 1):  # the first one warms up
                    for device in devices:
                        outputs[device] = str(folder / f"out-{device.replace(':', '-')}{series.suffix}")
                        (cool if state == "cold" else warm)(paths)
                        with confined(count):
                            done, told = run_job("ours", device, outputs[device], *paths)
                        if number:
                            samples[device].append((told["seconds"], done.seconds, done.rss_gb))
                for device, each in samples.items():
                    apart, whole, rss = map(statistics.median, zip(*each, strict=True))
                    rows.append([count, state, device, apart, size / apart, whole, rss])
                    figures = " | ".join(f"{value:.2f}" for value in (apart, size / apart, whole, rss))
                    say(f"| {count} | {state} | {device} | {figures} |\n")
        first, *rest = outputs.values()
        equal = all(filecmp.cmp(first, other, shallow=False) for other in rest)
    say(f"Outputs equal byte for byte: {equal if rest else 'only one device'}\n")
    if options.json:
        options.json.write_text(json.dumps(found | {"averages": rows, "equal": equal}, indent=1) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
