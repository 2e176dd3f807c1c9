"""`ckpt fix-prefix` as a user runs it: in place and beside, in folders, stopped in the middle, typed wrongly."""

from __future__ import annotations

import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import PATIENCE, contents, environment, is_writing, refused, run, spawn
from safetensors.torch import load_file, save_file

from ckpt_tools import convert

X = {"module.a.w": torch.arange(4.0), "module.a.b": torch.ones(2)}
BARE = {name.removeprefix("module."): tensor for name, tensor in X.items()}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return found.keys() == want.keys() and all(found[name].equal(want[name]) for name in want)


def save(name: str = "averaged.pth", obj: Any = X) -> Path:
    torch.save(obj, name)
    return Path(name)


def shards(folder: str = "model", **others: str) -> Path:
    """A sharded model with what Hugging Face puts beside it."""
    home = Path(folder)
    home.mkdir()
    weight_map = {}
    for i, (name, tensor) in enumerate(X.items(), 1):
        weight_map[name] = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensor}, home / weight_map[name], metadata={"format": "pt"})
    index = {"metadata": {"total_size": 24, "made": "by hand"}, "weight_map": weight_map}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, content in {"config.json": "{}", "tokenizer.model": "t", "modeling.py": "m", **others}.items():
        (home / file).write_text(content)
    return home


# In place


def test_fix_prefix_replaces_averaged_pth_by_default() -> None:
    save(obj={"state_dict": X, "epoch": 3})
    result = run("fix-prefix")
    assert (result.code, result.out) == (0, "")
    lines = result.err.splitlines()
    assert lines[0] == "averaged.pth: torch-zip, 1 state dict."
    assert lines[1] == "  state_dict: 2 of 2 names lose 'module.' (module.a.w becomes a.w)."
    assert lines[2].startswith("Wrote averaged.pth: ")
    found = torch.load("averaged.pth")
    assert same(found["state_dict"], BARE)
    assert found["epoch"] == 3
    again = run("fix-prefix")
    assert again.code == 0
    assert again.err.splitlines()[-1] == "Nothing to fix; it stays as it is."


def test_fix_prefix_replaces_averaged_safetensors_without_a_pth() -> None:
    save_file(X, "averaged.safetensors")
    assert run("fix-prefix").code == 0
    assert same(load_file("averaged.safetensors"), BARE)


def test_fix_prefix_rejects_a_missing_default() -> None:
    message = refused(Path(), "fix-prefix", code=2)
    assert message == "Error: no checkpoint given, and there is no averaged.pth or averaged.safetensors here."


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_fix_prefix_keeps_the_mode(mode: int) -> None:
    save().chmod(mode)
    assert run("fix-prefix").code == 0
    assert stat.S_IMODE(Path("averaged.pth").stat().st_mode) == mode


def test_fix_prefix_keeps_the_old_file_under_other_hard_links() -> None:
    save("checkpoint-5.pth")
    for name in ("last.pth", "model_best.pth"):
        os.link("checkpoint-5.pth", name)
    result = run("fix-prefix", "last.pth")
    assert result.code == 0
    assert "last.pth has 2 more names (hard links); there the old file stays." in result.err
    assert same(torch.load("last.pth"), BARE)
    assert same(torch.load("model_best.pth"), X)


def test_fix_prefix_rejects_a_symbolic_link() -> None:
    save("real.pth")
    Path("link.pth").symlink_to("real.pth")
    message = refused(Path(), "fix-prefix", "link.pth")
    real = Path("real.pth").resolve()
    assert message == f"Error: link.pth: is a symbolic link. Name the file itself, {real}, or a new one with -o."
    assert Path("link.pth").is_symlink()
    assert run("fix-prefix", "link.pth", "-o", "new.pth").code == 0
    assert same(torch.load("new.pth"), BARE)


def test_fix_prefix_rejects_a_write_protected_file(monkeypatch: pytest.MonkeyPatch) -> None:
    save().chmod(0o444)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # as root may do all things
    assert "averaged.pth: cannot be replaced (read-only). Allow it (chmod u+w)" in refused(Path(), "fix-prefix")


def test_fix_prefix_dry_run_writes_nothing() -> None:
    save("real.pth")
    Path("averaged.pth").symlink_to("real.pth")
    before = contents(Path())
    result = run("fix-prefix", "--dry-run", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["states"][0]["removed"] == {"module.": 2}
    assert (report["changed"], report["written"]) == (True, False)
    assert "The real run would stop: averaged.pth: is a symbolic link." in result.out
    assert contents(Path()) == before


def test_fix_prefix_writes_the_report_as_json() -> None:
    save()
    report = json.loads(run("fix-prefix", "--strip", "module.a.", "--json").out)
    assert report == {
        "path": "averaged.pth",
        "out": "averaged.pth",
        "in_place": True,
        "format": "torch-zip",
        "states": [
            {
                "place": "",
                "names": 2,
                "removed": {"module.a.": 2},
                "added": {},
                "example": ["module.a.w", "w"],
            }
        ],
        "nbytes": Path("averaged.pth").stat().st_size,
        "notes": [],
        "written": True,
        "changed": True,
    }


# Beside it


def test_fix_prefix_writes_given_prefixes_to_another_file() -> None:
    save("c.pth")
    before = Path("c.pth").read_bytes()
    result = run("fix-prefix", "c.pth", "--strip", "module.", "--add", "net.", "--add", "ema.", "-o", "d.pth")
    assert result.code == 0, result.err
    assert "2 of 2 names lose 'module.', 2 of 2 names get 'net.', 2 of 2 names get 'ema.'" in result.err
    assert same(torch.load("d.pth"), {f"ema.net.{name}": tensor for name, tensor in BARE.items()})
    assert Path("c.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("out", "code", "message"),
    [
        ("c.safetensors", 2, "c.safetensors: the checkpoint is a file named *.pth or *.pt or *.bin"),
        ("folder", 2, "folder: the checkpoint is a file named *.pth"),
        ("there.pth", 1, "there.pth: exists already. Pass --force to replace it"),
        ("c.pth", 1, "c.pth: is the checkpoint itself. Omit -o to replace it"),
        ("gone/d.pth", 1, "gone/d.pth: there is no folder"),
    ],
)
def test_fix_prefix_rejects_bad_targets(out: str, code: int, message: str) -> None:
    save("c.pth")
    Path("there.pth").write_text("old")
    assert refused(Path(), "fix-prefix", "c.pth", "-o", out, code=code).startswith(f"Error: {message}")


def test_fix_prefix_force_replaces_a_target() -> None:
    save("c.pth")
    Path("d.pth").write_text("old")
    assert run("fix-prefix", "c.pth", "-o", "d.pth", "--force").code == 0
    assert same(torch.load("d.pth"), BARE)


# Folders


def test_fix_prefix_writes_a_complete_folder_of_shards() -> None:
    home = shards(**{"optimizer.pt": "o", "pytorch_model.bin": "w", ".cache": "c"})
    (home / "runs").mkdir()
    before = contents(home)
    result = run("fix-prefix", "model", "-o", "new")
    assert result.code == 0, result.err
    assert "Not copied into the new folder: optimizer.pt, pytorch_model.bin, runs." in result.err
    assert contents(home) == before
    index = json.loads(Path("new/model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 24, "made": "by hand"},
        "weight_map": {"a.w": "model-00001-of-00002.safetensors", "a.b": "model-00002-of-00002.safetensors"},
    }
    for name, file in index["weight_map"].items():
        assert same(load_file(f"new/{file}"), {name: BARE[name]})
    assert sorted(path.name for path in Path("new").iterdir()) == sorted(
        ["config.json", "tokenizer.model", "modeling.py", "model.safetensors.index.json", *index["weight_map"].values()]
    )
    assert run("fix-prefix", "new").err.splitlines()[-1] == "Nothing to fix; it stays as it is."


def test_fix_prefix_renames_torch_shards() -> None:
    home = Path("model")
    home.mkdir()
    for i, (name, tensor) in enumerate(X.items(), 1):
        torch.save({name: tensor}, home / f"pytorch_model-{i}.bin")
    weight_map = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(X, 1)}
    (home / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert run("fix-prefix", "model", "-o", "new").code == 0
    assert same(torch.load("new/pytorch_model-1.bin") | torch.load("new/pytorch_model-2.bin"), BARE)


def test_fix_prefix_keeps_a_prefix_that_not_all_shards_carry() -> None:
    """A shard by itself would lose it."""
    home = shards()
    save_file({"b.w": torch.ones(2)}, home / "model-00002-of-00002.safetensors")
    index = json.loads((home / "model.safetensors.index.json").read_text())
    index["weight_map"] = {"module.a.w": "model-00001-of-00002.safetensors", "b.w": "model-00002-of-00002.safetensors"}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("fix-prefix", "model").err.splitlines()[-1] == "Nothing to fix; it stays as it is."


def test_fix_prefix_rejects_replacing_a_folder() -> None:
    shards()
    message = refused(Path(), "fix-prefix", "model")
    assert message == (
        "Error: model: no single rename can replace a folder of shards. Say where the new one goes, with -o."
    )


def test_fix_prefix_writes_a_folder_with_one_file() -> None:
    Path("model").mkdir()
    save_file(X, "model/model.safetensors")
    Path("model/config.json").write_text("{}")
    assert run("fix-prefix", "model", "-o", "new").code == 0
    assert same(load_file("new/model.safetensors"), BARE)
    assert Path("new/config.json").read_text() == "{}"
    assert run("fix-prefix", "model").code == 0
    assert same(load_file("model/model.safetensors"), BARE)


# What cannot be fixed


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ({"epoch": 3, "shadow_params": [torch.ones(1)]}, "c.pth: holds no dict of names to tensors."),
        (
            torch.nn.Linear(1, 1),
            "names to tensors. Save the model's state_dict(), not the model.",
        ),
        ({"module.a.w": torch.ones(1), "module": 1, "m._orig_mod.x": torch.ones(1), "m.x": torch.ones(1)}, "'m.x'"),
    ],
)
def test_fix_prefix_rejects_checkpoints_without_names(obj: Any, message: str) -> None:
    save("c.pth", obj)
    assert message in refused(Path(), "fix-prefix", "c.pth")


def test_fix_prefix_rejects_dcp_and_names_convert() -> None:
    convert(save("c.pth"), to="dcp", out="step")
    assert "step: a DCP checkpoint" in refused(Path(), "fix-prefix", "step", "-o", "new")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_fix_prefix_leaves_a_damaged_file(damage: str) -> None:
    raw = save("c.pth").read_bytes()
    at = raw.index(b"module.a.w")
    damaged = {"truncated": raw[:-30], "flipped": raw[:at] + b"X" + raw[at + 1 :], "empty": b""}[damage]
    Path("c.pth").write_bytes(damaged)
    assert "fresh copy" in refused(Path(), "fix-prefix", "c.pth") or damage == "flipped"


# Interruption

SIZE = 3 << 30


@pytest.fixture
def large() -> Path:
    """A file whose payload takes time to copy, and no room on the disk: it is a hole."""
    header = json.dumps({"module.w": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
    path = Path("c.safetensors")
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + SIZE)
    return path


# Makes each call of the kernel a small one with a pause behind it, as a slow disk would.
SLOWLY = """
import os, sys, time
from ckpt_tools.storage import splice
splice._without_holes = lambda source, span: [span]
def slow(source, target, count, start, position):
    time.sleep(0.01)
    return real(source, target, min(count, 1 << 16), start, position)
real, os.copy_file_range = os.copy_file_range, slow
from ckpt_tools.cli import main
main()
"""


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated"), (signal.SIGKILL, -9, "")],
)
@pytest.mark.parametrize("out", [(), ("-o", "new.safetensors")])
def test_fix_prefix_leaves_the_old_file_on_a_signal(
    number: signal.Signals, code: int, word: str, out: tuple[str, ...], large: Path
) -> None:
    before = large.stat()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, "fix-prefix", str(large), *out],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not is_writing(process.pid):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    after = large.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert [path.name for path in Path().iterdir()] == [large.name]
    if word:
        assert err.splitlines()[-1] == f"{word}; nothing was written."


def test_fix_prefix_does_not_replace_a_file_written_meanwhile(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_tools.storage import splice

    real = splice.write

    def writing(*args: Any) -> None:
        real(*args)
        with large.open("r+b") as file:
            file.write(b"x")

    monkeypatch.setattr(splice, "write", writing)
    result = run("fix-prefix", large)
    assert result.code == 1
    assert (
        "c.safetensors: was replaced by another file meanwhile" in result.err
        or "changed while it was read" in result.err
    )
    assert [path.name for path in Path().iterdir()] == [large.name]


def test_fix_prefix_does_not_replace_a_file_replaced_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training saves its next checkpoint under the same name."""
    from ckpt_tools.storage import splice

    path = save("last.pth")
    real = splice.write

    def training(*args: Any) -> None:
        real(*args)
        torch.save({"w": torch.zeros(1)}, "next.pth")
        Path("next.pth").replace(path)

    monkeypatch.setattr(splice, "write", training)
    result = run("fix-prefix", path)
    assert result.code == 1
    assert "last.pth: was replaced by another file meanwhile, which stays." in result.err
    assert list(torch.load(path)) == ["w"]
    assert [p.name for p in Path().iterdir()] == ["last.pth"]


def test_fix_prefix_needs_no_torch(tmp_path: Path) -> None:
    save()
    script = (
        "import sys\nfrom ckpt_tools import fix_prefix\n"
        "assert fix_prefix('averaged.pth').written\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], env=environment(), cwd=tmp_path, check=True)
    assert spawn("fix-prefix", cwd=tmp_path).returncode == 0


def test_fix_prefix_rejects_a_file_that_shrinks_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_tools.jobs import fix_prefix as job

    path = save("c.pth")
    real = job.read_header

    def disturbed(given: Path) -> Any:
        header = real(given)
        os.truncate(given, 100)
        return header

    monkeypatch.setattr(job, "read_header", disturbed)
    result = run("fix-prefix", path)
    assert result.code == 1
    assert "c.pth: changed while it was read" in result.err
    assert path.stat().st_size == 100
    assert list(Path().iterdir()) == [path]
