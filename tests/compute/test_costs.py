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

from ckpt_tools.compute import native

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts a process's calls")

FILES = 4
LARGE, SMALL = 4, 600  # tensors
LARGE_SHAPE, SMALL_SHAPE = (1024, 1024), (96,)

needs_native = pytest.mark.skipif(native._native is None, reason="installed without a C compiler")

COUNTED = """
import importlib, json, os, re, sys
import ckpt_tools

def fields(path):
    return {name: int(value) for name, value in re.findall(r"(\\w+):\\s+(\\d+)", open(path).read())}

job, native = json.loads(sys.argv[1]), sys.argv[2] == "native"
getattr(ckpt_tools, job["function"])  # imports what it needs
importlib.import_module("ckpt_tools.compute.engine")
if not native:
    importlib.import_module("ckpt_tools.compute.native")._native = None
    importlib.import_module("ckpt_tools.compute.torch_sums")
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
status, before = fields("/proc/self/status"), fields("/proc/self/io")
report = getattr(ckpt_tools, job["function"])(*job["arguments"], **job["options"])
after, peak = fields("/proc/self/io"), fields("/proc/self/status")["VmHWM"]
print(json.dumps({
    "read": after["rchar"] - before["rchar"], "written": after["wchar"] - before["wchar"],
    "reads": after["syscr"] - before["syscr"], "writes": after["syscw"] - before["syscw"],
    "memory": 1024 * (peak - status["VmRSS"]), "torch": "torch" in sys.modules,
    "peak": 1024 * peak, "announced": getattr(report, "peak_memory", 0),
}))
"""


@dataclass(frozen=True)
class Cost:
    """Bytes read and written, calls that read and write, bytes of memory beyond the start, torch imported or not.

    Also bytes of memory in all, and as the plan announced them.
    """

    read: int
    written: int
    reads: int
    writes: int
    memory: int
    torch: bool
    peak: int
    announced: int


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


def average(series: list[Path], tmp_path: Path, *, way: str = "native") -> Cost:
    return cost("average", series, out=tmp_path / f"out{series[0].suffix}", threads=2, way=way)


@needs_native
def test_average_moves_each_byte_once_in_few_calls_and_without_torch(series: list[Path], tmp_path: Path) -> None:
    inputs, output = sum(map(payload, series)), payload(series[0])
    found = average(series, tmp_path)
    assert inputs * 0.99 < found.read < inputs * 1.04
    assert output * 0.99 < found.written < output * 1.01
    assert found.reads < 1600  # 1,024 blocks of large tensors; the 2,400 small ones are gathered
    assert found.writes < 80  # 34 windows of large tensors, and runs of small ones
    # 6.1 to 7.7 MB, by what the threads hold at the same time; a tensor held whole takes 4.2 MB more.
    assert found.memory < 9e6
    assert found.announced == pytest.approx(found.peak, rel=0.2)
    assert not found.torch


def test_average_by_torch_moves_each_byte_once_in_bounded_memory(series: list[Path], tmp_path: Path) -> None:
    inputs, output = sum(map(payload, series)), payload(series[0])
    found = average(series, tmp_path, way="torch")
    assert inputs * 0.99 < found.read < inputs * 1.04
    assert output * 0.99 < found.written < output * 1.01
    assert found.reads < 3000  # one for each of the 2,400 small tensors
    assert found.writes < 1300
    assert found.memory < 24e6


@pytest.mark.parametrize(("function", "options"), [("fix_prefix", {}), ("convert", {"to": "plain"})])
def test_fix_prefix_and_convert_move_each_byte_once_without_torch(
    series: list[Path], tmp_path: Path, function: str, options: dict[str, str]
) -> None:
    suffix = series[0].suffix if function == "fix_prefix" else ".safetensors"
    found = cost(function, series[0], out=tmp_path / f"out{suffix}", **options)
    nbytes = payload(series[0])
    assert nbytes * 0.98 < found.read < nbytes * 1.05
    assert nbytes * 0.98 < found.written < nbytes * 1.01
    assert found.reads < 800
    assert found.writes < 650
    assert found.memory < 8e6
    assert not found.torch


def test_open_checkpoint_reads_the_header_alone(series: list[Path]) -> None:
    found = cost("open_checkpoint", series[0])
    assert found.read < 1e6
    assert found.reads < 100
    assert not found.torch


@needs_native
@pytest.mark.parametrize(("function", "files"), [("average", 3), ("convert", 1)])
def test_average_reads_transposed_tensors_once_in_long_rows_without_torch(
    tmp_path: Path, function: str, files: int
) -> None:
    paths = [tmp_path / f"step-{i}.pth" for i in range(files)]
    for i, path in enumerate(paths):
        torch.manual_seed(i)
        torch.save({"w": torch.randn(2048, 3072).t()}, path)
    options = {"to": "plain"} if function == "convert" else {"threads": 2}
    source = paths[0] if function == "convert" else paths
    found = cost(function, source, out=tmp_path / "out.safetensors", **options)
    inputs = sum(map(payload, paths))
    assert inputs * 0.99 < found.read < inputs * 1.04
    assert payload(paths[0]) * 1.99 < found.written < payload(paths[0]) * 2.01  # zeros first
    assert found.reads < 7000 * files  # 6 tiles of 1,024 rows; element by element it would be 6 million
    assert found.writes < 7000
    assert found.memory < 14e6
    assert not found.torch
