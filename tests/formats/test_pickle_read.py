"""The restricted unpickler: plain data comes out as it is, the unknown is kept inert, odd tensors by their kind."""

from __future__ import annotations

import argparse
import enum
import io
import pickle
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from crafting import TENSOR, same, torch_zip

import ckpt_tools
from ckpt_tools import open_checkpoint
from ckpt_tools.compute.payload import read_tensor
from ckpt_tools.errors import CorruptError, LayoutError, UnsupportedError
from ckpt_tools.formats import pickle_read, read_header
from ckpt_tools.formats.pickle_objects import Inert
from ckpt_tools.formats.tree import tensors_in
from ckpt_tools.tensors import TensorSpec, UnsupportedTensor

Save = Callable[..., Path]
PROTOCOLS = [2, 3, 4, 5]


class Color(enum.Enum):
    RED = 1


class Thing:
    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


class Pair(tuple):
    pass


class Names(list):
    pass


class Table(dict):
    pass


class Plan:
    """Classes inside classes, which protocol 2 names by getattr and protocol 4 by a path."""

    class Stage:
        def __init__(self, **state: Any) -> None:
            self.__dict__.update(state)

        class Kind(enum.Enum):
            WARM = "warm"

    class Steps(list):
        pass

    class Flags(enum.IntFlag):
        A = 1
        B = 2

    class Point(NamedTuple):
        x: int


class Block(torch.nn.Module):
    """A module of a class that the reader cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4)])
        self.scale = torch.nn.Parameter(torch.full((4, 1, 1), 0.5))
        self.config = {"depth": 3, "act": torch.nn.GELU()}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        Counter("abca"), Counter(), defaultdict(list, a=[1]), defaultdict(None, {1: 2}), defaultdict(int),
        {1, 2}, set(), frozenset({"a"}), 1 - 2j, b"", b"\0\xff", bytearray(b"\x80"), bytearray(),
        torch.Size([2, 3]), torch.Size([]), torch.float16, torch.float8_e5m2, torch.int64, torch.device("cuda", 1),
        torch.device("cpu"),
        OrderedDict(b=1, a=2), 1 << 100, -(1 << 100), 1e-300, float("inf"), None, True,
        "\U0001f642\n", (), ((1,), 2, 3, 4), [[]],
    ],
    ids=repr,
)  # fmt: skip
def test_read_header_returns_plain_values_unchanged(value: Any, protocol: int, save: Save) -> None:
    header = read_header(save("a.pth", {"value": value}, pickle_protocol=protocol))

    # Counter and defaultdict are mappings without their methods; all else is of its own type.
    assert header.tree["value"] == value
    if not isinstance(value, dict):
        assert type(header.tree["value"]) is type(value)
    # A default factory is named, and dropped; protocol 2 calls int long.
    assert header.foreign.keys() <= {"builtins.list", "builtins.int", "builtins.long"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_header_keeps_the_attributes_of_a_namespace(protocol: int, save: Save) -> None:
    args = argparse.Namespace(lr=0.1, opt="sgd", nested=argparse.Namespace(a=[1, None]), size=torch.Size([3]))
    header = read_header(save("a.pth", {"args": args, "w": torch.ones(1)}, pickle_protocol=protocol))

    assert isinstance(header.tree["args"], argparse.Namespace)
    assert (header.tree["args"].lr, header.tree["args"].opt, header.tree["args"].nested.a) == (0.1, "sgd", [1, None])
    assert header.foreign == {}


NUMPY = [
    np.float64(0.1), np.float32(-0.0), np.float16(65504), np.int64(-(2**63)), np.int32(-1), np.int16(7), np.int8(-128),
    np.uint64(2**64 - 1), np.uint32(1), np.uint16(65535), np.uint8(255), np.bool_(True), np.bool_(False),
    np.float64("inf"), np.array(2.5, dtype=">f8")[()], np.float64(-1e-308),
]  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", NUMPY, ids=repr)
def test_read_header_turns_numpy_scalars_into_python_numbers(value: Any, protocol: int, save: Save) -> None:
    header = read_header(save("a.pth", {"best": value}, pickle_protocol=protocol))

    assert type(header.tree["best"]) is type(value.item())
    assert np.asarray(header.tree["best"], value.dtype).tobytes() == value.tobytes()
    assert header.foreign == {}


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize(("order", "kind"), [(b"<", "<f8"), (b">", ">f8")])
def test_read_header_reads_numpy_scalars_of_both_module_paths_and_byte_orders(
    module: bytes, order: bytes, kind: str, tmp_path: Path
) -> None:
    # As Python 2 wrote it: the raw bytes as a SHORT_BINSTRING, which is text in Python 3.
    dtype = b"cnumpy\ndtype\n(U\2f8K\0K\1tR(K\3U\1" + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    pickled = b"\x80\2c" + module + b"\nscalar\n" + dtype + b"U\x08" + np.array(0.1, kind).tobytes() + b"\x86R."

    assert read_header(torch_zip(tmp_path / "a.pth", pickled)).tree == 0.1


@pytest.mark.parametrize(
    "value", [np.complex64(1 + 2j), np.str_("text"), np.datetime64("2020-01-01"), np.longdouble(1)]
)
def test_read_header_keeps_other_numpy_scalars_inert(value: Any, save: Save) -> None:
    header = read_header(save("a.pth", {"best": value, "w": torch.ones(1)}))

    assert isinstance(header.tree["best"], Inert)
    assert list(open_checkpoint(header.path)) == ["w"]


def test_read_header_keeps_numpy_arrays_inert_and_lists_them(save: Save) -> None:
    header = read_header(save("a.pth", {"rng": np.arange(4), "w": torch.ones(1)}))

    assert isinstance(header.tree["rng"], Inert)
    assert "numpy._core.multiarray._reconstruct" in header.foreign
    assert same(open_checkpoint(header.path)["w"], torch.ones(1))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        Color.RED,
        Thing(a=1),
        Pair((1, 2)),
        Names([1, 2]),
        Table(a=1),
        PurePosixPath("/a/b"),
        Thing,
        np.random.default_rng(0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_read_header_keeps_objects_of_unknown_classes_inert_and_lists_them(
    value: Any, protocol: int, save: Save
) -> None:
    header = read_header(save("a.pth", {"value": value, "w": torch.ones(1)}, pickle_protocol=protocol))

    kept = header.tree["value"]
    assert isinstance(kept, Inert) or issubclass(kept, Inert)
    assert sum(header.foreign.values()) >= 1
    assert same(open_checkpoint(header.path)["w"], torch.ones(1))


def test_inert_keeps_name_arguments_state_and_items(save: Save) -> None:
    header = read_header(
        save("a.pth", {"thing": Thing(a=1), "names": Names([1, 2]), "table": Table(k="v"), "color": Color.RED})
    )

    here = __name__
    assert repr(header.tree["thing"]) == f"<{here}.Thing, not loaded>"
    assert header.tree["thing"].state == {"a": 1}
    assert header.tree["names"].items == [1, 2]
    assert header.tree["table"].items == [("k", "v")]
    assert header.tree["color"].args == (1,)
    assert header.foreign == {f"{here}.{name}": 1 for name in ("Thing", "Names", "Table", "Color")}


NESTED = {
    "Plan.Stage": Plan.Stage(width=8),
    "Plan.Stage.Kind": Plan.Stage.Kind.WARM,
    "Plan.Steps": Plan.Steps([1]),
    "Plan.Flags": Plan.Flags.A | Plan.Flags.B,
    "Plan.Point": Plan.Point(3),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", NESTED)
def test_read_header_keeps_objects_of_nested_classes_inert(name: str, protocol: int, save: Save) -> None:
    tree = {"w": torch.ones(3), "cfg": {"one": NESTED[name], "two": [NESTED[name]]}}
    path = save("a.pth", tree, pickle_protocol=protocol, _use_new_zipfile_serialization=protocol != 2)
    cfg = read_header(path).tree["cfg"]
    assert isinstance(cfg["one"], Inert)
    assert cfg["two"] == [cfg["one"]]
    assert repr(cfg["one"]) == f"<{__name__}.{name}, not loaded>"
    assert same(open_checkpoint(path)["w"], torch.ones(3))


def test_inert_of_a_nested_class_keeps_arguments_state_items_and_tensors(save: Save) -> None:
    stage = Plan.Stage(width=8, w=torch.ones(2), kind=Plan.Stage.Kind.WARM)
    tree = read_header(save("a.pth", {"stage": stage, "steps": Plan.Steps([1, 2]), "point": Plan.Point(3)})).tree
    assert tree["stage"].state["width"] == 8
    assert tree["stage"].state["kind"].args == ("warm",)
    assert tree["steps"].items == [1, 2]
    assert tree["point"].args == (3,)
    assert [path for path, _ in tensors_in(tree)] == [("stage", "state", "w")]


def test_inert_of_a_bound_method_keeps_its_object(save: Save) -> None:
    tree = read_header(save("a.pth", {"hook": Plan.Stage(w=torch.ones(2)).__init__})).tree
    assert [path for path, _ in tensors_in(tree)] == [("hook", 0, "state", "w")]


def test_jobs_leave_objects_of_nested_classes_out_and_report_them(save: Save, tmp_path: Path) -> None:
    paths = [
        save(f"{i}.pth", {"model": {"module.w": torch.full((3,), float(i))}, "cfg": {"stage": Plan.Stage(), "lr": i}})
        for i in (1, 3)
    ]
    report = ckpt_tools.average(paths, out=tmp_path / "avg.pth")
    assert report.dropped == ("cfg.stage",)
    averaged = torch.load(tmp_path / "avg.pth", weights_only=True)
    assert averaged["model"]["w"].tolist() == [2, 2, 2]
    assert averaged["cfg"] == {"lr": 3}
    # Names are changed in place, and the object stays.
    ckpt_tools.fix_prefix(paths[0], out=tmp_path / "fixed.pth")
    fixed = torch.load(tmp_path / "fixed.pth", weights_only=False)
    assert list(fixed["model"]) == ["w"]
    assert isinstance(fixed["cfg"]["stage"], Plan.Stage)


def test_open_checkpoint_finds_tensors_inside_unknown_objects(save: Save) -> None:
    tensors = [torch.full((2,), float(i)) for i in range(4)]
    thing = Thing(a=tensors[0], b=[tensors[1], {"c": Names([tensors[2]])}], d=argparse.Namespace(e=tensors[3]))
    header = read_header(save("a.pth", thing))

    found = dict(tensors_in(header.tree))
    assert list(found) == [("state", "a"), ("state", "b", 0), ("state", "b", 1, "c", 0), ("state", "d", "e")]
    assert all(same(read_tensor(spec), tensor) for spec, tensor in zip(found.values(), tensors, strict=True))
    with pytest.raises(LayoutError, match=r"a pickled object \(.*Thing\), not a state dict"):
        open_checkpoint(header.path)


@pytest.mark.parametrize(
    "model", [Block, lambda: torch.nn.TransformerEncoderLayer(8, 2, 16), lambda: torch.nn.LSTM(3, 4)]
)
def test_tensors_in_finds_all_tensors_of_a_pickled_module(model: Callable[[], Any], save: Save) -> None:
    module = model()
    header = read_header(save("a.pth", module))

    assert isinstance(header.tree, Inert)
    found = [read_tensor(spec) for _, spec in tensors_in(header.tree) if isinstance(spec, TensorSpec)]
    state = module.state_dict()
    assert all(any(same(tensor, other) for other in found) for tensor in state.values())
    assert f"{type(module).__module__}.{type(module).__name__}" in header.foreign


def test_open_checkpoint_finds_a_state_dict_beside_a_module(save: Save) -> None:
    path = save("a.pth", {"model": torch.nn.Linear(2, 2).state_dict(), "module": Block(), "optimizer": Thing(lr=1)})

    assert list(open_checkpoint(path, state="model")) == ["weight", "bias"]


def test_read_header_reads_optimizers_schedulers_and_scalers(save: Save) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    header = read_header(
        save(
            "a.pth",
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()},
        )
    )

    assert header.tree["optimizer"]["param_groups"][0]["lr"] == 0.1
    assert header.tree["scheduler"]["T_max"] == 10
    assert len(dict(tensors_in(header.tree["optimizer"]))) == 6
    assert header.foreign == {}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (lambda: torch.eye(4).to_sparse_bsr((2, 2)), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.quantize_per_channel(torch.ones(3, 2), torch.ones(3), torch.zeros(3), 0, torch.quint8), "quant"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested"),
        (
            lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
            r"a tensor subclass \(torch.nested.*NestedTensor\)",
        ),
        (lambda: torch.empty(3, device="meta"), "on the meta device, without data"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), "a lazy conj view"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "a lazy neg view"),
        (lambda: torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False])),
         r"a tensor subclass \(torch.masked.*MaskedTensor\)"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # torch calls half of these prototypes, and the other half deprecated
def test_open_checkpoint_names_the_kind_of_an_unsupported_tensor(
    make: Callable[[], torch.Tensor], kind: str, new: bool, save: Save
) -> None:
    path = save("a.pth", {"w": torch.ones(2), "odd": make()}, _use_new_zipfile_serialization=new)

    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint.specs["odd"], UnsupportedTensor)
    with pytest.raises(UnsupportedError, match=f"'odd' is {kind}"):
        checkpoint["odd"]
    assert same(checkpoint["w"], torch.ones(2))


def test_open_checkpoint_reads_a_resolved_conjugate(save: Save) -> None:
    tensor = torch.tensor([1 + 2j, 3 - 1j]).conj().resolve_conj()
    path = save("a.pth", {"w": tensor})

    assert same(open_checkpoint(path)["w"], tensor)


def test_open_checkpoint_reads_a_subclass_of_tensor_with_plain_data(save: Save) -> None:
    path = save("a.pth", {"w": torch.arange(4.0).as_subclass(Marked)})

    assert open_checkpoint(path)["w"].tolist() == [0, 1, 2, 3]


class Marked(torch.Tensor):
    pass


def test_read_header_knows_storages_of_other_devices(tmp_path: Path) -> None:
    for name in (b"torch.cuda\nFloatStorage", b"torch\nFloatStorage"):
        path = torch_zip(
            tmp_path / "a.pth", b"\x80\2}X\1\0\0\0w" + TENSOR.replace(b"torch\nFloatStorage", name) + b"s."
        )
        assert open_checkpoint(path)["w"].tolist() == [0, 1, 2, 3]


def test_read_header_rejects_a_protocol_newer_than_this_python_knows(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pth", bytes([0x80, pickle.HIGHEST_PROTOCOL + 1]) + b"N.")

    with pytest.raises(CorruptError, match="unsupported pickle protocol"):
        read_header(path)


def test_dtypes_of_tensors_need_no_torch(save: Save) -> None:
    """torch takes longer to import than all else that `ckpt inspect` does."""
    path = save("c.pth", {"w": torch.ones(4).to(torch.float8_e4m3fn), "u": torch.ones(2).to(torch.uint16)})
    code = f"import sys, pathlib; from ckpt_tools.formats import read_header as r; print(r(pathlib.Path({str(path)!r})).tree['w'].dtype.name, 'torch' in sys.modules)"  # noqa: E501
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["float8_e4m3fn", "False"]


@pytest.mark.parametrize(
    "held",
    [
        torch.float16,
        [torch.float8_e5m2],
        {torch.float16: 1},
        {torch.float16},
        frozenset({torch.uint16}),
        argparse.Namespace(dtype=torch.bfloat16),
        (1, {"a": [torch.int8]}),
    ],
)
def test_dtypes_that_are_values_are_those_of_torch(held: Any, save: Save) -> None:
    tree = read_header(save("c.pth", {"w": torch.ones(4).to(torch.float8_e4m3fn), "held": held})).tree
    assert vars(tree["held"]) == vars(held) if isinstance(held, argparse.Namespace) else tree["held"] == held
    assert tree["w"].dtype.name == "float8_e4m3fn"


def test_a_pickle_cannot_change_a_dtype() -> None:
    pickled = b"\x80\x02ctorch\nfloat16\n}X\5\0\0\0dtypeK\1sb."
    with pytest.raises(CorruptError, match="cannot be read"):
        pickle_read.load(io.BytesIO(pickled), where="here")
