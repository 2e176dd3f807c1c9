"""Hostile pickles: what they name, build, nest, repeat and claim."""

# ruff: noqa: E501 - tables, of a kind a line
from __future__ import annotations

import struct
from itertools import product
from pathlib import Path

from crafting import STORAGE, TENSOR
from hostile_kind import (
    Kind,
    as_checkpoint,
    as_key,
    as_name,
    as_tensor,
    as_value,
    dict_of,
    dumped,
    global_,
    kinds,
    object_,
    text,
    whole,
)

ORDERED, NAMESPACE = "collections.OrderedDict", "argparse.Namespace"
TOUCH = text("touch run-by-a-pickle")
CODE = text("open('run-by-a-pickle', 'w')")


def called(name: str, *arguments: bytes) -> bytes:
    return global_(name) + b"(" + b"".join(arguments) + b"tR"


def stack_global(module: bytes, name: bytes) -> bytes:
    return module + name + b"\x93"


def pairs(levels: int, first: bytes = b"N\x85") -> bytes:
    """Return opcodes of a value paired with itself, so many times over."""
    return first + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(levels))


def nested(levels: int, inner: bytes = b"N") -> bytes:
    """Return opcodes of dicts that hold the one before twice."""
    steps = (b"q%c0}" % i + text("a") + b"h%cs" % i + text("b") + b"h%cs" % i for i in range(levels))
    return inner + b"".join(steps)


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


GETATTR = called("builtins.getattr", global_("os.path"), text("system"))
NAMED = {
    "os.system by REDUCE": called("os.system", TOUCH),
    "os.system by STACK_GLOBAL": stack_global(text("os"), text("system")) + TOUCH + b"\x85R",
    "os.system by INST": b"(" + TOUCH + b"ios\nsystem\n",
    "os.system by OBJ": b"(" + global_("os.system") + TOUCH + b"o",
    "os.system by NEWOBJ": global_("os.system") + TOUCH + b"\x85\x81",
    "os.system by NEWOBJ_EX": global_("os.system") + b")}" + text("command") + TOUCH + b"s\x92",
    "builtins.eval": called("builtins.eval", CODE),
    "builtins.exec": called("builtins.exec", CODE),
    "execfile of Python 2": called("__builtin__.execfile", TOUCH),
    "builtins.getattr": GETATTR,
    "builtins.getattr, called": GETATTR + TOUCH + b"\x85R",
    "builtins.__import__": called("builtins.__import__", text("antigravity")),
    "builtins.open": called("builtins.open", text("run-by-a-pickle"), text("w")),
    "builtins.map": called("builtins.map", global_("os.system"), b"](" + TOUCH + b"e"),
    "builtins.object": called("builtins.object"),
    "a module that imports at its name": called("importlib.import_module", text("antigravity")),
    "a module of Python that no one has imported": called("antigravity.fly"),
    "a module in the current folder": called("victim.Victim", TOUCH),
    "torch.load": called("torch.load", text("/etc/passwd")),
    "torch.hub.load": called("torch.hub.load", text("a/b"), text("c")),
    "torch.storage._load_from_bytes": called("torch.storage._load_from_bytes", whole(called("os.system", TOUCH))),
    "torch.jit.load": called("torch.jit.load", text("/etc/passwd")),
    "numpy.load": called("numpy.load", text("/etc/passwd")),
    "functools.partial": called("functools.partial", global_("os.system"), TOUCH) + b")R",
    "operator.attrgetter": called("operator.attrgetter", text("system")) + global_("os.path") + b"\x85R",
    "copyreg._reconstructor": called("copyreg._reconstructor", global_("os.system"), global_("builtins.object"), b"N"),
    "copyreg.add_extension": called("copyreg.add_extension", text("os"), text("system"), b"K\x07"),
    "types.CodeType": called("types.CodeType", b"K\0K\0K\0K\0K\0C\0"),
    "ctypes.CDLL": called("ctypes.CDLL", text("libc.so.6")),
    "webbrowser.open": called("webbrowser.open", text("http://localhost:1")),
    "socket.create_connection": called("socket.create_connection", dumped(("localhost", 1))),
    "pickle.loads": called("pickle.loads", whole(called("os.system", TOUCH))),
    "the tables of this library": called("ckpt_tools.formats.pickle_objects.GLOBALS.clear"),
    "an attribute of a known class": called("collections.OrderedDict.fromkeys", b"](K\1K\2e"),
    "a name with a new line": stack_global(text("os\nsystem"), text("x\ny")) + b")R",
    "a name that is empty": stack_global(text(""), text("")) + b")R",
    "a name with half of a surrogate pair": stack_global(text("a\ud800"), text("b\udfff")) + b")R",
    "a name that turns the line around": stack_global(text("a\u202egnp"), text("b\u2066")) + b")R",
    "a name that clears the screen": stack_global(text("a\x1b[2J"), text("b\x9b2J\x07")) + b")R",
    "a name of a megabyte": stack_global(text("a" * 1_000_000), text("b")) + b")R",
}
NO_NAMES = {
    "a name that is a number": stack_global(b"K\1", b"K\2") + b")R",
    "an extension code of one byte": b"\x82\xf0" + TOUCH + b"\x85R",
    "an extension code of four bytes": b"\x84\xf0\xf0\xf0\x7f" + TOUCH + b"\x85R",
    "names of 10,001 classes": b"(" + b"".join(global_(f"a.b{n}") for n in range(10_001)) + b"l",
}
ENCODED = {
    **{
        f"bytes by the encoding {encoding[:12]}": called("_codecs.encode", text("x"), text(encoding))
        for encoding in ("bz2_codec", "idna", "zlib", "punycode", "rot13", "utf-16", "unicode_escape", "x" * 100_000)
    },
    "bytes by an encoding that is no text": called("_codecs.encode", text("x"), b"K\1"),
    "bytes by an encoding with NUL": called("_codecs.encode", text("x"), text("latin-1\0")),
    "bytes of a number": called("builtins.bytes", dumped(1 << 40)),
    "a bytearray of a number": called("builtins.bytearray", dumped(1 << 40)),
    "bytes of what latin-1 lacks": called("_codecs.encode", text("\u202e"), text("latin-1")),
}

CLASS_STATE = dict_of(__new__=global_("a.b"), __init__=global_("a.b"), items=global_("a.b"), x=global_("a.b"))
BUILT = {
    "a class is changed": global_(ORDERED) + CLASS_STATE + b"b",
    "a class is changed by slots": global_(ORDERED) + b"N" + CLASS_STATE + b"\x86b",
    "an unknown class is changed": global_("a.b") + CLASS_STATE + b"b",
    "a storage is changed": STORAGE + CLASS_STATE + b"b",
    "a tensor is changed": TENSOR + dict_of(shape=b"K\x09\x85", storage=global_("a.b")) + b"b",
    "a tensor is changed by a tuple": TENSOR + b"(NK\x09\x85K\1\x85K\0Ntb",
    "a dtype is changed": global_("torch.float32") + CLASS_STATE + b"b",
    "a size is changed": called("torch.Size", b"](K\1e") + CLASS_STATE + b"b",
    "a Counter is changed": called("collections.Counter") + CLASS_STATE + b"b",
    "a number is changed": b"K\1" + CLASS_STATE + b"b",
    "a namespace of a list": called(NAMESPACE) + b"](K\1eb",
    "an OrderedDict of what are no pairs": called(ORDERED, b"](K\1K\2e"),
    "an OrderedDict of a number": called(ORDERED, b"K\7"),
    "a complex number of an object": called("builtins.complex", called("a.b"), b"K\1"),
    "a set of dicts": called("builtins.set", b"](}}e"),
    "a set of a number": called("builtins.set", dumped(1 << 40)),
    "a torch.Size of texts": called("torch.Size", b"](" + text("a") + b"e"),
    "a torch.device of a text": called("torch.device", text("/etc/passwd")),
}
BUILT_AND_READ = {
    "methods of an OrderedDict are hidden": called(ORDERED) + dict_of(items=global_("a.b"), __class__=b"N") + b"b",
    "a namespace with attributes of Python": called(NAMESPACE) + dict_of(__class__=b"K\1", __dict__=b"N") + b"b",
    "an unknown object with any state": called("a.b", b"N") + b"](N}eb" + b"](NNe\x85b",
    "an unknown object as a dict and a list": called("a.b") + b"K\1K\2s" + b"(K\1K\2e",
    "a numpy dtype of nonsense": called("numpy.dtype", b"]", b"]") + b"(K\3]NNNt" + b"b",
    "a numpy array of objects": object_("numpy.core.multiarray._reconstruct", dumped((1, (9,), "O", False, [1]))),
    "a numpy scalar of lies": called("numpy.core.multiarray.scalar", called("numpy.dtype", text("f8")), b"C\1x"),
}

MEMO = {
    "a memo of 2^31 entries by LONG_BINPUT": b"]" + put((1 << 31) - 1),
    "a memo of 2^24 entries by LONG_BINPUT": b"]" + put(1 << 24),
    "a memo of 2^31 entries by PUT": b"]p2147483647\n",
    "a memo index of 5,000 digits": b"]p" + b"9" * 5000 + b"\n",
    "a memo index below zero": b"]p-1\n",
    "a memo index that is no number": b"]pabc\n",
    "a memo entry that was never put": b"h\x07",
    "a memo entry of 4 bytes that was never put": b"j\xff\xff\xff\xff",
    "a memo index of 5,000 digits that is got": b"g" + b"9" * 5000 + b"\n",
}
OPCODES = {
    "a text beyond the end": b"X\xff\xff\xff\xff",
    "bytes of 2^62": b"\x8e" + struct.pack("<Q", 1 << 62) + b"x",
    "a bytearray of a gigabyte": b"\x96" + struct.pack("<Q", 1 << 30) + b"x",
    "an integer of 2 GB": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x",
    "an integer of a length below zero": b"\x8b" + struct.pack("<i", -1),
    "a frame of 2^62": b"\x95" + struct.pack("<Q", 1 << 62),
    "a text without an end": b"Vabc",
    "an integer in text of a megabyte": b"L" + b"9" * 1_000_000 + b"L\n",
    "a number in text that is none": b"Fabc\n",
    "an empty stack": b"0000",
    "no mark": b"t",
    "a reduce of nothing": b"NNR",
    "a persistent id in text": b"P1\n",
    "a buffer from outside": b"\x97",
    "an unknown opcode": b"\xff",
    "protocol 255": b"\x80\xff",
}

DEPTH = {
    "lists nested 40,000 deep": b"]" * 40_000 + b"a" * 39_999,
    "tuples nested 40,000 deep": b")" + b"\x85" * 40_000,
    "dicts nested 40,000 deep": b"}" + (text("x") + b"}") * 40_000 + b"s" * 40_000,
    "objects nested 5,000 deep": global_("a.b") + b"q\0N\x85Rq\1" + b"0h\0h\1\x85Rq\1" * 5_000,
    "namespaces nested 3,000 deep": called(NAMESPACE)
    + b"q\0"
    + (b"0" + called(NAMESPACE) + b"}" + text("x") + b"h\0sbq\0") * 3000,
    "states of OrderedDicts nested 2,000 deep": called(ORDERED)
    + b"q\0"
    + (b"0" + called(ORDERED) + b"}" + text("_metadata") + b"h\0sbq\0") * 2000,
}
GRAPHS = {
    "a tuple paired with itself 60 times": pairs(60),
    "a list paired with itself 60 times": pairs(60, b"]"),
    "dicts that hold the one before twice, 100 times": nested(100),
    "a namespace that holds itself": called(NAMESPACE) + b"q\0}" + text("x") + b"h\0sb",
    "a list that holds itself": b"]q\0h\0a",
    "a dict that holds itself": b"}q\0" + text("x") + b"h\0s",
    "an object that is its own state": called("a.b") + b"q\0h\0b",
    "an unknown object paired with itself 60 times": pairs(60, called("a.b")),
}
WEIGHTS_GRAPHS = {
    "weights that hold the ones before twice, 40 times": nested(40, TENSOR),
    "weights that hold themselves": b"}q\0" + text("w") + TENSOR + b"s" + text("state_dict") + b"h\0s",
    "weights of 900 levels": (b"}" + text("x")) * 900 + TENSOR + b"s" * 900,
    "one tensor under 3,000 names": TENSOR
    + b"q\xff0}("
    + b"".join(text(f"w{n}") + b"h\xff" for n in range(3000))
    + b"u",
    "500 state dicts": b"}(" + b"".join(text(f"s{n}") + dict_of(w=TENSOR) for n in range(500)) + b"u",
}

PRIME = (1 << 61) - 1  # integers that differ by it have one hash
KEYS = {
    "a pair of pairs as a key": pairs(40),
    "a pair of pairs by DUP as a key": b"N\x85" + b"2\x86" * 60,
    "a tuple 200,000 deep as a key": b")" + b"\x85" * 200_000,
    "a tuple 20,000 deep by marks as a key": b"(" * 20_000 + b"t" * 20_000,
    "a tuple of 100,000 as a key": b"(" + b"N" * 100_000 + b"t",
    "a tuple from a parameter as a key": called("torch._utils._rebuild_parameter", pairs(40)),
    "a tuple from a persistent id as a key": b"(" + text("module") + pairs(40) + b"tQ",
    "a torch.Size of 100,000 as a key": called("torch.Size", b"](" + b"K\1" * 100_000 + b"e"),
    "a list as a key": b"]",
    "a dict as a key": b"}",
    "a bytearray as a key": called("builtins.bytearray", text("x")),
    "an integer of 2,000 bytes as a key": b"\x8b" + struct.pack("<I", 2000) + b"\x7f" * 2000,
}
KEYS_READ = {
    "None as a key": b"N",
    "a float as a key": dumped(1.5),
    "NaN as two keys": dumped(float("nan")) + b"K\1s" + dumped(float("nan")),
    "infinity as a key": dumped(float("inf")),
    "True and 1 as keys": b"\x88K\1sK\1",
    "a complex number as a key": called("builtins.complex", dumped(1.0), dumped(2.0)),
    "bytes as a key": b"C\3abc",
    "a tuple as a key": dumped((1, ("a", None))),
    "a tuple with a tensor in it as a key": TENSOR + b"K\1\x86",
    "a tensor as a key": TENSOR,
    "a frozenset as a key": b"(K\1K\2\x91",
    "an integer of 400 digits as a key": dumped(10**400),
    "an integer below zero as a key": dumped(-1 << 63),
    "a torch.Size as a key": called("torch.Size", b"](K\1e"),
    "a torch.dtype as a key": global_("torch.float32"),
    "a class as a key": global_("a.b"),
    "an unknown object as a key": called("a.b", b"K\1"),
    "half of a surrogate pair as a key": text("a\ud800"),
    "a text of protocol 0 as a key": b"Vw\\u202e\n",
    "an empty text as a key": text(""),
    "a text that turns the line around as a key": text("exe.\u202egnp.\u2067"),
    "a text that clears the screen as a key": text("\x1b[2J\x1b]0;title\x07\x9b1m"),
    "a text of spaces without width as a key": text("w\u200b\u200e\ufeff"),
}


def flood(keys: bytes) -> bytes:
    return b"}(" + keys + b"u"


FLOODS = {
    "integers of one hash": dumped({n * PRIME: None for n in range(1, 3000)}),
    "tuples with integers of one hash": flood(b"".join(dumped((n * PRIME,)) + b"N" for n in range(1, 3000))),
    "integers in text of one hash": flood(b"".join(b"L%dL\nN" % (n * PRIME) for n in range(1, 5000))),
    "integers of 128 bytes of one hash": flood(
        b"".join(b"\x8a\x80" + (n * PRIME << 800).to_bytes(128, "little") + b"N" for n in range(1, 3000))
    ),
    "complex numbers of one hash": flood(
        b"".join(
            called("builtins.complex", dumped(float(-1000003 * n)), dumped(float(n))) + b"N" for n in range(1, 4000)
        )
    ),
    "tuples of -1 and -2, which have one hash": flood(
        b"".join(b"(" + b"".join(dumped(n) for n in each) + b"tN" for each in product((-1, -2), repeat=12))
    ),
    "a set of tuples of -1 and -2": called("builtins.set", dumped([*product((-1, -2), repeat=9)])),
    "frozensets of tuples of -1 and -2": flood(
        b"".join(b"(" + dumped(each) + b"\x91N" for each in product((-1, -2), repeat=12))
    ),
    "sizes of -1 and -2": b"("
    + b"".join(called("torch.Size", dumped([*each])) for each in product((-1, -2), repeat=8))
    + b"l",
    "1,000,000 sets": b"](" + b"\x8f" * 1_000_000 + b"e",
    "a set of 16,000 made again 20,000 times": b"]("
    + b"K\1K\2K\3K\4" * 4000
    + b"eq\0("
    + global_("builtins.set")
    + b"q\1"
    + b"h\0\x85R"
    + b"h\1h\0\x85R" * 20_000
    + b"l",
    "a dict made again 1,000 times": dumped({n: n for n in range(9000)}).replace(b"q\x00", b"q\0", 1)
    + b"0("
    + global_("collections.Counter")
    + b"r\1\1\0\0"
    + b"0"
    + b"j\1\1\0\0h\0\x85R" * 1000
    + b"l",
}


def storage(key: bytes = text("0"), count: bytes = b"K\4", kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + kind + key + text("cpu") + count + b"tQ"


def tensor(
    stored: bytes = STORAGE, start: bytes = b"K\0", size: bytes = b"K\4\x85", stride: bytes = b"K\1\x85"
) -> bytes:
    rest = b"\x89" + global_(ORDERED) + b")R"
    return global_("torch._utils._rebuild_tensor_v2") + b"(" + stored + start + size + stride + rest + b"tR"


SIXTY = dumped((1 << 60,))
STORAGES = {
    "a storage that is not there": tensor(storage(text("7"))),
    "a storage by a path out of the archive": tensor(storage(text("../../../../etc/passwd"))),
    "a storage by an absolute path": tensor(storage(text("/etc/passwd"))),
    "a storage of a name of a megabyte": tensor(storage(text("k" * 1_000_000))),
    "a storage of a name with escapes": tensor(storage(text("\x1b[2J\u202e\ud800"))),
    "a storage of a number for a name": tensor(storage(b"K\0")),
    "a storage of too many elements": tensor(storage(count=b"K\5")),
    "a storage of too few elements": tensor(storage(count=b"K\3")),
    "a storage of 2^62 elements": tensor(storage(count=dumped(1 << 62))),
    "a storage of elements below zero": tensor(storage(count=dumped(-4))),
    "a storage of True elements": tensor(storage(count=b"\x88")),
    "a storage of an integer of 1,000 bytes": tensor(storage(count=b"\x8b" + struct.pack("<I", 1000) + b"\x7f" * 1000)),
    "a storage of an unknown type": tensor(storage(kind=global_("a.b"))),
    "a storage of a type that is an object": tensor(storage(kind=called("a.b"))),
    "a storage of the type OrderedDict": tensor(storage(kind=global_(ORDERED))),
    "a storage of wider elements": tensor(storage(kind=b"ctorch\nDoubleStorage\n")),
    "a persistent id that is no storage": b"(" + text("secret") + text("x") + b"tQ",
    "a persistent id that is a pair of pairs": pairs(40) + b"Q",
    "a tensor that begins beyond its storage": tensor(start=b"K\5"),
    "a tensor that begins before its storage": tensor(start=dumped(-1)),
    "a tensor that begins at 2^63": tensor(start=dumped(1 << 63)),
    "a tensor that begins at a text": tensor(start=text("0")),
    "a tensor larger than its storage": tensor(size=b"K\5\x85"),
    "a tensor of 2^120 elements": tensor(size=dumped((1 << 60, 1 << 60)), stride=dumped((1, 1))),
    "a tensor of a size below zero": tensor(size=dumped((-4,))),
    "a tensor of a size of floats": tensor(size=dumped((4.0,))),
    "a tensor of a size of bools": tensor(size=dumped((True,))),
    "a tensor of a size that is a dict": tensor(size=b"}"),
    "a tensor of a size paired with itself": tensor(size=pairs(60)),
    "a tensor of a stride below zero": tensor(stride=dumped((-1,))),
    "a tensor of a stride of 2^62": tensor(stride=dumped((1 << 62,))),
    "a tensor of fewer strides than axes": tensor(stride=b")"),
    "a tensor of 100 axes": tensor(size=dumped((1,) * 100), stride=dumped((1,) * 100)),
    "an empty tensor of 2^400 columns": tensor(size=dumped((0, 1 << 400)), stride=dumped((1, 1))),
    "a tensor without a storage": tensor(stored=b"N"),
    "a parameter of a number": called("torch._utils._rebuild_parameter", b"K\1", b"\x88", b"}"),
    "a tensor rebuilt from no arguments": called("torch._utils._rebuild_tensor_v2"),
    "a tensor expanded to 2^60 elements": tensor(size=SIXTY, stride=b"K\0\x85"),
}
STORAGES_READ = {
    "a tensor on a device that is not there": tensor(storage().replace(text("cpu"), text("cuda:99"))),
    "a tensor on a device of a megabyte": tensor(storage().replace(text("cpu"), text("x" * 1_000_000))),
    "a storage without a type": tensor(storage(count=b"K\x10", kind=b"ctorch.storage\nUntypedStorage\n")),
    "a tensor expanded to 2^31 elements": tensor(size=dumped((1 << 31,)), stride=b"K\0\x85"),
    "a tensor expanded to 2^40 elements": tensor(size=dumped((1 << 40,)), stride=b"K\0\x85"),
    "a tensor whose elements overlap": tensor(size=dumped((2, 2, 2)), stride=dumped((1, 1, 1))),
    "a sparse tensor of lies": called("torch._utils._rebuild_sparse_tensor", b"K\1", b"(" + b"K\1" * 9 + b"t"),
    "a quantized tensor of lies": called("torch._utils._rebuild_qtensor", b"K\1"),
    "a tensor on the meta device": called("torch._utils._rebuild_meta_tensor_no_storage", b"K\1", SIXTY),
    "two tensors of two dtypes in one storage": tensor()
    + b"s"
    + text("v")
    + tensor(storage(count=b"K\2", kind=b"ctorch\nLongStorage\n"), size=b"K\2\x85"),
    "a lazy conjugate of floats": tensor().replace(b")RtR", b")R}" + text("conj") + b"\x88stR"),
    "a tensor rebuilt by os.system": called(
        "torch._tensor._rebuild_from_type_v2", global_("os.system"), global_("a.b"), TOUCH + b"\x85", b"N"
    ),
    "a subclass of a tensor that claims parts": called(
        "torch._tensor._rebuild_from_type_v2",
        global_("torch._utils._rebuild_wrapper_subclass"),
        global_("torch.distributed.tensor.DTensor"),
        b"(NNNNNNNt",
        dict_of(_local_tensor=b"N", _spec=pairs(30)),
    ),
}

NAMES = {
    "an empty name": text(""),
    "a name of dots": text("..."),
    "a name of a folder above": text("../../../etc/passwd"),
    "an absolute name": text("/etc/passwd"),
    "a name with NUL": text("w\0x"),
    "a name with half of a surrogate pair in weights": text("w\ud800"),
    "a name that turns the line around in weights": text("w\u202egnp.exe\u2066"),
    "a name that clears the screen in weights": text("w\x1b[2J\r\n\x9b"),
    "a name with marks of rich": text("[bold red]w[/] [link=file:///etc/passwd]x[/link]"),
    "a name of 60,000 bytes": text("x" * 60_000),
    "a name of 30,000 dots": text("x." * 30_000 + "w"),
    "a name of safetensors for metadata": text("__metadata__"),
    "a name that collides without its prefix": text("module.w") + TENSOR + b"s" + text("module.module.w"),
    "a name of 9,000 prefixes": text("module." * 9000 + "w"),
    "a name of 300 axes of letters": text("é" * 300),
    "an integer in place of a name": b"K\1",
    "an integer of 400 digits in place of a name": dumped(10**400),
    "a tuple in place of a name": dumped(("a", 1)),
    "None in place of a name": b"N",
    "NaN in place of a name": dumped(float("nan")),
    "bytes in place of a name": b"C\3abc",
}
WEIGHTS = dict_of(w=TENSOR)
CONTENTS = {
    "an epoch of 400 digits": dict_of(state_dict=WEIGHTS, epoch=dumped(10**400)),
    "an epoch that is NaN": dict_of(state_dict=WEIGHTS, epoch=dumped(float("nan"))),
    "a step that is infinite": dict_of(state_dict=WEIGHTS, global_step=dumped(float("inf"))),
    "a step below zero": dict_of(state_dict=WEIGHTS, step=dumped(-(1 << 70))),
    "a step that is a pair of pairs": dict_of(state_dict=WEIGHTS, step=pairs(60)),
    "a step that is a text with escapes": dict_of(state_dict=WEIGHTS, step=text("\x1b[2J9\u202e")),
    "an architecture with escapes": dict_of(state_dict=WEIGHTS, arch=text("\x1b[2Jos.system\u202e")),
    "a metric with escapes and NaN": dict_of(state_dict=WEIGHTS, metric=dumped({"\x1b[2J\u202e": float("nan")})),
    "arguments of a pair of pairs": dict_of(state_dict=WEIGHTS, args=pairs(60)),
    "an optimizer of nonsense": dict_of(state_dict=WEIGHTS, optimizer=dumped({"state": [1], "param_groups": {"a": 1}})),
    "an optimizer of 10^18 parameters": dict_of(
        state_dict=WEIGHTS,
        optimizer=dumped({"state": {10**18: {"step": 10**400}}, "param_groups": [{"params": [10**18]}]}),
    ),
    "an EMA with a decay that is a text": dict_of(
        state_dict=WEIGHTS, state_dict_ema=WEIGHTS, ema_decay=text("x"), num_updates=dumped(-1)
    ),
    "a loop in the arguments of a script": dict_of(
        state_dict=WEIGHTS, args=called(NAMESPACE) + b"q\0}" + text("model") + b"h\0sb"
    ),
    "a version of Lightning of nonsense": dict_of(
        **{
            "pytorch-lightning_version": b"]",
            "state_dict": WEIGHTS,
            "callbacks": dumped([1]),
            "hyper_parameters": b"K\1",
        }
    ),
    "an exponential average of nonsense": dict_of(**{"n_averaged": b"]", "module.w": TENSOR, "model": TENSOR}),
    "LitEma counts of nonsense": dict_of(
        **{"model_ema.num_updates": b"]", "model_ema.decay": TENSOR, "model.w": TENSOR}
    ),
    "numbers where weights are expected": dict_of(state_dict=dumped({"w": 1.0}), model=WEIGHTS),
    "a number alone": b"K\1",
    "a text with escapes alone": text("\x1b[2J\u202e"),
    "an empty dict": b"}",
    "None alone": b"N",
    "an unknown object alone": called("a.b", text("\x1b[2J")),
    "a class alone": global_(ORDERED),
    "weights of no tensor": dict_of(state_dict=dumped({"w": [1.0]})),
}
NO_WEIGHTS = {
    "no opcode but STOP": b"",
}


def legacy_parts(path: Path, parts: list[bytes]) -> None:
    path.write_bytes(b"".join(parts))


MAGIC = b"\x80\2" + dumped(0x1950A86A20F9469CFC6C) + b"."
PROTOCOL = whole(dumped(1001))
SYSTEM = whole(dumped({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}))
LEGACY_STORAGE = storage().replace(b"K\4tQ", b"K\4NtQ")
LEGACY_READ: dict[str, list[bytes]] = {
    "os.system in a legacy file": [MAGIC, PROTOCOL, SYSTEM, whole(called("os.system", TOUCH)), whole(b"]")],
    "os.system as a system in a legacy file": [
        MAGIC,
        PROTOCOL,
        whole(called("os.system", TOUCH)),
        whole(b"}"),
        whole(b"]"),
    ],
    "a legacy file of protocol 10^400": [MAGIC, whole(dumped(10**400)), SYSTEM, whole(b"}"), whole(b"]")],
}
LEGACY = {
    "a pair of pairs as a key in a legacy file": [
        MAGIC,
        PROTOCOL,
        SYSTEM,
        whole(b"}" + pairs(40) + b"Ns"),
        whole(b"]"),
    ],
    "a pair of pairs as the storages of a legacy file": [
        MAGIC,
        PROTOCOL,
        SYSTEM,
        whole(b"}"),
        whole(b"](" + pairs(60) + b"e"),
    ],
    "a legacy file without its storages": [
        MAGIC,
        PROTOCOL,
        SYSTEM,
        whole(dict_of(w=tensor(LEGACY_STORAGE))),
        whole(b"]"),
    ],
    "a legacy file of a storage of 2^62 elements": [
        MAGIC,
        PROTOCOL,
        SYSTEM,
        whole(dict_of(w=tensor(LEGACY_STORAGE))),
        whole(dumped(["0"])),
        struct.pack("<q", 1 << 62),
    ],
    "a legacy file of a storage of elements below zero": [
        MAGIC,
        PROTOCOL,
        SYSTEM,
        whole(dict_of(w=tensor(LEGACY_STORAGE))),
        whole(dumped(["0"])),
        struct.pack("<q", -1),
    ],
    "a legacy file with a view of lies": [
        MAGIC,
        PROTOCOL,
        SYSTEM,
        whole(
            dict_of(w=tensor(storage().replace(b"K\4tQ", b"K\4(" + text("v") + dumped(-5) + dumped(1 << 62) + b"ttQ")))
        ),
        whole(dumped(["0"])),
        struct.pack("<q", 4),
        bytes(16),
    ],
    "a legacy file that ends in its pickle": [MAGIC, PROTOCOL, SYSTEM, whole(b"}")[:-1]],
    "a legacy file of 5,000 pickles": [MAGIC, PROTOCOL, SYSTEM, *[whole(b"}")] * 5000],
}

KINDS: list[Kind] = [
    *kinds("pickle: names", True, NAMED, as_value),
    *kinds("pickle: names", False, NO_NAMES, as_value),
    *kinds("pickle: encodings", False, ENCODED, as_value),
    *kinds("pickle: built objects", False, BUILT, as_value),
    *kinds("pickle: built objects", True, BUILT_AND_READ, as_value),
    *kinds("pickle: memo", False, MEMO, as_value),
    *kinds("pickle: opcodes", False, OPCODES, as_value),
    *kinds("pickle: depth", False, DEPTH, as_value),
    *kinds("pickle: graphs", True, GRAPHS, as_value),
    *kinds("pickle: graphs", True, WEIGHTS_GRAPHS, as_checkpoint),
    *kinds("pickle: keys", False, KEYS, as_key),
    *kinds("pickle: keys", True, KEYS_READ, as_key),
    *kinds("pickle: floods", False, FLOODS, as_value),
    *kinds("storages and tensors", False, STORAGES, as_tensor),
    *kinds("storages and tensors", True, STORAGES_READ, as_tensor),
    *kinds("names of tensors", True, NAMES, as_name),
    *kinds("content", True, CONTENTS, as_checkpoint),
    *kinds("content", False, NO_WEIGHTS, as_checkpoint),
    *kinds("legacy files", False, LEGACY, legacy_parts),
    *kinds("legacy files", True, LEGACY_READ, legacy_parts),
]
