"""Pickles that are small, and would take minutes or gigabytes to read: refused at once, and honest ones are not."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crafting import TENSOR, bounded_resident, torch_legacy, torch_zip

from ckpt_tools.errors import CkptError, CorruptError
from ckpt_tools.formats import read_header
from ckpt_tools.formats.pickle_check import end_of_pickle


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def global_(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def pairs(levels: int) -> bytes:
    """Return opcodes of a tuple of itself twice, so many times over."""
    return b"N\x85" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(levels))


def dumped(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


KEYS = {
    "a pair of pairs": pairs(40),
    "a pair of pairs by DUP": b"N\x85" + b"2\x86" * 60,
    "a pair of pairs by GET": b"N\x85" + b"".join(b"p%d\n0g%d\ng%d\n\x86" % (i, i, i) for i in range(40)),
    "a pair of pairs by MEMOIZE": b"N\x85" + b"".join(b"\x940h%ch%c\x86" % (i, i) for i in range(40)),
    "a deep tuple": b")" + b"\x85" * 200_000,
    "a deep tuple by MARK": b"(" * 200_000 + b"t" * 200_000,
    "a wide tuple": b"(" + b"N" * 100_000 + b"t",
    "a tuple from a parameter": global_("torch._utils._rebuild_parameter") + pairs(40) + b"\x85R",
    "a tuple from a persistent id": b"(" + text("module") + pairs(40) + b"tQ\x85",
}  # fmt: skip
PLACES = {
    "SETITEM": b"}%sNs",
    "SETITEMS": b"}(NN%sNu",
    "DICT": b"(%sNd",
    "ADDITEMS": b"\x8f(%s\x90",
    "FROZENSET": b"(%s\x91",
    "set": global_("builtins.set") + b"](%se\x85R",
    "frozenset": global_("__builtin__.frozenset") + b"](%se\x85R",
    "OrderedDict": global_("collections.OrderedDict") + b"](%sN\x86e\x85R",
    "in a tuple": b"}%s\x85Ns",
}


def in_metadata(path: Path, pickled: bytes) -> Path:
    path.mkdir()
    (path / ".metadata").write_bytes(pickled)
    (path / "__0_0.distcp").write_bytes(b"")
    return path


MAKERS: dict[str, Callable[[Path, bytes], Path]] = {
    "zip": torch_zip, "legacy": torch_legacy, "metadata": in_metadata
}  # fmt: skip


def test_read_header_refuses_keys_that_take_long_to_hash(tmp_path: Path) -> None:
    # In a process of its own, because no signal ends a hash.
    code = """
import sys
from pathlib import Path
from ckpt_tools.errors import CkptError
from ckpt_tools.formats import read_header
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_header(path)
        print(path.name, "is read")
    except CkptError as error:
        if "its pickle cannot be read" not in str(error) or len(str(error)) > 4100:
            print(path.name, str(error)[:200])
"""
    cases = [(key, "SETITEM", "zip") for key in KEYS] + [("a pair of pairs", place, "zip") for place in PLACES]
    cases += [("a deep tuple", place, "zip") for place in ("set", "ADDITEMS")]
    cases += [(key, "SETITEM", each) for key in ("a pair of pairs", "a deep tuple") for each in ("legacy", "metadata")]
    for key, place, each in dict.fromkeys(cases):
        pickled = b"\x80\4" + PLACES[place].replace(b"%s", KEYS[key]) + b"."
        MAKERS[each](tmp_path / f"{key} {place} {each}", pickled)
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_end_of_pickle_agrees_with_pickletools_and_refuses_no_honest_pickle(protocol: int) -> None:
    from pickletools import genops

    shared = tuple(range(900))
    values = [
        OrderedDict((f"layer.{n}.weight", torch.ones(n % 3)) for n in range(300)),
        {(n, "a", (n, (2.0, None))): {shared, frozenset((n, "x"))} for n in range(300)} | {shared: [shared] * 1000},
        [1 << n for n in range(0, 4000, 50)], {-1.5: 1j, b"x" * 1000: bytearray(b"abc")}, "x" * 70_000, "\ud800",
        np.random.default_rng(0).bit_generator.state, np.arange(10), {str(n): () for n in range(70_000)},
        torch.Size([2, 3]), torch.float16,
    ]  # fmt: skip
    for value in (*values, values):
        pickled = pickle.dumps(value, protocol)
        *_, (last, _, at) = genops(pickled)
        assert last.name == "STOP"
        assert end_of_pickle(pickled + b"more") == at + 1 == len(pickled)
        for cut in (1, 2, len(pickled) // 2, len(pickled) - 1):
            assert end_of_pickle(pickled[:cut], whole=False) is None
            assert end_of_pickle(pickled[:cut]) == cut


def test_read_header_keeps_a_tuple_of_pairs_that_is_no_key(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pth", b"\x80\2}" + text("w") + TENSOR + b"s" + text("x") + pairs(60) + b"s.")
    tree = read_header(path).tree
    assert tree["x"][0] is tree["x"][1]


@pytest.mark.parametrize(
    "opcode",
    [b"r\xff\xff\xff\x7f", b"r\0\0\0\1", b"p2147483647\n", b"p" + b"9" * 5000 + b"\n"],
    ids=["LONG_BINPUT", "LONG_BINPUT 2^24", "PUT", "PUT of many digits"],
)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_read_header_refuses_a_memo_with_more_entries_than_opcodes(
    opcode: bytes, make: Callable[[Path, bytes], Path], tmp_path: Path
) -> None:
    path = make(tmp_path / "a", b"\x80\2]" + opcode + b".")
    with bounded_resident(), pytest.raises(CorruptError, match="a memo with more entries"):
        read_header(path)


# What each would take without a bound is in the comment.
COSTLY = {
    "integers of one hash": dumped({n * ((1 << 61) - 1): None for n in range(1, 3000)}),  # the square of their number
    "a long integer": dumped(1 << 10_000),  # Python does not write it out
    "sets": b"](" + b"\x8f" * 3_000_000 + b"e",  # 650 MB
    "a set again and again": b"](" + b"K\0K\1K\2K\3K\4K\5K\6K\7K\10" * 2000 + b"eq\0("  # 3.6 GB
    + (global_("builtins.set") + b"q\1") + b"h\0\x85R" + b"h\1h\0\x85R" * 20_000 + b"l",
    "a dict again and again": dumped({n: n for n in range(10_000)}).replace(b"q\x00", b"q\0", 1) + b"0("
    + (global_("collections.Counter") + b"r\1\1\0\0") + b"0" + b"j\1\1\0\0h\0\x85R" * 1000 + b"l",
    "names of classes": b"(" + b"".join(global_(f"a.b{n}") for n in range(20_000)) + b"l",
    "a name of a megabyte": b"}" + text("x." * 500_000) + TENSOR + b"s",
    "a deep dict": b"}" + (text("x") + b"}") * 40_000 + b"s" * 40_000,
    "a tensor of many axes": TENSOR.replace(b"K\4\x85K\1\x85", (b"(" + b"K\1" * 100_000 + b"t") * 2),
}  # fmt: skip


@pytest.mark.parametrize("case", COSTLY)
def test_read_header_refuses_what_takes_far_more_memory_than_the_file(case: str, tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pth", b"\x80\4" + COSTLY[case] + b".")
    with bounded_resident(110 << 20), pytest.raises(CkptError) as caught:
        read_header(path)
    assert len(str(caught.value)) < 4100
