"""Pickles that are small, and would take minutes or gigabytes to read: refused at once, and honest ones are not."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crafting import TENSOR, bounded_resident, safetensors_file, torch_legacy, torch_zip
from safetensors.torch import save_file

from ckpt_tools import average, fix_prefix, open_checkpoint, strip
from ckpt_tools.errors import CkptError, CorruptError
from ckpt_tools.formats import read_header
from ckpt_tools.formats.pickle_check import check
from ckpt_tools.jobs.inspect import describe
from ckpt_tools.tensors import TensorSpec


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


@pytest.mark.parametrize("protocol", [2, 4])
def test_check_agrees_with_pickletools_and_refuses_no_honest_pickle(protocol: int) -> None:
    from pickletools import genops

    shared = tuple(range(900))
    values = [
        OrderedDict((f"layer.{n}.weight", torch.ones(n % 3)) for n in range(100)),
        {(n, "a", (n, (2.0, None))): {shared, frozenset((n, "x"))} for n in range(300)} | {shared: [shared] * 1000},
        [1 << n for n in range(0, 4000, 50)], {-1.5: 1j, b"x" * 1000: bytearray(b"abc")}, "x" * 70_000, "\ud800",
        np.random.default_rng(0).bit_generator.state, np.arange(10), {str(n): () for n in range(5000)},
        torch.Size([2, 3]), torch.float16,
    ]  # fmt: skip
    for value in (*values, values):
        pickled = pickle.dumps(value, protocol)
        *_, (last, _, at) = genops(pickled)
        assert last.name == "STOP"
        assert check(pickled + b"more") == (at + 1, False) == (len(pickled), False)
        for cut in (1, 2, len(pickled) // 2, len(pickled) - 1):
            assert check(pickled[:cut], whole=False) is None
            assert check(pickled[:cut]) == (cut, False)


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


def test_many_tuples_are_keys_unless_their_hashes_are_equal(tmp_path: Path) -> None:
    honest = {(f"a{n}", n): n for n in range(4000)} | {frozenset((n, -n)): n for n in range(1, 100)}
    tree = read_header(torch_zip(tmp_path / "a.pth", b"\x80\4" + pickle.dumps(honest, 4)[2:])).tree
    assert (tree, list(tree)) == (honest, list(honest))

    flood = list(product((-1, -2), repeat=12))
    assert len({hash(each) for each in flood}) == 1
    for value in (dict.fromkeys(flood), set(flood), [set(flood[:200])]):
        for protocol in (2, 4):
            path = torch_zip(tmp_path / "a.pth", pickle.dumps(value, protocol))
            if isinstance(value, list) and protocol == 4:
                assert read_header(path).tree == value  # too few to take long
            else:
                with pytest.raises(CorruptError, match="too many values with one hash"):
                    read_header(path)


@pytest.mark.parametrize("make", [torch_zip, torch_legacy], ids=["zip", "legacy"])
def test_a_pickle_imports_no_encoding_that_it_names(make: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    # In a process of its own, in which no encoding has been imported.
    for encoding in ("bz2_codec", "idna", "cp1252", "latin-1", "zlib", "punycode", "x" * 100_000, "rot13", "UTF-8"):
        call = global_("_codecs.encode") + text("x") + text(encoding) + b"\x86R"
        make(tmp_path / f"{encoding[:10]}.pth", b"\x80\2" + call + b".")
    make(tmp_path / "0.pth", b"\x80\2" + b"}" + b".")
    code = """
import sys
from pathlib import Path
from ckpt_tools.errors import CkptError
from ckpt_tools.formats import read_header
honest, *others = sorted(Path(sys.argv[1]).iterdir())
read_header(honest)
before = set(sys.modules)
for path in others:
    try:
        assert read_header(path).tree == b"x"
        print(path.stem, end=" ")
    except CkptError as error:
        assert "by an encoding that is not latin-1" in str(error)
print(*set(sys.modules) - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["UTF-8", "latin-1"], "")


def expanded(size: int) -> bytes:
    sizes = b"\x8a\x06" + size.to_bytes(6, "little")
    return TENSOR.replace(b"K\4\x85K\1\x85", sizes + b"\x85K\0\x85")


def test_a_tensor_expanded_far_beyond_its_storage_is_not_written_out(tmp_path: Path) -> None:
    for size in (1 << 31, 1 << 40):
        path = torch_zip(tmp_path / f"{size}.pth", b"\x80\2}" + text("w") + expanded(size) + b"s.")
        with pytest.raises(CkptError, match=r"expanded from 16 bytes to \d+"):
            open_checkpoint(path)["w"]
        with pytest.raises(CkptError, match=r"expanded from 16 bytes to \d+"):
            average([path], out=tmp_path / "out.pth")
        assert not (tmp_path / "out.pth").exists()
    many = b"".join(text(f"w{n}") + expanded(1 << 24) + b"s" for n in range(30))
    tree = read_header(torch_zip(tmp_path / "many.pth", b"\x80\2}" + many + b".")).tree
    assert [type(each).__name__ for each in tree.values()] == ["TensorSpec"] * 16 + ["UnsupportedTensor"] * 14


def test_many_views_of_one_storage_are_bounded_together_and_slices_of_it_are_not(tmp_path: Path) -> None:
    base = torch.zeros(1 << 14)
    torch.save([base.expand(1024 - n, 1 << 14) for n in range(20)], tmp_path / "a.pth")  # 64 MiB each, or little less
    assert (tmp_path / "a.pth").stat().st_size < 100_000
    kinds = [type(each).__name__ for each in read_header(tmp_path / "a.pth").tree]
    assert kinds == ["TensorSpec"] * 17 + ["UnsupportedTensor"] * 3
    torch.save(list(base.split(1)), tmp_path / "b.pth")
    assert {type(each) for each in read_header(tmp_path / "b.pth").tree} == {TensorSpec}


def test_an_expanded_mask_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    mask = torch.arange(2.0).view(1, 2, 1).expand(3, 2, 2048)
    torch.save({"w": mask}, tmp_path / "a.pth")
    assert torch.equal(open_checkpoint(tmp_path / "a.pth")["w"], mask)


def test_read_header_refuses_sizes_of_more_digits_than_python_shows(tmp_path: Path) -> None:
    huge = b"\x8b" + struct.pack("<I", 1000) + b"\x7f" * 1000
    lying = TENSOR.replace(b"K\4\x85K\1\x85", b"(" + huge * 63 + b"K\0t(" + b"K\1" * 64 + b"t")
    with pytest.raises(CorruptError, match="a tensor claims shape"):
        read_header(torch_zip(tmp_path / "a.pth", b"\x80\2" + lying + b"."))


def test_average_leaves_out_a_key_with_a_tensor_in_it(tmp_path: Path) -> None:
    entry = b"}" + TENSOR + b"K\1\x86" + b"K\2s" + b"K\1K\2\x86" + b"K\3s"
    path = torch_zip(
        tmp_path / "a.pth",
        b"\x80\2}" + text("state_dict") + b"}" + text("w") + TENSOR + b"ss" + text("x") + entry + b"s.",
    )
    average([path], out=tmp_path / "out.pth")
    assert torch.load(tmp_path / "out.pth", weights_only=True)["x"] == {(1, 2): 3}


def test_fix_prefix_passes_over_keys_that_are_no_text(tmp_path: Path) -> None:
    state = {"module.w": torch.ones(2), float("nan"): 1, None: 2, (1, 2): 3, 1.5: 4}
    torch.save(state, tmp_path / "a.pth")
    fix_prefix(tmp_path / "a.pth", out=tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert [*map(str, found)] == ["w", "nan", "None", "(1, 2)", "1.5"]


@pytest.mark.parametrize("value", ["list", "dict"])
def test_inspect_passes_over_provenance_that_is_nested_deeply(value: str, tmp_path: Path) -> None:
    deep: Any = {}
    for _ in range(300):
        deep = [deep] if value == "list" else {"x": deep}
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive:
        archive.writestr("a/ckpt_tools.json", json.dumps({"made": deep, "args": deep}))
    metadata = {"ckpt_tools": json.dumps({"made": deep})}
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata=metadata)
    assert open_checkpoint(tmp_path / "a.pth").provenance is None
    assert open_checkpoint(tmp_path / "a.safetensors").provenance is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    names = (
        "x.safetensors.index.json",
        "model.safetensors.index.json",
        "config.json",
        "trainer_state.json",
        ".metadata",
    )
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        os.mkfifo(folder / name)
        with pytest.raises(CkptError):
            read_header(folder)
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    code = "import sys; from pathlib import Path; from ckpt_tools.formats import read_header"
    code += "; from ckpt_tools.jobs.inspect import describe; [describe(read_header(Path(p))) for p in sys.argv[1:]]"
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in names[:-1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "name",
    ["model.safetensors.index.json", "trainer_state.json", "a.safetensors.index.json", ".metadata"],
)
def test_a_file_of_a_terabyte_beside_weights_is_not_read(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    if not name.endswith("index.json"):
        save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    if name == ".metadata":
        (tmp_path / "model.safetensors").rename(tmp_path / "__0_0.distcp")
    with bounded_resident(), pytest.raises(CkptError, match=r"\d bytes are too many"):
        describe(read_header(tmp_path))


def test_read_header_takes_little_memory_for_a_safetensors_header_of_empty_lists(tmp_path: Path) -> None:
    for filler in (b"[],", b"{},"):
        header = b'{"x":[' + filler * 3_000_000 + b"0]}"
        with bounded_resident(), pytest.raises(CorruptError, match="more lists and objects than tensors need"):
            read_header(safetensors_file(tmp_path / "a.safetensors", header))


def test_messages_are_of_a_bounded_length(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pth", b"\x80\2" + TENSOR.replace(text("0"), text("k" * 60_000)) + b".")
    with pytest.raises(CorruptError, match="storage kkk") as caught:
        read_header(path)
    assert len(str(caught.value)) < 4100
    assert "The file is damaged" in str(caught.value)


def test_names_with_many_dots_and_repeated_texts_take_little_memory(tmp_path: Path) -> None:
    name = "x." * 30_000 + "w"
    torch.save(
        {"state_dict": {name: torch.ones(2)}, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "a.pth"
    )
    long = b"\x80\2}" + text("module.w") + TENSOR + b"s" + text("x") + b"](" + text("y" * 1_000_000) + b"q\x50"
    torch_zip(tmp_path / "b.pth", long + b"h\x50" * 3000 + b"es.")
    with bounded_resident(250 << 20):
        strip(tmp_path / "a.pth", out=tmp_path / "out.pth")
        fix_prefix(tmp_path / "b.pth", out=tmp_path / "fixed.pth")
    assert [*torch.load(tmp_path / "fixed.pth", weights_only=True)] == ["w", "x"]
