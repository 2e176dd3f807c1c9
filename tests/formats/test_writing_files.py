"""Writing: what the engine makes of a plan is what every other reader takes for a sound file."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import subprocess
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from crafting import TORCH_DTYPES, copies, random_tensor, raw_bytes, same, write, zeros
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools import average, convert, open_checkpoint
from ckpt_tools.errors import UnsupportedError, UsageError, WriteError
from ckpt_tools.formats import pickle_write, read_header
from ckpt_tools.formats import safetensors as st_format
from ckpt_tools.formats.file_plan import FilePlan, OutTensor, Terms
from ckpt_tools.formats.format import Writing
from ckpt_tools.formats.safetensors import SAFETENSORS
from ckpt_tools.formats.sharded import index_json, parse_size, plan_shards
from ckpt_tools.formats.torch_zip import TORCH_ZIP
from ckpt_tools.tensors import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:B?Complex.* support is experimental")

Save = Callable[..., Path]
SAFETENSORS_DTYPES = [
    dtype for dtype in TORCH_DTYPES if dtype not in ("complex128", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2")
]


def every_dtype(names: list[str]) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": random_tensor(name, (3, i + 1), seed=i) for i, name in enumerate(names)}


def assert_sound_zip(path: Path) -> None:
    """Let Python and Info-ZIP look at all checksums, sizes and places."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    if shutil.which("unzip"):
        done = subprocess.run(["unzip", "-t", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "No errors detected" in done.stdout


def sparse(plan: FilePlan, path: Path, crc: Mapping[OutTensor, int] | None = None) -> Path:
    """Make the file of a plan without its payload, which stays a hole."""
    with path.open("wb") as file:
        file.truncate(plan.size)
        for segment in plan.computed:
            file.seek(segment.offset)
            file.write(segment.make([(crc or {}).get(tensor, 0) for tensor in segment.needs]))
    assert path.stat().st_size == plan.size
    return path


# ---- torch zip


@pytest.fixture
def written(save: Save, tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """Tensors of every dtype and of odd shapes, copied by the engine into a torch file."""
    tensors = every_dtype(TORCH_DTYPES) | {
        "scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "transposed": torch.arange(12.0).view(3, 4).t(),
        "large": random_tensor("float32", (70_000,)),
    }  # fmt: skip
    writing = Writing(name="out.pth", provenance={"tool": "ckpt-tools"})
    (plan,) = TORCH_ZIP.plan(OrderedDict(copies(save("in.pth", tensors))), writing)
    return tensors, write(plan, tmp_path / "out.pth")


def test_torch_zip_plan_makes_a_sound_zip(written: tuple[dict[str, torch.Tensor], Path]) -> None:
    assert_sound_zip(written[1])


@pytest.mark.parametrize("mapped", [False, True], ids=["read", "mapped"])
def test_torch_zip_plan_makes_a_file_that_torch_loads_bit_for_bit(
    written: tuple[dict[str, torch.Tensor], Path], mapped: bool
) -> None:
    tensors, path = written
    loaded = torch.load(path, weights_only=True, mmap=mapped)

    assert isinstance(loaded, OrderedDict)
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor), name
        assert loaded[name].is_contiguous()


def test_torch_zip_plan_makes_records_of_the_bytes_of_tensors(written: tuple[dict[str, torch.Tensor], Path]) -> None:
    tensors, path = written
    with zipfile.ZipFile(path) as archive:
        stored = [archive.read(f"archive/data/{i}") for i in range(len(tensors))]
        crcs = [archive.getinfo(f"archive/data/{i}").CRC for i in range(len(tensors))]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert (archive.read("archive/byteorder"), archive.read("archive/version")) == (b"little", b"3\n")

    assert stored == [raw_bytes(tensor) for tensor in tensors.values()]
    assert crcs == [zlib.crc32(raw_bytes(tensor)) for tensor in tensors.values()]


def test_torch_zip_plan_aligns_every_payload_to_64_bytes(written: tuple[dict[str, torch.Tensor], Path]) -> None:
    for spec in open_checkpoint(written[1]).specs.values():
        assert spec.storage.offset % 64 == 0


def test_torch_zip_plan_writes_provenance_in_a_record_that_torch_ignores(
    written: tuple[dict[str, torch.Tensor], Path],
) -> None:
    _, path = written
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("archive/ckpt_tools.json")) == {"tool": "ckpt-tools"}

    assert read_header(path).provenance == {"tool": "ckpt-tools"}
    assert "ckpt_tools" not in torch.load(path, weights_only=True)


def test_read_header_reads_what_torch_zip_plan_makes(written: tuple[dict[str, torch.Tensor], Path]) -> None:
    tensors, path = written
    checkpoint = open_checkpoint(path)

    assert list(checkpoint) == list(tensors)
    assert all(same(checkpoint[name], tensor) for name, tensor in tensors.items())
    assert checkpoint.foreign == {}


def test_torch_zip_plan_makes_the_same_bytes_of_the_same_content(save: Save, tmp_path: Path) -> None:
    tensors = every_dtype(SAFETENSORS_DTYPES) | {"large": random_tensor("float32", (70_000,))}
    path = save("in.pth", tensors)
    (tmp_path / "elsewhere").mkdir()
    again = shutil.copy(path, tmp_path / "elsewhere" / "other.pth")
    files = []
    for i, (source, threads) in enumerate([(path, 1), (Path(again), 4)]):
        out = copies(source)
        plans = (
            TORCH_ZIP.plan(out, Writing(name=f"{i}.pth"))[0],
            SAFETENSORS.plan(out, Writing(name=f"{i}.safetensors"))[0],
        )
        files.append([write(plan, tmp_path / plan.name, threads=threads).read_bytes() for plan in plans])

    assert files[0] == files[1]


def test_torch_zip_plan_keeps_ties(save: Save, tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    path = save("in.pth", {"a": shared, "b": shared, "c": shared.clone()})
    loaded = torch.load(
        write(TORCH_ZIP.plan(copies(path), Writing(name="x"))[0], tmp_path / "out.pth"), weights_only=True
    )

    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() != loaded["c"].data_ptr()
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 2


def test_torch_zip_plan_writes_plain_data_unchanged(save: Save, tmp_path: Path) -> None:
    out = copies(save("in.pth", {"w": torch.ones(2)}))
    tree = {
        "state_dict": OrderedDict(out), "epoch": 3, "name": "ünï", "raw": b"\0\xff", "set": {1},
        "size": torch.Size([2]),
        "dtype": torch.bfloat16, "device": torch.device("cpu"), "nested": [(1, None), {"x": 2.5, 7: True}], "z": 1j,
        "array": bytearray(b"x"),
    }  # fmt: skip
    loaded = torch.load(write(TORCH_ZIP.plan(tree, Writing(name="x"))[0], tmp_path / "out.pth"), weights_only=True)

    assert same(loaded["state_dict"]["w"], torch.ones(2))
    assert {k: v for k, v in loaded.items() if k != "state_dict"} == {
        k: v for k, v in tree.items() if k != "state_dict"
    }


def copied(spec: TensorSpec) -> OutTensor:
    return OutTensor(spec.dtype, spec.shape, Terms.copy(spec), "copied")


def test_plain_copies_what_refers_to_itself(save: Save, tmp_path: Path) -> None:
    tree: dict[str, Any] = {"shared": [1], "n": 3}
    tree |= {"itself": tree, "twice": tree["shared"]}
    header = read_header(save("in.pth", {"cycle": tree, "w": torch.ones(2)}))
    plain = pickle_write.plain(header.tree, [], copied)
    loaded = torch.load(write(TORCH_ZIP.plan(plain, Writing(name="x"))[0], tmp_path / "out.pth"), weights_only=True)
    assert loaded["cycle"]["itself"] is loaded["cycle"]
    assert loaded["cycle"]["twice"] is loaded["cycle"]["shared"]


def test_plain_makes_a_tree_that_torch_loads_and_names_what_it_left_out(save: Save, tmp_path: Path) -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    tree = {
        "state_dict": state, "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=1)),
        "frozen": frozenset([1]),
        "best": 0.5, "thing": Fraction(1, 2), "list": [1, Fraction(1, 2), (2, Fraction(1, 2))],
    }  # fmt: skip
    path = save("in.pth", tree)
    header = read_header(path)
    dropped: list[str] = []
    out = copies(path)
    plain = pickle_write.plain({**header.tree, "state_dict": out}, dropped, copied)

    loaded = torch.load(write(TORCH_ZIP.plan(plain, Writing(name="x"))[0], tmp_path / "out.pth"), weights_only=True)
    assert loaded["args"] == {"lr": 0.1, "nested": {"a": 1}}
    assert (loaded["frozen"], loaded["best"], loaded["list"]) == ({1}, 0.5, [1, (2,)])
    assert dropped == ["thing", "list[]", "list[][]"]


def test_plain_keeps_the_metadata_of_a_state_dict(save: Save) -> None:
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).state_dict()
    header = read_header(save("in.pth", state))
    plain = pickle_write.plain(header.tree, [], copied)

    assert type(plain) is OrderedDict
    assert plain._metadata == state._metadata


def test_torch_zip_plan_rejects_what_cannot_be_pickled(save: Save) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]

    with pytest.raises(WriteError, match=r"out\.pth: the entries other than weights cannot be written"):
        TORCH_ZIP.plan({"x": deep}, Writing(name="out.pth"))
    with pytest.raises(WriteError, match="the entries other than weights cannot be written"):
        TORCH_ZIP.plan({"x": (i for i in ())}, Writing(name="out.pth"))[0]


def test_torch_zip_plan_writes_zip64_headers_beyond_4_gib(tmp_path: Path) -> None:
    # A record larger than 4 GiB, one that starts beyond 4 GiB, and one of exactly 2**32 - 1 bytes.
    shapes = {"large": (5 << 28,), "behind": (3,), "edge": ((1 << 32) - 1,), "far": (6 << 28,), "last": (2, 2)}
    tensors = {
        name: zeros(tmp_path, "uint8" if name == "edge" else "float32", shape, name) for name, shape in shapes.items()
    }
    crcs = {tensors["last"]: zlib.crc32(bytes(16))}  # of the others, gigabytes of zeros, nobody asks
    path = sparse(TORCH_ZIP.plan(tensors, Writing(name="x", provenance={}))[0], tmp_path / "out.pth", crcs)
    assert path.stat().st_blocks * 512 < 1 << 20  # a hole, but for the headers

    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: (info.file_size, info.compress_size) for info in archive.infolist()}
        assert [sizes[f"archive/data/{i}"] for i in range(5)] == [(t.nbytes, t.nbytes) for t in tensors.values()]
        assert archive.getinfo("archive/data/1").header_offset > 1 << 32
        with archive.open("archive/data/4") as record:  # whose local header lies beyond 4 GiB
            assert record.read() == bytes(16)
    checkpoint = open_checkpoint(path)
    assert {name: spec.shape for name, spec in checkpoint.specs.items()} == shapes
    assert all(spec.storage.offset % 64 == 0 for spec in checkpoint.specs.values())
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == shapes
    if shutil.which("unzip"):
        listing = subprocess.run(["unzip", "-v", str(path)], capture_output=True, text=True, check=True).stdout
        assert all(str(tensor.nbytes) in listing for tensor in tensors.values())


def test_torch_zip_plan_writes_more_records_than_16_bits_can_count(tmp_path: Path) -> None:
    tensors = {str(i): zeros(tmp_path, "int8", (1,), str(i)) for i in range(66_000)}
    crcs = dict.fromkeys(tensors.values(), zlib.crc32(b"\0"))
    path = sparse(TORCH_ZIP.plan(tensors, Writing(name="x"))[0], tmp_path / "out.pth", crcs)

    assert_sound_zip(path)
    assert len(read_header(path).tree) == 66_000
    reader = torch._C.PyTorchFileReader(str(path))  # torch.load itself takes 7 s to make so many tensors
    assert len(reader.get_all_records()) >= 66_000
    assert reader.get_record("data/65999") == b"\0"


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.sampled_from(["int8", "float16", "float64"])), max_size=8),
    st.text(max_size=40),
)
def test_torch_zip_plan_makes_a_sound_zip_of_any_sizes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, str]], text: str
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    tensors = {str(i): random_tensor(dtype, (size,), seed=i) for i, (size, dtype) in enumerate(sizes)}
    torch.save(tensors | {"pad": torch.ones(1)}, folder / "in.pth")
    tree = {"w": copies(folder / "in.pth"), "text": text}
    path = write(TORCH_ZIP.plan(tree, Writing(name="x", provenance={"text": text}))[0], folder / "out.pth")

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    loaded = torch.load(path, weights_only=True)
    assert loaded["text"] == text
    assert all(same(loaded["w"][name], tensor) for name, tensor in tensors.items())


# ---- safetensors


def test_safetensors_plan_makes_a_file_that_the_library_loads_bit_for_bit(save: Save, tmp_path: Path) -> None:
    tensors = every_dtype(SAFETENSORS_DTYPES) | {
        "scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "transposed": torch.arange(12.0).view(3, 4).t(),
        'odd "name"\\\n': torch.ones(1), "重み": torch.ones(2), "large": random_tensor("float32", (70_000,)),
    }  # fmt: skip
    plan = SAFETENSORS.plan(copies(save("in.pth", tensors)), Writing(metadata={"note": "ä"}, name="out.safetensors"))[0]
    path = write(plan, tmp_path / "out.safetensors")

    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor), name
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ä"}
    checkpoint = open_checkpoint(path)
    assert all(same(checkpoint[name], tensor) for name, tensor in tensors.items())
    for spec in checkpoint.specs.values():
        assert spec.storage.offset % spec.dtype.itemsize == 0


def test_average_writes_tied_tensors_once_for_load_model(save: Save, tmp_path: Path) -> None:
    def tied() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 5, bias=False))
        model[2].weight = model[0].weight
        return model

    source, target = tied(), tied()
    path = save("in.pth", source.state_dict())
    average([path], out=tmp_path / "out.safetensors")

    missing, unexpected = safetensors.torch.load_model(target, str(tmp_path / "out.safetensors"))
    assert (missing, unexpected) == (set(), []) or (list(missing), list(unexpected)) == ([], [])
    assert all(same(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert set(file.keys()) == {"0.weight", "1.weight", "1.bias"}
        assert file.metadata()["2.weight"] == "0.weight"
    assert open_checkpoint(tmp_path / "out.safetensors").keys() == source.state_dict().keys()


def test_average_with_untie_writes_each_name(save: Save, tmp_path: Path) -> None:
    shared = torch.randn(70_000)
    path = save("in.pth", {"a": shared, "b": shared, "c": torch.ones(1)})
    average([path], out=tmp_path / "out.safetensors", untie=True)

    loaded = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert loaded.keys() == {"a", "b", "c"}
    assert all(same(loaded[name], shared) for name in "ab")


def test_average_writes_out_a_tie_that_the_metadata_cannot_tell(save: Save, tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    names = ["a.format", "format", "note", "license", "z.w"]
    out = copies(save("in.pth", dict.fromkeys(names, shared)))
    path = write(SAFETENSORS.plan(out, Writing(metadata={"note": "text"}, name="x"))[0], tmp_path / "out.safetensors")

    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == {"a.format", "format", "note", "license"}
        assert file.metadata() == {"format": "pt", "note": "text", "z.w": "a.format"}
    checkpoint = open_checkpoint(path)
    assert set(checkpoint) == set(names)
    assert all(same(tensor, shared) for tensor in checkpoint.values())


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("w", "complex128", "'w' is complex128, which safetensors does not support. Write a .pth file instead"),
        ("w", "complex32", "'w' is complex32, which safetensors does not support"),
        ("__metadata__", "float32", "'__metadata__' cannot name a tensor in safetensors"),
        ("\ud800", "float32", "a tensor name is not valid Unicode"),
    ],
)
def test_safetensors_plan_rejects_what_the_format_cannot_hold(
    name: str, dtype: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        SAFETENSORS.plan({name: zeros(tmp_path, dtype, (2,))}, Writing(name="out.safetensors"))[0]


def test_safetensors_plan_rejects_a_header_over_the_limit_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(st_format, "MAX_HEADER", 1000)

    with pytest.raises(UnsupportedError, match=r"out: a header of \d+ bytes is over the limit of 1000"):
        SAFETENSORS.plan({"x" * 1000: zeros(tmp_path, "int8", (1,))}, Writing(name="out"))[0]


def test_safetensors_plan_of_more_than_4_gib_is_read_by_the_library(tmp_path: Path) -> None:
    tensors = {name: zeros(tmp_path, "bfloat16", (3 << 30,), name) for name in "ab"}
    path = sparse(SAFETENSORS.plan(tensors, Writing(name="x"))[0], tmp_path / "out.safetensors")

    with safetensors.safe_open(path, "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in "ab"} == {name: [3 << 30] for name in "ab"}


# ---- what stands beside the weights

OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}
BESIDE = {"optimizer": OPTIMIZER, "sched": None, "epoch": 3, "lr_scheduler": {"last_epoch": 3}, 7: "seven"}


@pytest.mark.parametrize("home", [(), ("model",), ("nets", "teacher"), ("metric", "net")])
def test_average_leaves_out_training_state_wherever_the_weights_are(
    home: tuple[str, ...], save: Save, tmp_path: Path
) -> None:
    weights = {"fc.w": torch.ones(2), "optim": torch.ones(1)}
    tree: dict[Any, Any] = weights | BESIDE
    if home == ("model",):
        tree = {"model": weights} | BESIDE
    if len(home) == 2:
        tree = {home[0]: {home[1]: weights}} | BESIDE
    report = average([save("in.pth", tree)], out=tmp_path / "out.pth", state=".".join(home[1:] and home) or "auto")

    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    assert set(loaded) == {*(home[:1] or weights), "sched", "epoch", 7}
    assert set(report.dropped) == {"optimizer", "lr_scheduler"}
    assert report.notes == ()


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_average_names_all_that_a_flat_output_leaves_out(out: str, save: Save, tmp_path: Path) -> None:
    weights = {"fc.w": torch.ones(2)}
    trees: list[tuple[dict[Any, Any], str, set[str]]] = [
        (weights | BESIDE, "auto", {"optimizer", "sched", "epoch", "lr_scheduler", "7"}),
        (
            {"model": weights | {"_extra_state": None}, "g_loss": {"v": torch.ones(2)}},
            "auto",
            {"model._extra_state", "g_loss"},
        ),
        ({"nets": {"a": weights, "b": weights}, "epoch": 1}, "nets.a", {"nets.b", "epoch"}),
    ]
    for tree, state, left_out in trees:
        report = average([save("in.pth", tree)], out=tmp_path / out, state=state, force=True)
        assert set(report.dropped) == left_out


def test_average_names_metadata_of_safetensors_that_it_leaves_out(tmp_path: Path) -> None:
    metadata = {"format": "pt", "license": "MIT", "b.w": "a.w"}
    safetensors.torch.save_file({"a.w": torch.ones(2)}, tmp_path / "in.safetensors", metadata=metadata)
    for out in ("out.pth", "out"):
        report = average([tmp_path / "in.safetensors"], out=tmp_path / out)
        assert (report.dropped, report.tied) == (("__metadata__.license",), ("b.w",))


METADATA = {"ss_base": "sdxl", "license": "MIT", "modelspec.title": "x", "note.by": "author"}
CHECKSUMS = {"sshs_model_hash": "0a", "sshs_legacy_hash": "0b", "modelspec.hash_sha256": "0x0c"}


@pytest.mark.parametrize("job", ["average", "convert", "to half", "to averaged-model"])
def test_jobs_keep_the_metadata_of_the_last_safetensors_file_without_its_checksums(job: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in (1, 2)]
    for i, path in enumerate(paths):
        metadata = {**METADATA, **CHECKSUMS, "ss_steps": str(i), "format": "pt", "b.w": "a.w", "ckpt_tools": "{}"}
        safetensors.torch.save_file({"a.w": torch.ones(2) * i, "c": torch.ones(1)}, path, metadata=metadata)
    out = tmp_path / "out.safetensors"
    if job == "average":
        report: Any = average(paths, out=out)
    else:
        options = {"to half": {"dtype": "float16"}, "to averaged-model": {"to": "averaged-model"}}.get(job, {})
        report = convert(paths[1], out=out, **{"to": "plain", **options})
    with safetensors.safe_open(out, "pt") as file:
        found = dict(file.metadata())
    assert json.loads(found.pop("ckpt_tools"))["tool"] == "ckpt-tools"
    tie = ("module.b.w", "module.a.w") if job == "to averaged-model" else ("b.w", "a.w")
    assert found == {**METADATA, "ss_steps": "1", "format": "pt", **dict([tie])}
    assert sorted(report.dropped) == sorted(f"__metadata__.{key}" for key in CHECKSUMS)


def test_average_keeps_no_metadata_that_would_read_as_a_tie(tmp_path: Path) -> None:
    # Without its prefix the tensor has the name that an entry of the metadata speaks of.
    safetensors.torch.save_file({"module.w": torch.ones(2)}, tmp_path / "in.safetensors", metadata={"trigger.x": "w"})
    report = average([tmp_path / "in.safetensors"], out=tmp_path / "out.safetensors")
    assert list(open_checkpoint(tmp_path / "out.safetensors")) == ["w"]
    assert report.dropped == ("__metadata__.trigger.x",)


def test_average_keeps_and_names_other_weights(save: Save, tmp_path: Path) -> None:
    weights = {"w": torch.ones(2), "b": torch.ones(1)}
    tree = {
        "model": weights, "g_loss": {"v": torch.full((2,), 2.0)}, "extra": {"net": weights | {"c": torch.ones(3)}},
        "best_acc": torch.tensor(1.0), "steps": torch.ones(2, dtype=torch.int64), "optimizer": OPTIMIZER,
        "module": Fraction(1, 2),
    }  # fmt: skip
    path = save("in.pth", tree)
    report = average([path], out=tmp_path / "out.pth")
    assert report.notes == ("Copied from the last checkpoint, not averaged: g_loss (1 tensor), extra (3 tensors).",)
    assert torch.load(tmp_path / "out.pth", weights_only=True)["g_loss"]["v"].tolist() == [2, 2]
    report = average([path], out=tmp_path / "out2.pth", state="extra.net")
    assert [note.partition(": ")[2] for note in report.notes] == ["g_loss (1 tensor)."]
    assert "model" in report.dropped  # without a path it would be read in place of the average
    assert average([path], out=tmp_path / "out.safetensors").notes == ()


# ---- shards


@pytest.mark.parametrize("stem", ["model", "adapter_model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("shards", [0, 1, 2])
def test_average_keeps_the_name_that_the_library_of_a_folder_looks_for(stem: str, shards: int, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    names = [f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)] or [f"{stem}.safetensors"]
    weight_map = {f"w{i}": name for i, name in enumerate(names)}
    for key, name in weight_map.items():
        safetensors.torch.save_file({key: torch.ones(2)}, source / name)
    if shards:
        index = source / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    average([source], out=out)

    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in source.iterdir())
    assert open_checkpoint(out).keys() == weight_map.keys()
    average([source], out=out, max_shard_size="1B", force=True)
    assert all(path.name.startswith(stem) for path in out.iterdir())


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, OutTensor]:
    """Draw tensors of 0 to 100 bytes, some of them tied."""
    distinct = [
        zeros(Path(), "int8", (size,), str(i))
        for i, size in enumerate(draw(st.lists(st.integers(0, 100), min_size=1, max_size=12)))
    ]
    chosen = draw(st.lists(st.sampled_from(distinct), min_size=1, max_size=20))
    return {f"n{i}": tensor for i, tensor in enumerate(chosen)}


@given(named_tensors(), st.one_of(st.none(), st.integers(1, 150)))
def test_plan_shards_holds_each_name_once_within_the_limit_and_keeps_ties_together(
    tensors: dict[str, OutTensor], limit: int | None
) -> None:
    shards = plan_shards(tensors, max_bytes=limit, stem="model", suffix=".safetensors")

    assert sorted(itertools.chain(*shards.values()), key=list(tensors).index) == list(tensors)
    assert all(names == sorted(names, key=list(tensors).index) for names in shards.values())
    place = {name: file for file, names in shards.items() for name in names}
    for a, b in itertools.combinations(tensors, 2):
        assert place[a] == place[b] or tensors[a] is not tensors[b]
    for names in shards.values():
        unique = {tensors[name] for name in names}
        assert limit is None or sum(t.nbytes for t in unique) <= limit or len([t for t in unique if t.nbytes]) == 1
    if limit is None or len(shards) == 1:
        assert list(shards) == ["model.safetensors"]
    else:
        assert list(shards) == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]


@given(named_tensors())
def test_plan_shards_keeps_the_shards_of_an_input_that_names_every_tensor(tensors: dict[str, OutTensor]) -> None:
    like = {name: f"part-{i % 3}.bin" for i, name in enumerate(tensors)} | {"other": "part-9.bin"}
    shards = plan_shards(tensors, max_bytes=None, stem="model", suffix=".safetensors", like=like)

    assert {name: file for file, names in shards.items() for name in names} == {
        name: like[name].replace(".bin", ".safetensors") for name in tensors
    }
    assert list(shards) == sorted(shards)
    assert len(plan_shards(tensors, max_bytes=None, stem="m", suffix=".bin", like={"other": "x.bin"})) == 1


def test_average_writes_the_index_of_hugging_face(save: Save, tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards

    state = {f"layer.{i}.weight": random_tensor("float32", (50, 10), seed=i) for i in range(7)}
    out = copies(save("in.pth", state))
    shards = plan_shards(out, max_bytes=5000, stem="model", suffix=".safetensors")
    theirs = split_torch_state_dict_into_shards(state, max_shard_size=5000)

    ours = json.loads(index_json(shards, out))
    assert ours == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}
    save_torch_state_dict(state, tmp_path, max_shard_size=5000)
    assert (tmp_path / "model.safetensors.index.json").read_bytes() == index_json(shards, out).rstrip(b"\n")


def test_index_json_counts_tied_bytes_once(tmp_path: Path) -> None:
    one, other = zeros(tmp_path, "float32", (5,), "a"), zeros(tmp_path, "float16", (3,), "c")
    tensors = {"a": one, "b": one, "c": other}

    index = json.loads(index_json({"x.bin": ["a", "b"], "y.bin": ["c"]}, tensors))
    assert index == {"metadata": {"total_size": 26}, "weight_map": {"a": "x.bin", "b": "x.bin", "c": "y.bin"}}


@pytest.mark.parametrize("text", ["5GB", "500MB", "1KB", "123", "2.5 GB", " 7 kb "])
def test_parse_size_reads_sizes_as_hugging_face_does(text: str) -> None:
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    number, unit = text.strip().upper().rstrip("KMGB").strip(), text.strip().upper()[-2:]

    assert parse_size(text) == int(float(number) * units.get(unit, 1))


@pytest.mark.parametrize(
    ("text", "size"), [("1KiB", 1024), ("5GiB", 5 << 30), ("2TiB", 2 << 40), ("3T", 3 * 10**12), ("1b", 1)]
)
def test_parse_size_reads_binary_sizes_as_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "size",
    [
        "",
        "GB",
        "-5GB",
        "0",
        "0GB",
        "0.1B",
        "5 5GB",
        "5XB",
        "1e9",
        "nan",
        "inf",
        "5GBs",
        "\u0663GB",
        "9" * 400 + "GB",
        0,
        -5,
        True,
    ],
)
def test_parse_size_rejects_what_is_no_size(size: str | int) -> None:
    with pytest.raises(UsageError, match="is not a size; use e.g. 5GB or 500MB"):
        parse_size(size)


def test_parse_size_takes_a_number_of_bytes() -> None:
    assert parse_size(1 << 62) == 1 << 62


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_average_of_one_file_is_that_file(suffix: str, save: Save, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in every_dtype(SAFETENSORS_DTYPES).items() if "bool" not in name}
    finite = {
        k: torch.nan_to_num(t.float()).to(t.dtype) if t.dtype.is_floating_point else t for k, t in tensors.items()
    }
    finite = {
        k: torch.view_as_complex(torch.nan_to_num(torch.view_as_real(t))) if t.is_complex() else t
        for k, t in finite.items()
    }
    average([save("in.pth", finite)], out=tmp_path / f"out{suffix}", dtype=None)

    out = tmp_path / f"out{suffix}"
    loaded = torch.load(out, weights_only=True) if suffix == ".pth" else safetensors.torch.load_file(out)
    assert loaded.keys() == finite.keys()
    assert all(same(loaded[name], tensor) for name, tensor in finite.items())
    assert read_header(out).provenance["inputs"][0]["name"] == "in.pth"
    assert math.isclose(read_header(out).provenance["inputs"][0]["coefficient"], 1.0)
    if suffix == ".pth":
        assert_sound_zip(out)
