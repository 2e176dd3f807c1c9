"""`ckpt recal-bn` as a user runs it: on the digits, narrow, as JSON, stopped in the middle, typed wrongly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from cli_runner import PATIENCE, command, contents, environment, refused, run
from conftest import FIXTURES

DIGITS = ("--model", f"{FIXTURES}/digits_net.py:DigitsNet", "--img-size", "8", "--crop-pct", "1")
GRAY = (*DIGITS, "--mean", "0", "--std", "1", "-j", "0")


@pytest.fixture
def averaged(tmp_path: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert run("avg", *runs, "--state", "raw").code == 0
    return tmp_path / "averaged.pth"


def test_recal_bn_writes_new_statistics(averaged: Path) -> None:
    before = averaged.read_bytes()
    result = run("recal-bn", *GRAY, "--data", FIXTURES / "digits/train", "--eval", FIXTURES / "digits/val", columns=120)
    assert result.code == 0, result.err
    assert result.out == ""
    assert "averaged.pth: weights (state_dict), DigitsNet, 3 BatchNorm layers." in result.err
    assert "Statistics of 1297 images of" in result.err
    assert "Images: 1x8x8, crop 1 (center), bicubic, mean 0, std 1." in result.err
    assert "From the options: size, crop, mean, std; from timm's default: interpolation." in result.err
    assert "on 500 images" in result.err
    assert result.err.splitlines()[-1] == "Wrote averaged-bn.pth: 3 layers recalibrated."
    assert averaged.read_bytes() == before

    old, new = (torch.load(f"averaged{end}.pth", weights_only=True)["state_dict"] for end in ("", "-bn"))
    changed = {name for name in old if not old[name].equal(new[name])}
    assert changed == {
        f"bn{i}.{what}" for i in (1, 2, 3) for what in ("running_mean", "running_var", "num_batches_tracked")
    }
    # The first layer sees convolved images, whatever the batches: torch in float64 agrees.
    from digits_net import load_digits

    images, _ = load_digits(FIXTURES / "digits" / "train")
    seen = torch.conv2d(images.double(), old["conv1.weight"].double(), padding=1)
    torch.testing.assert_close(new["bn1.running_mean"].double(), seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new["bn1.running_var"].double(), seen.var((0, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_recal_bn_report_fits_a_narrow_terminal(averaged: Path, columns: int) -> None:
    result = run("recal-bn", *GRAY, "--data", FIXTURES / "digits/val", columns=columns, terminal=True, TERM="dumb")
    assert result.code == 0, result.err
    table = result.err.splitlines()[4:-4]
    assert all(len(line) <= columns for line in table), table
    assert "…" not in result.err


def test_recal_bn_writes_json_alone_to_stdout(averaged: Path) -> None:
    result = run("recal-bn", *GRAY, "--data", FIXTURES / "digits/val", "--passes", "2", "--json")
    report = json.loads(result.out)
    assert report["written"] is True
    assert report["images"] == 500
    assert report["statistics"]["passes"] == 2
    assert [layer["name"] for layer in report["statistics"]["layers"]] == ["bn1", "bn2", "bn3"]


def test_recal_bn_keeps_prints_of_user_code_off_stdout(averaged: Path, tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("from digits_net import DigitsNet\nclass Net(DigitsNet): print('hello')\n")
    result = run("recal-bn", "--model", "loud.py:Net", *GRAY[2:], "--data", FIXTURES / "digits/val", "--json")
    assert "hello" in result.err
    assert json.loads(result.out)["written"] is True


def test_recal_bn_names_a_broken_image(averaged: Path, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "digits/val", tmp_path / "val")
    broken = min((tmp_path / "val").rglob("*.png"))
    broken.write_bytes(b"no image")
    result = run("recal-bn", *GRAY, "--data", "val")
    assert result.code == 0, result.err
    assert f"could not be read and were left out: 1, such as {broken.relative_to(tmp_path)}" in result.err


def test_recal_bn_dry_run_shows_the_plan(averaged: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    result = run("recal-bn", *GRAY, "--data", FIXTURES / "digits/val", "--images", "100", "--dry-run", "--json")
    assert result.code == 0
    assert json.loads(result.out)["images"] == 100
    assert "Statistics of 100 images" in result.err
    assert "Wrote" not in result.err
    assert contents(tmp_path) == before


def test_inspect_shows_the_provenance_of_statistics(averaged: Path) -> None:
    run("recal-bn", *GRAY, "--data", FIXTURES / "digits/val", "--images", "200")
    shown = run("inspect", "averaged-bn.pth").out
    assert "recal-bn" in shown
    assert "images 200" in shown
    assert "checkpoint-12.pth" in shown
    assert "None" not in shown


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ((), "--data is missing", 2),
        (("--data", "nowhere"), "--data nowhere: no such folder, tar or dataset", 1),
        (("--data", "v", "--images", "few"), "--images few: a number, 2 or more, or all", 2),
        (("--data", "v", "--images", "501"), "--images 501: there are only 500", 1),
        (("--data", "v", "--mean", "0;1"), "--mean '0;1': write numbers with commas", 2),
        (("--data", "v", "--model-kwargs", "classes"), "write name=value", 2),
        (("--data", "v", "--model-kwargs", "classes=9"), "unexpected keyword argument 'classes'", 1),
        (("--data", "v", "--model", "resnet17"), "Did you mean", 2),
        (("--data", "v", "-o", "averaged.pth"), "is one of the inputs", 1),
        (("missing.pth", "--data", "v"), "missing.pth: no such file", 1),
    ],
)
def test_recal_bn_rejects_bad_usage_in_one_message(
    averaged: Path, tmp_path: Path, arguments: tuple[str, ...], message: str, code: int
) -> None:
    (tmp_path / "v").symlink_to(FIXTURES / "digits" / "val")
    assert message in refused(tmp_path, "recal-bn", *GRAY, *arguments, code=code)


SLOW = """
import os, time, torch
def make():
    for i in range(1000):
        os.write(2, b".\\n")
        time.sleep(0.05)
        yield torch.zeros(4, 1, 8, 8)
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 4000
    def __getitem__(self, i):
        os.write(2, b".\\n")
        time.sleep(0.05)
        return torch.zeros(1, 8, 8), 0
def workers(): return Slow()
def loader(): return torch.utils.data.DataLoader(Slow(), batch_size=4, num_workers=2)
"""


@pytest.mark.parametrize(
    ("factory", "number", "code"),
    [
        ("make", signal.SIGINT, 130),
        ("workers", signal.SIGINT, 130),
        ("loader", signal.SIGINT, 130),
        ("loader", signal.SIGTERM, 143),
    ],
)
def test_recal_bn_leaves_nothing_on_a_signal(
    averaged: Path, tmp_path: Path, number: signal.Signals, code: int, factory: str
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    before = set(tmp_path.iterdir())
    process = subprocess.Popen(
        command("recal-bn", *DIGITS, "-j", "2", "-b", "4", "--data", f"slow.py:{factory}"),
        env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert any(line == ".\n" for line in process.stderr)  # it has begun to read
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to workers, too
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert out == ""
    assert err.count(".\n") < 1000  # it did not go on to the end
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if line != "."][-1].endswith("nothing was written.")
    assert {path for path in tmp_path.iterdir() if path.name != "__pycache__"} == before
