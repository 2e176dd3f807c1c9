"""`ckpt avg` of a series on a web server on this machine, against plain `curl` of the same ranges, in turns.

    python benchmarks/remote.py --bytes 1e9 --rounds 3

The server sends files by sendfile (tests/support/range_server.py). curl drops what it gets; `ckpt avg` adds it up
and writes the average. Between them, the same ranges are fetched into memory as `ckpt avg` does it, and not summed.
Needs the extra `remote`, and curl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES, BLOCK, CONNECTIONS = 4, 8 << 20, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=1e9, help="of each of 4 files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the files; a temporary one by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        folder = Path(made)
        paths = [folder / f"step_{n}.safetensors" for n in range(1, FILES + 1)]
        for path in paths:
            write(path, int(given.bytes))
        total = sum(path.stat().st_size for path in paths)
        server = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "support" / "range_server.py", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            url = (server.stdout or sys.stdin).readline().strip()
            urls = [f"{url}/{path.name}" for path in paths]
            local = [str(path) for path in paths]
            ways = {
                "curl, 16 at a time": lambda: curl(urls, paths[0].stat().st_size, folder),
                "ranges fetched, not summed": lambda: fetch(urls),
                "ckpt avg of the server": lambda: average(urls, folder),
                "ckpt avg of local files": lambda: average(local, folder),
            }
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(given.rounds):
                for name, way in ways.items():
                    taken[name].append(timed(way))
        finally:
            server.terminate()
            server.wait()
    print(f"{total / 1e9:.1f} GB in {FILES} files, {os.cpu_count()} cores, median of {given.rounds}")  # noqa: T201
    for name, samples in taken.items():
        seconds = statistics.median(wall for wall, _ in samples)
        cpu = statistics.median(used for _, used in samples)
        print(  # noqa: T201
            f"{name:28} {total / seconds / 1e6:6.0f} MB/s   {cpu / total * 1e9:.2f} CPU s/GB"
            f"   {[round(total / wall / 1e6) for wall, _ in samples]}"
        )


def write(path: Path, nbytes: int) -> None:
    """Write a safetensors file of bfloat16 tensors with 64 MB each, and random bits that are finite."""
    size = 64 << 20
    count = max(nbytes // size, 1)
    header = {
        f"layers.{i}.weight": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = bytearray(os.urandom(size))
    block[1::2] = bytes(b & 0xBF for b in block[1::2])  # no exponent of all ones
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(count):
            file.write(block)


def timed(way: object) -> tuple[float, float]:
    """Return (wall seconds, CPU seconds of the processes it starts)."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    way()  # type: ignore[operator]
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def curl(urls: list[str], nbytes: int, folder: Path) -> None:
    """Get all ranges by curl, each file by connections of its own that stay open."""
    config = folder / "ranges"
    lines = []
    for url in urls:
        for begin in range(0, nbytes, BLOCK):
            lines.append(
                f'next\nurl = "{url}"\nrange = "{begin}-{min(begin + BLOCK, nbytes) - 1}"\noutput = "/dev/null"'
            )
    config.write_text("\n".join(lines).removeprefix("next\n"))
    subprocess.run(
        ["curl", "-s", "-f", "-Z", "--parallel-max", str(CONNECTIONS), "-K", config], check=True, capture_output=True
    )


FETCH = """
import sys, threading
from ckpt_tools.series.paths import as_path
from ckpt_tools.storage.ahead import BLOCK, ReadAhead
from ckpt_tools.storage.source import OpenFiles

with OpenFiles() as files:
    paths = [as_path(url) for url in sys.argv[1:]]
    files.open_all(paths)
    nbytes = files[paths[0]].stat()[0]
    units = [[(path, at, at + BLOCK) for path in paths] for at in range(0, nbytes, BLOCK)]
    with ReadAhead(files, units.__getitem__, len(units), inputs=len(paths)) as ahead:
        for number in range(len(units)):
            ahead.wait(number, threading.Event())
            ahead.done(number)
"""


def fetch(urls: list[str]) -> None:
    subprocess.run([sys.executable, "-c", FETCH, *urls], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def average(paths: list[str], folder: Path) -> None:
    out = folder / "average.safetensors"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ckpt_tools", "avg", *paths, "-o", str(out), "--force"]
    subprocess.run(command, check=True, env=environment, capture_output=True)


if __name__ == "__main__":
    main()
