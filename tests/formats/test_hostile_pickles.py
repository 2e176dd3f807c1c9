"""Hostile pickles: nothing they name is imported or run, and nothing they do outlives their own file."""

from __future__ import annotations

import argparse
import builtins
import copyreg
import io
import os
import pickle
import struct
import subprocess
import sys
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from crafting import STORAGE, TENSOR, bounded_memory, bounded_resident, same, torch_legacy, torch_zip

from ckpt_tools import average, open_checkpoint
from ckpt_tools.compute.payload import read_tensor
from ckpt_tools.errors import CkptError, CorruptError
from ckpt_tools.formats import pickle_objects, read_header
from ckpt_tools.formats import pickle_read as unpickle
from ckpt_tools.formats.pickle_edit import trace
from ckpt_tools.formats.pickle_objects import Inert
from ckpt_tools.formats.tree import tensors_in
from ckpt_tools.tensors import TensorSpec, UnsupportedTensor

# In protocol 0 to 2 a name is GLOBAL, in protocol 4 STACK_GLOBAL.
NAMES = [
    "os.system", "posix.system", "nt.system", "builtins.eval", "builtins.exec", "builtins.getattr",
    "builtins.setattr", "builtins.__import__", "builtins.open", "builtins.compile", "builtins.type",
    "builtins.object", "builtins.map", "__builtin__.eval", "__builtin__.execfile", "subprocess.Popen",
    "subprocess.call", "torch.hub.load", "torch.load", "torch.storage._load_from_bytes", "torch.serialization.load",
    "torch.utils.data.DataLoader", "torch._utils._rebuild_xla_tensor", "torch.jit.load", "torch.ops.load_library",
    "copyreg._reconstructor", "copyreg.__newobj__", "copyreg.add_extension", "copy_reg._reconstructor",
    "importlib.import_module", "runpy.run_path", "pickle.loads", "_pickle.loads", "numpy.load",
    "numpy.testing._private.utils.runstring", "functools.partial", "operator.attrgetter", "operator.methodcaller",
    "types.FunctionType", "types.CodeType", "sys.modules.clear", "pip.main", "pty.spawn", "webbrowser.open",
    "ctypes.CDLL", "collections.namedtuple", "codecs.open", "codecs.encode", "collections.OrderedDict.fromkeys",
    "collections.OrderedDict.__init__", "argparse.Namespace.__setattr__", "argparse.ArgumentParser",
    "torch.Size.__class__", "torch.float32.__class__", "torch.Tensor", "torch.os.system",
    "ckpt_tools.formats.pickle_read.load", "ckpt_tools.formats.pickle_objects.GLOBALS.clear", "builtins.set.__init__",
]  # fmt: skip


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(name: str) -> tuple[bytes, bytes]:
    module, _, attribute = name.rpartition(".")
    return module.encode(), attribute.encode()


def stack_global(name: str) -> bytes:
    module, attribute = named(name)
    return text(module.decode()) + text(attribute.decode()) + b"\x93"


def global_(name: str) -> bytes:
    module, attribute = named(name)
    return b"c" + module + b"\n" + attribute + b"\n"


# Each opcode that makes an object of a class, or calls a function, with one argument.
CALLS: dict[str, Callable[[str, bytes], bytes]] = {
    "GLOBAL REDUCE": lambda name, arg: b"\x80\2" + global_(name) + arg + b"\x85R",
    "STACK_GLOBAL REDUCE": lambda name, arg: b"\x80\4" + stack_global(name) + arg + b"\x85R",
    "INST": lambda name, arg: b"\x80\2(" + arg + b"i" + named(name)[0] + b"\n" + named(name)[1] + b"\n",
    "OBJ": lambda name, arg: b"\x80\2(" + global_(name) + arg + b"o",
    "NEWOBJ": lambda name, arg: b"\x80\2" + global_(name) + arg + b"\x85\x81",
    "NEWOBJ_EX": lambda name, arg: b"\x80\4" + stack_global(name) + arg + b"\x85}\x92",
    "NEWOBJ_EX with a name": lambda name, arg: b"\x80\4" + stack_global(name) + b")}" + text("cmd") + arg + b"s\x92",
}


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Path]:
    """A file that the payloads would create; made by nobody when the test ends."""
    path = tmp_path / "sentinel"
    yield path
    assert not path.exists()


@pytest.fixture(autouse=True)
def honest(tmp_path: Path) -> Iterator[None]:
    """Read an honest file after each test, and find it as it is."""
    yield
    state = OrderedDict(w=torch.arange(3.0), n=torch.tensor(2))
    state._metadata = {"": {"version": 1}}
    args = argparse.Namespace(lr=0.1)
    torch.save({"state_dict": state, "args": args, "kept": {1, 2}, "dtype": torch.float16}, tmp_path / "honest.pth")
    checkpoint = open_checkpoint(tmp_path / "honest.pth")
    assert same(checkpoint["w"], torch.arange(3.0))
    assert same(checkpoint["n"], torch.tensor(2))
    assert checkpoint.header.tree["args"] == args
    assert checkpoint.header.tree["state_dict"]._metadata == {"": {"version": 1}}
    assert (checkpoint.header.tree["kept"], checkpoint.header.tree["dtype"]) == ({1, 2}, torch.float16)
    assert checkpoint.foreign == {}


def read(path: Path, pickled: bytes) -> Any:
    return read_header(torch_zip(path / "hostile.pth", pickled + b"."))


@pytest.mark.parametrize("name", NAMES)
def test_read_header_calls_nothing_that_a_pickle_names(name: str, tmp_path: Path, sentinel: Path) -> None:
    # The reader itself needs these: Python's zipfile reads names in the one, the limit on open files is in the other.
    modules = set(sys.modules) | {"encodings.cp437", "resource"}
    full = name.replace("__builtin__.", "builtins.")
    for opcodes, call in CALLS.items():
        evil = call(name, text(f"touch {sentinel}"))
        header = read(tmp_path, b"\x80\2}" + text("evil") + evil + b"s" + text("w") + TENSOR + b"s")

        assert isinstance(header.tree["evil"], Inert), opcodes
        assert repr(header.tree["evil"]) == f"<{full}, not loaded>", opcodes
        assert header.foreign == {full: 1}, opcodes
        assert set(sys.modules) <= modules, opcodes
        assert read_tensor(header.tree["w"]).tolist() == [0, 1, 2, 3], opcodes


def test_the_payloads_of_these_tests_are_live(tmp_path: Path) -> None:
    # The same bytes in Python's own unpickler do harm; else the tests above would show nothing.
    for call in ("GLOBAL REDUCE", "STACK_GLOBAL REDUCE", "INST", "OBJ"):
        made = tmp_path / call
        pickle.loads(CALLS[call]("os.system", text(f"touch '{made}'")) + b".")  # noqa: S301 - the point of this test
        assert made.exists(), call


@pytest.mark.parametrize("module", ["builtins", "__builtin__"])
@pytest.mark.parametrize("owner", ["os", "os.environ", "argparse.Namespace", "collections.OrderedDict", "torch.Size"])
@pytest.mark.parametrize("attribute", ["system", "__init__", "__class__", "__subclasses__", "fromkeys"])
def test_read_header_looks_up_no_attribute_for_a_pickle(
    module: str, owner: str, attribute: str, tmp_path: Path, sentinel: Path
) -> None:
    found = global_(f"{module}.getattr") + global_(owner) + text(attribute) + b"\x86R"
    # Python's own unpickler gets the attribute, and calls it.
    for call in (b"", text(f"touch {sentinel}") + b"\x85R", b")R}b", text("x") + b"\x85\x81"):
        with suppress(CorruptError):
            tree = read(tmp_path, b"\x80\2" + found + call).tree
            assert isinstance(tree, Inert) or issubclass(tree, Inert)


def test_read_header_takes_little_memory_for_names_of_nested_classes(tmp_path: Path) -> None:
    # Each class is inside the one before, and all of them are kept: names of 5 GB together.
    outer = global_("builtins.getattr") + b"q\0" + global_("a.thing")
    steps = b"".join(
        b"r" + struct.pack("<I", i) + b"0h\0j" + struct.pack("<I", i) + b"h\1\x86R" for i in range(2, 3000)
    )
    with bounded_resident(256 << 20):
        header = read(tmp_path, b"\x80\2" + text("x" * 1000) + b"q\x010" + outer + steps)
    assert issubclass(header.tree, Inert)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_read_header_does_not_run_a_reduce_that_torch_saved(new: bool, tmp_path: Path, sentinel: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {sentinel}",)

    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(2), "evil": Evil()}, path, _use_new_zipfile_serialization=new)

    checkpoint = open_checkpoint(path)
    assert checkpoint.foreign == {"posix.system": 1}
    assert checkpoint.header.tree["evil"].args == (f"touch {sentinel}",)
    assert same(checkpoint["w"], torch.ones(2))


@pytest.mark.parametrize("call", CALLS)
def test_read_header_does_not_import_a_module_that_a_pickle_names(
    call: str, tmp_path: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim_of_a_pickle.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Victim: pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    header = read(tmp_path, CALLS[call]("victim_of_a_pickle.Victim", text("x")))
    assert header.foreign == {"victim_of_a_pickle.Victim": 1}
    assert "victim_of_a_pickle" not in sys.modules


def test_read_header_does_not_import_torch_for_a_file_without_its_values(tmp_path: Path, sentinel: Path) -> None:
    path = torch_zip(
        tmp_path / "a.pth",
        b"\x80\2}"
        + text("w")
        + TENSOR
        + b"s"
        + text("evil")
        + CALLS["INST"]("os.system", text(f"touch {sentinel}"))
        + b"s.",
    )
    code = """
        import sys
        from pathlib import Path
        from ckpt_tools.formats import read_header
        before = set(sys.modules)
        header = read_header(Path(sys.argv[1]))
        assert header.tree["w"].shape == (4,)
        print(sorted(set(sys.modules) - before - {"encodings.cp437"}))  # in which Python's zipfile reads names
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), path], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "opcode", [b"\x82\xf0", b"\x83\xf0\xf0", b"\x84\xf0\xf0\xf0\x00"], ids=["EXT1", "EXT2", "EXT4"]
)
def test_read_header_looks_up_no_extension_code(opcode: bytes, tmp_path: Path, sentinel: Path) -> None:
    code = int.from_bytes(opcode[1:], "little")
    with pytest.raises(CorruptError, match=f"unregistered extension code {code}"):
        read(tmp_path, b"\x80\2" + opcode + text(f"touch {sentinel}") + b"\x85R")

    copyreg.add_extension("posix", "system", code)
    try:
        # Python's own unpickler leaves what it found in a cache, which ours must neither use nor fill.
        for _ in range(2):
            assert pickle.loads(b"\x80\2" + opcode + b".") is os.system  # noqa: S301 - names it, and calls nothing
            header = read(tmp_path, b"\x80\2" + opcode + text(f"touch {sentinel}") + b"\x85R")
            assert repr(header.tree) == "<posix.system, not loaded>"
    finally:
        copyreg.remove_extension("posix", "system", code)


SETTABLE = sorted(pickle_objects.GLOBALS) + ["torch.Size", "torch.float32", "torch.device", "some.thing"]


@pytest.mark.parametrize("slots", [False, True], ids=["dict", "slots"])
@pytest.mark.parametrize("name", SETTABLE)
def test_read_header_lets_no_pickle_change_a_class(name: str, slots: bool, tmp_path: Path) -> None:
    state = b"}" + b"".join(
        text(key) + global_("evil.thing") + b"s" for key in ("__new__", "__init__", "items", "dtype", "kind", "x")
    )
    before = {full: dict(vars(found)) for full, found in pickle_objects.GLOBALS.items()}

    with pytest.raises(CorruptError, match=r"its pickle cannot be read \((TypeError|AttributeError|UnpicklingError)"):
        read(tmp_path, b"\x80\2" + global_(name) + (b"N" + state + b"\x86" if slots else state) + b"b")
    assert {full: dict(vars(found)) for full, found in pickle_objects.GLOBALS.items()} == before


def built(instance: bytes, key: str, value: bytes, *, slots: bool) -> bytes:
    state = b"}" + text(key) + value + b"s"
    return b"\x80\2" + instance + (b"N" + state + b"\x86" if slots else state) + b"b"


@pytest.mark.parametrize("slots", [False, True], ids=["dict", "slots"])
@pytest.mark.parametrize(
    "key", ["items", "keys", "values", "get", "__class__", "__dict__", "update", "pop", "_metadata"]
)
def test_read_header_lets_no_pickle_hide_methods_of_an_ordered_dict(key: str, slots: bool, tmp_path: Path) -> None:
    instance = global_("collections.OrderedDict") + b")R" + text("w") + TENSOR + b"s"

    header = read(tmp_path, built(instance, key, global_("argparse.Namespace"), slots=slots))
    assert isinstance(header.tree, OrderedDict)
    assert list(header.tree.items()) == [("w", header.tree["w"])]
    assert list(open_checkpoint(header.path)) == ["w"]


@pytest.mark.parametrize("slots", [False, True], ids=["dict", "slots"])
@pytest.mark.parametrize("name", ["collections.Counter", "collections.defaultdict"])
def test_read_header_lets_no_pickle_hide_methods_of_a_counter(name: str, slots: bool, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="its pickle cannot be read"):
        read(tmp_path, built(global_(name) + b")R", "items", global_("argparse.Namespace"), slots=slots))


@pytest.mark.parametrize("slots", [False, True], ids=["dict", "slots"])
@pytest.mark.parametrize("key", ["__class__", "__dict__", "__eq__", "__repr__"])
def test_read_header_takes_a_namespace_as_data(key: str, slots: bool, tmp_path: Path) -> None:
    for value in (*map(global_, pickle_objects.GLOBALS), b"}" + text("__class__") + b"Ns", global_("evil.thing"), b"N"):
        try:
            tree = read(tmp_path, built(global_("argparse.Namespace") + b")R", key, value, slots=slots)).tree
        except CorruptError:
            continue
        assert type(tree) in {found for found in pickle_objects.GLOBALS.values() if isinstance(found, type)}
        assert list(tensors_in(tree)) == []


@pytest.mark.parametrize(
    "state",
    [
        # As the dataclass would take it: a duck of a dtype, then a shape, a stride, a start and a storage of choice.
        b"(NK\x09\x85K\1\x85K\0Nt",
        b"(N]K\0t",
        b"}" + text("shape") + b"K\x09\x85s",
        b"N}" + text("shape") + b"K\x09\x85s\x86",
    ],
    ids=["tuple", "list", "dict", "slots"],
)
@pytest.mark.parametrize(
    "instance", [TENSOR, b"ctorch._utils\n_rebuild_sparse_tensor\n)R", STORAGE], ids=["tensor", "sparse", "storage"]
)
def test_read_header_lets_no_pickle_change_a_checked_tensor(instance: bytes, state: bytes, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="its pickle cannot be read"):
        read(tmp_path, b"\x80\2" + instance + state + b"b")


def test_tensor_spec_rejects_the_state_of_a_pickle(runs: list[Path]) -> None:
    spec = next(iter(open_checkpoint(runs[0]).specs.values()))
    assert type(spec) is TensorSpec
    for tensor in (spec, UnsupportedTensor("sparse")):
        before = repr(tensor)
        with pytest.raises(TypeError, match="tries to change a tensor"):
            tensor.__setstate__([None] * 5)  # type: ignore[union-attr]
        assert repr(tensor) == before


def test_read_header_reads_no_other_file_for_a_pickle(tmp_path: Path) -> None:
    # A tensor whose storage is replaced by one in /etc/passwd: its bytes would come out in the average.
    secret = tmp_path / "secret"
    secret.write_bytes(b"top secret, 16 b")
    namespace = global_("argparse.Namespace") + b")R}"
    storage = (
        namespace
        + text("path")
        + text(str(secret))
        + b"s"
        + text("offset")
        + b"K\0s"
        + text("nbytes")
        + b"K\x10s"
        + text("big_endian")
        + b"\x89sb"
    )
    dtype = namespace + text("name") + text("float32") + b"s" + text("itemsize") + b"K\4s" + text("word") + b"K\4sb"
    path = torch_zip(
        tmp_path / "a.pth", b"\x80\2}" + text("w") + TENSOR + b"(" + dtype + b"K\4\x85K\1\x85K\0" + storage + b"tbs."
    )

    with pytest.raises(CorruptError, match="tries to change a tensor"):
        average([path], out=tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("name", ["torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_parameter"])
@pytest.mark.parametrize(
    "args",
    [
        b")",
        b"N\x85",
        global_("os.system") + b"\x85",
        b"(" + global_("os.system") + b"NNNt",
        b"(]NNNt",
        b"(NN" + b"]" + b"Nt",
        b"(" + global_("torch._utils._rebuild_tensor_v2") + b"N)Nt",
        b"(" + global_("torch._utils._rebuild_tensor_v2") + b"NK\1Nt",
    ],
)
def test_read_header_calls_nothing_by_way_of_functions_that_rebuild_tensors(
    name: str, args: bytes, tmp_path: Path
) -> None:
    try:
        tree = read(tmp_path, b"\x80\2" + global_(name) + args + b"R").tree
    except CorruptError:
        return
    assert [spec.reason for _, spec in tensors_in(tree)] in ([], ["a tensor subclass (unknown)"])


LENGTHS = {
    "BINBYTES8": b"\x8e" + struct.pack("<Q", 1 << 62),
    "BINBYTES8 over": b"\x8e" + b"\xff" * 8,
    "BINBYTES": b"B" + b"\xff" * 4,
    "BINUNICODE": b"X" + b"\xff" * 4,
    "BINUNICODE8": b"\x8d" + struct.pack("<Q", 1 << 62),
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1 << 62),
    "FRAME": b"\x95" + struct.pack("<Q", 1 << 62),
    "LONG4": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "LONG4 negative": b"\x8b" + struct.pack("<i", -1),
    "BINSTRING": b"T" + struct.pack("<i", 2**31 - 1),
    "BINSTRING negative": b"T" + struct.pack("<i", -1),
    "LONG1": b"\x8a\xff",
    "SHORT_BINSTRING": b"U\xff",
    "STRING": b"S'abc",
    "UNICODE": b"Vabc",
    "INT": b"Iabc\n",
    "LONG": b"L1e9L\n",
    "FLOAT": b"Fabc\n",
    "GLOBAL": b"cos\nsystem",
    "PERSID": b"P1\n",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"N\x98",
    "GET": b"g7\n",
    "BINGET": b"h\x07",
    "LONG_BINGET": b"j\xff\xff\xff\xff",
    "PUT negative": b"NP-1\n",
    "POP": b"0",
    "DUP": b"2",
    "TUPLE": b"t",
    "REDUCE": b"NNR",
    "BUILD": b"b",
    "SETITEM": b"NNNs",
    "APPEND": b"NNa",
    "an unknown opcode": b"\xff",
}


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("make", [torch_zip, torch_legacy], ids=["zip", "legacy"])
def test_read_header_rejects_lengths_and_opcodes_that_lie(case: str, make: Callable[..., Path], tmp_path: Path) -> None:
    path = make(tmp_path / "a.pth", b"\x80\4" + LENGTHS[case] + b".")

    with bounded_resident(), pytest.raises(CorruptError, match="its pickle cannot be read"):
        read_header(path)


GIB = 1 << 30
# Lengths that a system with some memory to spare grants.
CLAIMS = {
    "BINBYTES": b"B" + struct.pack("<I", GIB),
    "BINBYTES8": b"\x8e" + struct.pack("<Q", GIB),
    "BINUNICODE": b"X" + struct.pack("<I", GIB),
    "BINUNICODE8": b"\x8d" + struct.pack("<Q", GIB),
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", GIB),
    "BINSTRING": b"T" + struct.pack("<i", GIB),
    "LONG4": b"\x8b" + struct.pack("<i", GIB),
    "FRAME": b"\x95" + struct.pack("<Q", GIB),
}


@pytest.mark.parametrize("case", CLAIMS)
@pytest.mark.parametrize("make", [torch_zip, torch_legacy], ids=["zip", "legacy"])
def test_read_header_takes_no_memory_for_a_length_beyond_the_end(
    case: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    path = make(tmp_path / "a.pth", b"\x80\4" + CLAIMS[case] + b"few bytes.")

    with bounded_resident(), pytest.raises(CorruptError, match="its pickle cannot be read"):
        read_header(path)


@pytest.mark.parametrize("case", CLAIMS)
def test_spell_takes_no_memory_for_a_length_beyond_the_end(case: str) -> None:
    with bounded_resident(), pytest.raises(CorruptError, match="its pickle cannot be read"):
        trace(b"\x80\4" + CLAIMS[case] + b"few bytes.", where="a")


def doubled(depth: int) -> bytes:
    """Pair a value with itself, and the pair with itself: a few bytes a time, twice as much when written out."""
    return b"N\x85q\0" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth))


@pytest.mark.parametrize(
    "place",
    [
        STORAGE.replace(text("0"), b"%s"),
        TENSOR.replace(b"K\4\x85K\1\x85", b"%sK\1\x85"),
        TENSOR.replace(b"K\4\x85K\1\x85", b"K\4\x85%s"),
        TENSOR.replace(b"K\0K\4", b"%sK\4"),
        TENSOR.replace(b"\x89ccollections\nOrderedDict\n)R", b"\x89N%sN").replace(b"v2", b"v3"),
        global_("numpy.dtype") + b"%s\x85R",
        global_("_codecs.encode") + text("a") + b"%s\x86R",
        global_("torch.Size") + b"%s\x85R",
        global_("torch.device") + b"%s\x85R",
        global_("evil.thing") + b"%s\x85R",
        b"%s",
    ],
    ids=["key", "size", "stride", "start", "dtype", "numpy", "codec", "Size", "device", "unknown", "itself"],
)
def test_read_header_does_not_unfold_a_value_paired_with_itself_60_times(place: bytes, tmp_path: Path) -> None:
    try:
        with bounded_memory():
            read(tmp_path, b"\x80\2" + place.replace(b"%s", doubled(60)))
    except CorruptError as error:
        assert "MemoryError" not in str(error)  # noqa: PT017 - there may well be none
        assert len(str(error)) < 2000  # noqa: PT017


def test_read_header_does_not_unfold_a_list_of_storages(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    keys = raw.rindex(b"\x80\2")
    path.write_bytes(raw[:keys] + b"\x80\2](" + doubled(60) + b"e.")

    with bounded_memory(), pytest.raises(CorruptError, match="its list of storages does not match"):
        read_header(path)


@pytest.mark.parametrize(
    "deep",
    [
        b"]" * 200_000 + b"a" * 199_999,
        b")" + b"\x85" * 200_000,
        (global_("evil.thing") + b"q\0N\x85R") + b"q\1" + b"".join(b"0h\0h\1\x85Rq\1" for _ in range(50_000)),
    ],
    ids=["lists", "tuples", "objects"],
)
def test_read_header_refuses_deep_nesting_in_little_memory(deep: bytes, tmp_path: Path) -> None:
    with bounded_memory(), pytest.raises(CorruptError, match="nested more than 1000 levels deep"):
        read(tmp_path, b"\x80\2" + deep)


def test_tensors_in_makes_the_paths_of_a_deep_tree_one_at_a_time(tmp_path: Path) -> None:
    depth = 990
    level = b"0}" + text("x") + b"h\1s" + text("w") + b"h\2sq\1"
    header = read(tmp_path, b"\x80\2" + TENSOR + b"q\2" + b"0Nq\1" + level * depth)

    lengths = [len(path) for path, _ in tensors_in(header.tree)]
    assert lengths == [*range(depth, 0, -1)]


@pytest.mark.parametrize(
    "loop",
    [
        b"]q\0h\0a",
        b"}q\0" + text("self") + b"h\0s",
        global_("evil.thing") + b")Rq\0h\0b",
        global_("argparse.Namespace") + b")Rq\0}" + text("x") + b"h\0sb",
    ],
    ids=["list", "dict", "object", "namespace"],
)
def test_tensors_in_walks_a_tree_that_contains_itself_once(loop: bytes, tmp_path: Path) -> None:
    header = read(tmp_path, b"\x80\2" + loop)

    assert list(tensors_in(header.tree)) == []
    with pytest.raises(CkptError, match=r"hostile\.pth"):
        open_checkpoint(header.path)


def test_read_header_rejects_unknown_persistent_ids(tmp_path: Path) -> None:
    pids = [
        b"N",
        b")",
        text("storage"),
        b"(" + text("storage") + b"t",
        b"(" + text("module") + b"t",
        b"K\1",
        global_("evil.thing") + b")R",
        STORAGE[:-1].replace(b"ctorch\nFloatStorage\n", global_("evil.thing")),
        STORAGE[:-1].replace(b"K\4t", b"\x88t"),
        STORAGE[:-1].replace(b"ctorch\nFloatStorage\n", global_("collections.OrderedDict")),
        STORAGE[:-1].replace(text("0"), text("../../etc/passwd")),
    ]
    for pid in pids:
        with pytest.raises(
            CorruptError, match=r"an unknown type of persistent|a storage without|there is no such entry"
        ):
            read(tmp_path, b"\x80\2" + pid + b"Q")


def test_read_header_leaves_the_process_unchanged(tmp_path: Path, sentinel: Path) -> None:
    before = dict(vars(builtins)), Path.cwd(), list(sys.path), dict(copyreg.dispatch_table), dict(os.environ)
    for call in CALLS.values():
        read(tmp_path, call("builtins.exec", text(f"open({str(sentinel)!r}, 'w')")))

    assert (dict(vars(builtins)), Path.cwd(), list(sys.path), dict(copyreg.dispatch_table), dict(os.environ)) == before


def test_load_shares_nothing_between_two_readers(tmp_path: Path) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("no storage here")

    first, foreign = unpickle.load(io.BytesIO(b"\x80\2" + global_("evil.thing") + b")R."), refuse, where="a")
    second, _ = unpickle.load(io.BytesIO(b"\x80\2" + global_("evil.thing") + b")R."), refuse, where="b")

    assert type(first) is not type(second)
    assert foreign == {"evil.thing": 1}
