"""NeMo's archives: the torch zip in a tar file is read as if it were a file of its own."""

from __future__ import annotations

import gzip
import io
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import load
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools import average, open_checkpoint
from ckpt_tools.errors import CkptError, NotACheckpointError, UnsupportedError


def nemo(path: Path, state: dict[str, torch.Tensor], *, form: int = tarfile.PAX_FORMAT, **others: bytes) -> Path:
    """Write a file as NeMo's SaveRestoreConnector does: its configuration first, then the weights."""
    weights = io.BytesIO()
    torch.save(state, weights)
    with tarfile.open(path, "w:", format=form) as archive:
        for name, data in {"model_config.yaml": b"a: 1\n", **others, "model_weights.ckpt": weights.getvalue()}.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size, member.mtime = len(data), 1.5  # a fraction needs a record of its own
            archive.addfile(member, io.BytesIO(data))
    return path


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"encoder.weight": torch.randn(30, 7), "encoder.bias": torch.randn(3).bfloat16(), "n": torch.tensor(seed)}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_open_checkpoint_reads_a_nemo_file_bit_for_bit(tmp_path: Path, form: int) -> None:
    checkpoint = open_checkpoint(nemo(tmp_path / "m.nemo", state(1), form=form))
    for name, tensor in state(1).items():
        assert torch.equal(checkpoint[name], tensor)


def test_average_of_nemo_files_is_a_torch_file(tmp_path: Path) -> None:
    paths = [nemo(tmp_path / f"step={i}.nemo", state(i)) for i in range(3)]
    average(paths, out=tmp_path / "out.ckpt")
    found = load(tmp_path / "out.ckpt")
    want = torch.stack([state(i)["encoder.weight"].double() for i in range(3)]).mean(0).float()
    assert torch.equal(found["encoder.weight"], want)
    assert found["n"] == 2


def test_average_finds_nemo_files_in_a_folder(tmp_path: Path) -> None:
    for i in range(2):
        nemo(tmp_path / f"step={i}.nemo", state(i))
    assert len(average(tmp_path, out=tmp_path / "out" / "..", dry_run=True).inputs) == 2


def test_no_output_is_named_as_a_nemo_file(tmp_path: Path) -> None:
    for name in ("out.nemo", "a.b.nemo"):
        with pytest.raises(UnsupportedError, match=rf"{name}: nemo is read, not written\. Choose another name"):
            average([nemo(tmp_path / "1.nemo", state(1))], out=tmp_path / name)
        assert not (tmp_path / name).exists()


def test_open_checkpoint_says_what_a_tar_file_is_that_has_no_single_torch_file(tmp_path: Path) -> None:
    path = nemo(tmp_path / "m.nemo", state(1), **{"other.ckpt": b"x"})
    with pytest.raises(UnsupportedError, match="a tar file with 2 torch files.*tar -xf"):
        open_checkpoint(path)


def test_open_checkpoint_says_how_to_open_a_compressed_file(tmp_path: Path) -> None:
    (tmp_path / "m.nemo").write_bytes(gzip.compress(nemo(tmp_path / "plain.nemo", state(1)).read_bytes()))
    with pytest.raises(NotACheckpointError, match="compressed; run gunzip"):
        open_checkpoint(tmp_path / "m.nemo")


@given(data=st.data())
def test_open_checkpoint_reads_or_rejects_a_damaged_nemo_file(tmp_path: Path, data: st.DataObject) -> None:
    path = nemo(tmp_path / "m.nemo", state(1))
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(513, len(raw) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with suppress(CkptError):
        dict(open_checkpoint(path))
