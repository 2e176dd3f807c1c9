"""Several processes, as torchrun starts them: the same statistics, one writer, one error that ends all."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import PATIENCE
from torch import nn

from ckpt_tools import recalibrate_checkpoint
from ckpt_tools.batchnorm import processes

Save = Callable[..., Path]

NETS = """
import os
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

def one(): return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5))

class Images(Dataset):
    def __len__(self): return 37
    def __getitem__(self, i):
        return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(i)).double() * 2 + 5, i % 5

def images(): return Images()

def of_sizes(*sizes):
    return list(torch.stack([Images()[i][0] for i in range(sum(sizes))]).split(sizes))

def short(): return of_sizes(3, 3)  # too little for four processes
def left_over(): return of_sizes(4, 4, 4, 1)  # nothing to join the last one to, if it comes alone
def singles(): return of_sizes(1, 1, 1, 1, 1)

def shared_out():
    return DataLoader(Images(), batch_size=6, sampler=DistributedSampler(Images()) if "RANK" in os.environ else None)

def others(): return [batch + int(os.environ.get("RANK", 0)) for batch in of_sizes(4, 4)]

class Dying(Images):
    def __getitem__(self, i):
        if os.environ.get("RANK") == "1":
            os._exit(9)
        return super().__getitem__(i)

def dying(): return Dying()

class Failing(Images):
    def __getitem__(self, i):
        if os.environ.get("RANK") == "1":
            raise RuntimeError("rank 1 fails")
        return super().__getitem__(i)

def failing(): return Failing()
"""
COUNTS = {"images": 37, "short": 6, "left_over": 13, "singles": 5, "shared_out": 37}


def job(folder: Path, data: str, out: str) -> dict[str, Any]:
    """A recalibration, with the accuracy on labelled images for some of the data."""
    labelled = {"eval_data": f"{folder}/nets.py:images"} if data == "short" else {}
    return {
        "path": folder / "averaged.pth", "model": f"{folder}/nets.py:one", "data": f"{folder}/nets.py:{data}",
        "batch_size": 6, "workers": 0, "passes": 2, "out": folder / out, "device": "cpu", **labelled,
    }  # fmt: skip


def in_turn(rank: int, world: int, ports: list[int], jobs: list[dict[str, Any]], answers: Any) -> None:
    """Carry out jobs as one of the processes of torchrun, each in a group of its own, up to the first error."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    for number, (port, options) in enumerate(zip(ports, jobs, strict=True)):
        os.environ["MASTER_PORT"] = str(port)
        try:
            report = recalibrate_checkpoint(options.pop("path"), **options)
            answers.put((rank, number, (report.written, report.images, report.before, report.after)))
        except Exception as error:  # noqa: BLE001 - the test looks at it
            answers.put((rank, number, f"{type(error).__name__}: {error}"))
    answers.close()
    answers.join_thread()
    os._exit(0)  # a group that lost a process cannot be left in an orderly way


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in bound:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in bound]


def of_processes(world: int, jobs: list[dict[str, Any]], expected: int) -> dict[tuple[int, int], Any]:
    """Carry out jobs in several processes; return the answers by rank and job."""
    context = multiprocessing.get_context("forkserver")  # so that torch is imported once for all
    context.set_forkserver_preload(["ckpt_tools.jobs.recalibrate"])
    answers = context.Queue()
    ports = free_ports(len(jobs))
    processes = [context.Process(target=in_turn, args=(rank, world, ports, jobs, answers)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        found = [answers.get(timeout=PATIENCE) for _ in range(expected)]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return {(rank, number): answer for rank, number, answer in found}


@pytest.fixture
def folder(save: Save, tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5)).double()
    save("averaged.pth", network.state_dict())
    (tmp_path / "nets.py").write_text(NETS.replace("nn.Linear(48, 5))", "nn.Linear(48, 5)).double()"))
    return tmp_path


def test_recalibrate_bn_merges_processes_exactly(folder: Path) -> None:
    """Four processes see each image once, however it comes, and give the statistics and the accuracy of one."""
    jobs = [job(folder, data, f"{data}-4.pth") for data in COUNTS]
    found = of_processes(4, [*jobs, job(folder, "others", "others-4.pth")], 4 * (len(COUNTS) + 1))
    items = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(i)).double() for i in range(37)])
    for number, (data, count) in enumerate(COUNTS.items()):
        alone = recalibrate_checkpoint(**job(folder, data, f"{data}-1.pth"))
        one, four = (torch.load(folder / f"{data}-{n}.pth", weights_only=True) for n in (1, 4))
        whole = items[:count] * 2 + 5
        for state in (one, four):
            torch.testing.assert_close(state["0.running_mean"], whole.mean((0, 2, 3)), rtol=1e-10, atol=0)
            torch.testing.assert_close(state["0.running_var"], whole.var((0, 2, 3)), rtol=1e-10, atol=0)
        if data != "singles":  # which may be joined to batches of other sizes
            assert four["0.num_batches_tracked"].equal(one["0.num_batches_tracked"])
        for rank in range(4):
            written, images, before, after = found[rank, number]
            assert written is (rank == 0)
            assert images == count
            for mine, its in ((before, alone.before), (after, alone.after)):
                assert (mine is None) == (its is None) == (data != "short")
                if mine is not None and its is not None:
                    assert (mine.top1, mine.top5, mine.images, mine.outputs) == (its.top1, its.top5, 37, 5)
                    assert mine.loss == pytest.approx(its.loss, rel=1e-12)
    for rank in range(4):
        assert found[rank, len(COUNTS)].startswith("DataError: `data` begins with other images in each process.")


def test_a_process_that_is_lost_is_told_as_such(folder: Path) -> None:
    found = of_processes(2, [job(folder, "dying", "dying.pth")], 1)
    assert found[0, 0].startswith("CkptError: another process of this job has ended or cannot be reached (")
    assert not (folder / "dying.pth").exists()


def test_recalibrate_bn_ends_all_processes_with_the_error_of_one(folder: Path) -> None:
    """As torchrun starts the command."""
    before = sorted(folder.iterdir())
    result = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ckpt_tools",
            "recal-bn", "--model", "nets.py:one", "--data", "nets.py:failing", "-b", "6", "-j", "0",
        ],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "rank 1 fails" in result.stderr
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


def test_a_process_that_works_alone_asks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    mine = torch.ones(2)
    with processes.alone():
        assert not processes.started_by_torchrun()
        assert processes.gathered(mine) == [mine]
        assert processes.gathered_objects(3) == [3]
    assert processes.started_by_torchrun()
    with pytest.raises(ValueError, match="has not been initialized"):  # of torch, which has no group here
        processes.gathered(mine)
