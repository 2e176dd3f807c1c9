"""`ckpt avg`: the line people type, what they see of it, and what lies there afterwards."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from cli_runner import PATIENCE, contents, environment, refused, run
from fake_gpu import Cpu
from safetensors.torch import load_file, save_file

from ckpt_tools.compute.gpu import devices, streams
from ckpt_tools.storage.source import OpenFiles


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pair() -> list[Path]:
    """Two checkpoints and their mean: w is 1.5, and the integer of the last is kept."""
    paths = [Path("c-1.pth"), Path("c-2.pth")]
    for i, path in enumerate(paths, 1):
        torch.save({"state_dict": {"w": torch.full((4,), float(i)), "n": torch.tensor(i)}, "epoch": i}, path)
    return paths


def sharded(folder: str, value: float) -> str:
    Path(folder).mkdir()
    weight_map = {}
    for i, name in enumerate("ab", 1):
        weight_map[name] = f"model-0000{i}-of-00002.safetensors"
        save_file({name: torch.full((3,), value)}, f"{folder}/{weight_map[name]}")
    Path(folder, "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    Path(folder, "config.json").write_text("{}")
    return folder


def ema_oracle(paths: list[Path], decay: float) -> dict[str, np.ndarray[Any, Any]]:
    """The recursion v = d v + (1 - d) x in float64, over the EMA weights that torch reads."""
    average: dict[str, np.ndarray[Any, Any]] = {}
    with torch.serialization.safe_globals([argparse.Namespace]):
        for path in paths:
            for key, tensor in torch.load(path, weights_only=True)["state_dict_ema"].items():
                name, x = key.removeprefix("module."), tensor.double().numpy()
                average[name] = decay * average[name] + (1 - decay) * x if name in average else x
    return average


@pytest.mark.parametrize(
    ("lead", "lost"), [("module.", "'module.'"), ("module._orig_mod.", "'module.' and '_orig_mod.'")]
)
def test_avg_summary_names_prefixes_that_names_lose(save: Any, here: Path, lead: str, lost: str) -> None:
    for i in (1, 2):
        save(f"w{i}.pth", {f"{lead}{name}": torch.ones(2) for name in ("a", "b")})
    save("plain.pth", {"a": torch.ones(2), "b": torch.ones(2)})
    done = run("avg", "w1.pth", "w2.pth", "-o", "out.pth")
    assert f"Names lose {lost} in w1.pth, w2.pth." in done.err.splitlines()
    assert "Names lose" not in run("avg", "plain.pth", "-o", "out2.pth").err


def test_avg_line_with_a_decay_of_training_works_and_warns(runs: list[Path]) -> None:
    Path("runs").symlink_to(runs[0].parent)
    line = "ckpt avg runs/*.pth --mode ema --decay 0.99"
    done = subprocess.run(
        ["bash", "-c", line], env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    first, *_, last = done.stderr.splitlines()
    assert first == (
        "12 checkpoints: checkpoint-1.pth to checkpoint-12.pth, in the order of the epoch stored in the files. "
        "Weights: ema (state_dict_ema). Mode: ema."
    )
    assert re.fullmatch(r"Wrote averaged\.pth: [\d.]+ kB in [\d.]+ s\.", last)
    assert "checkpoint-1.pth, holds 89.5% of this average" in done.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["averaged.pth", "runs"]

    state = torch.load("averaged.pth", weights_only=True, mmap=True)["state_dict"]
    oracle = ema_oracle(runs, 0.99)
    assert state.keys() == oracle.keys()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            np.testing.assert_array_max_ulp(tensor.numpy(), oracle[name].astype(np.float32), maxulp=1)

    # A second run does not overwrite, unless it is told to.
    again = refused(Path(), "avg", "runs/*.pth", "--mode", "ema", "--decay", "0.99")
    assert again == ("Error: averaged.pth: exists already. Pass --force to replace it, or choose another name with -o.")
    before = Path("averaged.pth").read_bytes()
    assert run("avg", "runs/*.pth", "--mode", "ema", "--decay", "0.99", "--force").code == 0
    assert Path("averaged.pth").read_bytes() == before


def test_avg_default_name_follows_the_inputs(pair: list[Path]) -> None:
    assert run("avg", *pair).code == 0
    for i in (1, 2):
        save_file({"w": torch.full((4,), float(i))}, f"s-{i}.safetensors")
    assert run("avg", "s-*.safetensors").code == 0
    assert run("avg", sharded("m-1", 1.0), sharded("m-2", 2.0)).code == 0
    assert torch.load("averaged.pth", weights_only=True)["state_dict"]["w"].tolist() == [1.5] * 4
    assert load_file("averaged.safetensors")["w"].tolist() == [1.5] * 4
    assert sorted(path.name for path in Path("averaged").iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert load_file("averaged/model-00002-of-00002.safetensors")["b"].tolist() == [1.5] * 3


def test_avg_of_mixed_formats_writes_a_pth(pair: list[Path]) -> None:
    save_file({"w": torch.full((4,), 3.0), "n": torch.tensor(3)}, "c-3.safetensors")
    assert run("avg", *pair, "c-3.safetensors").code == 0
    assert Path("averaged.pth").is_file()


@pytest.mark.parametrize("name", ["soup.safetensors", "soup.pt", "soup.pth.tar", "soup"])
def test_avg_suffix_chooses_the_format(pair: list[Path], name: str) -> None:
    assert run("avg", *pair, "-o", name).code == 0
    if name.endswith(".safetensors"):
        assert load_file(name)["w"].tolist() == [1.5] * 4
    elif "." in name:
        assert torch.load(name, weights_only=True)["epoch"] == 2
    else:
        assert [path.name for path in Path(name).iterdir()] == ["model.safetensors"]


def test_avg_expands_home_in_the_target(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("home").mkdir()
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    assert run("avg", *pair, "--out=~/soup.pth").code == 0
    assert Path("home/soup.pth").is_file()


# What is shown


def test_avg_writes_json_alone_to_stdout(pair: list[Path]) -> None:
    result = run("avg", *pair, "--json")
    report = json.loads(result.out)
    assert result.code == 0
    assert (report["written"], report["out"], report["averaged"], report["copied"]) == (
        True,
        "averaged.pth",
        ["w"],
        ["n"],
    )
    assert [(i["name"], i["step"], i["coefficient"]) for i in report["inputs"]] == [
        ("c-1.pth", 1, 0.5),
        ("c-2.pth", 2, 0.5),
    ]
    assert report["bytes_written"] == Path("averaged.pth").stat().st_size
    assert "Wrote averaged.pth" in result.err
    assert run("avg", *pair, "--force").out == ""


def test_a_refused_job_is_an_error_in_json(pair: list[Path]) -> None:
    message = refused(Path(), "avg", *pair, "gone.pth", "--json").removeprefix("Error: ")
    error = {"type": "SeriesError", "message": message, "exit_code": 1}
    assert json.loads(run("avg", *pair, "gone.pth", "--json").out) == {"error": error}


@contextmanager
def no_payload_may_be_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any) -> NoReturn:
        pytest.fail("payload was read")

    with monkeypatch.context() as patch:
        patch.setattr(OpenFiles, "open", refuse)
        yield


def test_avg_dry_run_writes_nothing_and_reads_no_payload(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(runs[0].parent, "runs")
    before = contents(Path())
    with no_payload_may_be_read(monkeypatch):
        result = run("avg", "runs", "--mode", "ema", "--decay", "0.7", "--dry-run", "--json")
    assert result.code == 0
    assert contents(Path()) == before
    plan = json.loads(result.out)
    assert plan["written"] is False
    assert plan["bytes_written"] > 0

    lines = result.err.splitlines()
    assert lines[0].split() == ["checkpoint", "step", "coefficient"]
    rows = [line.split() for line in lines[1:13]]
    assert [row[0] for row in rows] == [f"checkpoint-{i}.pth" for i in range(1, 13)]
    assert [int(row[1]) for row in rows] == list(range(8, 20))
    assert [float(row[2]) for row in rows] == [round(i["coefficient"], 6) for i in plan["inputs"]]
    assert sum(i["coefficient"] for i in plan["inputs"]) == pytest.approx(1, abs=1e-12)
    assert rows[-1][3] == "█" * 20
    assert "Ordered by the epoch stored in the files; mode ema; weights: ema (state_dict_ema)." in lines
    assert "Names lose 'module.' in checkpoint-4.pth, checkpoint-5.pth, checkpoint-6.pth." in lines
    assert "17 tensors averaged, 3 copied from the last checkpoint." in lines
    assert any(
        re.fullmatch(r"Reads 817 kB, writes 7\d\.\d kB to averaged\.pth; memory: about .* [MG]B\.", x) for x in lines
    )
    assert any("optimizer" in x and x.startswith("Not carried over") for x in lines)


def test_avg_dry_run_does_not_check_values(pair: list[Path]) -> None:
    torch.save({"state_dict": {"w": torch.full((4,), torch.nan), "n": torch.tensor(3)}, "epoch": 3}, "c-3.pth")
    assert run("avg", *pair, "c-3.pth", "--dry-run").code == 0
    assert "holds NaN" in refused(Path(), "avg", *pair, "c-3.pth")


def test_avg_dry_run_notes_a_target_that_the_run_rejects(pair: list[Path]) -> None:
    Path("out").mkdir()
    Path("out/train.py").touch()
    for options in ((), ("--force",)):
        refusal = refused(Path(), "avg", *pair, "-o", "out", *options).removeprefix("Error: ")
        planned = run("avg", *pair, "-o", "out", *options, "--dry-run")
        assert planned.code == 0
        assert f"The real run would stop: {refusal}" in planned.out.splitlines()


def test_avg_dry_run_announces_the_bytes_then_written(runs: list[Path]) -> None:
    plan = json.loads(run("avg", *runs, "--dry-run", "--json").out)
    report = json.loads(run("avg", *runs, "--json").out)
    assert plan.pop("peak_memory") > plan["memory"]
    assert report.pop("peak_memory") > report["memory"]
    assert plan | {"written": True} == report
    assert report["bytes_written"] == Path("averaged.pth").stat().st_size


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_avg_table_fits_the_terminal_and_keeps_names_whole(runs: list[Path], columns: int) -> None:
    result = run("avg", *runs, "--dry-run", columns=columns, terminal=True, NO_COLOR="1")
    table = result.out.split("\n\n")[0].splitlines()
    assert len(table) == 13
    assert max(map(len, table)) <= columns
    assert table[-1].split()[0] == "checkpoint-12.pth"


def test_avg_table_shows_negative_coefficients_and_unknown_steps() -> None:
    for name in ("early", "late"):
        torch.save({"w": torch.full((2,), float(len(name)))}, f"{name}.pth")
    result = run("avg", "early.pth", "late.pth", "--mode", "weights", "--weights", "-1,2", "--dry-run")
    assert result.out.splitlines()[1].split()[:2] == ["early.pth", "-1.000000"]
    assert "No step found for early.pth" in result.out


def test_avg_shows_notes_and_the_state(pair: list[Path]) -> None:
    Path("last.pth").hardlink_to(pair[1])
    result = run("avg", *pair, "last.pth")
    assert result.err.splitlines()[:2] == [
        "2 checkpoints: c-1.pth, c-2.pth, in the order of the epoch stored in the files. "
        "Weights: raw (state_dict). Mode: uniform.",
        "last.pth is c-2.pth under another name: counted once.",
    ]
    assert "in the order of the arguments." in run("avg", *pair, "--order", "given", "--force").err
    said = "1 checkpoint: c-1.pth, so this is a copy of its weights. Weights: raw (state_dict)."
    assert run("avg", "c-1.pth", "--force").err.startswith(said)


def test_avg_shows_tensors_that_some_checkpoints_lack(pair: list[Path]) -> None:
    torch.save({"state_dict": {"w": torch.zeros(4), "head": torch.zeros(1)}, "epoch": 3}, "c-3.pth")
    for plan in (["--dry-run"], []):
        result = run("avg", *pair, "c-3.pth", "--keys", "intersection", *plan)
        shown = result.out if plan else result.err
        assert "Left out (missing in some checkpoints): head, n." in shown
    result = run("avg", *pair, "c-3.pth", "--keys", "union", "-o", "union.pth")
    assert "Not in every checkpoint, so averaged over those that have them: 'head' and 1 more." in result.err


# What lies there afterwards


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_avg_output_mode_follows_the_umask(pair: list[Path], umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        for name in ("a.pth", "a.safetensors", "folder"):
            assert run("avg", *pair, "-o", name).code == 0
    finally:
        os.umask(before)
    files = [Path("a.pth"), Path("a.safetensors"), Path("folder/model.safetensors")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [mode] * 3
    assert stat.S_IMODE(Path("folder").stat().st_mode) == 0o777 & ~umask


def test_avg_does_not_touch_the_inputs(runs: list[Path]) -> None:
    shutil.copytree(runs[0].parent, "runs")
    for path in Path("runs").iterdir():
        path.chmod(0o444)
    before = contents(Path("runs"))
    assert run("avg", "runs", "--hash").code == 0
    assert contents(Path("runs")) == before


def test_avg_leaves_out_its_own_outputs(pair: list[Path]) -> None:
    assert run("avg", *pair, "-o", "averaged.pth").code == 0
    result = run("avg", "*.pth", "-o", "second.pth", "--json")
    assert [i["name"] for i in json.loads(result.out)["inputs"]] == ["c-1.pth", "c-2.pth"]
    assert "averaged.pth was written by ckpt-tools: left out (add it with --include-outputs)." in result.err
    assert Path("second.pth").read_bytes() == Path("averaged.pth").read_bytes()


def test_avg_runs_no_code_in_a_pickle_and_reads_its_tensors(pair: list[Path]) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("ran",)

    torch.save(
        {"state_dict": {"w": torch.full((4,), 3.0), "n": torch.tensor(3)}, "epoch": 3, "x": Payload()}, "c-3.pth"
    )
    result = run("avg", *pair, "c-3.pth")
    assert result.code == 0
    assert not Path("ran").exists()
    saved = torch.load("averaged.pth", weights_only=True)
    assert saved["state_dict"]["w"].tolist() == [2.0] * 4
    assert "x" not in saved


def test_avg_names_the_gpu_in_the_plan_and_the_last_line(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "choose", lambda name, nbytes: ("cuda:0",))
    monkeypatch.setattr(streams, "Gpu", lambda name: Cpu())
    plan = run("avg", *pair, "--device", "cuda", "--dry-run", "--json")
    assert "B; sums on cuda:0." in plan.err
    assert json.loads(plan.out)["device"] == "cuda:0"
    done = run("avg", *pair, "--device", "cuda", "--gpu-memory", "50MB", columns=120)
    assert re.search(r"Wrote averaged\.pth: .* in \d+\.\d\d s on cuda:0", done.err)
    assert torch.load("averaged.pth")["state_dict"]["w"].tolist() == [1.5] * 4


def test_avg_rejects_missing_devices(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, message in [
        (["--device", "abacus"], "--device abacus: write auto, cpu"),
        (["--device", "cuda"], "say --device cpu"),
        (["--gpu-memory", "much"], "--gpu-memory much is not a size"),
    ]:
        assert message in refused(Path(), "avg", *pair, *options, code=2)
