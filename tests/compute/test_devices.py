"""Devices: which does the sums, what is refused, and that the answer costs no import of torch where it need not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_gpu import Cpu
from safetensors.torch import load_file

import ckpt_tools
from ckpt_tools.compute import engine
from ckpt_tools.compute.gpu import devices, streams
from ckpt_tools.compute.gpu.devices import check_name, choose
from ckpt_tools.errors import UsageError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two checkpoints whose mean is 1.5."""
    paths = [tmp_path / f"c-{i}.pth" for i in (1, 2)]
    for i, path in enumerate(paths, 1):
        torch.save({"w": torch.full((40,), float(i)), "n": torch.tensor(i)}, path)
    return paths


@pytest.mark.usefixtures("gpus")
def test_choose_takes_all_gpus_for_cuda_and_one_for_a_number() -> None:
    assert choose("cuda", 1) == ("cuda:0", "cuda:1")
    assert choose("cuda:1", 1) == ("cuda:1",)
    assert choose("cpu", 10**15) == ()
    with pytest.raises(UsageError, match="`device='cuda:7'`: there are 2 GPUs, cuda:0 to cuda:1"):
        choose("cuda:7", 1)


def test_choose_rejects_a_number_beyond_the_only_gpu(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="`device='cuda:1'`: there is 1 GPU, cuda:0"):
        choose("cuda:1", 1)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "", "mps", "cuda:1\n", "cuda:٣"])
def test_check_name_rejects_an_unknown_device(name: str) -> None:
    with pytest.raises(UsageError, match=r"write auto, cpu, cuda \(all GPUs\), or cuda:1"):
        check_name(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_choose_rejects_a_missing_gpu_and_says_what_torch_lacks(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(UsageError, match=rf"`device='{name}'`: torch \S+ is a build without CUDA.*say `device='cpu'`"):
        choose(name, 1)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(UsageError, match=rf"`device='{name}'`: torch \S+ finds no GPU.*nvidia-smi.*say `device='cpu'`"):
        choose(name, 1)


def test_choose_auto_takes_gpus_for_large_jobs_where_there_is_a_driver(
    gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "AUTO_FROM", 1000)
    monkeypatch.setattr(devices, "_DRIVER", (tmp_path,))
    assert choose("auto", 999) == ()
    assert choose("auto", 1000) == ("cuda:0", "cuda:1")
    monkeypatch.setattr(devices, "_DRIVER", (tmp_path / "none",))
    assert choose("auto", 1000) == ()


def test_choose_auto_takes_the_cpu_where_torch_finds_no_gpu(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "AUTO_FROM", 0)
    monkeypatch.setattr(devices, "_DRIVER", (tmp_path,))
    assert choose("auto", 1) == ()


def test_choose_does_not_import_torch_for_the_cpu() -> None:
    code = (
        "import sys; from ckpt_tools.compute.gpu.devices import choose\n"
        "assert choose('cpu', 10**15) == choose('auto', 10**6) == ()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_average_reports_its_devices(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ckpt_tools.average(pair, out=tmp_path / "a.safetensors", device="cpu").device == "cpu"
    seen = []
    monkeypatch.setattr(devices, "choose", lambda name, nbytes: seen.append((name, nbytes)) or ("cpu", "cpu"))
    monkeypatch.setattr(streams, "Gpu", lambda _: Cpu())
    report = ckpt_tools.average(pair, out=tmp_path / "b.safetensors", device="cuda", gpu_memory="30MB", threads=2)
    assert json.loads(json.dumps(report.to_dict()))["device"] == "cpu, cpu"
    assert seen == [("cuda", report.bytes_read)]
    assert load_file(tmp_path / "b.safetensors")["w"].equal(torch.full((40,), 1.5))
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(a[key].equal(b[key]) for key in ("w", "n"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "`device='abacus'`: write auto, cpu"),
        ({"gpu_memory": "much"}, "`gpu_memory='much'` is not a size"),
        ({"gpu_memory": 0}, "`gpu_memory=0` is not a size"),
        ({"gpu_memory": 1000, "threads": 1}, "`gpu_memory=1000`: 1 thread needs at least 1MB"),
    ],
)
def test_average_rejects_senseless_devices_before_it_writes(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(devices, "choose", lambda name, nbytes: ("cpu",))
    monkeypatch.setattr(engine, "run", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(UsageError, match=message):
        ckpt_tools.average(pair, out=tmp_path / "out.pth", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_average_on_gpus_writes_the_file_of_the_cpu(runs: list[Path], tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        report = ckpt_tools.average(
            runs, mode="ema", state="raw", out=tmp_path / device / "out.pth", device=device, gpu_memory="100MB"
        )
        assert report.device.startswith(device)
    assert (tmp_path / "cpu" / "out.pth").read_bytes() == (tmp_path / "cuda" / "out.pth").read_bytes()
