"""Seeds: small sound checkpoints, a few hundred bytes each, from which the fuzzer starts.

Zip archives have no checksums (0, as torch writes when it is told to), so that an entry changes without its checksum.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from zero_files import arrays, save_zero

Seeds = Mapping[str, bytes]

_WEIGHTS = {
    "fc.weight": torch.arange(6.0).view(2, 3),
    "fc.bias": torch.ones(2, dtype=torch.float16),
    "n": torch.tensor(3),
}
_PROVENANCE = {"version": "0.1.0", "command": "avg", "mode": "uniform", "state": "raw", "arguments": {"last": 2},
               "inputs": [{"name": "a.pth", "coefficient": 0.5}]}  # fmt: skip


def archive(records: Mapping[str, bytes]) -> bytes:
    """Return a zip archive without compression and checksums."""
    body, directory = b"", b""
    for name, data in records.items():
        raw = name.encode()
        common = struct.pack("<5H3I2H", 20, 0x800, 0, 0, 33, 0, len(data), len(data), len(raw), 0)
        directory += b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<3HII", 0, 0, 0, 0, len(body)) + raw
        body += b"PK\3\4" + common + raw + data
    count = len(records)
    return body + directory + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)


def records_of(data: bytes) -> dict[str, bytes]:
    """Return all entries of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as found:
        return {info.filename: found.read(info) for info in found.infolist()}


def saved(value: Any, *, new: bool = True) -> bytes:
    """Return the file that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def small(value: Any, more: Mapping[str, bytes] | None = None) -> bytes:
    """Return the file that torch.save writes, without padding and checksums, with more entries."""
    return archive({**_bare(saved(value)), **(more or {})})


def _bare(data: bytes) -> dict[str, bytes]:
    """Return the entries of a torch file that hold the checkpoint."""
    return {name: each for name, each in records_of(data).items() if "/." not in name}


def _states() -> dict[str, Any]:
    """Objects as training saves them, of the tensors of `_WEIGHTS`, in the order of their storages 0, 1 and 2."""
    weights, view = OrderedDict(_WEIGHTS), _WEIGHTS["fc.weight"]
    optimizer = {
        "state": {0: {"step": 3, "exp_avg": _WEIGHTS["fc.weight"], "exp_avg_sq": _WEIGHTS["fc.weight"]}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.0, "params": [0]}],
    }
    wrapped = OrderedDict((f"_orig_mod.module.{name}", each) for name, each in weights.items())
    wrapped._metadata = OrderedDict({"": {"version": 1}, "_orig_mod": {"version": 1}})  # type: ignore[attr-defined]
    return {
        "plain": weights,
        "training": {"state_dict": weights, "optimizer": optimizer, "epoch": 3, "arch": "resnet18", "metric": 0.5},
        "wrapped": {"model": wrapped, "model_ema": {"module": wrapped}, "global_step": 10, "config": {"a": [1, None]}},
        "views": {"a": view.t(), "b": view[:, 1:], "c": view.expand(2, 2, 3), "d": torch.nn.Parameter(view),
                  "half": _WEIGHTS["fc.bias"], "n": _WEIGHTS["n"], "empty": view[:0], "size": view.shape},
        "values": {"w": view, "x": (1, 2.5, "ü", b"x", {3, 4}, 1 << 70, 1j, True), ("a", 1): [torch.float16],
                   None: frozenset({1})},
    }  # fmt: skip


def storages() -> dict[str, bytes]:
    """Return the storages that the pickles of `pickles` name."""
    records = records_of(saved(_WEIGHTS))
    return {name.rpartition("/")[2]: data for name, data in records.items() if "/data/" in name}


def pickles() -> Seeds:
    """Return pickles as torch.save writes them."""
    found = {name: records_of(saved(state))["archive/data.pkl"] for name, state in _states().items()}
    return found | {
        "namespace": b"\x80\2}X\4\0\0\0argscargparse\nNamespace\n)\x81}X\2\0\0\0lrG?\xb9\x99\x99\x99\x99\x99\x9asbs.",
        "protocol 4": pickle.dumps({"a": [1, "b", {2: None}, (3, 4.5)], "b": bytearray(b"x")}, 4),
        "unknown": b"\x80\2}X\1\0\0\0acos\nsystem\nX\2\0\0\0ls\x85Rs.",
    }


def torch_zips() -> Seeds:
    found = {name: small(state) for name, state in _states().items()}
    found["big endian"] = small(_WEIGHTS, {"archive/byteorder": b"big"})
    found["provenance"] = small(_WEIGHTS, {"archive/ckpt_tools.json": json.dumps(_PROVENANCE).encode()})
    repacked = small(_WEIGHTS)[:-2] + b"\1\0x"  # with a comment
    return found | {"torch": saved(_WEIGHTS), "comment": repacked}


def torch_legacy() -> Seeds:
    return {name: saved(state, new=False) for name, state in _states().items()}


def safetensors() -> Seeds:
    tensors = {name.replace(".", "_"): each for name, each in _WEIGHTS.items()}
    return {
        "plain": safetensors_bytes(_WEIGHTS),
        "metadata": safetensors_bytes(tensors, {"format": "pt", "ckpt_tools": json.dumps(_PROVENANCE)}),
        "tie": safetensors_bytes(_WEIGHTS, {"head.weight": "fc.weight"}),
        "odd": safetensors_bytes(
            {"empty": torch.empty(0, 3)}
            | {name: torch.ones(2).to(getattr(torch, name)) for name in ("bool", "float8_e5m2", "complex64", "uint16")}
        ),
    }


SHARDS = {
    "a.safetensors": {"w": torch.arange(3.0), "v": torch.ones(2)},
    "b.safetensors": {"x": torch.zeros(1)},
    "c.bin": {"y": torch.arange(2), "z": torch.ones(1)},
}
"""The shards that the indexes of `indexes` list."""


def shards() -> dict[str, bytes]:
    return {name: small(each) if name == "c.bin" else safetensors_bytes(each) for name, each in SHARDS.items()}


def indexes() -> Seeds:
    of = {name: file for file, tensors in SHARDS.items() for name in tensors}
    one = {name: file for name, file in of.items() if file == "a.safetensors"}
    return {
        "all": json.dumps({"metadata": {"total_size": 48}, "weight_map": of}).encode(),
        "one": json.dumps({"weight_map": one}).encode(),
        "outside": json.dumps({"metadata": {}, "weight_map": {**one, "w": "../a.safetensors"}}).encode(),
    }


def dcp() -> tuple[dict[str, bytes], Seeds]:
    """Return the files of a folder by name, and seeds of its ``.metadata``."""
    import torch.distributed.checkpoint as saving

    state = {"model": {"w": torch.arange(6.0).view(2, 3)}, "optim": [{"lr": 0.1}, torch.ones(2)], "step": 3}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        saving.save(state, checkpoint_id=folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return files, {"saved": files[".metadata"]}


def zero(stage: int) -> dict[str, dict[str, bytes]]:
    """Return the entries of each file of a DeepSpeed checkpoint of two ranks."""
    group = arrays({"a": (2, 3), "b": (3,)})
    with tempfile.TemporaryDirectory() as folder:
        save_zero(Path(folder), [group], stage=stage, ranks=2, buffers={"n": torch.tensor(4)}, shared={"c": "a"})
        return {path.name: _bare(path.read_bytes()) for path in sorted(Path(folder).iterdir())}


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(2, 1)
        self.register_buffer("table", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def torch_scripts() -> Seeds:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        torch.jit.save(torch.jit.script(_Net()), buffer)
    records = records_of(buffer.getvalue())
    return {"module": archive({name: data for name, data in records.items() if not name.endswith(".debug_pkl")})}


def pt2() -> Seeds:
    sizes = {"sizes": [{"as_int": 4}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}}
    meta = {"path_name": "weight_0", "use_pickle": False, "tensor_meta": {"dtype": 7, "layout": 7, **sizes}}
    weights = "m/data/weights/"
    config = json.dumps({"config": {"fc.weight": meta}}).encode()
    new = {"m/archive_format": b"pt2", "m/byteorder": b"little", f"{weights}weight_0": bytes(range(16)),
           f"{weights}model_weights_config.json": config}  # fmt: skip
    old = {"version": b"8.2", "serialized_state_dict.pt": small(_WEIGHTS), "serialized_exported_program.json": b"{}"}
    return {"config": archive(new), "file": archive({f"{weights}model.pt": small(_WEIGHTS)}), "old": archive(old)}


def nemo() -> Seeds:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as found:
        for name, data in {"model_config.yaml": b"a: 1\n", "model_weights.ckpt": small(_WEIGHTS)}.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            found.addfile(member, io.BytesIO(data))
    return {"nemo": buffer.getvalue().rstrip(b"\0") + bytes(1024)}
