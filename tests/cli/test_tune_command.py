"""`ckpt tune` as a user runs it: on folders of digits, as JSON, narrow, typed wrongly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_runner import contents, run
from conftest import FIXTURES

NET = f"{FIXTURES}/digits_net.py:DigitsNet"
PLAIN = ("--model", NET, "--crop-pct", "1", "--mean", "0", "--std", "1", "-j", "0", "-b", "32")


@pytest.fixture
def here_with_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint and 8 digits of each class, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(FIXTURES / "series" / "seed-1" / "checkpoint-12.pth", "last.pth")
    for part in ("train", "val"):
        for digit in range(10):
            folder = Path("digits", part, str(digit))
            folder.mkdir(parents=True)
            for image in sorted((FIXTURES / folder).iterdir())[:8]:
                shutil.copy(image, folder)
    return tmp_path


def test_tune_shows_sizes_stages_and_intervals_and_writes(here_with_digits: Path) -> None:
    before = Path("last.pth").read_bytes()
    result = run(
        "tune", "last.pth", *PLAIN, "--data", "digits/train", "--eval", "digits/val", "--img-size", "12",
        "--sizes", "8,12", "--lr", "0.1", "--epochs", "5", "--teacher", "last.pth", "--alpha", "0.2", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert [each["size"] for each in report["sizes"]] == [8, 12]
    assert list(report["stages"]) == ["before", "recalibrated", "after"]
    assert report["stages"]["before"] == report["sizes"][1]["accuracy"]
    assert report["written"] is True
    assert report["settings"]["alpha"] == 0.2
    lines = result.err.splitlines()
    assert lines[0] == "last.pth: weights (state_dict), DigitsNet, 10 classes."
    assert any(line.startswith("Images: 1x12x12, crop 1 (center), bicubic") for line in lines)
    assert "BatchNorm layers to measure: bn3." in lines
    assert "With the teacher 'last.pth': weight 0.2, temperature 5." in lines
    assert "Features on the disk: 13.4 kB, removed at the end." in lines
    assert any(line.startswith("after against before: top-1 +") and "(p = " in line for line in lines)
    assert lines[-1] == "Wrote last-tuned.pth: 330 parameters trained, 1 BatchNorm layer recalibrated."
    assert Path("last.pth").read_bytes() == before
    old, new = (torch.load(f"last{end}.pth", weights_only=True)["state_dict"] for end in ("", "-tuned"))
    assert {name.partition(".")[0] for name in old if not old[name].equal(new[name])} == {"bn3", "head"}
    shown = run("inspect", "last-tuned.pth").out
    assert "tune" in shown
    assert "epochs 5" in shown


@pytest.mark.parametrize("columns", [40, 80])
def test_tune_report_fits_a_narrow_terminal(here_with_digits: Path, columns: int) -> None:
    result = run(
        "tune", "last.pth", *PLAIN, "--data", "digits/train", "--eval", "digits/train", "--img-size", "8",
        "--epochs", "1", "--images", "40", columns=columns,
    )  # fmt: skip
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("on 80 images"))
    assert all(len(line) <= columns for line in lines[begin : begin + 4])
    assert "…" not in result.err
    assert any("--eval is the same as --data" in line for line in lines)
    assert any(line.startswith("after against recalibrated") and "no difference shown" in line for line in lines)


def test_tune_dry_run_writes_nothing(here_with_digits: Path) -> None:
    before = contents(here_with_digits)
    result = run("tune", "last.pth", *PLAIN, "--data", "digits/train", "--img-size", "8", "--dry-run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["written"] is False
    assert "Without --eval nothing shows whether the training helps." in result.err
    assert "Wrote" not in result.err
    assert contents(here_with_digits) == before


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ((), "--data is missing: the images to train on", 2),
        (("--data", "nowhere"), "--data nowhere: no such folder, tar or dataset", 1),
        (("--data", "digits/train", "--images", "few"), "--images few: a number, 2 or more, or all", 2),
        (("--data", "digits/train", "--sizes", "8;12"), "--sizes '8;12': write numbers with commas", 2),
        (("--data", "digits/train", "--train", "tail"), "--train is one of head, last-block, all", 2),
        (("--data", "digits/train", "--head", "fc"), "--head fc: DigitsNet has no such module", 2),
        (("--data", "digits/train", "--img-size", "1"), "DigitsNet failed on a batch of shape [32, 1, 1, 1]", 1),
        (("--data", "digits/train", "--teacher", "resnet17"), "--teacher resnet17: is no checkpoint, no timm", 2),
        (("--data", "digits/train", "-o", "last.pth"), "is one of the inputs", 1),
        (("--data", "digits/train", "--alpha", "0.5"), "--alpha goes with --teacher", 2),
    ],
)
def test_tune_refuses_bad_input_and_says_the_way_on(
    here_with_digits: Path, arguments: tuple[str, ...], message: str, code: int
) -> None:
    before = contents(here_with_digits)
    result = run("tune", "last.pth", *PLAIN, "--img-size", "8", *arguments)
    assert message in result.err
    assert result.code == code
    assert contents(here_with_digits) == before
