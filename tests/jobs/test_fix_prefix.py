"""Names without wrapper prefixes: torch, safetensors and unzip read the result, and only names have changed."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ckpt_tools
from ckpt_tools import fix_prefix, open_checkpoint
from ckpt_tools.errors import AlignmentError, CkptError, UsageError

Save = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore:.*pickle protocol:UserWarning")


def free(path: Path) -> Any:
    """Read all that a file holds; the tests made it themselves."""
    return torch.load(path, weights_only=False)


def equal(a: Any, b: Any) -> bool:
    """Compare two trees, tensors bit by bit; Python's == alone would ask a tensor for a truth value."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        same_kind = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        return same_kind and a.numpy().tobytes() == b.numpy().tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True) if len(a) == len(b) else [((0, 0), (1, 1))]
        return equal(getattr(a, "_metadata", None), getattr(b, "_metadata", None)) and all(
            equal(k, j) and equal(v, w) for (k, v), (j, w) in pairs
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, argparse.Namespace):
        return equal(vars(a), vars(b))
    return bool(a == b)


def check_zip(path: Path) -> None:
    done = subprocess.run(["unzip", "-tq", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def payload_of(path: Path) -> dict[str, bytes]:
    """All records but the pickle."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("data.pkl")}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Everything in a folder, hidden files too."""
    return {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), head=nn.Linear(4, 2)))


# What goes


def test_fix_prefix_lets_a_training_checkpoint_load_into_the_bare_model(save: Save) -> None:
    """As timm and torchvision save: DDP's names, the EMA's without, an optimizer, the arguments."""
    model, ema = nn.DataParallel(net()), net()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.stack([parameter.sum() for parameter in model.parameters()]).sum().backward()
    optimizer.step()
    whole = {
        "state_dict": model.state_dict(), "state_dict_ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(resume="module.", lr=0.1), "epoch": 3, "arch": "module.conv.weight",
    }  # fmt: skip
    path = save("c.pth", whole)
    before = payload_of(path)
    report = fix_prefix(path)
    assert report.written
    assert report.changed
    assert [(s.place, s.removed) for s in report.states] == [
        ("state_dict", {"module.": len(whole["state_dict"])}),
        ("state_dict_ema", {}),
    ]
    found = free(path)
    assert net().load_state_dict(found["state_dict"])
    assert list(found["state_dict"]._metadata) == list(net().state_dict()._metadata)
    expected = whole | {"state_dict": model.module.state_dict()}
    assert equal(found, expected)
    assert payload_of(path) == before
    check_zip(path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["_orig_mod.module.a.w", "_orig_mod.module.b.w"], ["a.w", "b.w"]),
        (["module._orig_mod.module.a.w"], ["a.w"]),
        (["layers.0._checkpoint_wrapped_module.w", "head.w"], ["layers.0.w", "head.w"]),
        (["_fsdp_wrapped_module.a._fsdp_wrapped_module.w"], ["a.w"]),
        (["module.a.w", "b.w"], ["module.a.w", "b.w"]),  # a module of that name
        (["a.module.w"], ["a.module.w"]),
    ],
)
def test_fix_prefix_removes_the_wrappers_that_average_removes(
    names: list[str], expected: list[str], save: Save
) -> None:
    path = save("c.pth", {name: torch.full((2,), float(i)) for i, name in enumerate(names)})
    fix_prefix(path)
    assert equal(free(path), {name: torch.full((2,), float(i)) for i, name in enumerate(expected)})


def test_fix_prefix_renames_module_versions(save: Save) -> None:
    """What stands for the wrapper itself gives way to what stands for the model, as torch's own function has it."""
    state = nn.DataParallel(nn.DataParallel(net())).state_dict()
    path = save("c.pth", state)
    fix_prefix(path)
    for _ in range(2):
        nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
    found = torch.load(path, weights_only=True)
    assert equal(dict(found), dict(state))
    assert found._metadata == state._metadata == net().state_dict()._metadata


def test_fix_prefix_renames_entries_of_modules_that_are_not_tensors(save: Save) -> None:
    path = save("c.pth", {"module.w": torch.ones(2), "module.fc.scale": 1.0, "module.fc._extra_state": {"module.x": 1}})
    fix_prefix(path)
    assert equal(free(path), {"w": torch.ones(2), "fc.scale": 1.0, "fc._extra_state": {"module.x": 1}})


def test_fix_prefix_finds_state_dicts_anywhere_but_in_an_optimizer(save: Save) -> None:
    weights = {"module.w": torch.ones(2)}
    adam = {"state": {"module.w": {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": ["module.w"]}]}
    swa = {"callbacks": {"SWA": {"average_model_state": weights}}}
    path = save("c.pth", {"nets": [{"g": weights}, (dict(weights),)], "optimizer": adam, "optims": [adam], **swa})
    report = fix_prefix(path)
    assert [state.place for state in report.states] == ["nets.0.g", "nets.1.0"]  # the third is the first once more
    bare = {"w": torch.ones(2)}
    assert equal(
        free(path),
        {
            "nets": [{"g": bare}, (bare,)],
            "optimizer": adam,
            "optims": [adam],
            "callbacks": {"SWA": {"average_model_state": bare}},
        },
    )


# What stays


@pytest.mark.parametrize("counter", ["n_averaged", "steps"])
def test_fix_prefix_keeps_the_module_of_an_averaged_model(counter: str, save: Save) -> None:
    averaged = AveragedModel(nn.DataParallel(net()))
    state = OrderedDict((counter if k == "n_averaged" else k, v) for k, v in averaged.state_dict().items())
    path = save("c.pth", {"model_ema": state})
    report = fix_prefix(path)
    found = torch.load(path, weights_only=True)["model_ema"]
    assert list(found) == [counter, *(f"module.{name}" for name in net().state_dict())]
    assert "`convert(to='plain')`" in report.notes[0]
    if counter == "n_averaged":
        AveragedModel(net()).load_state_dict(found)
    again = fix_prefix(path)
    assert (again.changed, again.written) == (False, False)


def test_fix_prefix_removes_prefixes_before_the_module_of_an_averaged_model(save: Save) -> None:
    averaged = AveragedModel(net()).state_dict()
    path = save("c.pth", {f"_orig_mod.{name}": tensor for name, tensor in averaged.items()})
    fix_prefix(path)
    assert list(torch.load(path)) == list(averaged)


def test_fix_prefix_treats_a_counter_of_another_shape_as_a_tensor(save: Save) -> None:
    path = save("c.pth", {"module.steps": torch.ones(2), "module.w": torch.ones(2)})
    fix_prefix(path)
    assert list(torch.load(path)) == ["steps", "w"]


def test_fix_prefix_writes_nothing_if_no_name_changes(tmp_path: Path, save: Save) -> None:
    path = save("c.pth", {"w": torch.ones(2)})
    before = contents(tmp_path)
    report = fix_prefix(path)
    assert (report.changed, report.written) == (False, False)
    assert contents(tmp_path) == before


def test_fix_prefix_copies_to_out_if_no_name_changes(tmp_path: Path, save: Save) -> None:
    path = save("c.pth", {"w": torch.ones(2)})
    report = fix_prefix(path, out=tmp_path / "d.pth")
    assert (report.changed, report.written) == (False, True)
    assert (tmp_path / "d.pth").read_bytes() == path.read_bytes()


class Unknown:
    """A class that a reader of the checkpoint does not have."""

    def __init__(self) -> None:
        self.names = ["module.w", "module.w"]


def test_fix_prefix_keeps_unknown_objects(save: Save) -> None:
    path = save("c.pth", {"state_dict": {"module.w": torch.ones(2)}, "cfg": Unknown(), "module.w": Counter(a=2)})
    fix_prefix(path)
    found = free(path)
    assert list(found) == ["state_dict", "cfg", "module.w"]
    assert found["cfg"].names == ["module.w", "module.w"]
    assert list(found["state_dict"]) == ["w"]


def test_fix_prefix_keeps_provenance(tmp_path: Path, save: Save) -> None:
    path = save("c.pth", {"state_dict": {"w": torch.ones(2)}})
    ckpt_tools.average([path], out=tmp_path / "averaged.pth")
    made = open_checkpoint(tmp_path / "averaged.pth").provenance
    fix_prefix(tmp_path / "averaged.pth", add=["_orig_mod.", "module."])
    assert made is not None
    assert open_checkpoint(tmp_path / "averaged.pth").provenance == made
    assert list(torch.load(tmp_path / "averaged.pth")["state_dict"]) == ["module._orig_mod.w"]
    check_zip(tmp_path / "averaged.pth")


def test_fix_prefix_keeps_views_of_one_storage(save: Save) -> None:
    whole = torch.arange(12.0)
    path = save("c.pth", {"module.a": whole[2:6], "module.b": whole.view(3, 4).t(), "module.c": whole})
    size = path.stat().st_size
    fix_prefix(path)
    found = torch.load(path, weights_only=True)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1
    assert equal(found, {"a": whole[2:6], "b": whole.view(3, 4).t(), "c": whole})
    assert path.stat().st_size == size


# Random trees

NAMES = st.lists(
    st.lists(st.sampled_from(["conv", "0", "module", "w", "é"]), min_size=1, max_size=3).map(".".join),
    min_size=1, max_size=5, unique=True,
).filter(lambda names: not all(name.startswith("module.") for name in names))  # fmt: skip
LEADS = st.lists(st.sampled_from(["module.", "_orig_mod.", "_fsdp_wrapped_module."]), max_size=3).map("".join)


@st.composite
def trees(draw: st.DrawFn) -> tuple[Any, Any]:
    """A tree with wrapped names and the same one without; equal texts in it are mostly one object."""
    texts: dict[str, str] = {}

    def shared(text: str) -> str:
        return texts.setdefault(text, text) if draw(st.booleans()) else "".join(list(text))

    tensor = torch.from_numpy(np.frombuffer(draw(st.binary(min_size=16, max_size=16)), dtype=np.int32).copy())
    spare: list[Any] = []

    def state() -> tuple[Any, Any]:
        lead, names = draw(LEADS), draw(NAMES)
        wrapped, bare = OrderedDict(), OrderedDict()
        for i, name in enumerate(names):
            value = tensor[i % 4 :] if draw(st.booleans()) else torch.full((2,), float(i))
            wrapped[shared(lead + name)], bare[name] = value, value
            spare.append(shared(lead + name))
        if draw(st.booleans()):
            parts = lead.split(".")[:-1]
            shells = OrderedDict({".".join(parts[:i]): {"version": 0} for i in range(len(parts))})
            bare._metadata = OrderedDict({"": {"version": 1}, **{n: {"version": 1} for n in names}})
            wrapped._metadata = shells | {shared((lead + n).removesuffix(".")): v for n, v in bare._metadata.items()}
        return wrapped, bare

    pairs = [state() for _ in range(draw(st.integers(1, 3)))]
    shape = draw(st.sampled_from(["plain", "dict", "list"]))
    if shape == "plain":
        return pairs[0]
    wrapped, bare = ([pair[i] for pair in pairs] for i in (0, 1))
    others = {"names": spare, "args": argparse.Namespace(first=spare[0], rest=tuple(spare)), "n": 3}
    others |= {shared(name): i for i, name in enumerate(spare)}
    if shape == "list":
        return [wrapped, others], [bare, others]
    return ({f"s{i}": s for i, s in enumerate(wrapped)} | others, {f"s{i}": s for i, s in enumerate(bare)} | others)


def with_prefix(tree: Any, prefix: str) -> Any:
    """Put a prefix before the names in every state dict of such a tree."""
    if isinstance(tree, OrderedDict) and any(isinstance(value, torch.Tensor) for value in tree.values()):
        new = OrderedDict((prefix + name, value) for name, value in tree.items())
        if hasattr(tree, "_metadata"):
            metadata = tree._metadata.items()
            new._metadata = OrderedDict((f"{prefix}{name}" if name else prefix[:-1], value) for name, value in metadata)
        return new
    if isinstance(tree, dict):
        return {key: with_prefix(value, prefix) for key, value in tree.items()}
    return [with_prefix(value, prefix) for value in tree] if isinstance(tree, list) else tree


@settings(max_examples=60)
@given(trees(), st.sampled_from([2, 3, 4, 5, None]))
def test_fix_prefix_renames_random_trees_as_python_does(pair: tuple[Any, Any], protocol: int | None) -> None:
    """A file of each protocol, and one of the format before zip."""
    tree, expected = pair
    as_zip = protocol is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.pth"
        torch.save(tree, path, pickle_protocol=protocol or 2, _use_new_zipfile_serialization=as_zip)
        payload = payload_of(path) if as_zip else None
        for step in (lambda: fix_prefix(path), lambda: fix_prefix(path, add=["a.", "longer_by_far."])):
            step()
            assert equal(free(path), expected)
            if as_zip:
                assert payload_of(path) == payload
                check_zip(path)
            expected = with_prefix(expected, "longer_by_far.a.")
        fix_prefix(path, strip=["longer_by_far.", "a."])
        assert equal(free(path), pair[1])


# Prefixes by hand


def test_fix_prefix_strips_and_adds_only_the_given_prefixes(save: Save) -> None:
    path = save(
        "c.pth", {"module.model.a.w": torch.ones(1), "module.model.b.w": torch.ones(2), "head.w": torch.ones(3)}
    )
    report = fix_prefix(path, strip=["module.", "model."], add=["net.", "module."])
    assert report.states[0].removed == {"module.": 2, "model.": 2}
    assert report.states[0].added == {"net.": 3, "module.": 3}
    assert list(torch.load(path)) == ["module.net.a.w", "module.net.b.w", "module.net.head.w"]


def versions(model: nn.Module) -> dict[str, Any]:
    return dict(model.state_dict()._metadata)


def test_fix_prefix_renames_module_versions_by_given_prefixes(save: Save) -> None:
    path = save("c.pth", net().state_dict())
    fix_prefix(path, add=["model."])
    assert list(torch.load(path)._metadata) == ["model", "model.conv", "model.bn", "model.head"]
    fix_prefix(path, strip=["model."])
    assert torch.load(path)._metadata == net().state_dict()._metadata
    wrapped = save("d.pth", nn.DataParallel(net()).state_dict())
    for options in ({}, {"add": ["net."]}):  # a name that two have become goes on as one
        fix_prefix(wrapped, **options)
    assert torch.load(wrapped)._metadata == OrderedDict((f"net.{k}".rstrip("."), v) for k, v in versions(net()).items())
    fix_prefix(path, add=["ema_"])  # joins the first part of each name
    assert list(torch.load(path)._metadata) == ["", "ema_conv", "ema_bn", "ema_head"]


def test_fix_prefix_adds_no_prefix_to_a_tensor_beside_the_weights(save: Save) -> None:
    path = save("c.pth", {"best_acc": torch.tensor(0.9), "net": {"w": torch.ones(1)}})
    fix_prefix(path, add=["model."])
    assert equal(free(path), {"best_acc": torch.tensor(0.9), "net": {"model.w": torch.ones(1)}})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strip": ["net."]}, AlignmentError, r"starts with 'net\.'\. The first one is 'module\.a\.w'"),
        ({"strip": ["module"]}, UsageError, r"would be '\.a\.w', which is no name\. Prefixes end in a dot"),
        ({"strip": ["module.a.", "module.b."]}, AlignmentError, r"'module\.a\.w' and 'module\.b\.w' would both be 'w'"),
        ({"strip": [""]}, UsageError, "`strip` takes prefixes such as 'model.'"),
        ({"add": "model."}, UsageError, r"`add` takes a list of prefixes, such as \['model\.'\], not 'model\.'"),
    ],
)  # fmt: skip
def test_fix_prefix_rejects_prefixes_that_do_not_fit(
    options: dict[str, Any], error: type[CkptError], message: str, tmp_path: Path, save: Save
) -> None:
    path = save("c.pth", {"module.a.w": torch.ones(1), "module.b.w": torch.ones(1)})
    before = contents(tmp_path)
    with pytest.raises(error, match=message):
        fix_prefix(path, **options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("other", ["w", 1])
def test_fix_prefix_rejects_two_names_that_become_one(other: Any, tmp_path: Path, save: Save) -> None:
    path = save("c.pth", {"net": {"a._orig_mod.w": torch.ones(1), "a.w": torch.ones(1), other: torch.ones(1)}})
    before = contents(tmp_path)
    with pytest.raises(AlignmentError, match=r"c\.pth: in net: 'a\._orig_mod\.w' and 'a\.w' would both be 'a\.w'"):
        fix_prefix(path)
    assert contents(tmp_path) == before


def test_fix_prefix_requires_a_path(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """./averaged.pth, which it would rewrite, is the default of the command alone."""
    save("averaged.pth", {"module.w": torch.ones(1)})
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(TypeError, match=r"fix_prefix\(\) missing a required argument: 'path'"):
        fix_prefix()
    assert contents(tmp_path) == before


# Bytes


def test_fix_prefix_renames_a_memoized_string_at_each_use(save: Save) -> None:
    """One object: a key that changes in one dict, stays in another, and is a value."""
    name = "module.w"
    tree = [
        {name: torch.ones(1)},
        {name: torch.ones(2), "b": torch.ones(3)},
        {name: 1},
        name,
        [name, {"module.w2": name}],
    ]
    path = save("c.pth", tree)
    fix_prefix(path)
    expected = [{"w": torch.ones(1)}, *tree[1:]]
    assert equal(free(path), expected)
    assert equal(torch.load(path, weights_only=True), expected)


def test_fix_prefix_output_loads_with_weights_only(save: Save) -> None:
    """The restricted loader of torch knows protocol 2 alone."""
    bare = net().state_dict()
    path = save("c.pth", {f"module.{name}": tensor for name, tensor in bare.items()}, pickle_protocol=2)
    fix_prefix(path)
    assert equal(torch.load(path, weights_only=True, mmap=True), dict(bare))


@pytest.mark.parametrize(("names", "times"), [(1, 4), (40, 4), (3000, 1)])
def test_fix_prefix_keeps_storages_aligned(names: int, times: int, save: Save) -> None:
    path = save("c.pth", {f"module.{i}.w": torch.full((3,), float(i)) for i in range(names)})
    before = offsets(path)
    for options in (
        {},
        {"add": ["a_very_long_name_of_a_wrapper.module."]},
        {"strip": ["a_very_long_name_of_a_wrapper."]},
    ) * times:
        fix_prefix(path, **options)
        after = offsets(path)
        moved = {after[name] - before[name] for name in after if name != "data.pkl"}
        assert len(moved) == 1
        assert moved.pop() % 4096 == 0
        check_zip(path)
    assert equal(torch.load(path), {f"module.{i}.w": torch.full((3,), float(i)) for i in range(names)})


def offsets(path: Path) -> dict[str, int]:
    """Where the bytes of each record start, as torch finds them."""
    reader = torch._C.PyTorchFileReader(str(path))
    return {name: reader.get_record_offset(name) for name in reader.get_all_records()}
