"""The pickle in a torch file: byte for byte what torch.save writes, made without torch."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from crafting import TORCH_DTYPES, random_tensor

from ckpt_tools.errors import WriteError
from ckpt_tools.formats.file_plan import OutTensor, Terms
from ckpt_tools.formats.pickle_write import dump
from ckpt_tools.tensors import DTYPES


def out(tensor: torch.Tensor) -> OutTensor:
    return OutTensor(DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), Terms(), "a tensor")


def of_torch(tree: Any) -> bytes:
    """Return the pickle that torch.save writes."""
    torch.save(tree, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3, 4)])
def test_dump_pickles_a_tensor_as_torch_does(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(dtype, shape)
    assert dump({"w": out(tensor)}, name="a.pth")[0] == of_torch({"w": tensor})


def test_dump_pickles_a_tree_as_torch_does() -> None:
    tied, half, codes = torch.ones(2, 2), torch.ones(3).half(), torch.ones(2).to(torch.float8_e5m2)

    def tree(tied: Any, half: Any, codes: Any) -> Any:
        model = OrderedDict({"a": tied, "b": tied, "h": half})
        model._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
        return {"model": model, "epoch": 3, "log": [codes, 0.5, None, "ctorch\n"], "size": torch.Size([2, 3]), "s": {1}}

    pickled, storages = dump(tree(out(tied), out(half), out(codes)), name="a.pth")
    assert pickled == of_torch(tree(tied, half, codes))
    assert [tensor.dtype.name for tensor in storages] == ["float32", "float16", "float8_e5m2"]


def test_dump_leaves_no_module_behind() -> None:
    before = set(sys.modules)
    dump({"w": out(torch.ones(1)), "f": out(torch.ones(1).to(torch.float8_e4m3fn))}, name="a.pth")
    with pytest.raises(WriteError, match=r"a\.pth: the entries other than weights cannot be written"):
        dump({"w": out(torch.ones(1)), "odd": (i for i in ())}, name="a.pth")
    assert set(sys.modules) == before


def test_plan_and_read_header_do_not_import_torch(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}
    torch.save({"model": tensors, "epoch": 1}, tmp_path / "in.pth")
    code = f"""
import sys
from pathlib import Path
from ckpt_tools.formats.format import Writing
from ckpt_tools.jobs.assembly import nested
from ckpt_tools.formats import read_header
source = read_header(Path({str(tmp_path / "in.pth")!r}))
writing = Writing(name="out.pth", provenance={{"made": "here"}})
planned = nested(source.tree, writing, target=Path("out.pth"), format=source.format)
(plan,) = planned.files
raw = bytearray(plan.size)
for tensor, offset in plan.payloads:
    at = tensor.terms[0].storage.offset
    raw[offset : offset + tensor.nbytes] = Path(source.path).read_bytes()[at : at + tensor.nbytes]
for segment in plan.computed:
    piece = segment.make([0] * len(segment.needs))
    raw[segment.offset : segment.offset + len(piece)] = piece
Path({str(tmp_path / "out.pth")!r}).write_bytes(raw)
assert not [name for name in sys.modules if name.split(".")[0] == "torch" or name[:32].isalnum() and len(name) > 32]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written["epoch"] == 1
    assert all(torch.equal(written["model"][name], tensor) for name, tensor in tensors.items())
