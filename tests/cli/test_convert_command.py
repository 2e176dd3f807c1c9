"""`ckpt convert` as a person uses it: what is said, what comes out, what is refused."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from cli_runner import run
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    raw, ema = (OrderedDict(w=torch.full((2,), value), b=torch.full((1,), value)) for value in (1.0, 2.0))
    torch.save({"state_dict": raw, "state_dict_ema": ema, "epoch": 3, "optimizer": {"state": {}}}, "c.pth")
    return tmp_path / "c.pth"


def test_convert_shows_the_state_and_what_is_dropped() -> None:
    result = run("convert", "c.pth", "-o", "w.safetensors")
    assert result.code == 0
    assert result.err.splitlines()[:3] == [
        "c.pth: torch-zip, layout timm.",
        "To layout plain, 2 tensors: ema (state_dict_ema) → the whole file.",
        "Not carried over: state_dict, epoch, optimizer.",
    ]
    assert load_file("w.safetensors")["w"].tolist() == [2, 2]


def test_convert_takes_no_library_for_the_writer_of_a_state_dict_alone() -> None:
    torch.save({"pytorch-lightning_version": "2.5", "global_step": 7, "state_dict": {"w": torch.ones(2)}}, "l.ckpt")
    assert run("convert", "l.ckpt", "w.safetensors").err.splitlines()[0] == "l.ckpt: torch-zip."


def test_convert_writes_the_report_as_json() -> None:
    result = run("convert", "c.pth", "--to", "torchvision", "-o", "t.pth", "--updates", "9", "--json")
    report = json.loads(result.out)
    assert report["placed"] == ["raw (state_dict) → model", "ema (state_dict_ema) → model_ema"]
    assert (report["layout"], report["to"], report["written"]) == ("timm", "torchvision", True)
    assert torch.load("t.pth", weights_only=True)["model_ema"]["n_averaged"].item() == 9


def test_convert_dry_run_writes_nothing() -> None:
    result = run("convert", "c.pth", "--to", "deit", "-o", "d.pth", "--dry-run")
    assert result.code == 0
    assert "raw (state_dict) → model, ema (state_dict_ema) → model_ema" in result.out
    assert not Path("d.pth").exists()


def test_convert_list_shows_the_layouts() -> None:
    result = run("convert", "--list")
    assert result.code == 0
    assert "timm-ema          timm, with the weights as state_dict_ema" in result.out.splitlines()
    assert "(is read, not written)" in next(line for line in result.out.splitlines() if line.startswith("nemo"))
    listed = json.loads(run("convert", "--list", "--json").out)
    assert {"name": "plain", "about": "names to tensors: one set of weights", "written": True} in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "timm"), "CKPT is missing"),
        (("c.pth",), "-o is missing: where to write"),
        (("c.pth", "--to", "litemma", "-o", "x.pth"), "dcp, not 'litemma'. Did you mean litema?"),
        (("c.pth", "--to", "timm", "-o", "x.safetensors"), "nests its weights, which safetensors cannot hold"),
        (("c.pth", "-o", "x.ptx"), "x.ptx: .ptx is not a known suffix. Did you mean .pt"),
    ],
)
def test_convert_exits_with_2_on_bad_usage(arguments: tuple[str, ...], message: str) -> None:
    result = run("convert", *arguments)
    assert result.code == 2
    assert message in result.err
    assert result.err.startswith("Error: ")
    assert [path.name for path in Path().iterdir()] == ["c.pth"]


def test_convert_keeps_an_existing_target_without_force() -> None:
    Path("w.pth").write_text("mine")
    result = run("convert", "c.pth", "-o", "w.pth")
    assert result.code == 1
    assert "exists already. Pass --force" in result.err
    assert Path("w.pth").read_text() == "mine"
    assert run("convert", "c.pth", "-o", "w.pth", "--force").code == 0


@pytest.mark.parametrize("command", ["convert", "strip", "diff"])
def test_a_second_state_is_refused_by_commands_that_take_one(command: str) -> None:
    arguments = ["c.pth", "c.pth"] if command == "diff" else ["c.pth", "-o", "out.pth"]
    result = run(command, *arguments, "--state", "raw", "--state", "ema")
    assert result.code == 2
    assert "--state is given 2 times, and this command takes one set of weights." in result.err
    assert not Path("out.pth").exists()
