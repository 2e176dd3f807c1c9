"""Jobs in parts: the bytes of one process, whoever does which part, is killed, or comes with another job."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_tools import average, convert, strip
from ckpt_tools.compute import engine, native, work_units
from ckpt_tools.compute.shares import shares
from ckpt_tools.errors import CorruptError, UsageError, WriteError
from ckpt_tools.jobs.share import Work
from ckpt_tools.storage.kept_stage import Stage, stages
from ckpt_tools.storage.source import OpenFiles

Call = Callable[..., Any]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut jobs into so many work units that each part has some."""
    monkeypatch.setattr(native, "SLICE", 512)
    monkeypatch.setattr(native, "largest_tile", lambda key, one_order: 700)
    monkeypatch.setattr(work_units, "SMALL", 256)
    monkeypatch.setattr(engine, "SLICE", 300)


@pytest.fixture
def series(here: Path) -> list[str]:
    """Three checkpoints with an optimizer and tensors that are read in each way: slices, tiles, small ones, copies."""
    torch.manual_seed(0)
    for i in range(1, 4):
        weights = {
            "wide": torch.randn(40, 70),
            "turned": torch.randn(60, 50).t(),
            "half": torch.randn(3000).to(torch.bfloat16),
            "bias": torch.randn(5),
            "scale": torch.randn(7),
            "steps": torch.arange(600) + i,
        }
        state = {0: {"exp_avg": torch.randn(40, 70), "step": torch.tensor(1.0)}}
        optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}
        torch.save({"state_dict": weights, "optimizer": optimizer, "epoch": i}, f"step_{i}.pth")
    return [f"step_{i}.pth" for i in range(1, 4)]


@pytest.fixture
def folders(series: list[str]) -> list[str]:
    """The same checkpoints as folders of shards with a configuration."""
    Path("run").mkdir()
    for i, path in enumerate(series, 1):
        convert(path, out=f"run/step-{i}/", max_shard_size=9000)
        Path(f"run/step-{i}/config.json").write_text('{"model_type": "x"}')
    return [f"run/step-{i}" for i in range(1, 4)]


@pytest.fixture
def dcp_folders(series: list[str]) -> list[str]:
    """The same checkpoints as torch.distributed.checkpoint writes them."""
    for i, path in enumerate(series, 1):
        with pytest.warns(UserWarning, match="single process"):
            dcp.save({"model": torch.load(path)["state_dict"]}, checkpoint_id=f"dcp/step_{i}")
    return [f"dcp/step_{i}" for i in range(1, 4)]


def content(path: str) -> dict[str, bytes]:
    """The bytes of a file, or of all files in a folder."""
    files = [Path(path)] if Path(path).is_file() else [each for each in Path(path).rglob("*") if each.is_file()]
    return {str(each.relative_to(path)): each.read_bytes() for each in files}


def hidden() -> list[Path]:
    return [each for each in Path().iterdir() if each.name.startswith(".")]


def journals() -> dict[str, list[Any]]:
    """The units in each journal of the only stage."""
    (stage,) = stages(Path("out.pth"))
    return {
        path.name: [units for line in path.read_text().splitlines() for units in json.loads(line).get("units", ())]
        for path in sorted(stage.path.glob("*.jsonl"))
    }


def jobs() -> Iterator[tuple[str, str, Call]]:
    def averaging(fixture: str, out: str, **options: Any) -> tuple[str, str, Call]:
        return fixture, out, lambda inputs, **more: average(inputs, out=out, **options, **more)

    yield averaging("series", "out.pth", state="raw")
    yield averaging("series", "out.safetensors", mode="ema", decay=0.5, write_checksums=True)
    yield averaging("folders", "out", dtype="bfloat16")
    yield averaging("dcp_folders", "out")
    yield "series", "out.pth", lambda inputs, **more: convert(inputs[0], out="out.pth", write_checksums=True, **more)
    yield "series", "out.safetensors", lambda inputs, **more: convert(inputs[0], out="out.safetensors", **more)
    yield "series", "out.pth", lambda inputs, **more: strip(inputs[0], out="out.pth", **more)


@pytest.mark.parametrize(("inputs", "out", "job"), [*jobs()])
def test_parts_make_the_bytes_of_one_process(
    inputs: str, out: str, job: Call, small_units: None, request: pytest.FixtureRequest
) -> None:
    paths = request.getfixturevalue(inputs)
    job(paths)
    alone = content(out)
    for count in (1, 2, 4):
        shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink()
        for index in random.Random(count).sample(range(1, count + 1), count):
            report = job(paths, part=f"{index}/{count}")
            assert not report.written
            assert not os.path.lexists(out)
            assert f"Part {index} of {count} of {out} is done." in report.part
        assert job(paths, finish=True).written
        assert content(out) == alone
        assert not hidden()


def test_every_part_has_its_share_of_the_units(series: list[str], small_units: None) -> None:
    for index in (1, 2, 3):
        average(series, out="out.pth", part=f"{index}/3")
    found = [[unit for begin, end in units for unit in range(begin, end)] for units in journals().values()]
    assert min(map(len, found)) >= 3
    every = sorted(unit for units in found for unit in units)
    assert every == [*range(len(every))]


def test_shares_are_even_and_in_order() -> None:
    sizes = [random.Random(0).randrange(1, 100) for _ in range(1000)]
    for count in (1, 3, 7):
        found = shares(sizes, count)
        assert [unit for each in found for unit in each] == [*range(1000)]
        bytes_each = [sum(sizes[unit] for unit in each) for each in found]
        assert max(bytes_each) - sum(sizes) / count <= 99
    assert [len(each) for each in shares([5, 5], 4)] == [0, 1, 0, 1]


KILLED = '''
import os, signal, time
from ckpt_tools import average
from ckpt_tools.compute import engine, native
from ckpt_tools.jobs import share
from ckpt_tools.storage.kept_stage import Open

native.SLICE, share.NBYTES = 1 << 14, 1
fill, filled, lines = engine._Cpu.fill, [], []

def slowly(self, unit):
    """Each of the first units has a line of its own, however slow the disk is."""
    while len(lines) <= min(len(filled), 3):
        time.sleep(0.002)
    filled.append(unit)
    fill(self, unit)

def torn(self, said):
    lines.append(said)
    if len(lines) == 4:
        os.write(self.fd, b'{"units":[[0,')
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, said)

append, Open.append, engine._Cpu.fill = Open.append, torn, slowly

average(["a.safetensors", "b.safetensors"], out="out.pth", threads=1, part="1/1")
'''


def test_after_a_kill_only_what_was_missing_is_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    numel, units = 1 << 14, 40
    for name in ("a", "b"):
        save_file({"w": torch.randn(units * numel)}, f"{name}.safetensors")
    average(["a.safetensors", "b.safetensors"], out="out.pth")
    alone = Path("out.pth").read_bytes()
    Path("out.pth").unlink()
    assert subprocess.run([sys.executable, "-c", KILLED], check=False, timeout=200).returncode == -signal.SIGKILL
    assert not Path("out.pth").exists()
    (stage,) = stages(Path("out.pth"))
    lines = (stage.path / "part-1-of-1.jsonl").read_text().splitlines()
    assert lines[-1] == '{"units":[[0,'
    done = sum(end - begin for line in lines[:-1] for begin, end in json.loads(line).get("units", ()))
    assert 0 < done < units
    monkeypatch.setattr(native, "SLICE", numel)

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    report = average(["a.safetensors", "b.safetensors"], out="out.pth", part="1/1")
    missing = 2 * 4 * numel * (units - done)
    assert missing <= read() - before < missing + 4 * numel
    assert f"{3 * 4 * numel * done:,} bytes were read and written before" in report.part
    average(["a.safetensors", "b.safetensors"], out="out.pth", finish=True)
    assert Path("out.pth").read_bytes() == alone


def test_one_process_goes_on_with_the_parts_of_others(series: list[str], small_units: None) -> None:
    average(series, out="alone.pth")
    average(series, out="out.pth", part="2/4")
    average(series, out="out.pth", part="1/2")  # another division, after the first has ended
    report = average(series, out="out.pth", resume=True)
    assert "bytes were read and written before" in report.part
    alone = torch.load("alone.pth")["state_dict"]
    made = torch.load("out.pth")["state_dict"]
    assert all(torch.equal(made[name], alone[name]) for name in alone)
    assert not hidden()


def test_clocks_of_machines_may_differ(series: list[str], small_units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    average(series, out="out.pth")
    alone = Path("out.pth").read_bytes()
    Path("out.pth").unlink()
    average(series, out="out.pth", part="1/2")
    monkeypatch.setattr("time.time", lambda: 0.0)
    average(series, out="out.pth", part="2/2")
    average(series, out="out.pth", finish=True)
    assert Path("out.pth").read_bytes() == alone


def test_finish_names_the_missing_parts(series: list[str], small_units: None) -> None:
    with pytest.raises(WriteError, match=r"out.pth: nothing of it is there yet. First run all parts, such as `part="):
        average(series, out="out.pth", finish=True)
    average(series, out="out.pth", part="1/4")
    with pytest.raises(WriteError, match=r"parts 2, 3, 4 of 4 are missing or not complete. Run each.*`part='2/4'`"):
        average(series, out="out.pth", finish=True)
    average(series, out="out.pth", part="4/4")
    average(series, out="out.pth", part="2/4")
    with pytest.raises(WriteError, match=r"part 3 of 4 is missing or not complete. Run `part='3/4'`, then `finish`"):
        average(series, out="out.pth", finish=True)
    assert not Path("out.pth").exists()


def test_parts_of_other_arguments_or_files_are_not_mixed(series: list[str], small_units: None) -> None:
    average(series, out="out.pth", part="1/2")
    for more in ({"part": "2/2"}, {"finish": True}):
        with pytest.raises(WriteError, match="parts of another job are there: its arguments are others"):
            average(series, out="out.pth", mode="ema", decay=0.5, **more)
        with pytest.raises(WriteError, match=r"there: its inputs are others \(step_3.pth\).*remove the folder .*parts"):
            average(series[:2], out="out.pth", **more)
    os.utime(series[1], ns=(0, 0))
    with pytest.raises(WriteError, match="there: step_2.pth has changed since"):
        average(series, out="out.pth", part="2/2")
    report = average(series, out="out.pth", resume=True)
    assert report.part == "Began anew: step_2.pth has changed since."
    assert not hidden()


def test_a_part_that_is_at_work_keeps_others_out(series: list[str], small_units: None) -> None:
    average(series, out="out.pth", part="1/2")
    average(series, out="out.pth", part="2/2")
    (stage,) = stages(Path("out.pth"))
    with stage.journal(1, 2).opened():
        for more in ({"part": "1/2"}, {"part": "1/3"}, {"finish": True}, {"resume": True}):
            with pytest.raises(WriteError, match="out.pth: part 1 of 2 is at work in another process. Wait until it"):
                average(series, out="out.pth", **more)
        average(series, out="out.pth", part="2/2")
        with pytest.raises(WriteError, match="parts of another job are there: its arguments are others"):
            average(series, out="out.pth", mode="ema", decay=0.5, resume=True)
    average(series, out="out.pth", finish=True)


def test_a_run_in_one_piece_removes_parts_that_it_makes_useless(series: list[str], small_units: None) -> None:
    average(series, out="out.pth", part="1/2")
    average(series, out="other.pth", part="1/2")
    average(series, out="out.pth")
    assert [each.name[:11] for each in hidden()] == [".other.pth."]


def test_a_stage_without_its_job_is_not_trusted(series: list[str], small_units: None) -> None:
    for part in ("1/2", "2/2"):
        average(series, out="out.pth", part=part)
    (stage,) = stages(Path("out.pth"))
    (stage.path / "job.json").unlink()  # as a finish leaves it that is killed while it renames
    with pytest.raises(WriteError, match="nothing of it is there yet"):
        average(series, out="out.pth", finish=True)
    assert "before" not in average(series, out="out.pth", part="2/2").part
    with pytest.raises(WriteError, match="part 1 of 2 is missing|parts 1 of 2 are missing"):
        average(series, out="out.pth", finish=True)


def test_parts_that_begin_at_once_keep_the_work_of_one_another(
    series: list[str], small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part 2 begins and ends where part 1 has just seen that nobody has begun."""
    average(series, out="alone.pth")
    job = Stage.job

    def then_another(self: Stage) -> Any:
        found = job(self)
        if found is None:
            monkeypatch.setattr(Stage, "job", job)
            average(series, out="out.pth", part="2/2")
        return found

    monkeypatch.setattr(Stage, "job", then_another)
    average(series, out="out.pth", part="1/2")
    average(series, out="out.pth", finish=True)
    assert Path("out.pth").read_bytes() == Path("alone.pth").read_bytes()


def test_the_last_process_says_which_part_was_the_slowest(
    series: list[str], small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, moved = Work.timed, {}

    def took(self: Work) -> None:
        moved[self.asked.index] = self.nbytes
        self._began = 100.0 - 2 * self.asked.index
        with monkeypatch.context() as later:
            later.setattr("ckpt_tools.jobs.share.time", SimpleNamespace(monotonic=lambda: 100.0))
            timed(self)

    with monkeypatch.context() as slow:
        slow.setattr(Work, "timed", took)
        reports = [average(series, out="out.pth", part=f"{part}/2") for part in (1, 2)]
    assert [f"It moved {moved[i] / 1e9:.3g} GB in {2 * i}.0 s, " in reports[i - 1].part for i in (1, 2)] == [True] * 2
    report = average(series, out="out.pth", finish=True)
    assert report.part == (
        f"2 parts took 3.0 s on average, and the slowest, part 2, moved {moved[2] / 1e9:.3g} GB in 4.0 s, "
        f"{moved[2] / 4e9:.3g} GB/s read and written."
    )


def test_a_stage_that_lost_a_file_is_refused(series: list[str], small_units: None) -> None:
    average(series, out="out.pth", part="1/2")
    (stage,) = stages(Path("out.pth"))
    (stage.path / "output" / "out.pth").unlink()
    with pytest.raises(WriteError, match=r"what is there of it is damaged: .*out.pth is missing. Remove the folder"):
        average(series, out="out.pth", part="2/2")


def test_parts_that_are_cut_otherwise_are_refused(
    series: list[str], small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    average(series, out="out.pth", part="1/2")
    monkeypatch.setattr(native, "SLICE", 700)
    with pytest.raises(WriteError, match="part 1 of 2 was cut into other work units, as by a ckpt without its C"):
        average(series, out="out.pth", part="2/2")


def test_nothing_counts_of_a_part_whose_input_changed_meanwhile(
    series: list[str], small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = OpenFiles.used

    def touched(self: OpenFiles, paths: Iterable[Path]) -> None:
        os.utime("step_1.pth", (1, 1))
        used(self, paths)

    before = Path("step_1.pth").stat()
    with monkeypatch.context() as changed:
        changed.setattr(OpenFiles, "used", touched)
        changed.setattr("ckpt_tools.jobs.share.NBYTES", 0)
        with pytest.raises(CorruptError, match="changed while it was read"):
            average(series, out="out.pth", part="1/1")
    os.utime("step_1.pth", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert journals() == {"part-1-of-1.jsonl": []}
    with pytest.raises(WriteError, match="part 1 of 1 is missing"):
        average(series, out="out.pth", finish=True)


def test_a_target_that_is_there_needs_force(folders: list[str], small_units: None) -> None:
    average(folders, out="out", mode="ema", decay=0.9)
    with pytest.raises(WriteError, match="out: exists already. Pass `force=True`"):
        average(folders, out="out", part="1/2")
    for more in ({"part": "1/2"}, {"part": "2/2"}, {"finish": True}):
        average(folders, out="out", force=True, **more)
    average(folders, out="alone")
    assert {name: data for name, data in content("out").items() if name.endswith("safetensors")} == {
        name: data for name, data in content("alone").items() if name.endswith("safetensors")
    }
    assert not hidden()


def test_a_target_that_appears_meanwhile_is_kept_and_so_are_the_parts(
    series: list[str], small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    average(series, out="out.pth", part="1/1")
    run = engine.run

    def slow(*arguments: Any, **options: Any) -> None:
        run(*arguments, **options)
        Path("out.pth").write_text("another's")

    monkeypatch.setattr(engine, "run", slow)
    with pytest.raises(WriteError, match="was created by another program in the meantime, and was kept"):
        average(series, out="out.pth", finish=True)
    assert Path("out.pth").read_text() == "another's"
    monkeypatch.setattr(engine, "run", run)
    Path("out.pth").unlink()
    average(series, out="out.pth", finish=True)
    assert set(torch.load("out.pth")["state_dict"]) >= {"wide", "turned"}


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", "", "1/1000000"])
def test_a_part_out_of_range_is_refused(part: str) -> None:
    with pytest.raises(UsageError, match=r"`part='.*'`: write i/n, part i of n with i from 1 to n"):
        average(["a.pth"], part=part)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"part": "1/2", "finish": True}, "`part` and `finish` do not go together"),
        ({"finish": True, "resume": True}, "`finish` and `resume` do not go together"),
        ({"part": "1/2", "hash": True}, "`hash` does not go with `part`: every part would read all inputs once more"),
        ({"finish": True, "sign_off": "s.json"}, "`sign_off` does not go with `finish`"),
        ({"resume": True, "recal_bn": "images"}, "`recal_bn` does not go with `part`, `finish` and `resume`"),
        ({"part": "1/2", "device": "cuda"}, "`device='cuda'`: with `part`, `finish` and `resume`"),
    ],
)
def test_options_that_do_not_go_with_parts_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        average(["a.pth"], **options)
