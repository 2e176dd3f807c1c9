"""The runner: what it borrows of the process it gives back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cli_runner import PATIENCE
from torch import nn

from ckpt_tools.evaluation.runner import Runner

# Resident memory in MB around a run that frees a block of 256 MB, in a process of its own.
PROBE = """
import torch
from torch import nn
from ckpt_tools.evaluation.runner import Runner

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

def freed():
    before = resident()
    block = torch.ones(64 * 2**20)
    del block
    return resident() - before

freed()
with Runner(nn.Linear(1, 1), torch.device("cpu"), amp=False, channels_last=False):
    within = freed()
print(within, freed())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_runner_gives_the_settings_of_the_allocator_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=PATIENCE)
    within, after = map(float, done.stdout.split())
    assert after < 50
    assert within > 200  # or nothing was borrowed


def test_runner_is_a_context_that_lets_errors_pass() -> None:
    runner = Runner(nn.Linear(1, 1), torch.device("cpu"), amp=False, channels_last=False)
    with pytest.raises(KeyError, match="mine"), runner:
        raise KeyError("mine")
