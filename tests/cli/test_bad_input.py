"""Bad input: one clear message, the right exit code, nothing written, nothing run, inputs as they were."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import refused, run, spawn
from safetensors.torch import save_file
from torch import nn

from ckpt_tools.compute import native
from ckpt_tools.storage.source import OpenFiles


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in (1, 2, 3):
        save(f"c-{i}.pth", state(float(i)))


def state(value: float = 0.0, **other: Any) -> dict[str, Any]:
    return {"w": torch.full((3, 4), value), "b": torch.full((4,), value), "n": torch.tensor(7)} | other


def save(name: str, obj: Any, **options: Any) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    torch.save(obj, name, **options)
    return name


GOOD = ("c-1.pth", "c-2.pth", "c-3.pth")
# Permission bits bind root, too, in a process without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (PR_CAPBSET_DROP is 24).
UNPRIVILEGED = """
import ctypes, os
if os.geteuid() == 0 and any(ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) for capability in (1, 2)):
    raise SystemExit(77)
"""
needs_permissions = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", UNPRIVILEGED], check=False).returncode != 0,
    reason="this root may not give its rights up",
)


# Files that are not there, or are not checkpoints


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("c-4.pth", "c-4.pth: no such file or folder. Did you mean c-3.pth?"),
        ("rums/c-1.pth", "rums/c-1.pth: no such file or folder. The folder rums does not exist."),
        ("rums/*.pth", "no file matches 'rums/*.pth'. The folder rums does not exist."),
        (
            "empty-fodler/*.pth",
            "no file matches 'empty-fodler/*.pth'. The folder empty-fodler does not exist. Did you me",
        ),
        ("d-*.pth", "no file matches 'd-*.pth'. Look at the folder: ls ."),
        ("empty-folder", "empty-folder: no checkpoints in this folder (looked for *.pth *.pt *.bin *.ckpt *.tar"),
        ("", "an empty path. Is a variable of the shell unset?"),
        ("/dev/null", "/dev/null: neither a file nor a folder."),
    ],
)
def test_avg_rejects_a_path_without_a_checkpoint(path: str, message: str) -> None:
    Path("empty-folder").mkdir()
    if path == "c-4.pth":  # one suggestion only is near
        Path("c-1.pth").rename("x")
        Path("c-2.pth").rename("y")
    assert refused(Path(), "avg", path).startswith(f"Error: {message}")


@pytest.mark.parametrize(
    "words",
    [("diff", "", "c-1.pth"), ("convert", "", "-o", "x.pth"), ("fix-prefix", ""), ("card", ""), ("clean", "")],
    ids=lambda words: words[0],
)
def test_an_empty_path_is_not_the_current_folder(words: Sequence[str]) -> None:
    assert "an empty path. Is a variable of the shell unset?" in refused(Path(), *words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad-4.pth: empty file. Get a fresh copy."),
        (b"PK", "bad-4.pth: not a checkpoint"),
        (b"these are not the weights you are looking for", "neither a torch file (zip or legacy) nor safetensors."),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "It is a Git LFS pointer; run git lfs pull."),
        (pickle.dumps({"w": 1}, 2), "It is a pickle that torch.save did not write."),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 50, "It is an HDF5 file."),
        (b"PK\3\4" + b"\0" * 50, "truncated or damaged: its zip directory cannot be read"),
    ],
    ids=["empty", "two bytes", "text", "git lfs", "pickle", "hdf5", "zip"],
)
def test_avg_rejects_a_file_that_is_no_checkpoint(content: bytes, message: str) -> None:
    Path("bad-4.pth").write_bytes(content)
    refusal = refused(Path(), "avg", *GOOD, "bad-4.pth")
    assert "bad-4.pth: " in refusal
    assert message in refusal


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_avg_rejects_a_truncated_file(form: str) -> None:
    if form == "safetensors":
        save_file({"w": torch.zeros(3, 4)}, "c-4.pth")
    else:
        save("c-4.pth", state(4.0), _use_new_zipfile_serialization=form == "zip")
    whole = Path("c-4.pth").read_bytes()
    for length in (1, 9, 60, len(whole) // 2, len(whole) - 1):
        Path("c-4.pth").write_bytes(whole[:length])
        assert "c-4.pth: " in refused(Path(), "avg", *GOOD, "c-4.pth")


@needs_permissions
def test_avg_rejects_an_unreadable_folder_or_file() -> None:
    Path("closed").mkdir()
    shutil.move("c-3.pth", "closed/c-3.pth")
    Path("c-2.pth").chmod(0)
    Path("closed").chmod(0)
    try:
        for path in ("c-2.pth", "closed", "closed/c-3.pth", "closed/*.pth"):
            done = spawn("avg", "c-1.pth", path, cwd=Path(), first=UNPRIVILEGED)
            assert done.returncode == 1, path
            assert "Traceback" not in done.stderr
            assert done.stderr.startswith("Error: ")
            assert "ermission denied" in done.stderr or "no file matches" in done.stderr
    finally:
        Path("closed").chmod(0o755)
    assert not Path("averaged.pth").exists()


# Checkpoints without usable weights


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"epoch": 3, "arch": "resnet50"}, "bad.pth: no tensor inside. It is a checkpoint file, but holds no weights."),
        ({}, "bad.pth: no tensor inside."),
        ({"state_dict": {}, "epoch": 3}, "bad.pth: its 'state_dict' holds no tensor. Nothing to average."),
        (
            {"net": {"encoder": {"w": torch.zeros(2)}}},
            "bad.pth: in no known layout. There are tensors in net.encoder. Choose with --state net.encoder.",
        ),
        (
            nn.ReLU(),
            "bad.pth: a pickled object (torch.nn.modules.activation.ReLU), not a state dict; it was not loaded. "
            "Save its state_dict() from the code that made it.",
        ),
        ({"model": nn.ReLU()}, "bad.pth: its 'model' is a pickled object (torch.nn.modules.activation.ReLU)"),
    ],
    ids=["none", "empty", "empty state dict", "unknown layout", "module", "module inside"],
)
def test_avg_rejects_a_checkpoint_without_a_state_dict(tree: Any, message: str) -> None:
    save("bad.pth", tree)
    assert refused(Path(), "avg", "bad.pth").startswith(f"Error: {message}")


def test_avg_rejects_a_missing_set_of_weights() -> None:
    assert "c-3.pth: has no ema weights, only raw (the whole file). Use --state raw." in refused(
        Path(), "avg", *GOOD, "--state", "ema"
    )
    assert "c-3.pth: nothing at 'model.teacher'. The top level holds: w, b, n." in refused(
        Path(), "avg", *GOOD, "--state", "model.teacher"
    )


def test_avg_rejects_raw_and_averaged_weights_mixed() -> None:
    save("t-1.pth", {"state_dict": state(1.0), "epoch": 1})
    save("t-2.pth", {"state_dict": state(2.0), "state_dict_ema": state(2.0), "epoch": 2})
    refusal = refused(Path(), "avg", "t-1.pth", "t-2.pth")
    assert "t-2.pth holds EMA weights, t-1.pth does not (1 of 2 do)." in refusal
    assert "--state raw" in refusal
    assert run("avg", "t-1.pth", "t-2.pth", "--state", "raw").code == 0


# Hostile files


def lying(entry: dict[str, Any], payload: int = 48, length: int | None = None) -> None:
    header = json.dumps({"w": entry}).encode()
    declared = len(header) if length is None else length
    Path("lie.safetensors").write_bytes(struct.pack("<Q", declared) + header + b"\0" * payload)


@pytest.mark.parametrize(
    ("entry", "options", "message"),
    [
        ({"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 4800]}, {}, "lie.safetensors: 'w' of shape [3, 4]"),
        ({"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 48]}, {}, "lie.safetensors: "),
        ({"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 48]}, {}, "lie.safetensors: "),
        ({"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}, {"payload": 47}, "lie.safetensors: truncated"),
        ({"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}, {"payload": 99}, "longer than its header says"),
        ({"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}, {"length": 1 << 60}, "lie.safetensors: truncated"),
        ({"dtype": "F32", "shape": [3, 4], "data_offsets": [-48, 0]}, {}, "holds impossible numbers"),
        ({"dtype": "F32", "shape": [3, 4]}, {}, "the entry of 'w' is incomplete"),
    ],
)
def test_avg_rejects_a_false_safetensors_header(entry: dict[str, Any], options: dict[str, int], message: str) -> None:
    lying(entry, **options)
    assert message in refused(Path(), "avg", "lie.safetensors")


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "link.safetensors", "sub/../../outside"])
def test_avg_rejects_an_index_that_points_outside_its_folder(place: str) -> None:
    save_file({"w": torch.zeros(3)}, "outside.safetensors")
    Path("m").mkdir()
    Path("m/link.safetensors").symlink_to("../outside.safetensors")
    index = {"metadata": {}, "weight_map": {"w": place}}
    Path("m/model.safetensors.index.json").write_text(json.dumps(index))
    refusal = refused(Path(), "avg", "m")
    assert "m/model.safetensors.index.json" in refusal
    assert "refused" in refusal


@pytest.mark.parametrize("legacy", [False, True])
def test_avg_rejects_a_pickle_of_code_alone(legacy: bool) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("ran",)

    save("bad.pth", Code(), _use_new_zipfile_serialization=not legacy)
    refusal = refused(Path(), "avg", "bad.pth")
    assert "bad.pth: a pickled object (posix.mkdir), not a state dict; it was not loaded." in refusal
    assert not Path("ran").exists()


# Series that do not line up


def test_avg_rejects_mismatched_keys() -> None:
    save("d-4.pth", state(4.0) | {"head.bias": torch.zeros(2)})
    assert refused(Path(), "avg", *GOOD, "d-4.pth") == (
        "Error: c-1.pth has no tensor 'head.bias' (1 of 4 files have it). "
        "Use --keys intersection to average what all files share."
    )
    assert run("avg", *GOOD, "d-4.pth", "--keys", "intersection").code == 0


@pytest.mark.parametrize(("one", "other"), [([1], []), ([1, 3], [3]), ([3, 1], [3, 4]), ([2, 6], [3, 4])])
def test_avg_rejects_shapes_that_would_broadcast(one: list[int], other: list[int]) -> None:
    save("d-1.pth", {"w": torch.zeros(one), "v": torch.zeros(2)})
    save("d-2.pth", {"w": torch.zeros(other), "v": torch.zeros(2)})
    refusal = refused(Path(), "avg", "d-1.pth", "d-2.pth")
    assert f"'w' has shape {one} in d-1.pth but {other} in d-2.pth. These are not checkpoints of one model." in refusal


def test_avg_rejects_a_dtype_that_changes_along_the_series() -> None:
    save("d-4.pth", state() | {"w": torch.zeros(3, 4, dtype=torch.float16)})
    refusal = refused(Path(), "avg", *GOOD, "d-4.pth")
    assert "'w' is float32 in c-1.pth but float16 in d-4.pth." in refusal
    assert "--dtype float32" in refusal
    assert run("avg", *GOOD, "d-4.pth", "--dtype", "float32").code == 0


def test_avg_rejects_a_dtype_of_another_category() -> None:
    save("d-4.pth", state() | {"n": torch.tensor(7.0)})
    for options in ([], ["--dtype", "float32"]):
        refusal = refused(Path(), "avg", *GOOD, "d-4.pth", *options)
        assert "'n' is int64 in c-1.pth but float32 in d-4.pth. They cannot be averaged." in refusal


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (float("-inf"), "-infinity")]
)
def test_avg_rejects_a_nonfinite_value(value: float, word: str) -> None:
    bad = state(4.0)
    bad["w"][1, 2] = value
    save("c-4.pth", bad)
    refusal = refused(Path(), "avg", *GOOD, "c-4.pth")
    assert refusal.startswith(f"Error: c-4.pth: 'w' holds {word} at [1, 2].")
    assert "--allow-nonfinite" in refusal
    assert run("avg", *GOOD, "c-4.pth", "--allow-nonfinite").code == 0


def test_avg_rejects_sums_that_overflow_the_output() -> None:
    for i in (1, 2):
        save(f"h-{i}.pth", {"w": torch.full((3,), 30000.0 * i)})
    options = ("--dtype", "float16", "--mode", "weights", "--weights", "1,1", "--no-normalize")
    refusal = refused(Path(), "avg", "h-1.pth", "h-2.pth", *options)
    assert "the average of 'w' overflows float16" in refusal
    assert "--dtype float32" in refusal


@pytest.mark.parametrize(
    ("tensor", "kind"), [(torch.eye(3).to_sparse(), "sparse"), (torch.zeros(3, device="meta"), "on the meta device")]
)
def test_avg_rejects_unsupported_tensors(tensor: torch.Tensor, kind: str) -> None:
    save("d-4.pth", state() | {"w": tensor})
    refusal = refused(Path(), "avg", "d-4.pth")
    assert f"d-4.pth: 'w' is {kind}" in refusal


# Wrong usage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "ema", "--decay", "1.5"], "decay of 1.5 is outside [0, 1]"),
        (["--mode", "ema", "--decay", "-0.1"], "decay of -0.1 is outside [0, 1]"),
        (["--mode", "ema", "--decay", "nan"], "decay of nan is outside [0, 1]"),
        (["--mode", "ema", "--per-step", "--decay", "7"], "decay of 7.0 is outside [0, 1]"),
        (["--mode", "ema", "--warmup", "cosine"], "--warmup is one of litema, timm, not 'cosine'."),
        (["--mode", "swa", "--decay", "0.9"], "--decay goes with --mode ema."),
        (["--mode", "ema", "--weights", "1,2,3"], "--weights goes with --mode weights."),
        (["--mode", "weights"], "--mode weights needs --weights"),
        (["--mode", "weights", "--weights", "1,2"], "--weights has 2 numbers for 3 checkpoints."),
        (["--mode", "weights", "--weights", "1,1,-2"], "--weights sum to 0 and cannot be normalised."),
        (["--mode", "weights", "--weights", "0,0,0"], "--weights sum to 0 and cannot be normalised."),
        (["--mode", "weights", "--weights", "1,2,inf"], "--weights must be finite numbers."),
        (["--mode", "weights", "--weights", "1;2;3"], "--weights '1;2;3': write numbers with commas, such as 1,2,3."),
        (
            ["--mode", "median"],
            "--mode is one of uniform, ema, weights, decay, power, difference, posthoc, stock, not 'median'.",
        ),
        (["--keys", "some"], "--keys is one of strict, intersection, union"),
        (["--match", "shape"], "--match is one of name, order, not 'shape'"),
        (["--buffers", "none"], "--buffers is one of average, last, not 'none'."),
        (["--order", "time"], "--order is one of auto, given, natural, mtime, not 'time'."),
        (["--dtype", "int8"], "not 'int8'"),
        (["--last", "0"], "--last 0: must be 1 or more."),
        (["--threads", "0"], "--threads 0: must be a whole number from 1 to 256."),
        (["--metric", "loss"], "--metric, --metrics and --lower-is-better go with --best."),
        (["--max-shard-size", "5XB", "-o", "m"], "--max-shard-size 5XB is not a size; use e.g. 5GB or 500MB."),
        (["--max-shard-size", "5GB"], "--max-shard-size needs a folder: give -o a name without suffix."),
        (["-o", ""], "-o '': there is no name in it. Is a variable of the shell unset?"),
        (["-o", "new/.pth"], "-o new/.pth: there is no name in it."),
        (["--max-shard-size", "9" * 400 + "GB", "-o", "m"], "is not a size"),
        (["-o", "averaged.pht"], "averaged.pht: .pht is not a known suffix. Did you mean .pt or .pth?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_avg_exits_with_2_on_bad_usage(options: list[str], message: str) -> None:
    assert message in refused(Path(), "avg", *GOOD, *options, code=2)


# Targets


def test_avg_rejects_a_target_that_is_an_input() -> None:
    Path("soft.pth").symlink_to("c-1.pth")
    Path("hard.pth").hardlink_to("c-1.pth")
    Path("soft-folder").symlink_to(".")
    for target in (
        "c-1.pth",
        "./c-1.pth",
        "soft.pth",
        "hard.pth",
        "soft-folder/c-1.pth",
        str(Path("c-1.pth").absolute()),
    ):
        for force in ([], ["--force"]):
            refusal = refused(Path(), "avg", *GOOD, "-o", target, *force)
            assert refusal == (
                f"Error: {target.removeprefix('./')}: is one of the inputs, which are never changed. "
                "Choose another name with -o."
            )


def test_avg_rejects_a_target_in_or_around_an_input() -> None:
    Path("m").mkdir()
    save_file({"w": torch.zeros(3)}, "m/model.safetensors")
    Path("all").mkdir()
    shutil.copytree("m", "all/m-2")
    for target in ("m/averaged.safetensors", "m/averaged"):
        assert f"{target}: lies inside the input m" in refused(Path(), "avg", "m", "-o", target, "--force")
    assert "all: holds the input all/m-2" in refused(Path(), "avg", "m", "all/m-2", "-o", "all", "--force")
    assert "..: holds the input" in refused(Path(), "avg", *GOOD, "-o", "..", "--force")
    assert "which is never changed" in refused(Path(), "avg", "m", "-o", "m/model.safetensors", "--force")


def test_avg_rejects_an_existing_target() -> None:
    Path("old.pth").write_text("precious")
    Path("folder").mkdir()
    Path("folder/model.safetensors").write_text("precious")
    Path("averaged.bin").mkdir()
    for target in ("old.pth", "folder"):
        refusal = refused(Path(), "avg", *GOOD, "-o", target)
        assert refusal == (
            f"Error: {target}: exists already. Pass --force to replace it, or choose another name with -o."
        )
    assert "averaged.bin: is a folder already." in refused(Path(), "avg", *GOOD, "-o", "averaged.bin", "--force")
    assert "/dev/null: is not a regular file." in refused(Path(), "avg", *GOOD, "-o", "/dev/null", "--force")


def test_avg_rejects_a_target_in_a_missing_folder() -> None:
    assert refused(Path(), "avg", *GOOD, "-o", "new/averaged.pth") == (
        f"Error: new/averaged.pth: there is no folder {Path('new').absolute()}. "
        f"Make it first: mkdir -p {Path('new').absolute()}"
    )


def test_avg_rejects_a_deleted_current_folder(runs: list[Path]) -> None:
    leave = "import os\nos.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"
    done = spawn("avg", runs[0], "-o", Path("out.pth").absolute(), cwd=Path(), first=leave)
    assert (done.returncode, done.stderr) == (
        1,
        "Error: the current folder is gone, and torch cannot start in it. cd to another folder.\n",
    )
    assert spawn("inspect", runs[0], cwd=Path(), first=leave).returncode == 0
    assert spawn("inspect", "c-1.pth", cwd=Path(), first=leave).stderr == "Error: c-1.pth: no such file or folder.\n"


@needs_permissions
def test_avg_rejects_a_target_in_a_write_protected_folder() -> None:
    Path("closed").mkdir()
    Path("closed").chmod(0o555)
    done = spawn("avg", *GOOD, "-o", "closed/averaged.pth", cwd=Path(), first=UNPRIVILEGED)
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: closed/averaged.pth: the folder {Path('closed').absolute()} is not writable for you. "
        "Choose another place with -o.\n"
    )


@needs_permissions
def test_avg_writes_into_a_folder_that_cannot_be_listed() -> None:
    Path("blind").mkdir()
    Path("blind").chmod(0o777)
    reference = spawn("avg", *GOOD, "-o", "blind/a.pth", cwd=Path(), first=UNPRIVILEGED)
    assert reference.returncode == 0
    Path("blind").chmod(0o333)
    done = spawn("avg", *GOOD, "-o", "blind/b.pth", cwd=Path(), first=UNPRIVILEGED)
    assert (done.returncode, "Wrote blind/b.pth" in done.stderr) == (0, True)
    Path("blind").chmod(0o777)
    assert Path("blind/b.pth").read_bytes() == Path("blind/a.pth").read_bytes()


# A full disk


def test_avg_rejects_a_small_disk_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("avg", *GOOD).code == 0
    size = Path("averaged.pth").stat().st_size
    Path("averaged.pth").unlink()
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50))
    monkeypatch.setattr(OpenFiles, "open", lambda *_: pytest.fail("payload was read"))
    refusal = refused(Path(), "avg", *GOOD)
    assert refusal.startswith(f"Error: averaged.pth: needs {size:,} bytes, and {Path().absolute()} has 50 left.")


@pytest.mark.parametrize("target", ["averaged.pth", "averaged.safetensors", "averaged"])
def test_avg_leaves_nothing_on_a_disk_that_fills_up(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    refusal = refused(Path(), "avg", *GOOD, "-o", target)
    assert "No space left on device" in refusal
    assert "Nothing was left at the target" in refusal


def test_avg_leaves_nothing_at_a_limit_of_file_size() -> None:
    save("big-1.pth", {"w": torch.zeros(1000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        refusal = refused(Path(), "avg", "big-1.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refusal == "Error: averaged.pth: cannot be written (File too large). Choose another place with -o."


def test_avg_force_keeps_the_old_target_on_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("averaged.pth").write_text("precious")
    Path("averaged.pth").chmod(0o600)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
    refusal = refused(Path(), "avg", *GOOD, "--force")
    assert "averaged.pth: cannot be written (Input/output error)" in refusal
    assert Path("averaged.pth").read_text() == "precious"
    assert stat.S_IMODE(Path("averaged.pth").stat().st_mode) == 0o600


def test_avg_rejects_an_input_that_changes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the average is made: no result from halves of two files."""
    pack = native.pack

    def meddling(*args: Any, **kwargs: Any) -> Any:
        os.utime("c-2.pth", ns=(1, 1))
        return pack(*args, **kwargs)

    monkeypatch.setattr(native, "pack", meddling)
    result = run("avg", *GOOD)
    assert result.code == 1
    assert "c-2.pth: changed while it was read." in result.err
    assert sorted(path.name for path in Path().iterdir()) == sorted(GOOD)


def test_avg_rejects_an_input_that_is_cut_short_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = native.pack

    def meddling(*args: Any, **kwargs: Any) -> Any:
        os.truncate("c-2.pth", 100)
        return pack(*args, **kwargs)

    monkeypatch.setattr(native, "pack", meddling)
    result = run("avg", *GOOD)
    assert result.code == 1
    assert "c-2.pth: ends before its tensors do. Get a fresh copy." in result.err
    assert sorted(path.name for path in Path().iterdir()) == sorted(GOOD)
