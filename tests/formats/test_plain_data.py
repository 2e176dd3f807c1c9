"""Plain data of configurations: objects of omegaconf and arrays of NumPy become dicts, lists and numbers."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crafting import torch_zip
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

import ckpt_tools
from ckpt_tools.errors import WriteError

Save = Callable[..., Path]


def strip(path: Path, out: Path) -> Any:
    return ckpt_tools.strip(path, out=out)


def average(path: Path, out: Path) -> Any:
    return ckpt_tools.average([path, path], out=out)


def convert(path: Path, out: Path) -> Any:
    return ckpt_tools.convert(path, to="timm", out=out)


JOBS = pytest.mark.parametrize("job", [strip, average, convert], ids=lambda job: job.__name__)
OPTIMIZER = {"state": {}, "param_groups": []}


def written(job: Callable[[Path, Path], Any], path: Path) -> tuple[Any, Any]:
    """Return the report of a job and what torch reads from its output without other code."""
    out = path.with_name("out.ckpt")
    out.unlink(missing_ok=True)
    report = job(path, out)
    return report, torch.load(out, weights_only=True)


@JOBS
@pytest.mark.parametrize("protocol", [2, 5])
@given(
    array=st_numpy.arrays(
        st.sampled_from(
            ["<f8", ">f8", "<f4", "<f2", "<i8", ">i4", "<i2", "i1", "<u8", "<u4", ">u2", "u1", "?", "<c8", ">c16"]
        ),
        st_numpy.array_shapes(min_dims=0, max_dims=4, max_side=4),
    ),
    fortran=st.booleans(),
)
def test_jobs_write_small_arrays_as_lists(
    job: Callable[[Path, Path], Any], protocol: int, save: Save, array: Any, fortran: bool
) -> None:
    array = np.asfortranarray(array) if fortran else array
    tree = {"state_dict": {"w": torch.ones(2)}, "run": {"shift": array, "cutoff": 5.0}, "optimizer": OPTIMIZER}
    report, found = written(job, save("in.ckpt", tree, pickle_protocol=protocol))
    assert found["run"].keys() == {"shift", "cutoff"}
    again = np.asarray(found["run"]["shift"], dtype=array.dtype)
    assert again.shape == array.shape
    np.testing.assert_array_equal(again, array)
    assert not any("shift" in place for place in report.dropped)
    # An array does not become a set of weights.
    assert list(ckpt_tools.open_checkpoint(Path(report.out))) == ["w"]


@JOBS
@pytest.mark.parametrize(
    "value",
    [
        np.array(["a", "b"]),
        np.array([{}, None]),
        np.zeros(1 << 18),
        np.array(["2020-01-01"], "M8[D]"),
        np.longdouble(1),
    ],
    ids=["text", "objects", "large", "dates", "long double"],
)
def test_jobs_report_arrays_that_they_leave_out(job: Callable[[Path, Path], Any], value: Any, save: Save) -> None:
    tree = {"state_dict": {"w": torch.ones(2)}, "run": {"odd": value, "lr": 1}, "optimizer": OPTIMIZER, "note": value}
    report, found = written(job, save("in.ckpt", tree))
    assert found["run"] == {"lr": 1}
    assert {"run.odd", "note"} <= set(report.dropped)
    assert "note" not in getattr(report, "beside", ())


@pytest.mark.parametrize(
    "state",
    [
        b"(K\1(K\2tdK\0X\2\0\0\0abt",  # two bytes for two numbers of 8 bytes
        b"(K\1(J\xff\xff\xff\xfftdK\0X\0\0\0\0t",
        b"(K\1(\x8a\x09\0\0\0\0\0\0\0\0\1K\0td\x89X\0\0\0\0t",
        b"(K\1(NtdK\0X\0\0\0\0t",
        b"N",
    ],
)
def test_average_takes_a_damaged_array_for_an_unknown_object(state: bytes, tmp_path: Path) -> None:
    dtype = b"cnumpy\ndtype\n(X\2\0\0\0f8\x89\x88tR"
    array = (
        b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R"
        + state.replace(b"td", b"t" + dtype)
        + b"b"
    )
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ"
    tensor += b"K\0K\4\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR"
    path = torch_zip(
        tmp_path / "in.pth", b"\x80\3}(X\5\0\0\0model}X\1\0\0\0w" + tensor + b"sX\1\0\0\0a}X\1\0\0\0b" + array + b"su."
    )
    report, found = written(average, path)
    assert report.dropped == ("a.b",)
    assert found["a"] == {}


class _Node:
    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


@pytest.fixture
def omegaconf(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lay configurations out as omegaconf/base.py, dictconfig.py, listconfig.py and nodes.py pickle them."""
    made: dict[str, type] = {}
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    for module, names in {
        "omegaconf.dictconfig": ["DictConfig"],
        "omegaconf.listconfig": ["ListConfig"],
        "omegaconf.nodes": ["AnyNode", "IntegerNode", "PathNode", "UnionNode"],
        "omegaconf.base": ["ContainerMetadata"],
    }.items():
        monkeypatch.setitem(sys.modules, module, library := types.ModuleType(module))
        for name in names:
            made[name] = type(name, (_Node,), {"__module__": module})
            setattr(library, name, made[name])

    def lay_out(value: Any, parent: Any = None, leaf: str = "AnyNode") -> Any:
        if isinstance(value, _Node):
            value._parent = parent
            return value
        kind = {dict: "DictConfig", list: "ListConfig"}.get(type(value), leaf)
        node = made[kind](_metadata=made["ContainerMetadata"](ref_type=Any, object_type=dict), _parent=parent)
        if isinstance(value, dict):
            node._content = {key: lay_out(inner, node) for key, inner in value.items()}
        elif isinstance(value, list):
            node._content = [lay_out(inner, node) for inner in value]
        else:
            node._val = value
        return node

    return types.SimpleNamespace(create=lay_out, **made)


CONFIG: dict[str, Any] = {
    "net": {"layers": [20, {"width": 40}], "act": "relu"}, "lr": 1e-3, "same": "${net.layers}", "missing": "???",
    "none": None, "on": True, 7: "seven", "empty": {}, "nothing": [],
}  # fmt: skip


@JOBS
def test_jobs_write_configurations_of_omegaconf_as_dicts_and_lists(
    job: Callable[[Path, Path], Any], omegaconf: Any, save: Save
) -> None:
    tree = {
        "state_dict": {"w": torch.ones(2)},
        "hyper_parameters": omegaconf.create(CONFIG),
        "list": [omegaconf.create([1, [2]])],
        "part": omegaconf.create(CONFIG)._content["net"],  # whose pickle has the whole in it, as its parent
        "optimizer": OPTIMIZER,
    }
    report, found = written(job, save("in.ckpt", tree))
    assert found["hyper_parameters"] == CONFIG
    assert found["list"] == [[1, [2]]]
    assert found["part"] == CONFIG["net"]
    assert set(report.dropped) <= {"optimizer"}


def test_strip_reads_every_node_of_omegaconf_and_reports_objects_in_it(omegaconf: Any, save: Save) -> None:
    union = omegaconf.UnionNode(_metadata=None, _parent=None, _content=omegaconf.create(3, leaf="IntegerNode"))
    inner = {"path": omegaconf.create(np.dtype("f4"), leaf="PathNode"), "either": union, "lr": 1}
    nothing, text = omegaconf.DictConfig(_content=None), omegaconf.DictConfig(_content="${other}")
    tree = {"model": {"w": torch.ones(2)}, "cfg": omegaconf.create(inner), "none": nothing, "text": text}
    report, found = written(strip, save("in.ckpt", tree | {"optimizer": OPTIMIZER}))
    assert found == {"model": found["model"], "cfg": {"either": 3, "lr": 1}, "none": None, "text": "${other}"}
    assert report.dropped == ("cfg.path",)
    assert report.beside == ("cfg", "none", "text")


def test_average_rejects_a_configuration_that_is_its_own_value(omegaconf: Any, save: Save) -> None:
    loop = omegaconf.AnyNode(_metadata=None, _parent=None)
    loop._val = loop
    path = save("in.ckpt", {"model": {"w": torch.ones(2)}, "cfg": loop})
    with pytest.raises(WriteError, match="nested too deeply"):
        ckpt_tools.average(path, out=path.with_name("out.ckpt"))
