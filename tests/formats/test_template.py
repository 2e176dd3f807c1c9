"""Headers that equal another's are parsed once, and read as if each had been parsed alone."""

from __future__ import annotations

import io
import struct
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crafting import same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_tools import open_checkpoint
from ckpt_tools.compute.payload import read_tensor
from ckpt_tools.errors import CkptError, CorruptError
from ckpt_tools.formats import read_header
from ckpt_tools.formats.torch_zip import KNOWN, TORCH_ZIP

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    KNOWN.clear()
    yield
    KNOWN.clear()


def weights(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    tied = torch.randn(3, 2)
    return {"a": tied, "b": tied, "t": torch.randn(4, 3).t(), "h": torch.randn(5).half(), "n": torch.tensor(seed)}


def check(path: Path, expected: dict[str, torch.Tensor]) -> None:
    read = open_checkpoint(path)
    assert list(read) == list(expected)
    assert all(same(read[name], tensor) for name, tensor in expected.items())


def alone(path: Path) -> Any:
    """Read a file as if no other had been read before."""
    known = dict(KNOWN)
    KNOWN.clear()
    try:
        return outcome(path)
    finally:
        KNOWN.clear()
        KNOWN.update(known)


def outcome(path: Path) -> Any:
    try:
        header = read_header(path)
    except CkptError as error:
        return type(error), str(error)
    return header.tree, header.files, header.foreign, header.metadata, header.provenance


@pytest.mark.parametrize("name", ["step_{}.pth", "step_{}.safetensors"])
def test_read_header_parses_equal_headers_once_and_keeps_them_independent(
    name: str, save: Save, tmp_path: Path
) -> None:
    paths = [tmp_path / name.format(i) for i in range(3)]
    for i, path in enumerate(paths):
        tensors = {"w": torch.full((2, 3), float(i)), "n": torch.tensor(i)}
        save_file(tensors, path) if path.suffix == ".safetensors" else save(path.name, tensors)

    first, second = read_header(paths[0]), read_header(paths[1])
    first.metadata["format"] = "changed"
    second.tree.clear()
    second.foreign["changed"] += 1
    third = read_header(paths[2])

    assert first.template is second.template is third.template is not None
    assert list(third.tree) == ["w", "n"] or list(third.tree) == ["n", "w"]
    assert {spec.storage.path for spec in third.tree.values()} == {paths[2]}
    assert "changed" not in third.metadata.values()
    assert third.foreign == Counter()
    assert [stamp.path for stamp in third.files] == [paths[2]]
    check(paths[2], {name: torch.tensor(2) if name == "n" else torch.full((2, 3), 2.0) for name in third.tree})


def test_read_header_forgets_a_template_with_its_last_header(save: Save) -> None:
    header = read_header(save("a.pth", weights(0)))
    assert list(KNOWN.values()) == [header.template]
    del header
    assert not KNOWN


@pytest.mark.parametrize(
    "names", [("step_1.pth", "step_2.pth"), ("step_9.pth", "step_10.pth"), ("a.pth", "b.pth"), ("b.pth", "a.pth")]
)
def test_read_header_reads_files_with_records_of_other_names(names: tuple[str, str], save: Save) -> None:
    keep = [read_header(save(name, weights(seed))) for seed, name in enumerate(names)]
    for seed, header in enumerate(keep):
        check(header.path, weights(seed))
        assert outcome(header.path) == alone(header.path)


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.ones(2, 6), "lr": 0.1},
        {"w": torch.ones(3, 4), "lr": 0.2},
        {"w": torch.ones(4, 3).t(), "lr": 0.1},
        {"v": torch.ones(3, 4), "lr": 0.1},
        {"w": torch.ones(3, 4).int(), "lr": 0.1},
    ],
)
def test_read_header_reads_another_pickle_without_the_template(other: dict[str, Any], save: Save) -> None:
    first = read_header(save("x.pth", {"w": torch.ones(3, 4), "lr": 0.1}))
    second = read_header(save("y.pth", other))
    assert first.template is not second.template
    assert second.tree["lr"] == other["lr"]
    check(second.path, {name: value for name, value in other.items() if name != "lr"})


def test_read_header_keeps_shared_containers_apart_for_each_file(save: Save) -> None:
    def tree(seed: int) -> Any:
        log: list[Any] = [1, "x"]
        log.append(log)
        model = torch.nn.BatchNorm1d(2).state_dict()
        return {"model": model, "log": log, "again": log, "pair": (model, 2.5), "args": {"lr": None}}

    first, second = (read_header(save(f"{seed}.pth", tree(seed))) for seed in (0, 1))
    assert first.template is second.template is not None
    log, own = first.tree["log"], second.tree["log"]
    assert own is second.tree["again"] is own[2]
    assert own is not log
    assert second.tree["pair"][0] is second.tree["model"]
    assert second.tree["model"]._metadata == first.tree["model"]._metadata
    assert second.tree["model"]._metadata is not first.tree["model"]._metadata


def test_read_header_does_not_unfold_pairs_of_pairs(save: Save) -> None:
    pairs: Any = (1, 2)
    for _ in range(60):
        pairs = (pairs, pairs)
    first, second = (read_header(save(f"{seed}.pth", {"w": torch.ones(2), "pairs": pairs})) for seed in (0, 1))
    assert first.template is second.template is not None
    assert second.tree["pairs"][0] is second.tree["pairs"][1]


def test_read_header_keeps_a_tuple_that_holds_itself(save: Save) -> None:
    items: list[Any] = []
    ring = (items,)
    items.append(ring)
    _, second = (read_header(save(f"{seed}.pth", {"w": torch.ones(2), "ring": ring})) for seed in (0, 1))
    assert second.tree["ring"][0][0] is second.tree["ring"]


@pytest.mark.parametrize("odd", [Namespace(lr=0.1), {1, 2}, torch.float16, torch.nn.Identity()])
def test_read_header_reads_other_objects_for_each_file(odd: Any, save: Save) -> None:
    first, second = (read_header(save(f"{seed}.pth", weights(seed) | {"odd": odd})) for seed in (0, 1))
    assert first.tree["odd"] is not second.tree["odd"] or isinstance(odd, torch.dtype)
    assert type(first.tree["odd"]).__name__ == type(second.tree["odd"]).__name__
    assert second.tree["a"].storage.path == second.path


def test_read_header_rejects_a_wrong_local_header_despite_a_template(save: Save) -> None:
    keep = read_header(save("x.pth", weights(0)))
    path = save("y.pth", weights(1))
    assert read_header(path).template is keep.template
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"y/data/2", b"y/data/7", 1))  # the local header stands before the directory
    with pytest.raises(CorruptError, match=r"y\.pth: its directory points at no entry for y/data/2"):
        read_header(path)


def test_read_header_rejects_a_wrong_checksum_despite_a_template(save: Save) -> None:
    keep = read_header(save("x.pth", weights(0)))
    path = save("y.pth", weights(1))
    assert read_header(path).template is keep.template
    raw = bytearray(path.read_bytes())
    line = raw.rindex(b"y/data.pkl") - 46
    assert raw[line : line + 4] == b"PK\1\2"
    raw[line + 16] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptError, match=r"y\.pth: the checksum of its data\.pkl does not match"):
        read_header(path)


@settings(max_examples=100)
@given(data=st.data())
def test_read_header_treats_a_damaged_twin_as_it_does_alone(save: Save, data: st.DataObject) -> None:
    KNOWN.clear()
    keep = read_header(save("x.pth", weights(0)))
    path = save("y.pth", weights(1))
    assert read_header(path).template is keep.template
    raw = bytearray(path.read_bytes())
    marks = [i for i in range(len(raw)) if raw.startswith((b"PK", b"y/"), i)]
    for _ in range(data.draw(st.integers(1, 3))):
        near = data.draw(st.sampled_from(marks)) + data.draw(st.integers(0, 60))
        raw[min(near, len(raw) - 1)] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)

    assert keep.template in KNOWN.values()
    assert outcome(path) == alone(path)


def test_read_header_reads_twins_with_records_far_apart(save: Save) -> None:
    tensors = [{f"w{i}": torch.randn(20_000) for i in range(4)} for _ in range(2)]
    first, second = (read_header(save(f"{i}.pth", tensors[i])) for i in range(2))
    assert first.template is second.template is not None
    check(second.path, tensors[1])


def test_read_header_takes_no_bytes_of_an_offset_for_the_root(tmp_path: Path) -> None:
    """With roots `x/` and `A/`, storages at 0x2f78 and 0x2f41: numbers that read as these names, little endian."""
    saved = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, saved)
    with zipfile.ZipFile(saved) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))

    def write(root: str, storages: list[tuple[int, float]], listed: int) -> Path:
        body, lines = bytearray(0x3100), []
        at = 0
        records = [("data.pkl", pickled, None), ("version", b"3\n", None)]
        records += [("data/0", struct.pack("<4f", *[value] * 4), offset) for offset, value in storages]
        for name, data, offset in records:
            at = at if offset is None else offset
            path = (root + name).encode()
            sizes = (0, len(data), len(data), len(path))
            head = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, *sizes, 0) + path + data
            body[at : at + len(head)] = head
            if offset is None or offset == listed:
                lines.append(
                    struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, *sizes, 0, 0, 0, 0, 0, at) + path
                )
            at += len(head)
        directory = b"".join(lines)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(directory), len(body), 0)
        found = tmp_path / f"{root[:-1]}.pt"
        found.write_bytes(bytes(body) + directory + end)
        return found

    honest = write("x/", [(0x2F78, 1.0)], 0x2F78)
    hostile = write("A/", [(0x2F78, 666.0), (0x2F41, 2.0)], 0x2F41)
    first = TORCH_ZIP.read(honest)
    assert torch.equal(read_tensor(TORCH_ZIP.read(hostile).tree["w"]), torch.load(hostile, weights_only=True)["w"])
    assert torch.equal(read_tensor(first.tree["w"]), torch.ones(4))
