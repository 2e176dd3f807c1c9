"""Hostile archives and headers: zip, safetensors, tar, TorchScript, torch.export, and provenance."""

# ruff: noqa: E501 - tables, of a kind a line
from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from crafting import PAYLOAD, TENSOR, safetensors_file, zip_of
from hostile_kind import Kind, dict_of, kinds, whole
from hostile_pickles import TOUCH, called, pairs

PICKLED = whole(dict_of(w=TENSOR))
RECORDS = {"a/data.pkl": PICKLED, "a/byteorder": b"little", "a/data/0": PAYLOAD, "a/version": b"3\n"}


def zipped(records: dict[str, bytes] | list[tuple[str, bytes]], compress: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for name, data in records.items() if isinstance(records, dict) else records:
            archive.writestr(zipfile.ZipInfo(name), data, compress)
    return buffer.getvalue()


GOOD = zipped(RECORDS)
DIRECTORY = GOOD.index(b"PK\1\2")
END = GOOD.index(b"PK\5\6")


def patched(*changes: tuple[int, str, int], raw: bytes = GOOD) -> bytes:
    """Return an archive with numbers (offset, struct format, value) in it."""
    made = bytearray(raw)
    for at, layout, value in changes:
        struct.pack_into(f"<{layout}", made, at, value)
    return bytes(made)


def line(number: int) -> int:
    """Return the offset of an entry of the directory."""
    at = DIRECTORY
    for _ in range(number):
        name, extra, comment = struct.unpack_from("<HHH", GOOD, at + 28)
        at += 46 + name + extra + comment
    return at


def inserted(end: bytes, raw: bytes = GOOD) -> bytes:
    """Return an archive with bytes before its last record."""
    return raw[:END] + end + raw[END:]


ZIP64_END = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1 << 60, 1 << 60, 1 << 60, 1 << 60)
LOCATOR = b"PK\6\7" + struct.pack("<IQI", 0, END, 1)
TWICE = zipped([*RECORDS.items(), ("a/data/1", bytes(16))])
ZIPS = {
    "an archive cut in its directory": GOOD[: DIRECTORY + 20],
    "an archive cut in a tensor": GOOD[:200],
    "an archive without an end": GOOD[:END],
    "an archive of an end alone": GOOD[END:],
    "a directory at 4 GB": patched((END + 16, "I", 0xFFFFFFF0)),
    "a directory of 4 GB": patched((END + 12, "I", 0xFFFFFFF0)),
    "a comment with an end in it": patched((END + 20, "H", 22)) + b"PK\5\6" + bytes(18),
    "a zip64 end of 2^60": patched((END + 84 - 8, "I", 0xFFFFFFFF), raw=inserted(ZIP64_END + LOCATOR)),
    "a zip64 locator to nowhere": inserted(b"PK\6\7" + struct.pack("<IQI", 0, 1 << 62, 1)),
    "an entry at 4 GB": patched((line(2) + 42, "I", 0xFFFFFF00)),
    "an entry in the directory": patched((line(2) + 42, "I", DIRECTORY)),
    "an entry of 4 GB": patched((line(2) + 20, "I", 0xFFFFFF00), (line(2) + 24, "I", 0xFFFFFF00)),
    "an entry with zip64 sizes that are not there": patched(
        (line(2) + 20, "I", 0xFFFFFFFF), (line(2) + 24, "I", 0xFFFFFFFF)
    ),
    "an entry with two sizes": patched((line(2) + 24, "I", 17)),
    "an entry with a content that is a folder": patched((line(2) + 38, "I", 0x10)),
    "an entry of a name of 65,535 bytes": patched((line(2) + 28, "H", 0xFFFF)),
    "an entry with extra bytes beyond the end": patched((line(2) + 30, "H", 0xFFFF)),
    "a local header with extra bytes beyond the end": patched((GOOD.index(b"a/data/0") - 2, "H", 0xFFFF)),
    "an encrypted pickle": patched((line(0) + 8, "H", 1)),
    "a compressed pickle": zipped(RECORDS, zipfile.ZIP_DEFLATED),
    "a pickle by an unknown method": patched((line(0) + 10, "H", 99)),
    "a pickle that unpacks to 64 MB": zipped([("a/data.pkl", bytes(1 << 26))], zipfile.ZIP_DEFLATED),
    "a directory in place of a pickle": zipped([("a/data.pkl/", b""), ("a/data/0", PAYLOAD)]),
    "two root folders": zipped(RECORDS | {"b/data.pkl": PICKLED}),
    "a root folder above": zipped({f"../{name}": data for name, data in RECORDS.items()}),
    "an absolute root folder": zipped({f"/etc/{name}": data for name, data in RECORDS.items()}),
    "names that are no UTF-8": GOOD.replace(b"a/data/0", b"a/data/\xff"),
    "an empty pickle": zipped(RECORDS | {"a/data.pkl": b""}),
    "an archive of an archive": zipped([("a.pth", GOOD)]),
    "2,000 empty entries": zipped([(f"x/{n}", b"") for n in range(2000)]),
    "a word processor's file": zipped([("[Content_Types].xml", b"<x/>"), ("word/document.xml", b"<x/>")]),
    "an archive after other bytes": b"#!/bin/sh\n" * 50 + GOOD,
    "a second pickle of the same name": TWICE.replace(b"a/data/1", b"a/data/0"),
    "entries of names beside the root": zipped(RECORDS | {"../x": b"", "/etc/passwd": b"", "a\\..\\b": b"", "": b""}),
}
ZIPS_READ = {
    "a comment of 65,535 bytes": patched((END + 20, "H", 65535)) + b"x" * 65535,
    "a symbolic link as an entry": patched((line(2) + 38, "I", 0o120777 << 16)),
    "a byte order of nonsense": zipped(RECORDS | {"a/byteorder": b"\x1b[2J" * 1000}),
    "a version of nonsense": zipped(RECORDS | {"a/version": b"9" * 5000}),
    "two entries in one place": patched((line(3) + 42, "I", GOOD.index(b"PK\3\4", 1))),
    "a directory of 65,535 entries": patched((END + 8, "H", 0xFFFF), (END + 10, "H", 0xFFFF)),
    "a directory of fewer entries than it has": patched((END + 8, "H", 1), (END + 10, "H", 1)),
    "an end on another disk": patched((END + 4, "H", 7), (END + 6, "H", 7)),
    "a comment that reaches beyond the end": patched((END + 20, "H", 500)),
    "a pickle with another checksum": patched((line(0) + 16, "I", 0)),
    "a root folder of escapes": zipped(
        {name.replace("a/", "a\x1b[2J\u202e/", 1): data for name, data in RECORDS.items()}
    ),
}


def raw(path: Path, data: bytes) -> None:
    path.write_bytes(data)


DEEP: Any = {}
for _ in range(400):
    DEEP = {"args": [DEEP]}
RECORD = {"tool": "ckpt-tools", "command": "avg"}
PROVENANCE: dict[str, Any] = {
    "provenance that is no JSON": b"{" * 50,
    "provenance of 100,000 brackets": b"[" * 100_000,
    "provenance that is no UTF-8": b"\xff\xfe{}",
    "provenance of a number": b"1",
    "provenance of an integer of 5,000 digits": b'{"inputs": ' + b"9" * 5000 + b"}",
    "provenance of NaN and infinity": b'{"args": {"a": NaN, "b": -Infinity, "c": 1e999}}',
    "provenance nested 400 deep": json.dumps(DEEP).encode(),
    "provenance with escapes": json.dumps(
        {**RECORD, "command": "\x1b[2J\u202e", "args": {"\x1b[2J": "\u2066"}}
    ).encode(),
    "provenance with halves of surrogate pairs": b'{"command": "\\ud800", "args": {"\\udfff": "\\ud800"}}',
    "provenance of inputs of nonsense": json.dumps(
        {**RECORD, "inputs": [1, None, {"path": []}, [[]]], "schedule": 1}
    ).encode(),
    "provenance of inputs elsewhere": json.dumps(
        {**RECORD, "inputs": [{"path": "/etc/passwd", "coefficient": "x"}]}
    ).encode(),
    "provenance of a line of code": json.dumps(
        {**RECORD, "command": "$(touch run-by-a-pickle)", "made": {"made": 1}}
    ).encode(),
    "provenance of types of nonsense": json.dumps(
        {"command": {}, "args": [], "inputs": {}, "made": [], "state": 1}
    ).encode(),
    "provenance of a megabyte": json.dumps({"command": "x" * 1_000_000}).encode(),
}


def with_provenance(path: Path, record: bytes) -> None:
    zip_of(path, RECORDS | {"a/ckpt_tools.json": record})


def with_metadata(path: Path, record: bytes) -> None:
    said = {"format": "pt", "ckpt_tools": record.decode("utf-8", "replace")}
    safetensors_file(path, {"__metadata__": said, "w": entry()}, PAYLOAD)


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16), **other: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **other}


HEADERS: dict[str, tuple[Any, bytes]] = {
    "a header that is a list": (b"[" + b"]" * 7, b""),
    "a header of 5,000 braces": (b'{"a":' * 5000, b""),
    "a header of a list 100,000 deep": (b'{"a":' + b"[" * 100_000, b""),
    "a header of a million empty lists": (b'{"x":[' + b"[]," * 1_000_000 + b"0]}", b""),
    "a header with a byte order mark": (b'\xef\xbb\xbf{"w":1}', b""),
    "a header in UTF-16": ('{"w":1}'.encode("utf-16"), b""),
    "a header with text after it": (json.dumps({"w": entry()}).encode() + b"{}", PAYLOAD),
    "a name twice": (b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2), PAYLOAD),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{"a":"b"},"w":1}', PAYLOAD),
    "metadata that is a list": ({"__metadata__": [], "w": entry()}, PAYLOAD),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "w": entry()}, PAYLOAD),
    "a tensor that is a number": ({"w": 1}, PAYLOAD),
    "a tensor without a dtype": ({"w": {"shape": [4], "data_offsets": [0, 16]}}, PAYLOAD),
    "a shape of NaN": (b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', PAYLOAD),
    "a shape of infinity": (b'{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,16]}}', PAYLOAD),
    "a shape of 4.0": ({"w": entry(shape=[4.0])}, PAYLOAD),
    "a shape of true": ({"w": entry(shape=[True])}, PAYLOAD),
    "a shape below zero": ({"w": entry(shape=[-2, -2])}, PAYLOAD),
    "a shape of 2^120 elements": ({"w": entry(shape=[1 << 60, 1 << 60])}, PAYLOAD),
    "a shape of 2^64 + 4 elements": ({"w": entry(shape=[(1 << 64) + 4])}, PAYLOAD),
    "a shape of 5,000 digits": (b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}', PAYLOAD),
    "a shape of 1,000 axes": ({"w": entry(shape=[1] * 1000 + [4])}, PAYLOAD),
    "a shape of 2^40 and 0": ({"w": entry(shape=[1 << 40, 0], offsets=[0, 16])}, PAYLOAD),
    "offsets that overlap": ({"v": entry(), "w": entry(offsets=[8, 24])}, bytes(24)),
    "offsets with a gap": ({"v": entry(), "w": entry(offsets=[20, 36])}, bytes(36)),
    "offsets backwards": ({"w": entry(offsets=[16, 0])}, PAYLOAD),
    "offsets below zero": ({"w": entry(offsets=[-16, 0])}, PAYLOAD),
    "offsets beyond the end": ({"w": entry(offsets=[1 << 62, (1 << 62) + 16])}, PAYLOAD),
    "offsets of three numbers": ({"w": entry(offsets=[0, 8, 16])}, PAYLOAD),
    "offsets of floats": ({"w": entry(offsets=[0.0, 16.0])}, PAYLOAD),
    "data that no tensor has": ({"w": entry()}, PAYLOAD + b"secret"),
    "less data than tensors": ({"w": entry()}, PAYLOAD[:-1]),
    "chunks of nonsense": ({"__metadata__": {"DCP_SHARDING_INFO": "{", "DCP_VERSION": "x"}, "w": entry()}, PAYLOAD),
    "a header without tensors": ({}, PAYLOAD),
    "half of a surrogate pair in safetensors": (b'{"w\\ud800":' + json.dumps(entry()).encode() + b"}", PAYLOAD),
}
HEADERS_READ: dict[str, tuple[Any, bytes]] = {
    "an unknown dtype": ({"w": entry(), "v": entry(dtype="F5", shape=[2], offsets=[16, 18])}, PAYLOAD + b"xx"),
    "a name of a folder above in safetensors": (
        {"../../x": entry(), "/etc/passwd": entry(offsets=[16, 32])},
        bytes(32),
    ),
    "an empty name in safetensors": ({"": entry()}, PAYLOAD),
    "a name with NUL in safetensors": ({"w\0x": entry()}, PAYLOAD),
    "a name that turns the line around in safetensors": ({"w\u202egnp\u2067": entry()}, PAYLOAD),
    "a name that clears the screen in safetensors": ({"w\x1b[2J\x9b\x07": entry()}, PAYLOAD),
    "a name of a megabyte in safetensors": ({"x" * 1_000_000: entry()}, PAYLOAD),
    "metadata of a megabyte": ({"__metadata__": {"a": "x" * 1_000_000}, "w": entry()}, PAYLOAD),
    "metadata of 20,000 ties": ({"__metadata__": {f"w{n}": "w" for n in range(20_000)}, "w": entry()}, PAYLOAD),
    "metadata of ties in a ring": ({"__metadata__": {"a.b": "b.a", "b.a": "a.b"}, "w": entry()}, PAYLOAD),
    "metadata with escapes": ({"__metadata__": {"\x1b[2J": "\u202e", "format": "\x1b[2J"}, "w": entry()}, PAYLOAD),
    "an entry with more fields": ({"w": entry(code="import os")}, PAYLOAD),
    "a dtype that is a list": ({"w": entry(dtype=[])}, PAYLOAD),
    "half bytes": ({"w": entry(dtype="F4", shape=[3], offsets=[0, 1])}, b"x"),
}
LENGTHS = {
    "a header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "a header longer than the file": struct.pack("<Q", 1 << 20) + b'{"w":1}',
    "a header of no bytes": struct.pack("<Q", 0) + b"{",
    "a header over the limit": struct.pack("<Q", 100_000_001) + b"{" + bytes(1000),
    "a header cut in its length": b"\x10\0\0",
}


def header(path: Path, content: tuple[Any, bytes]) -> None:
    safetensors_file(path, *content)


def tarred(members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w:") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.PAX_FORMAT) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


CONFIG = member("./model_config.yaml", b"target: os.system\n")
WEIGHTS = "./model_weights.ckpt"
NEMO_GOOD = tarred([CONFIG, member(WEIGHTS, GOOD)])
TARS = {
    "weights that are a symbolic link": tarred([CONFIG, member(WEIGHTS, kind=tarfile.SYMTYPE, linkname="/etc/passwd")]),
    "weights that are a hard link": tarred([CONFIG, member(WEIGHTS, kind=tarfile.LNKTYPE, linkname="/etc/passwd")]),
    "weights that are a device": tarred([CONFIG, member(WEIGHTS, kind=tarfile.CHRTYPE, devmajor=1, devminor=5)]),
    "weights that are a pipe": tarred([CONFIG, member(WEIGHTS, kind=tarfile.FIFOTYPE)]),
    "weights that are a folder": tarred([CONFIG, member(WEIGHTS, kind=tarfile.DIRTYPE)]),
    "weights twice": tarred([member(WEIGHTS, GOOD), member(WEIGHTS, GOOD)]),
    "weights beyond the end": NEMO_GOOD[: 512 * 4],
    "a member of a size of 8 GB": NEMO_GOOD.replace(b"%011o" % len(GOOD), b"77777777777"),
    "a tar file with another checksum": NEMO_GOOD[:150] + b"9" + NEMO_GOOD[151:],
    "a tar file without members": tarred([]),
    "a tar file of a header of 100 kB": tarred([member(WEIGHTS, GOOD, pax_headers={"comment": "x" * 100_000})])[
        :20_000
    ],
    "a compressed tar file": tarred([CONFIG, member(WEIGHTS, GOOD)], "w:gz"),
    "a legacy tar file of storages": tarred(
        [member("storages", whole(called("os.system", TOUCH))), member("pickle", PICKLED)]
    ),
    "1,000 members": tarred([member(f"x{n}") for n in range(1000)]),
}
TARS_READ = {
    "weights by a path above": tarred([CONFIG, member("../../model_weights.ckpt", GOOD)]),
    "weights by an absolute path": tarred([CONFIG, member("/etc/model_weights.ckpt", GOOD)]),
    "a configuration that names code": NEMO_GOOD,
    "weights by a name with escapes": tarred([CONFIG, member("\x1b[2J\u202e.ckpt", GOOD)]),
}

MODULE = b"\x80\2c__torch__\nNet\n)\x81" + dict_of(w=TENSOR) + b"b."
SCRIPT = {"a/data.pkl": MODULE, "a/constants.pkl": b"\x80\2).", "a/data/0": PAYLOAD, "a/version": b"3\n"}
PROGRAM = b'class Net(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n  w : Tensor\n'
SCRIPTS = {
    "TorchScript without code": SCRIPT,
    "TorchScript of os.system": {
        **SCRIPT,
        "a/code/__torch__.py": PROGRAM,
        "a/data.pkl": whole(called("os.system", TOUCH)),
    },
    "TorchScript of code without an end": {**SCRIPT, "a/code/__torch__.py": b"class Net(Module" + b"(" * 10_000},
    "TorchScript of 10,000 classes": {**SCRIPT, "a/code/__torch__.py": b"class X(Module):\n  w : Tensor\n" * 10_000},
    "TorchScript of a pair of pairs": {**SCRIPT, "a/code/__torch__.py": PROGRAM, "a/data.pkl": whole(pairs(60))},
}
SCRIPTS_READ: dict[str, dict[str, bytes]] = {
    "TorchScript with a hostile constant": {
        **SCRIPT,
        "a/code/__torch__.py": PROGRAM,
        "a/constants.pkl": whole(b"}" + pairs(40) + b"Ns"),
    },
}
WEIGHTS_CONFIG = {
    "config": {
        "w": {
            "path_name": "weight_0",
            "is_param": True,
            "use_pickle": False,
            "tensor_meta": {
                "dtype": 7,
                "sizes": [{"as_int": 4}],
                "strides": [{"as_int": 1}],
                "storage_offset": {"as_int": 0},
                "device": {"type": "cpu", "index": None},
                "layout": 7,
                "requires_grad": False,
            },
        }
    }
}


def exported(config: Any) -> dict[str, bytes]:
    made = config if isinstance(config, bytes) else json.dumps(config).encode()
    return {
        "a/archive_format": b"pt2",
        "a/models/model.json": b"{}",
        "a/byteorder": b"little",
        "a/data/weights/model_weights_config.json": made,
        "a/data/weights/weight_0": PAYLOAD,
    }


def config(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(WEIGHTS_CONFIG))
    where = made["config"]["w"]
    for key, value in changes.items():
        (where if key in where else where["tensor_meta"])[key] = value
    return made


PROGRAMS = {
    "an exported program of no JSON": exported(b"{" * 1000),
    "an exported program of brackets": exported(b"[" * 100_000),
    "an exported program of a list": exported([]),
    "an exported weight by a path above": exported(config(path_name="../../../etc/passwd")),
    "an exported weight by an absolute path": exported(config(path_name="/etc/passwd")),
    "an exported weight of 2^60 elements": exported(config(sizes=[{"as_int": 1 << 60}])),
    "an exported weight of a size by code": exported(config(sizes=[{"as_expr": {"expr_str": "__import__('os')"}}])),
}
PROGRAMS_READ = {
    "an exported weight that is a pickle": exported(config(use_pickle=True)),
    "an exported weight of dtype 999": exported(config(dtype=999)),
    "an exported weight of 100 axes": exported(config(sizes=[{"as_int": 1}] * 100, strides=[{"as_int": 1}] * 100)),
}


def records(path: Path, entries: dict[str, bytes]) -> None:
    zip_of(path, entries)


OTHERS = {
    "an empty file": b"",
    "a file of zeros": bytes(5000),
    "a page of HTML": b"<!DOCTYPE html><html><script>alert(1)</script></html>",
    "a program of Linux": b"\x7fELF" + bytes(500),
    "a script of the shell": b"#!/bin/sh\ntouch run-by-a-pickle\n",
    "a pickle of os.system": whole(called("os.system", TOUCH)),
    "a module of Python": b"import os; os.system('touch run-by-a-pickle')\n",
    "an array of objects of NumPy": b"\x93NUMPY\1\0v\0{'descr': '|O', 'shape': (1,)}\n"
    + whole(called("os.system", TOUCH)),
    "a pointer of Git LFS with escapes": b"version https://git-lfs.github.com/spec/v1\noid sha256:\x1b[2J\nsize 1\n",
}

KINDS: list[Kind] = [
    *kinds("zip archives", False, ZIPS, raw),
    *kinds("zip archives", True, ZIPS_READ, raw),
    *kinds("provenance", True, PROVENANCE, with_provenance),
    *kinds(
        "provenance", True, {f"{n} in safetensors": v for n, v in PROVENANCE.items()}, with_metadata, "a.safetensors"
    ),
    *kinds("safetensors", False, HEADERS, header, "a.safetensors"),
    *kinds("safetensors", True, HEADERS_READ, header, "a.safetensors"),
    *kinds("safetensors", False, LENGTHS, raw, "a.safetensors"),
    *kinds("tar archives", False, TARS, raw, "a.nemo"),
    *kinds("tar archives", True, TARS_READ, raw, "a.nemo"),
    *kinds("TorchScript", False, SCRIPTS, records, "a.pt"),
    *kinds("TorchScript", True, SCRIPTS_READ, records, "a.pt"),
    *kinds("torch.export", False, PROGRAMS, records, "a.pt2"),
    *kinds("torch.export", True, PROGRAMS_READ, records, "a.pt2"),
    *kinds("no checkpoints", False, OTHERS, raw),
]
