"""One checkpoint inside a folder: every command finds it where `avg` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import run
from safetensors.torch import save_file

from ckpt_tools import average, convert, diff, fix_prefix, open_checkpoint, strip
from ckpt_tools.errors import NotACheckpointError, SeriesError, UsageError
from ckpt_tools.formats import read_header
from ckpt_tools.jobs.parameter_names import find_names
from ckpt_tools.series.paths import one_checkpoint

WEIGHTS = {"module.w": torch.ones(3)}
Save = Callable[..., Path]


@pytest.fixture
def step(save: Save, tmp_path: Path) -> Path:
    """A folder of a step, with weights, and an optimizer beside them."""
    save("step_300/optimizer.pt", {"state": {}, "param_groups": []})
    save("step_300/scheduler.bin", {"last_epoch": 3})
    (tmp_path / "step_300" / "config.json").write_text("{}")
    return save("step_300/weights.pth", {"model": WEIGHTS, "optimizer": {"state": {0: torch.ones(3)}}}).parent


def test_the_only_checkpoint_in_a_folder_is_found(step: Path) -> None:
    assert one_checkpoint(step) == step / "weights.pth"
    assert one_checkpoint(str(step / "weights.pth")) == step / "weights.pth"


def test_a_checkpoint_in_a_folder_of_its_own_is_found(tmp_path: Path) -> None:
    for name in ("actor", "optimizer_0", "logs"):
        (tmp_path / "step" / name).mkdir(parents=True)
    for name in ("actor", "optimizer_0"):
        save_file(WEIGHTS, tmp_path / "step" / name / "model.safetensors")
    assert one_checkpoint(tmp_path / "step") == tmp_path / "step" / "actor"
    assert one_checkpoint(tmp_path / "step" / "actor") == tmp_path / "step" / "actor"


def test_several_checkpoints_in_a_folder_are_listed(step: Path, save: Save) -> None:
    save("step_300/other.pth", WEIGHTS)
    with pytest.raises(SeriesError, match=r"step_300: a folder with 2 checkpoints: other\.pth, weights\.pth\. Give"):
        one_checkpoint(step)


def test_a_folder_without_checkpoints_is_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert one_checkpoint(tmp_path) == tmp_path
    with pytest.raises(NotACheckpointError, match="the folder has no model"):
        convert(tmp_path, to="plain", out=tmp_path / "out.pth")


def test_one_rank_of_several_in_a_folder_is_refused(tmp_path: Path, save: Save) -> None:
    for rank in (0, 1):
        save(f"iter_10/mp_rank_0{rank}/model.pt", WEIGHTS)
    with pytest.raises(SeriesError, match="one rank of several"):
        one_checkpoint(tmp_path / "iter_10" / "mp_rank_00")


def test_every_command_takes_the_folder_of_a_step(step: Path, tmp_path: Path) -> None:
    convert(step, to="plain", out=tmp_path / "plain.pth")
    assert list(open_checkpoint(tmp_path / "plain.pth")) == ["module.w"]
    assert diff(step, tmp_path / "plain.pth").verdict == "identical"
    assert strip(step, out=tmp_path / "stripped.pth").written
    fix_prefix(step, out=tmp_path / "bare.pth")
    assert list(open_checkpoint(tmp_path / "bare.pth")) == ["w"]
    assert list(find_names(read_header(step / "weights.pth"), step, None, {}).names or ()) == ["module.w"]
    average([step], out=tmp_path / "average.pth")
    shown = run("inspect", step)
    assert shown.code == 0
    assert "step_300/weights.pth: torch-zip" in shown.out


@pytest.mark.parametrize("command", [average, convert, strip])
@pytest.mark.parametrize(
    ("url", "lacks"),
    [
        ("s3://bucket/run/step_1.pth", "obstore, which is"),
        ("gs://bucket/run/*.pth", "obstore, which is"),
        ("https://host/a.pth?Signature=secret", "obstore, which is"),
        ("hf://user/model", "obstore and huggingface_hub, which are"),
    ],
)
def test_without_the_extra_an_address_is_refused_with_the_command_that_installs_it(
    command: Any, url: str, lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_tools.storage.remote.addresses.find_spec", lambda name: None)
    monkeypatch.setattr("ckpt_tools.storage.source.STORES", {})
    monkeypatch.setattr("ckpt_tools.storage.remote.addresses.STORES", {})
    options = {"to": "plain"} if command is convert else {}
    given = [url] if command is average else url
    with pytest.raises(
        UsageError, match=rf"// needs {lacks} not installed: pip install 'ckpt-tools\[remote\]'"
    ) as told:
        command(given, out=tmp_path / "out.pth", **options)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("command", [average, convert, strip])
def test_an_address_of_no_known_store_is_refused(command: Any, tmp_path: Path) -> None:
    options = {"to": "plain"} if command is convert else {}
    given = ["ftp://host/a.pth"] if command is average else "ftp://host/a.pth"
    with pytest.raises(SeriesError, match=r"ftp:// is not read; s3://, .* are\. Download"):
        command(given, out=tmp_path / "out.pth", **options)


def test_a_folder_named_like_a_store_that_is_not_known_is_a_folder(here: Path) -> None:
    (here / "ftp:").mkdir()
    with pytest.raises(SeriesError, match="no such file or folder"):
        average(["ftp://missing.pth"], out=here / "out.pth")
