"""Processes of torchrun share a job without torch: the last one publishes, and if one fails nothing is published."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import PATIENCE, Result, environment, run

from ckpt_tools import average
from ckpt_tools.compute import engine, native
from ckpt_tools.jobs import asked
from ckpt_tools.storage.kept_stage import Stage

Call = Callable[..., Result]

JOB = ("avg", "a.safetensors", "b.safetensors", "-o", "out.safetensors")

WORKER = """
import os, pathlib, signal, sys, time
from ckpt_tools.cli import main
from ckpt_tools.compute import engine, native
from ckpt_tools.jobs import share
from ckpt_tools.storage.kept_stage import Open

native.SLICE, share.NBYTES = 1 << 14, 1
way, rank, fill, append, lines = os.environ["WAY"], os.environ["RANK"], engine._Cpu.fill, Open.append, []

def slowly(self, unit):
    if way == "killed":  # the first one has hardly begun when the other one is killed
        self._job.stop.wait(60 if rank == "0" else 0.05)
    # None is killed before both are at work; then the other one says what it has found, and the first one publishes.
    awaited = {"killed 1": " 1/2 begins", "whole 0": " 2/2 ends"}.get(f"{way} {rank}", "")
    while awaited not in notes():
        time.sleep(0.02)
    fill(self, unit)

def notes():
    return "".join(each.read_text() for each in pathlib.Path().glob(".*.parts/processes"))

def torn(self, said):
    lines.append(said)
    if len(lines) == 3 and way == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, said)

Open.append, engine._Cpu.fill = torn, slowly
try:
    main()
finally:
    os.write(1, f"{rank} {'torch' in sys.modules}\\n".encode())
"""

TORCHRUN = """
import os, sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

for way in ("killed", "whole"):
    os.environ["WAY"], failed = way, False
    try:
        main(["--nproc-per-node", "2", "--master-port", "0", "worker.py", *sys.argv[1:]])
    except ChildFailedError:
        failed = True
    os.write(1, f"= {way} {failed} {os.path.exists('out.safetensors')}\\n".encode())
"""


@pytest.fixture
def alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The output of one process, after whose making it is gone."""
    from safetensors.torch import save_file

    monkeypatch.setattr(native, "SLICE", 1 << 14)
    torch.manual_seed(0)
    for name in "ab":
        save_file({"w": torch.randn(20 << 14)}, f"{name}.safetensors")
    assert run(*JOB).code == 0
    made = Path("out.safetensors").read_bytes()
    Path("out.safetensors").unlink()
    return made


def test_torchrun_ends_all_if_one_is_killed_and_the_next_run_goes_on(alone: bytes) -> None:
    Path("worker.py").write_text(WORKER)
    command = [sys.executable, "-W", "ignore", "-c", TORCHRUN, *JOB]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=True)
    lines = sorted(line for line in ended.stdout.splitlines() if line[0] in "=01")
    # Each process says if torch was imported; the one that is killed says nothing.
    said = ["0 False", "0 False", "1 False", "= killed True False", "= whole False True"]
    assert lines == said, ended.stderr
    assert Path("out.safetensors").read_bytes() == alone
    assert ended.stderr.count("Wrote out.safetensors") == 1
    assert "bytes were read and written before." in ended.stderr
    assert not list(Path().glob(".*"))


def process(rank: int, world: int, **more: str) -> dict[str, str]:
    """What torchrun sets for a process, of one machine of several."""
    named = {"RUN_ID": "none", "RESTART_COUNT": "0", "ERROR_FILE": f"/tmp/log/attempt_0/{rank}/error.json"}
    variables = {f"TORCHELASTIC_{name}": value for name, value in named.items()}
    return (
        {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": "29500", "GROUP_WORLD_SIZE": "2"}
        | variables
        | more
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Call:
    def call(variables: dict[str, str], *words: str) -> Result:
        with monkeypatch.context() as there:
            for name, value in variables.items():
                there.setenv(name, value)
            return run(*(words or JOB))

    return call


def test_the_one_that_ends_last_publishes_also_where_an_old_run_had_the_same_name(alone: bytes, started: Call) -> None:
    assert started(process(0, 2)).code == 0  # the other one was killed
    result = started(process(1, 2) | {"MASTER_PORT": "1"})  # of another run
    assert result.err.splitlines()[-1].endswith(
        "The process that ends last publishes the output. Not begun yet: part 1."
    )
    both = [started(process(0, 2)).code, started(process(1, 2)).code]
    assert both == [0, 0]
    assert Path("out.safetensors").read_bytes() == alone


def test_a_process_that_runs_again_is_waited_for(alone: bytes, started: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old run of the same name has ended in part 1, and the new one's part 1 is at work when part 2 ends."""
    assert started(process(0, 2)).code == 0
    fill = engine.run
    inner: list[Result] = []

    def during(*arguments: Any, **options: Any) -> None:
        if not inner:
            monkeypatch.setattr(engine, "run", fill)
            inner.append(started(process(1, 2)))
        fill(*arguments, **options)

    monkeypatch.setattr(engine, "run", during)
    result = started(process(0, 2))
    assert "Part 2 of 2 of out.safetensors is done." in inner[0].err
    assert "Wrote out.safetensors" in result.err
    assert Path("out.safetensors").read_bytes() == alone


def test_runs_on_one_machine_have_names_of_their_own(alone: bytes, started: Call) -> None:
    alike = {"GROUP_WORLD_SIZE": "1"}
    for log, rank in (("a", 0), ("b", 1), ("b", 0)):
        variables = process(rank, 2, TORCHELASTIC_ERROR_FILE=f"/tmp/{log}/attempt_0/{rank}/error.json")
        assert not Path("out.safetensors").exists()
        assert started(variables | alike).code == 0
    assert Path("out.safetensors").read_bytes() == alone


def test_machines_that_count_their_restarts_apart_share_a_run(alone: bytes, started: Call) -> None:
    """torchrun counts on each machine what failed there; the others start anew with it, and do not count that."""
    assert started(process(0, 2, TORCHELASTIC_RESTART_COUNT="1")).code == 0
    assert started(process(1, 2)).code == 0
    assert Path("out.safetensors").read_bytes() == alone


def test_processes_with_other_arguments_are_refused(alone: bytes, started: Call) -> None:
    started(process(0, 2))
    result = started(process(1, 2), *JOB, "--mode", "ema", "--decay", "0.5")
    assert result.code == 1
    assert "parts of another job are there: its arguments are others. Run all parts with the same command" in result.err
    os.utime("b.safetensors", ns=(0, 0))
    result = started(process(1, 2))
    assert result.code == 1
    assert "parts of another job are there: b.safetensors has changed since" in result.err
    assert not Path("out.safetensors").exists()


def test_of_two_that_begin_different_jobs_at_once_one_is_refused(
    alone: bytes, started: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = Stage.began
    inner: list[Result] = []

    def during(self: Stage, step: str, index: int, count: int) -> None:
        if index == 1:
            inner.append(started(process(1, 2), *JOB, "--mode", "ema", "--decay", "0.5"))
        began(self, step, index, count)

    monkeypatch.setattr(Stage, "began", during)
    result = started(process(0, 2))
    assert inner[0].code == 1
    assert "parts of another job are there" in inner[0].err
    assert result.code == 0


def test_processes_that_compare_other_files_are_refused(alone: bytes, started: Call) -> None:
    started(process(0, 2), "diff", "a.safetensors", "b.safetensors")
    result = started(process(1, 2), "diff", "b.safetensors", "a.safetensors")
    assert result.code == 1
    assert "parts of another job are there: its arguments are others" in result.err


def test_variables_that_a_script_sets_are_enough(alone: bytes, started: Call) -> None:
    for rank in (1, 0):
        assert started({"RANK": str(rank), "WORLD_SIZE": "2"}).code == 0
    assert Path("out.safetensors").read_bytes() == alone


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "4"}, {"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "0", "WORLD_SIZE": "x"}]
)
def test_variables_that_name_no_process_are_passed_over(variables: dict[str, str], alone: bytes, started: Call) -> None:
    assert started(variables).code == 0
    assert Path("out.safetensors").read_bytes() == alone


def test_a_call_of_the_library_in_one_process_does_the_whole_job(alone: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in process(0, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(asked, "COMMAND", [])
    assert average(JOB[1:3], out="out.safetensors").written
