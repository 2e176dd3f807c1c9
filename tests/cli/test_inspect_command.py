"""`ckpt inspect`: everything worth knowing about a file, from its header, to read or to parse."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from cli_runner import contents, refused, run
from safetensors.torch import save_file

from ckpt_tools.storage.source import OpenFiles


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_inspect_summarizes_a_timm_checkpoint(runs: list[Path]) -> None:
    result = run("inspect", runs[3])
    assert (result.code, result.err) == (0, "")
    lines = [line.strip() for line in result.out.splitlines()]
    assert lines[0] == f"{runs[3]}: torch-zip, 220 kB"
    assert "ema (state_dict_ema): 20 tensors, 17k values, 68.1 kB (layout timm)" in lines
    assert "raw (state_dict): 20 tensors, 17k values, 68.1 kB (layout timm)" in lines
    assert lines.count("20 of 20 names carry 'module.'") == 2
    assert any(line.startswith("epoch 11, metric 98.") for line in lines)
    assert any(line.startswith("optimizer: SGD with momentum") and "(0.99x the weights)" in line for line in lines)
    assert any(line.split()[:4] == ["float32", "17", "68.1", "kB"] for line in lines)


@pytest.mark.parametrize("number", [2, 9])
def test_inspect_summarizes_a_legacy_file(runs: list[Path], number: int) -> None:
    result = run("inspect", runs[number - 1])
    assert "torch-legacy" in result.out.splitlines()[0]
    assert "ema (state_dict_ema): 20 tensors" in result.out


def test_inspect_reads_no_payload(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        pytest.fail("payload was read")

    monkeypatch.setattr(OpenFiles, "open", refuse)
    assert run("inspect", runs[0], "--tensors").code == 0


def test_inspect_writes_json_alone_to_stdout(runs: list[Path]) -> None:
    result = run("inspect", runs[0], "--json")
    assert (result.code, result.err) == (0, "")
    described = json.loads(result.out)
    assert (described["format"], described["counters"], described["provenance"]) == ("torch-zip", {"epoch": 8}, None)
    assert [(s["which"], s["layout"], s["elements"]) for s in described["sets"]] == [
        ("ema", "timm", 17029),
        ("raw", "timm", 17029),
    ]
    assert all("tensors" not in s for s in described["sets"])


def test_inspect_lists_tensors_on_request(runs: list[Path]) -> None:
    shown = run("inspect", runs[0], "--tensors").out
    assert shown.count("head.weight ") == 2
    row = next(line for line in shown.splitlines() if "bn1.num_batches_tracked" in line)
    assert row.split() == ["bn1.num_batches_tracked", "int64", "[]"]
    listed = json.loads(run("inspect", runs[0], "--tensors", "--json").out)["sets"][0]["tensors"]
    assert {"name": "head.weight", "dtype": "float32", "shape": [10, 32], "nbytes": 1280} in listed


def test_inspect_shows_provenance(runs: list[Path]) -> None:
    assert run("avg", *runs, "--mode", "ema", "--decay", "0.7").code == 0
    shown = run("inspect", "averaged.pth").out
    assert "ema average of ema (state_dict_ema), decay 0.7" in shown
    rows = [line.split() for line in shown.splitlines() if line.rstrip().endswith(".pth")]
    assert [row[-1] for row in rows] == [path.name for path in runs]
    assert rows[-1][0] == "0.300000"
    provenance = json.loads(run("inspect", "averaged.pth", "--json").out)["provenance"]
    assert [i["name"] for i in provenance["inputs"]] == [path.name for path in runs]


def test_inspect_names_what_an_average_left_out() -> None:
    for i in (1, 2, 3):
        save_file({"w": torch.full((3,), float(i))}, f"c-{i}.safetensors")
    Path("c-4.safetensors").write_bytes(b"")
    assert run("avg", ".", "--skip-broken", "--exclude", "c-1*", "-q", "-o", "a.safetensors").code == 0
    lines = [line.strip() for line in run("inspect", "a.safetensors").out.splitlines()]
    assert "left out: c-1.safetensors (excluded), c-4.safetensors (damaged)" in lines


def test_inspect_shows_forged_provenance_as_far_as_possible() -> None:
    for odd, shown in (([], ["None", "a"]), ([math.nan, math.inf], [])):  # only Python has JSON with these
        inputs = [{"name": "a", "coefficient": c} for c in (0.5, *odd, 10**400, "x")]
        save_file({"w": torch.zeros(2)}, "c.safetensors", {"ckpt_tools": json.dumps({"inputs": [*inputs, [[]], None]})})
        result = run("inspect", "c.safetensors")
        assert result.code == 0
        assert [line.split()[-1] for line in result.out.splitlines()[3:]] == shown
        assert run("inspect", "c.safetensors", "--json").code == 0


def test_inspect_lists_foreign_names_and_runs_nothing() -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("ran",)

    torch.save({"state_dict": {"w": torch.zeros(2)}, "callback": Payload()}, "c.pth")
    before = contents(Path())
    result = run("inspect", "c.pth")
    assert result.code == 0
    assert "unknown classes, kept as plain data and never run: posix.mkdir" in result.out
    assert json.loads(run("inspect", "c.pth", "--json").out)["foreign"] == {"posix.mkdir": 1}
    assert contents(Path()) == before


def test_inspect_summarizes_a_file_without_known_weights() -> None:
    torch.save({"student": {"backbone": {"w": torch.zeros(2)}}, "epoch": 3}, "c.pth")
    result = run("inspect", "c.pth")
    assert result.code == 0
    assert "no weights in a known layout" in result.out
    assert "student: 1 other tensor" in result.out


def test_inspect_summarizes_a_sharded_folder_as_one_checkpoint() -> None:
    Path("m").mkdir()
    for i, name in enumerate("ab", 1):
        save_file({name: torch.zeros(3)}, f"m/model-0000{i}-of-00002.safetensors")
    weight_map = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate("ab", 1)}
    Path("m/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    result = run("inspect", "m")
    assert "m: sharded" in result.out
    assert "in 3 files" in result.out
    assert "weights (the whole file): 2 tensors, 6 values, 24 B" in result.out


def test_inspect_shows_unsupported_tensors_by_reason() -> None:
    torch.save({"w": torch.eye(3).to_sparse(), "v": torch.zeros(2)}, "c.pth")
    shown = run("inspect", "c.pth", "--tensors").out
    assert next(line for line in shown.splitlines() if line.startswith("  w ")).split() == ["w", "sparse"]


def test_inspect_expands_home(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(runs[0].parent))
    assert run("inspect", "~/checkpoint-1.pth").code == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone", r"Error: gone: no such file or folder."),
        (
            "folder",
            "Error: folder: no checkpoints in this folder "
            "(looked for *.pth *.pt *.bin *.ckpt *.tar *.safetensors *.nemo).",
        ),
        ("text.pth", "Error: text.pth: not a checkpoint: neither a torch file (zip or legacy) nor safetensors."),
        ("empty.pth", "Error: empty.pth: empty file. Get a fresh copy."),
        ("/dev/zero", "Error: /dev/zero: neither a file nor a folder."),
    ],
)
def test_inspect_rejects_bad_input(path: str, message: str) -> None:
    Path("folder").mkdir()
    Path("text.pth").write_text("these are not the weights you are looking for")
    Path("empty.pth").touch()
    assert refused(Path(), "inspect", path) == message
    assert refused(Path(), "inspect", path, "--json") == message


def test_inspect_shows_what_a_safetensors_file_says_of_itself() -> None:
    own = {"ss_network_dim": "16", "modelspec.title": "x" * 70, **{f"ss_{i}": str(i) for i in range(10)}}
    save_file({"w": torch.ones(2)}, "lora.safetensors", {"format": "pt", **own})
    lines = [line.strip() for line in run("inspect", "lora.safetensors").out.splitlines()]
    assert "metadata: 12 entries" in lines
    assert sum(": " in line and line.split(": ")[0] in own for line in lines) == 8
    assert "and 4 more, which -v shows" in lines
    full = [line.strip() for line in run("inspect", "lora.safetensors", "-v").out.splitlines()]
    assert {f"{key}: {text}" for key, text in own.items()} <= {*full}
    assert json.loads(run("inspect", "lora.safetensors", "--json").out)["metadata"] == own
    save_file({"w": torch.ones(2)}, "long.safetensors", {"k" * 10_000: "v" * 10_000})
    assert max(map(len, run("inspect", "long.safetensors").out.splitlines())) < 200
    save_file({"w": torch.ones(2)}, "plain.safetensors", {"format": "pt"})
    assert "metadata" not in run("inspect", "plain.safetensors").out
