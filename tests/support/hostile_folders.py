"""Hostile folders: indexes, links, pipes, files beside weights, and checkpoints of several processes."""

# ruff: noqa: E501 - tables, of a kind a line
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import zero_files
from crafting import PAYLOAD, TENSOR, safetensors_file, torch_zip
from hostile_archives import entry
from hostile_kind import Kind, as_tensor, dict_of, dumped, global_, object_, text, whole
from hostile_pickles import TOUCH, called, pairs
from hostile_runs import SECRET

INDEX = "model.safetensors.index.json"
Make = Callable[[Path], Any]


def folders(group: str, read: bool, table: dict[str, Make]) -> list[Kind]:
    """Return a kind for each entry; its function fills the folder ``model``, beside which is a file with a secret."""

    def maker(fill: Make) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            (folder / "secret").write_bytes(SECRET)
            (folder / "model").mkdir()
            safetensors_file(folder / "outside.safetensors", {"w": entry()}, PAYLOAD)
            fill(folder / "model")
            return folder / "model"

        return make

    return [Kind(name, group, maker(fill), read) for name, fill in table.items()]


def weights(folder: Path, name: str = "model.safetensors") -> None:
    safetensors_file(folder / name, {"w": entry()}, PAYLOAD)


def index(content: Any, *shards: str) -> Make:
    """Return a maker of a folder with an index (an object, or bytes) and these shards."""

    def fill(folder: Path) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / INDEX).write_bytes(raw)
        for shard in shards:
            weights(folder, shard)

    return fill


def mapped(file: Any, *shards: str, name: str = "w") -> Make:
    return index({"metadata": {"total_size": 16}, "weight_map": {name: file}}, *shards)


def then(*steps: Make) -> Make:
    def fill(folder: Path) -> None:
        for step in steps:
            step(folder)

    return fill


def link(name: str, target: str) -> Make:
    return lambda folder: (folder / name).symlink_to(target)


def written(name: str, data: bytes | str) -> Make:
    def fill(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return fill


def pipe(name: str) -> Make:
    return lambda folder: os.mkfifo(folder / name)


def sparse(name: str, size: int = 1 << 40) -> Make:
    def fill(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return fill


INDEXES: dict[str, Make] = {
    "a shard by a path above": mapped("../outside.safetensors"),
    "a shard by an absolute path": mapped("/etc/passwd"),
    "a shard that is a link out": then(mapped("a.safetensors"), link("a.safetensors", "../outside.safetensors")),
    "a shard that is a link to the secret": then(mapped("a.safetensors"), link("a.safetensors", "../secret")),
    "a shard in a folder that is a link out": then(mapped("sub/outside.safetensors"), link("sub", "..")),
    "a shard that is a link to itself": then(mapped("a.safetensors"), link("a.safetensors", "a.safetensors")),
    "a shard that is not there": mapped("a.safetensors"),
    "a shard that is the index": mapped(INDEX),
    "a shard that is the folder": mapped("."),
    "a shard that is a folder": then(mapped("a.safetensors"), lambda folder: (folder / "a.safetensors").mkdir()),
    "a shard that is a pipe": then(mapped("a.safetensors"), pipe("a.safetensors")),
    "a shard of a terabyte of zeros": then(mapped("a.safetensors"), sparse("a.safetensors")),
    "a shard of an empty name": mapped(""),
    "a shard of a name with NUL": mapped("a\0.safetensors"),
    "a shard of a name of 5,000 letters": mapped("a" * 5000),
    "a shard of a name that is a number": mapped(1),
    "a shard of a name that is a list": mapped([]),
    "a shard of a name of half of a surrogate pair": mapped("a\ud800.safetensors"),
    "a shard of a name with escapes": mapped("\x1b[2J\u202e.safetensors"),
    "a shard without the tensor": mapped("a.safetensors", "a.safetensors", name="v"),
    "a shard that is a pickle of os.system": then(
        mapped("a.bin"), lambda folder: torch_zip(folder / "a.bin", whole(called("os.system", TOUCH)))
    ),
    "an index of no JSON": index(b"{" * 100),
    "an index of 100,000 brackets": index(b'{"weight_map":' + b"[" * 100_000),
    "an index of a list": index([]),
    "an index of a number": index({"weight_map": 1}),
    "an index without names": index({"weight_map": {}}),
    "an index of an integer of 5,000 digits": index(b'{"metadata":' + b"9" * 5000 + b"}"),
    "an index that is a pipe": pipe(INDEX),
    "an index of a terabyte": sparse(INDEX),
    "an index that is a link to itself": link(INDEX, INDEX),
    "an index of 20,000 shards that are not there": index(
        {"weight_map": {f"w{n}": f"{n}.safetensors" for n in range(20_000)}}
    ),
    "a folder with a link to itself": link("model", "."),
    "a folder of nothing": lambda folder: None,
    "a folder of 500 empty files": lambda folder: [(folder / f"{n}.pth").touch() for n in range(500)],
    "files of names with escapes": written("\x1b[2J\u202e.pth", "x"),
}
INDEXES_READ: dict[str, Make] = {
    "an index of metadata of nonsense": index(
        {"metadata": {"total_size": -1, "\x1b[2J\u202e": []}, "weight_map": {"w": "a.safetensors"}}, "a.safetensors"
    ),
    "shards that are a link within the folder": then(
        mapped("a.safetensors", "b.safetensors"), link("a.safetensors", "b.safetensors")
    ),
    "two indexes": then(mapped("a.safetensors", "a.safetensors"), written("b.safetensors.index.json", "{}")),
}

COMPANIONS_READ: dict[str, Make] = {
    "a configuration of no JSON": then(weights, written("config.json", "{" * 500)),
    "a configuration of 100,000 brackets": then(weights, written("config.json", "[" * 100_000)),
    "a configuration with escapes": then(
        weights, written("config.json", '{"model_type": "\\u001b[2J\\u202e", "architectures": ["\\ud800"]}')
    ),
    "a configuration of a model that names code": then(
        weights,
        written("config.json", '{"auto_map": {"AutoModel": "victim.Victim"}, "trust_remote_code": true}'),
        written("victim.py", "open('run-by-a-pickle', 'w')"),
        written("modeling_x.py", "open('run-by-a-pickle', 'w')"),
    ),
    "a configuration of a terabyte": then(weights, sparse("config.json")),
    "a configuration that is a pipe": then(weights, pipe("config.json")),
    "a tokenizer that is a link to the secret": then(weights, link("tokenizer.json", "../secret")),
    "a configuration that is a link to the secret": then(weights, link("config.json", "../secret")),
    "a license that is an absolute link": then(weights, link("LICENSE", "/etc/passwd")),
    "a tokenizer that is a link to itself": then(weights, link("tokenizer.json", "tokenizer.json")),
    "a tokenizer that is a link to a device": then(weights, link("tokenizer.json", "/dev/zero")),
    "a tokenizer that is a pipe": then(weights, pipe("tokenizer.json")),
    "a folder named as a tokenizer": then(weights, lambda folder: (folder / "tokenizer.json").mkdir()),
}
COMPANIONS_READ |= {
    "a state of the trainer of no JSON": then(weights, written("trainer_state.json", "\xff{{")),
    "a state of the trainer of 100,000 brackets": then(weights, written("trainer_state.json", "[" * 100_000)),
    "a state of the trainer of a step of 5,000 digits": then(
        weights, written("trainer_state.json", '{"global_step":' + "9" * 5000 + "}")
    ),
    "a state of the trainer of steps of nonsense": then(
        weights,
        written("trainer_state.json", '{"global_step": "\\u001b[2J", "epoch": NaN, "log_history": [1, {"step": []}]}'),
    ),
    "a state of the trainer that is a pipe": then(weights, pipe("trainer_state.json")),
}
COMPANIONS: dict[str, Make] = {
    "a state of the trainer of a terabyte": then(weights, sparse("trainer_state.json")),
}

DCP = "torch.distributed.checkpoint.metadata."
Place = tuple[Any, Any, Any]
HERE: Place = ("__0_0.distcp", 0, None)


def metadata(
    chunks: list[tuple[tuple[int, ...], tuple[int, ...], Place]],
    size: tuple[int, ...] = (4,),
    dtype: bytes = global_("torch.float32"),
    path: bytes = b"",
    name: str = "w",
) -> Callable[[int], bytes]:
    """Return what makes a ``.metadata``, given the length of the file of chunks."""

    def make(length: int) -> bytes:
        def sizes(values: tuple[int, ...]) -> bytes:
            return called("torch.Size", dumped(values))

        stored, listed = [], []
        for number, (offsets, shape, (file, at, extent)) in enumerate(chunks):
            key = object_(f"{DCP}MetadataIndex", dict_of(fqn=text(name), offset=sizes(offsets), index=dumped(number)))
            place = dict_of(
                relative_path=dumped(file), offset=dumped(at), length=dumped(length if extent is None else extent)
            )
            stored.append(key + object_("torch.distributed.checkpoint.filesystem._StorageInfo", place))
            listed.append(object_(f"{DCP}ChunkStorageMetadata", dict_of(offsets=sizes(offsets), sizes=sizes(shape))))
        properties = object_(f"{DCP}TensorProperties", b"(" + dtype + b"NNNNt")
        tensor = dict_of(properties=properties, size=sizes(size), chunks=b"](" + b"".join(listed) + b"e")
        fields = dict_of(
            state_dict_metadata=b"}" + text(name) + object_(f"{DCP}TensorStorageMetadata", tensor) + b"s",
            planner_data=(b"}" + text(name) + path + b"s") if path else b"N",
            storage_data=b"}(" + b"".join(stored) + b"u",
        )
        return whole(object_(f"{DCP}Metadata", fields))

    return make


def dcp(content: Callable[[int], bytes] | bytes, chunk: bytes = TENSOR) -> Make:
    def fill(folder: Path) -> None:
        path = torch_zip(folder / "__0_0.distcp", whole(chunk))
        made = content if isinstance(content, bytes) else content(path.stat().st_size)
        (folder / ".metadata").write_bytes(made)

    return fill


ONE = [((0,), (4,), HERE)]


def placed(*place: Any) -> Make:
    return dcp(metadata([((0,), (4,), place)]))  # type: ignore[list-item]


BOXES = [(at, (1, 1, 1), HERE) for at in product(range(12), repeat=3)]
OVERLAPS = [((n % 7, n % 11, n % 13), (17, 17, 17), HERE) for n in range(3000)]
DCPS: dict[str, Make] = {
    "metadata that is no pickle": dcp(b"x" * 100),
    "metadata of os.system": dcp(whole(called("os.system", TOUCH))),
    "metadata of a pair of pairs as a key": dcp(whole(b"}" + pairs(40) + b"Ns")),
    "metadata of nothing": dcp(b""),
    "metadata of a dict": dcp(whole(b"}")),
    "metadata that is a pipe": then(dcp(b""), lambda folder: (folder / ".metadata").unlink(), pipe(".metadata")),
    "metadata of a terabyte": then(dcp(b""), sparse(".metadata")),
    "metadata that is a link out": then(
        dcp(b""), lambda folder: (folder / ".metadata").unlink(), link(".metadata", "../secret")
    ),
    "a chunk by a path above": placed("../outside.safetensors", 0, None),
    "a chunk by an absolute path": placed("/etc/passwd", 0, None),
    "a chunk in a file that is not there": placed("__1_0.distcp", 0, None),
    "a chunk in a file of a name with NUL": placed("a\0", 0, None),
    "a chunk in a file of a number": placed(1, 0, None),
    "a chunk in a link out": then(placed("__1_0.distcp", 0, None), link("__1_0.distcp", "../secret")),
    "a chunk in a pipe": then(placed("__1_0.distcp", 0, None), pipe("__1_0.distcp")),
    "a chunk at 2^62": placed("__0_0.distcp", 1 << 62, None),
    "a chunk before the file": placed("__0_0.distcp", -1, None),
    "a chunk of 2^62 bytes": placed("__0_0.distcp", 0, 1 << 62),
    "a chunk of no bytes": placed("__0_0.distcp", 0, 0),
    "a chunk that is os.system": dcp(metadata(ONE), called("os.system", TOUCH)),
    "a chunk of another dtype": dcp(metadata(ONE, dtype=global_("torch.float64"))),
    "a chunk of a dtype that is a class": dcp(metadata(ONE, dtype=global_("os.system"))),
    "chunks that overlap": dcp(metadata([((0,), (4,), HERE), ((2,), (4,), HERE)], (6,))),
    "chunks with a gap": dcp(metadata([((0,), (4,), HERE), ((6,), (4,), HERE)], (10,))),
    "a chunk beyond the tensor": dcp(metadata([((3,), (4,), HERE)])),
    "a chunk before the tensor": dcp(metadata([((-1,), (4,), HERE)])),
    "a tensor of 2^120 elements in chunks": dcp(metadata(ONE, (1 << 60, 1 << 60))),
    "a tensor of 100 axes in chunks": dcp(metadata(ONE, (1,) * 100)),
    "no chunks": dcp(metadata([])),
    "3,000 boxes that overlap": dcp(
        metadata(OVERLAPS, (40, 40, 40)), TENSOR.replace(b"K\4\x85K\1\x85", b"(K\x11K\x11K\x11t(K\0K\0K\0t")
    ),
    "a path of 1,000 keys": dcp(metadata(ONE, path=dumped(("a",) * 1000))),
    "a path of no keys": dcp(metadata(ONE, path=dumped(()))),
    "a path of a float": dcp(metadata(ONE, path=dumped((1.5,)))),
}
DCPS_READ: dict[str, Make] = {
    "a path of a far index": dcp(metadata(ONE, path=dumped(("a", 1 << 40)))),
    "a name with escapes in chunks": dcp(metadata(ONE, name="\x1b[2J\u202e")),
    "a path of escapes": dcp(metadata(ONE, path=dumped(("\x1b[2J\u202e", "../../x")))),
    "1,728 boxes": dcp(
        metadata(BOXES, (12, 12, 12)),
        TENSOR.replace(b"K\4\x85K\1\x85", b"K\1K\1K\1\x87K\1K\1K\1\x87").replace(b"K\4tQ", b"K\4tQ"),
    ),
}


def zero(*changes: tuple[str, Callable[[dict[str, Any]], Any]], stage: int = 2) -> Make:
    """Return a maker of a checkpoint of DeepSpeed, of whose files those that match a pattern are changed."""

    def fill(folder: Path) -> None:
        shutil.rmtree(folder)
        zero_files.full(folder, stage=stage, ranks=2)
        for pattern, change in changes:
            for path in sorted(folder.glob(pattern)):
                zero_files.edit(path, change)

    return fill


def changed(pattern: str, *keys: str, to: Any, stage: int = 2) -> Make:
    def change(states: dict[str, Any]) -> None:
        for key in keys[:-1]:
            states = states[key]
        states[keys[-1]] = to

    return zero((pattern, change), stage=stage)


def removed(pattern: str) -> Make:
    return then(zero(), lambda folder: [path.unlink() for path in sorted(folder.glob(pattern))[:1]])


ALL_MODEL, ALL_OPTIM = "*model_states.pt", "*optim_states.pt"
ZEROS: dict[str, Make] = {
    "shapes of 2^60 elements": changed(ALL_MODEL, "param_shapes", to=[{"w": torch.Size([1 << 60])}]),
    "shapes of nonsense": changed(ALL_MODEL, "param_shapes", to=[{"w": "x"}]),
    "shapes that are a number": changed(ALL_MODEL, "param_shapes", to=1),
    "groups of no partitions": changed(ALL_OPTIM, "single_partition_of_fp32_groups", to=[]),
    "partitions that are numbers": changed(ALL_OPTIM, "single_partition_of_fp32_groups", to=[1.0, 2.0]),
    "a stage of 9": changed(ALL_OPTIM, "zero_stage", to=9),
    "a partition count of 2^40": changed(ALL_OPTIM, "partition_count", to=1 << 40),
    "a rank of an optimizer that is not there": removed(ALL_OPTIM),
    "a model that is not there": removed(ALL_MODEL),
    "an optimizer that is a link to the secret": then(
        removed(ALL_OPTIM), link("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "../secret")
    ),
}
ZEROS_READ: dict[str, Make] = {
    "a state of the optimizer that is a text": changed(ALL_OPTIM, "base_optimizer_state", to="x"),
}

ADAPTER: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "x"}
FACTORS = {
    "base_model.model.q.lora_A.weight": entry(shape=[2, 2]),
    "base_model.model.q.lora_B.weight": entry(shape=[2, 2], offsets=[16, 32]),
}


def adapter(config: Any = None, **changes: Any) -> Make:
    def fill(folder: Path) -> None:
        safetensors_file(folder / "adapter_model.safetensors", FACTORS, PAYLOAD * 2)
        raw = config if isinstance(config, bytes) else json.dumps({**ADAPTER, **changes}).encode()
        (folder / "adapter_config.json").write_bytes(raw)

    return fill


LORAS: dict[str, Make] = {
    "an adapter of no JSON": adapter(b"{" * 100),
    "an adapter of 100,000 brackets": adapter(b"[" * 100_000),
    "an adapter of a rank of 10^18": adapter(r=10**18),
    "an adapter of a rank of 5,000 digits": adapter(b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}"),
    "an adapter of a factor of NaN": adapter(b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}'),
    "an adapter of a pattern that takes for ever": adapter(alpha_pattern={"(a+)+$": 1, "(.*)*(.*)*(.*)*x": 2}),
    "an adapter of a base by a path above": adapter(base_model_name_or_path="../../../etc"),
    "an adapter of another type": adapter(peft_type="\x1b[2J\u202e"),
    "an adapter that names code": adapter(auto_mapping={"base_model_class": "Victim", "parent_library": "victim"}),
}
RANKS: dict[str, Make] = {
    "a rank that is not there": then(
        lambda folder: as_tensor(folder / "consolidated.00.pth", TENSOR),
        lambda folder: as_tensor(folder / "consolidated.02.pth", TENSOR),
    ),
    "a rank that is a link out": then(
        lambda folder: as_tensor(folder / "consolidated.00.pth", TENSOR), link("consolidated.01.pth", "../secret")
    ),
    "a rank that is a pipe": then(
        lambda folder: as_tensor(folder / "consolidated.00.pth", TENSOR), pipe("consolidated.01.pth")
    ),
    "files of FSDP that are pipes": then(pipe("pytorch_model_fsdp_0.bin"), pipe("model_state_rank_0.pth")),
    "a folder of Lightning of nonsense": then(
        written("meta.pt", b"PK\3\4"), written("__0_0.distcp", b"x"), written(".metadata", b"x")
    ),
}

RANKS_READ: dict[str, Make] = {
    "a rank of os.system": lambda folder: torch_zip(folder / "consolidated.00.pth", whole(called("os.system", TOUCH))),
    "a folder of a rank that is a link out": then(
        lambda folder: (folder / "mp_rank_00").mkdir(),
        lambda folder: as_tensor(folder / "mp_rank_00" / "model_optim_rng.pt", TENSOR),
        link("mp_rank_01", "/etc"),
    ),
}

KINDS: list[Kind] = [
    *folders("indexes of shards", False, INDEXES),
    *folders("indexes of shards", True, INDEXES_READ),
    *folders("files beside weights", True, COMPANIONS_READ),
    *folders("files beside weights", False, COMPANIONS),
    *folders("DCP", False, DCPS),
    *folders("DCP", True, DCPS_READ),
    *folders("DeepSpeed", False, ZEROS),
    *folders("DeepSpeed", True, ZEROS_READ),
    *folders("LoRA", True, LORAS),
    *folders("ranks", False, RANKS),
    *folders("ranks", True, RANKS_READ),
]
