"""Odd input for fix-prefix: it comes out right or is refused, and what was there stays."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import fix_prefix, open_checkpoint
from ckpt_tools.errors import AlignmentError, LayoutError
from ckpt_tools.storage import splice

Save = Callable[..., Path]

_PADDING = struct.pack("<2H", 0x4246, 10) + b"Z" * 10


def weights(*names: str) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((name, torch.randn(5)) for name in names)


def check_zip(path: Path) -> None:
    done = subprocess.run(["unzip", "-tq", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("last", [False, True], ids=["pickle-first", "pickle-last"])
@pytest.mark.parametrize(
    "extra",
    [b"", _PADDING, _PADDING * 2, b"abc", _PADDING + b"Z", struct.pack("<2HQQ", 1, 16, 1, 1) * 2],
    ids=["none", "padded", "padded twice", "no field", "padded and a rest", "sizes twice"],
)
@pytest.mark.parametrize("add", [(), ("p" * 5000 + ".",)], ids=["shorter", "longer"])
def test_fix_prefix_keeps_zip_headers_of_any_kind(
    extra: bytes, last: bool, add: tuple[str, ...], tmp_path: Path, save: Save
) -> None:
    state = weights("module.a.weight", "module.b.weight")
    written = save("torch.pth", state)
    path = tmp_path / "c.pth"
    with zipfile.ZipFile(written) as old, zipfile.ZipFile(path, "w") as new:
        for name in sorted(old.namelist(), key=lambda name: name.endswith("data.pkl") is last):
            info = zipfile.ZipInfo(name)
            info.extra = extra
            new.writestr(info, old.read(name))
    assert torch.load(path, weights_only=True).keys() == state.keys()
    fix_prefix(path, strip=["module."], add=add)
    check_zip(path)
    found = torch.load(path, weights_only=True)
    for name, tensor in state.items():
        assert found["".join(add) + name.removeprefix("module.")].equal(tensor)


def test_fix_prefix_rejects_names_that_are_not_plain_text(save: Save) -> None:
    path = save("c.pth", {"model": {"module.a": torch.ones(2), np.str_("module.b"): torch.ones(2)}})
    before = path.read_bytes()
    with pytest.raises(AlignmentError, match=r"in model, a tensor has a name that is no plain text.*str\(name\)"):
        fix_prefix(path)
    assert path.read_bytes() == before


def test_fix_prefix_rejects_the_state_of_an_optimizer(save: Save) -> None:
    path = save("optimizer.pt", {"state": {"module.w": {"exp_avg": torch.ones(2)}}, "param_groups": []})
    before = path.read_bytes()
    for add in ([], ["model."]):
        with pytest.raises(LayoutError, match="the state of an optimizer"):
            fix_prefix(path, add=add)
    assert path.read_bytes() == before


def test_fix_prefix_notes_a_prefix_on_most_names(save: Save) -> None:
    path = save("c.pth", weights("module.a", "module.b", "c"))
    report = fix_prefix(path)
    assert not report.changed
    assert report.notes == (
        f"{path}: 2 of 3 names start with 'module.', but not all, so it may be the model's own, and stays. "
        "To take it off: `strip='module.'`.",
    )
    fix_prefix(path, strip=["module."])
    assert list(torch.load(path)) == ["a", "b", "c"]


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_fix_prefix_renames_litema_names_with_the_weights(wrapper: str, save: Save) -> None:
    """LitEma's buffers are called as the parameters, without dots; `module` in a dotless name is no wrapper."""
    outer, inner = ("module.", wrapper.removeprefix("module.")) if wrapper.startswith("module.") else ("", wrapper)
    raw = weights(*(f"{inner}{name}" for name in ("submodule.weight", f"{inner}a.bias")))
    state = {f"{outer}model.{name}": tensor for name, tensor in raw.items()}
    state |= {f"{outer}model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in raw.items()}
    state |= {f"{outer}model_ema.decay": torch.tensor(0.9), f"{outer}model_ema.num_updates": torch.tensor(3)}
    path = save("c.ckpt", {"state_dict": state})
    fix_prefix(path)
    assert list(torch.load(path)["state_dict"]) == [
        "model.submodule.weight", "model.a.bias", "model_ema.submoduleweight", "model_ema.abias",
        "model_ema.decay", "model_ema.num_updates",
    ]  # fmt: skip
    average = open_checkpoint(path, state="ema")
    for name, tensor in raw.items():
        assert torch.equal(torch.as_tensor(average[f"model.{name.replace(inner, '')}"]), tensor + 1)


def test_fix_prefix_creates_a_private_copy_of_a_private_file(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save("c.pth", weights("module.a"))
    path.chmod(0o600)
    modes: list[int] = []
    write = splice.write

    def looking(splice: Any, source: Any, target: int, *more: Any) -> None:
        modes.append(stat.S_IMODE(os.fstat(target).st_mode))
        write(splice, source, target, *more)

    monkeypatch.setattr(splice, "write", looking)
    fix_prefix(path)
    assert modes == [0o600]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_fix_prefix_keeps_file_attributes(save: Save) -> None:
    path = save("c.pth", weights("module.a"))
    try:
        os.setxattr(path, "user.origin", b"run 7")
    except OSError:
        pytest.skip("the file system has no attributes")
    fix_prefix(path)
    assert os.getxattr(path, "user.origin") == b"run 7"


def test_fix_prefix_raises_the_limit_of_open_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    names = {f"module.{i}": f"model-{i:05}-of-00060.safetensors" for i in range(60)}
    for name, shard in names.items():
        save_file({name: torch.ones(2)}, model / shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    code = (
        "import resource, sys, ckpt_tools\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (80, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "ckpt_tools.fix_prefix(sys.argv[1], out=sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model, tmp_path / "new"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, shard in names.items():
        assert list(load_file(tmp_path / "new" / shard)) == [name.removeprefix("module.")]
