"""Verifying a checkpoint by itself, against hashlib, NumPy, and the libraries of the formats."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crafting import raw_bytes, torch_zip
from safetensors.torch import load_file, save_file
from series_files import sharded

from ckpt_tools import VerifyReport, average, convert, open_checkpoint, verify
from ckpt_tools.errors import UsageError


def results(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.result for check in report.checks}


def detail(report: VerifyReport, name: str) -> str:
    return next(check.detail for check in report.checks if check.name == name)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(5, 7, generator=generator), "b": torch.randn(6, generator=generator).bfloat16()}


@pytest.fixture
def safetensors(tmp_path: Path) -> Path:
    save_file(weights(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_a_whole_checkpoint_of_each_format_passes(safetensors: Path, tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "zip.pth")
    torch.save(weights(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    sharded(tmp_path / "sharded", 1.0)
    convert(safetensors, to="dcp", out=tmp_path / "dcp")
    found = {
        name: results(verify(tmp_path / name)) for name in ("zip.pth", "legacy.pth", "a.safetensors", "sharded", "dcp")
    }
    assert all("failed" not in each.values() and each["structure"] == each["finite"] == "ok" for each in found.values())
    assert {name for name, each in found.items() if each["loads"] == "not checked"} == {"dcp"}
    assert {name for name, each in found.items() if each["crc32"] == "ok"} == {"zip.pth", "dcp"}


@pytest.mark.parametrize("out", ["b.pth", "b.safetensors", "b/", "dcp"])
def test_recorded_checksums_are_those_of_hashlib(out: str, safetensors: Path, tmp_path: Path) -> None:
    options = {"to": "dcp"} if out == "dcp" else {}
    convert(safetensors, out=f"{tmp_path}/{out}", write_checksums=True, **options)
    made = open_checkpoint(tmp_path / out).provenance
    assert made is not None
    want = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(raw_bytes(tensor)).hexdigest(),
        }
        for name, tensor in weights().items()
    }
    assert made["checksums"] == want
    report = verify(tmp_path / out)
    assert report.passed
    assert results(report)["checksums"] == "ok"


def test_checksums_change_no_tensor_and_libraries_read_the_file(tmp_path: Path) -> None:
    for i in range(3):
        torch.save(
            {"model": {"w": torch.full((40, 50), float(i)), "n": torch.tensor(i)}, "epoch": i}, tmp_path / f"{i}.pth"
        )
    paths = [tmp_path / f"{i}.pth" for i in range(3)]
    for out in ("a.pth", "a.safetensors"):
        average(paths, out=tmp_path / out, write_checksums=True)
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert loaded["w"].equal(torch.ones(40, 50))
    assert loaded["n"] == 2
    assert load_file(tmp_path / "a.safetensors")["w"].equal(torch.ones(40, 50))
    assert verify(tmp_path / "a.pth").passed  # with the CRC-32 of the record, which was written twice


@pytest.mark.parametrize("out", ["b.pth", "b.safetensors", "b/model.safetensors", "dcp/__0_0.distcp"])
def test_every_changed_byte_of_the_values_is_found(out: str, safetensors: Path, tmp_path: Path) -> None:
    options = {"to": "dcp"} if "dcp" in out else {}
    whole = tmp_path / out.partition("/")[0]
    convert(safetensors, out=f"{whole}/" if "/" in out else whole, write_checksums=True, **options)
    data = (tmp_path / out).read_bytes()
    values = [raw_bytes(tensor) for tensor in weights().values()]
    places = [data.index(each) + i for each in values for i in range(0, len(each), 9)]
    for at in places:
        (tmp_path / out).write_bytes(data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
        report = verify(whole, threads=1)
        assert not report.passed, at
        assert results(report)["checksums"] == "failed", at


def test_every_changed_byte_of_a_safetensors_header_is_found(safetensors: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    convert(safetensors, out=path, write_checksums=True)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    tensors = data.index(b'"a":{"dtype"')
    for at in [*range(8), *range(tensors, end)]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        assert not verify(path, threads=1).passed, at


def test_a_file_that_ends_early_is_found_at_every_length(safetensors: Path, tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "a.pth")
    for path in (safetensors, tmp_path / "a.pth"):
        data = path.read_bytes()
        for length in range(0, len(data), 61):
            (tmp_path / "short").write_bytes(data[:length])
            assert results(verify(tmp_path / "short", threads=1)) == {"structure": "failed"}, length


def test_a_file_that_is_loaded_in_the_place_of_shards_is_found(tmp_path: Path) -> None:
    sharded(tmp_path / "model", 1.0)
    assert verify(tmp_path / "model").passed
    save_file(weights(), tmp_path / "model/model.safetensors")
    assert "model.safetensors is beside the index" in detail(verify(tmp_path / "model"), "structure")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2", "complex64", "float64"])
def test_values_that_are_not_finite_are_counted(dtype: str, tmp_path: Path) -> None:
    values = np.ones((4, 6))
    values[1, 2], values[1, 3], values[3, 5] = np.nan, np.inf, -np.inf
    torch.save({"ok": torch.ones(2), "w": torch.from_numpy(values).to(getattr(torch, dtype)).T}, tmp_path / "a.pth")
    report = verify(tmp_path / "a.pth")
    # Transposed in the file, and so in the index.
    assert detail(report, "finite") == "'w' has 1 NaN and 2 infinities, the first at [2, 1]"
    assert not report.passed
    assert verify(tmp_path / "a.pth", allow_nonfinite=True).passed


def test_scales_of_packed_blocks_that_are_nan_are_counted(tmp_path: Path) -> None:
    scales = torch.arange(256, dtype=torch.uint8).reshape(32, 8).view(torch.float8_e8m0fnu)
    nans = scales.float().isnan()
    torch.save({"scales": scales}, tmp_path / "a.pth")
    first = nans.nonzero()[0].tolist()
    assert detail(verify(tmp_path / "a.pth"), "finite") == f"'scales' has {nans.sum()} NaN, the first at {first}"
    torch.save({"scales": scales[:-1].clone()}, tmp_path / "a.pth")
    assert results(verify(tmp_path / "a.pth"))["finite"] == "ok"


def test_allowed_values_do_not_hide_tensors_that_are_not_read(tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([torch.nan]), "s": torch.eye(3).to_sparse()}, tmp_path / "a.pth")
    assert results(verify(tmp_path / "a.pth"))["finite"] == "failed"
    report = verify(tmp_path / "a.pth", allow_nonfinite=True)
    assert results(report)["finite"] == "not checked"
    assert detail(report, "finite").startswith("'w' has 1 NaN, the first at [0] (allowed); 1 of 2 tensors: 's' is ")


def test_a_value_is_found_in_an_optimizer_and_in_a_chunk(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(3)}, "optimizer": {"state": {0: {"exp_avg": torch.tensor([1.0, torch.nan])}}}}
    torch.save(state, tmp_path / "a.pth")
    assert "'optimizer.state.0.exp_avg' has 1 NaN" in detail(verify(tmp_path / "a.pth"), "finite")


def test_a_class_that_torch_refuses_is_told(tmp_path: Path) -> None:
    from argparse import Namespace

    torch.save({"w": torch.ones(2), "args": Namespace(lr=1)}, tmp_path / "a.pth")
    report = verify(tmp_path / "a.pth")
    assert "argparse.Namespace" in detail(report, "loads")
    assert not report.passed


def test_a_harmful_pickle_never_gets_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *args, **options: called.append(args))
    import pickle

    deep = b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b"."
    path = torch_zip(tmp_path / "deep.pth", deep)
    assert results(verify(path)) == {"structure": "failed"}
    assert called == []
    assert results(verify(torch_zip(tmp_path / "good.pth", pickle.dumps({"a": 1}, 2))))["structure"] == "ok"
    assert len(called) == 1


def test_a_digest_is_compared_with_that_of_sha256sum(safetensors: Path, tmp_path: Path) -> None:
    want = hashlib.sha256(safetensors.read_bytes()).hexdigest()
    assert results(verify(safetensors, expect_sha256=want.upper()))["sha256"] == "ok"
    wrong = verify(safetensors, expect_sha256=want[:-1] + ("0" if want[-1] != "0" else "1"))
    assert results(wrong)["sha256"] == "failed"
    assert not wrong.passed
    folder = sharded(tmp_path / "folder", 1.0)
    files = sorted(path.name for path in folder.iterdir())
    text = subprocess.run(["sha256sum", *files], cwd=folder, capture_output=True, text=True, check=True).stdout
    (tmp_path / "SUMS").write_text(text)
    assert results(verify(folder, expect_sha256=str(tmp_path / "SUMS")))["sha256"] == "ok"
    (tmp_path / "SUMS").write_text("".join(text.splitlines(keepends=True)[1:]))
    assert "does not list" in detail(verify(folder, expect_sha256=str(tmp_path / "SUMS")), "sha256")
    index = json.loads((folder / files[-1]).read_text())
    (folder / files[-1]).write_text(json.dumps(index | {"more": 1}))
    (tmp_path / "SUMS").write_text(text)
    assert f"'{files[-1]}'" in detail(verify(folder, expect_sha256=str(tmp_path / "SUMS")), "sha256")
    with pytest.raises(UsageError, match="has 3 files"):
        verify(folder, expect_sha256=want)
    with pytest.raises(UsageError, match="a list of them"):
        verify(folder, expect_sha256=str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["a.pth", "./a.pth", "out/a.pth", "{}/out/a.pth", "out/b\nc\\d.pth"])
def test_a_list_of_sha256sum_is_read_wherever_it_was_made(
    name: str, safetensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    name = name.format(tmp_path)
    here = Path("out") if name.endswith("a.pth") and "out" not in name else Path()
    path = here / name
    shutil.copy(safetensors, path)
    text = subprocess.run(["sha256sum", name], cwd=here, capture_output=True, text=True, check=True).stdout
    Path("SUMS").write_text(text)
    assert results(verify(path, expect_sha256="SUMS"))["sha256"] == "ok"
    Path("SUMS").write_text(text.replace(hashlib.sha256(path.read_bytes()).hexdigest(), "0" * 64) + text)
    assert results(verify(path, expect_sha256="SUMS"))["sha256"] == "failed"


def test_all_that_a_list_has_of_a_folder_is_compared(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "folder", 1.0)
    (folder / "config.json").write_text("{}")
    files = sorted(path.name for path in folder.iterdir())
    text = subprocess.run(["sha256sum", *files], cwd=folder, capture_output=True, text=True, check=True).stdout
    (tmp_path / "SUMS").write_text(text)
    assert detail(verify(folder, expect_sha256=str(tmp_path / "SUMS")), "sha256") == "those of 4 files"
    (folder / "config.json").write_text("[]")
    assert "'config.json' has another" in detail(verify(folder, expect_sha256=str(tmp_path / "SUMS")), "sha256")


@pytest.mark.parametrize(
    ("made_in", "names"), [("folder", "*"), (".", "other.json folder/*"), ("/", "$OLDPWD/folder/*")]
)
def test_a_file_that_a_list_has_of_a_folder_and_that_is_gone_is_found(
    made_in: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    (sharded(Path("folder"), 1.0) / "tokenizer.json").write_text("{}")
    Path("other.json").write_text("{}")
    script = f"cd {made_in} && sha256sum {names}"
    text = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    Path("SUMS").write_text(text)
    Path("other.json").unlink()  # of another folder: that is not what is asked
    assert detail(verify("folder", expect_sha256="SUMS"), "sha256") == "those of 4 files"
    Path("folder/tokenizer.json").unlink()
    assert detail(verify("folder", expect_sha256="SUMS"), "sha256") == "SUMS lists 'tokenizer.json', which is not there"
    monkeypatch.chdir(tmp_path)
    assert "lists 'tokenizer.json'" in detail(verify("run/folder", expect_sha256="run/SUMS"), "sha256")


def test_a_list_may_be_below_the_home_folder_and_has_one_form(
    safetensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    digest = hashlib.sha256(safetensors.read_bytes()).hexdigest()
    (tmp_path / "SUMS").write_text(f"{digest}  a.safetensors\n")
    assert results(verify(safetensors, expect_sha256="~/SUMS"))["sha256"] == "ok"
    (tmp_path / "SUMS").write_text(f"SHA256 (a.safetensors) = {digest}\n")  # with --tag
    with pytest.raises(UsageError, match="a line that is not of the form DIGEST  NAME"):
        verify(safetensors, expect_sha256="~/SUMS")


def test_a_name_that_is_not_utf8_is_no_fault_of_the_file(safetensors: Path) -> None:
    odd = safetensors.with_name(os.fsdecode(b"\xff.safetensors"))
    safetensors.rename(odd)
    report = verify(odd)
    assert report.passed, report
    assert results(report)["loads"] == "not checked"


def test_a_broken_link_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.pth").symlink_to("gone.pth")
    assert detail(verify(tmp_path / "a.pth"), "structure") == "a broken link to gone.pth."


@pytest.mark.parametrize("sample", ["0%", "101%", "1", "", "-1%", "nan%", 1])
def test_a_sample_is_a_part(sample: Any, safetensors: Path) -> None:
    with pytest.raises(UsageError, match="sample"):
        verify(safetensors, sample=sample)


def test_what_is_no_checkpoint_fails_and_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no checkpoint")
    for path in ("/dev/zero", tmp_path / "text.pth", tmp_path / "none.pth", tmp_path):
        assert results(verify(path)) == {"structure": "failed"}
