"""Tasks of srun share a job: the last one publishes, once; what is no task of srun does the whole job."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runner import PATIENCE, Result, environment, run

from ckpt_tools import average
from ckpt_tools.compute import native
from ckpt_tools.jobs import asked

JOB = ("avg", "step_1.safetensors", "step_2.safetensors", "-o", "out.safetensors")


@pytest.fixture
def alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The output of one process, after whose making it is gone."""
    from safetensors.torch import save_file

    monkeypatch.setattr(native, "SLICE", 1 << 14)
    torch.manual_seed(0)
    for i in (1, 2):
        save_file({"w": torch.randn(1 << 18)}, f"step_{i}.safetensors")
    assert run(*JOB).code == 0
    made = Path("out.safetensors").read_bytes()
    Path("out.safetensors").unlink()
    return made


def task(index: int, count: int, step: int = 0, **more: str) -> dict[str, str]:
    """What srun sets for a task."""
    numbers = {"PROCID": index, "STEP_NUM_TASKS": count, "NTASKS": count, "STEP_ID": step, "JOB_ID": 7}
    return {f"SLURM_{name}": str(number) for name, number in numbers.items()} | more


@pytest.fixture
def as_task(monkeypatch: pytest.MonkeyPatch) -> object:
    def call(*words: str, variables: dict[str, str]) -> Result:
        with monkeypatch.context() as there:
            for name, value in variables.items():
                there.setenv(name, value)
            return run(*words)

    return call


def itself() -> dict[str, str]:
    return {"SLURM_TASK_PID": str(os.getpid())}


def test_tasks_that_run_at_once_publish_once(alone: bytes) -> None:
    # The shell becomes ckpt, as a task of srun is from the start.
    command = f"export SLURM_TASK_PID=$$; exec {shlex.quote(sys.executable)} -m ckpt_tools {shlex.join(JOB)} --json"
    tasks = [
        subprocess.Popen(
            ["sh", "-c", command],
            env=environment(**task(index, 3)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    ended = [each.communicate(timeout=PATIENCE) for each in tasks]
    assert [each.returncode for each in tasks] == [0] * 3, ended
    (reported,) = [out for out, _ in ended if out]
    assert json.loads(reported)["written"]
    assert [out == "" for out, _ in ended].count(True) == 2
    assert ["Wrote out.safetensors" in err for _, err in ended].count(True) == 1
    for index, (out, err) in enumerate(ended, 1):
        assert (f"Part {index} of 3 of out.safetensors is done. " in err) == (not out)
        assert ("The process that ends last publishes the output." in err) == (not out)
    assert Path("out.safetensors").read_bytes() == alone
    assert not list(Path().glob(".*"))


def test_without_one_of_the_tasks_nothing_is_published_until_they_run_again(alone: bytes, as_task: object) -> None:
    for index in (2, 0):
        result = as_task(*JOB, variables=task(index, 3) | itself())  # type: ignore[operator]
        assert result.code == 0
    assert not Path("out.safetensors").exists()
    words = []
    for index in (1, 0, 2):  # the first one completes the job, but others of this step are still to come
        result = as_task(*JOB, variables=task(index, 3, step=1) | itself())  # type: ignore[operator]
        assert result.code == 0
        assert Path("out.safetensors").exists() == (index == 2)
        words.append(result.err.splitlines()[-1])
    assert words[1].startswith("Part 1 of 3 of out.safetensors is done; ")
    assert "bytes were read and written before. The process that ends last" in words[1]
    assert words[2].startswith("Wrote out.safetensors")
    assert Path("out.safetensors").read_bytes() == alone
    assert not list(Path().glob(".*"))


def test_a_task_that_is_killed_while_it_publishes_is_made_good_by_the_next_step(
    alone: bytes, as_task: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:

        def kill(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        killed.setattr("ckpt_tools.storage.kept_stage.Stage.place", kill)
        for index in range(2):
            try:
                as_task(*JOB, variables=task(index, 2) | itself())  # type: ignore[operator]
            except KeyboardInterrupt:
                assert index == 1
    assert not Path("out.safetensors").exists()
    for index in range(2):
        as_task(*JOB, variables=task(index, 2, step=1) | itself())  # type: ignore[operator]
    assert Path("out.safetensors").read_bytes() == alone


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        (task(0, 4, step=4294967290, SLURM_TASK_PID="1"), False),  # an interactive shell of salloc
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_TASK_PID": "1"}, False),  # a batch script
        (task(0, 4, SLURM_TASK_PID="1", SLURM_PTY_PORT="1"), False),  # srun --pty bash
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, False),
        (task(0, 1), False),
        (task(3, 4, SLURM_TASK_PID="1"), True),  # a script that srun started
    ],
)
def test_what_srun_did_not_start_does_the_whole_job(
    variables: dict[str, str], told: bool, alone: bytes, as_task: object
) -> None:
    result = as_task(*JOB, variables=variables)  # type: ignore[operator]
    assert result.code == 0
    assert Path("out.safetensors").read_bytes() == alone
    line = "srun runs 4 tasks, and did not start ckpt itself: this process does the whole job."
    assert (line in result.err) == told


def test_a_part_that_is_asked_for_is_done_whatever_srun_says(alone: bytes, as_task: object) -> None:
    result = as_task(*JOB, "--part", "2/2", "--json", variables=task(0, 8) | itself())  # type: ignore[operator]
    assert "Part 2 of 2 of out.safetensors is done." in result.err
    assert result.err.endswith("When all parts are, run the same command with --finish in place of --part.\n")
    assert json.loads(result.out)["written"] is False


def test_a_call_of_the_library_in_one_task_does_the_whole_job(alone: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (task(0, 8) | itself()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(asked, "COMMAND", [])
    assert average(JOB[1:3], out="out.safetensors").written


def test_a_sweep_runs_in_one_process(alone: bytes, as_task: object) -> None:
    words = ("sweep", *JOB[1:3], "--last", "1,2", "--eval-command", "score {ckpt}", "--lower-is-better")
    result = as_task(*words, variables=task(1, 2) | itself())  # type: ignore[operator]
    assert result.code == 2
    assert "this sweep was started in 2 processes, and it runs in one: which averages it makes depends on" in result.err


def test_tasks_with_other_arguments_are_refused(alone: bytes, as_task: object) -> None:
    as_task(*JOB, variables=task(0, 2) | itself())  # type: ignore[operator]
    other = (*JOB, "--mode", "ema", "--decay", "0.5")
    result = as_task(*other, variables=task(1, 2) | itself())  # type: ignore[operator]
    assert result.code == 1
    assert "parts of another job are there: its arguments are others" in result.err


def test_without_locks_the_last_task_is_not_known(
    alone: bytes, as_task: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(fd: int, how: int) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as lacking:
        lacking.setattr(fcntl, "flock", refuse)
        result = as_task(*JOB, variables=task(0, 2) | itself())  # type: ignore[operator]
    assert result.code == 1
    assert (
        "No locks available), so that the last part is not known. Give each process its part with --part, and"
        in result.err
    )
