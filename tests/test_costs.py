"""What a job costs, counted and not timed: bytes and calls by the kernel's count, private memory, imports.

Each job runs in a process of its own. The limits stand a little above what was counted; a second pass over the
payload, a call for each small tensor, or a whole tensor held in memory goes far beyond them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts a process's calls")

FILES = 4
LARGE, SMALL = 4, 600  # tensors
LARGE_SHAPE, SMALL_SHAPE = (1024, 1024), (96,)

COUNTED = """
import importlib, json, os, re, sys
import ckpt_tools

def fields(path):
    return {name: int(value) for name, value in re.findall(r"(\\w+):\\s+(\\d+)", open(path).read())}

job, native = json.loads(sys.argv[1]), sys.argv[2] == "native"
getattr(ckpt_tools, job["function"])  # imports what it needs
importlib.import_module("ckpt_tools.engine")
if not native:
    importlib.import_module("ckpt_tools.native")._native = None
    importlib.import_module("ckpt_tools.summing")
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
status, before = fields("/proc/self/status"), fields("/proc/self/io")
getattr(ckpt_tools, job["function"])(*job["arguments"], **job["options"])
after, peak = fields("/proc/self/io"), fields("/proc/self/status")["VmHWM"]
print(json.dumps({
    "read": after["rchar"] - before["rchar"], "written": after["wchar"] - before["wchar"],
    "reads": after["syscr"] - before["syscr"], "writes": after["syscw"] - before["syscw"],
    "memory": 1024 * (peak - status["VmRSS"]), "torch": "torch" in sys.modules,
}))
"""


@dataclass(frozen=True)
class Cost:
    """Bytes read and written, calls that read and write, bytes of memory beyond the start, torch imported or not."""

    read: int
    written: int
    reads: int
    writes: int
    memory: int
    torch: bool


def cost(function: str, *arguments: object, way: str = "native", **options: object) -> Cost:
    job = json.dumps({"function": function, "arguments": arguments, "options": options}, default=str)
    done = subprocess.run([sys.executable, "-c", COUNTED, job, way], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Cost(**json.loads(done.stdout))


@pytest.fixture(scope="module", params=["pth", "safetensors"])
def series(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("series")
    paths = [folder / f"step-{i}.{request.param}" for i in range(FILES)]
    for i, path in enumerate(paths):
        torch.manual_seed(i)
        tensors = {f"module.large.{k}": torch.randn(LARGE_SHAPE) for k in range(LARGE)}
        tensors |= {f"module.small.{k}": torch.randn(SMALL_SHAPE) for k in range(SMALL)}
        if request.param == "pth":
            torch.save(tensors, path)
        else:
            save_file(tensors, path)
    return paths


def payload(path: Path) -> int:
    return path.stat().st_size


def test_an_average_reads_each_input_once_and_writes_once(series: list[Path], tmp_path: Path) -> None:
    inputs = sum(map(payload, series))
    out = tmp_path / f"out{series[0].suffix}"
    found = cost("average", series, out=out, threads=2)
    assert inputs * 0.98 < found.read < inputs * 1.10
    assert payload(out) * 0.95 < found.written < payload(out) * 1.05


def test_an_average_needs_no_torch_and_little_memory(series: list[Path], tmp_path: Path) -> None:
    found = cost("average", series, out=tmp_path / f"out{series[0].suffix}", threads=2)
    assert not found.torch
    assert found.memory < 12e6


@pytest.mark.parametrize("way", ["native", "torch"])
def test_print(series, tmp_path, way):
    print(
        way,
        sum(map(payload, series)),
        payload(series[0]),
        cost("average", series, out=tmp_path / f"out{series[0].suffix}", threads=2, way=way),
    )
    if way == "native":
        print(cost("fix_prefix", series[0], out=tmp_path / f"f{series[0].suffix}"))
        print(cost("convert", series[0], to="plain", out=tmp_path / "c.safetensors"))
