"""The runner: what it borrows of the process it gives back."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_runner import PATIENCE

# Resident memory in MB within and after runs that free a block of 256 MB: one that returns, and one that fails.
PROBE = """
from contextlib import suppress
import torch
from torch import nn
from ckpt_tools.errors import ModelError
from ckpt_tools.evaluation.data import Batches, Loading
from ckpt_tools.evaluation.runner import Runner

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

def freed():
    before = resident()
    block = torch.ones(64 * 2**20)
    del block
    return resident() - before

class Network(nn.Module):
    fails = False

    def forward(self, images):
        print(freed())
        if self.fails:
            raise KeyError
        return images

batches = Batches([(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))], Loading(images=-1))
network = Network()
runner = Runner(network, torch.device("cpu"), amp=False, channels_last=False)
freed()
for network.fails in (False, True):
    with suppress(ModelError):
        runner.evaluate("evaluating", batches, lambda what, done, total: None)
    print(freed())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_runner_restores_the_settings_of_the_allocator_after_an_error_as_well() -> None:
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    figures = [*map(float, done.stdout.split())]
    assert len(figures) == 4
    assert max(figures[1::2]) < 50  # after the runs
    assert min(figures[0::2]) > 200  # within them, or nothing was borrowed
