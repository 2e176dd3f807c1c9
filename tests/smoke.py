"""The installed wheel in a clean environment: `ckpt` works with torch, safetensors, typer and rich alone.

Run by `make smoke` with that environment's Python; not collected by pytest.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

CKPT = str(Path(sys.executable).parent / "ckpt")
ROOT = Path(__file__).parent.parent
RUNS = ROOT / "fixtures" / "runs"
# The whole process stays below the first; where torch alone comes near it (builds with CUDA do), the second counts.
MAX_RSS = 0.40e9
MAX_RSS_BESIDE_TORCH = 0.15e9


def ckpt(*arguments: str, folder: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([CKPT, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode or re.search(r"\w+Warning\b", done.stderr):  # such as DeprecationWarning; ours is "Warning: ..."
        raise SystemExit(f"ckpt {' '.join(arguments)}: exit {done.returncode}, or a warning of Python")
    return done


def peak_rss(program: str, *arguments: str) -> int:
    """Run a program and return the most memory that the whole process held, in bytes."""
    pid = os.spawnv(os.P_NOWAIT, program, [program, *arguments])
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{program} {' '.join(arguments)} failed")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_files() -> None:
    """The wheel holds every module and the compiled extension, but not its sources."""
    files = {str(path) for path in importlib.metadata.files("ckpt-tools") or ()}
    missing = {str(path.relative_to(ROOT)) for path in (ROOT / "ckpt_tools").rglob("*.py")} - files
    if missing or "ckpt_tools/py.typed" not in files:
        raise SystemExit(f"the wheel lacks {sorted(missing) or 'py.typed'}")
    if importlib.util.find_spec("ckpt_tools.compute._native") is None:
        raise SystemExit("the wheel lacks the compiled extension")
    if sources := [name for name in files if name.endswith((".c", ".h")) or "csrc" in name]:
        raise SystemExit(f"the wheel holds {sources}")


NETS = """
import torch
def net(): return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
def images(): return [torch.full((8, 3, 5, 5), float(i)) for i in range(4)]
"""


def recalibrate(folder: str) -> None:
    """A model and data of the user's own need torch alone; a timm name says what to install."""
    import torch

    (Path(folder) / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict(), f"{folder}/net.pth")
    ckpt("recal-bn", "net.pth", "--model", "nets.py:net", "--data", "nets.py:images", folder=folder)
    state = torch.load(f"{folder}/net-bn.pth", weights_only=True)
    images = torch.cat([torch.full((8, 3, 5, 5), float(i)) for i in range(4)])
    seen = torch.conv2d(images, state["0.weight"], state["0.bias"])
    torch.testing.assert_close(state["1.running_mean"], seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    command = [CKPT, "recal-bn", "net.pth", "--model", "resnet18", "--data", "nets.py:images", "-o", "x.pth"]
    refused = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if refused.returncode != 1 or "pip install 'ckpt-tools[vision]'" not in refused.stderr:
        raise SystemExit(f"a timm model without timm: {refused.stderr}")


def rewrite(folder: str) -> None:
    """The other commands end where they began: renamed and back, converted and back."""
    ckpt("convert", "averaged.pth", "-o", "plain.safetensors", folder=folder)
    ckpt("fix-prefix", "plain.safetensors", "--add", "module.", folder=folder)
    ckpt("fix-prefix", "plain.safetensors", folder=folder)
    ckpt("convert", "plain.safetensors", "--to", "averaged-model", "-o", "swa.pth", folder=folder)
    ckpt("convert", "swa.pth", "--to", "dcp", "-o", "shards", folder=folder)
    verdict = json.loads(ckpt("diff", "averaged.pth", "shards", "--json", folder=folder).stdout)["verdict"]
    if verdict != "identical":
        raise SystemExit(f"converted there and back: {verdict}")
    ckpt("strip", str(RUNS / "checkpoint-1.pth"), "-o", "stripped.pth", folder=folder)


def main() -> None:
    for name in ("timm", "torchvision", "PIL", "numpy"):
        if importlib.util.find_spec(name) is not None:
            raise SystemExit(f"{name} is installed, so this proves nothing")
    check_files()
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch

    with tempfile.TemporaryDirectory() as folder:
        runs = [str(path) for path in RUNS.glob("*.pth")]
        ckpt("avg", *runs, "--mode", "ema", "--decay", "0.99", folder=folder)
        description = json.loads(ckpt("inspect", "averaged.pth", "--json", folder=folder).stdout)
        inputs = [entry["name"] for entry in description["provenance"]["inputs"]]
        if inputs != [f"checkpoint-{i}.pth" for i in range(1, 13)]:
            raise SystemExit(f"wrong order: {inputs}")
        loaded = torch.load(Path(folder) / "averaged.pth", weights_only=True, mmap=True)
        if loaded["arch"] != "digits_net" or len(loaded["state_dict"]) != 20:
            raise SystemExit("the average does not hold what it should")
        rewrite(folder)
        recalibrate(folder)
        big = [f"{folder}/big-{i}.pth" for i in range(3)]
        for i, path in enumerate(big):
            torch.save({"a": torch.full((50_000_000,), float(i)), "b": torch.zeros(1000)}, path)
        torch_alone = peak_rss(sys.executable, "-W", "ignore", "-c", "import torch")
        rss = peak_rss(CKPT, "avg", *big, "-o", f"{folder}/big.safetensors")
        sys.stderr.write(
            f"peak RSS {rss / 1e9:.3f} GB for 3 files with a tensor of 0.2 GB each; "
            f"importing torch {torch.__version__} alone {torch_alone / 1e9:.3f} GB\n"
        )
        if rss > max(MAX_RSS, torch_alone + MAX_RSS_BESIDE_TORCH):
            raise SystemExit("too much memory")
    sys.stderr.write(f"smoke: all well ({resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime:.0f} s of work)\n")


main()
