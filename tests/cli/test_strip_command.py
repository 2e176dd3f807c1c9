"""`ckpt strip`: what goes and what it gains, in words, bars and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import contents, refused, run

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def reports(*words: str | Path) -> list[dict[str, Any]]:
    """Return the reports of `ckpt strip --json`."""
    printed = json.loads(run("strip", *words, "--json").out)
    assert printed.keys() == {"checkpoints"}
    return list(printed["checkpoints"])


def test_strip_shows_each_entry_with_its_size(runs: list[Path]) -> None:
    result = run("strip", runs[3], "-o", "s.pth")
    assert (result.code, result.out) == (0, "")
    lines = result.err.splitlines()
    assert lines[0].split() == ["optimizer", "67.4", "kB", "█" * 20]
    assert "Kept: ema (state_dict_ema), raw (state_dict), epoch, arch, version, args, metric." in lines
    gained = runs[3].stat().st_size - Path("s.pth").stat().st_size
    assert lines[-1] == f"Wrote s.pth: 147 kB of 220 kB, {gained / 1000:.3g} kB (33%) less."
    assert "made by ckpt-tools" in run("inspect", "s.pth").out
    assert ": strip of ema (state_dict_ema) and raw (state_dict)" in run("inspect", "s.pth").out
    assert run("diff", "s.pth", runs[3]).code == run("diff", "s.pth", runs[3], "--state", "raw").code == 0


def test_strip_succeeds_if_there_is_nothing_to_strip(save: Save) -> None:
    save("a.pth", {"w": torch.ones(2)})
    before = contents(Path())
    result = run("strip", "a.pth")
    assert (result.code, result.err) == (0, "a.pth: nothing to strip, so no file is written.\n")
    assert contents(Path()) == before
    assert reports("a.pth")[0]["entries"] == []


def test_strip_writes_json_alone_to_stdout(runs: list[Path]) -> None:
    (report,) = reports(runs[3], "-o", "s.pth", "--state", "ema")
    assert {entry["place"] for entry in report["entries"]} == {"state_dict", "optimizer", "saver"}
    assert (report["kept"], report["written"]) == (["ema (state_dict_ema)"], True)
    assert report["bytes_written"] == Path("s.pth").stat().st_size


def test_strip_dry_run_shows_the_output_and_writes_nothing(runs: list[Path]) -> None:
    result = run("strip", runs[3], "-o", "s.pth", "--dry-run")
    assert (result.code, contents(Path())) == (0, {})
    assert result.out.splitlines()[-1].startswith("Would write s.pth: 147 kB of 220 kB")


def test_strip_shows_compacted_views_apart(save: Save) -> None:
    save("a.pth", {"model": {"v": torch.ones(1000)[:10]}, "optimizer": {"state": {}, "param_groups": []}})
    lines = run("strip", "a.pth").err.splitlines()
    assert [line.split()[:-1] for line in lines[:2]] == [
        ["optimizer", "0"],
        ["unused", "parts", "of", "storages", "3.96", "kB"],
    ]


def test_strip_rejects_bad_input(save: Save) -> None:
    save("a.pth", {"model": {"w": torch.ones(2)}, "optimizer": {"state": {}, "param_groups": []}})
    save("o.pth", {"state": {0: {"m": torch.ones(2)}}, "param_groups": []})
    assert refused(Path(), "strip", "gone") == "Error: gone: no such file or folder."
    assert "o.pth: holds training state alone" in refused(Path(), "strip", "o.pth")
    assert "a.pth: has no ema weights" in refused(Path(), "strip", "a.pth", "--state", "ema")
    assert "is one of the inputs" in refused(Path(), "strip", "a.pth", "-o", "a.pth", "--force")
    assert "stays one" in refused(Path(), "strip", "a.pth", "-o", "a.safetensors", code=2)
