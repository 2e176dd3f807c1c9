"""Conversion: every layout and file format there and back, with the same weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import load, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from two_sets import PAIRS, State, bn_weights, opened, weights, wrapped

import ckpt_tools
from ckpt_tools.checkpoints.layouts import LAYOUTS
from ckpt_tools.errors import CkptError, LayoutError, NumericsError
from ckpt_tools.storage import splice

Save = Callable[..., Path]
WRITTEN = [layout.name for layout in LAYOUTS if layout.written]


@pytest.mark.parametrize("layout", PAIRS)
def test_convert_keeps_both_sets_in_a_round_trip(save: Save, tmp_path: Path, layout: str) -> None:
    raw, ema = weights(1), weights(2)
    source = save("timm.pth", {"state_dict": raw, "state_dict_ema": ema, "epoch": 3, "arch": "x"})
    there, back = tmp_path / "there.pth", tmp_path / "back.pth"
    ckpt_tools.convert(source, to=layout, out=there, updates=5)
    assert same_bits(opened(there, "raw"), raw)
    assert same_bits(opened(there, "ema"), ema)
    ckpt_tools.convert(there, to="timm", out=back)
    assert same_bits(load(back)["state_dict"], raw)
    assert same_bits(load(back)["state_dict_ema"], ema)
    subprocess.run(["unzip", "-tq", there], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("layout", ["timm", "deit", "lightning", "mmengine", "fairseq", "dit"])
def test_convert_keeps_entries_beside_the_weights(save: Save, tmp_path: Path, layout: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    tree = {"state_dict": weights(1), "state_dict_ema": weights(2), "epoch": 3, "optimizer": optimizer}
    ckpt_tools.convert(save("timm.pth", tree), to=layout, out=tmp_path / "out.pth", updates=1)
    found = load(tmp_path / "out.pth")
    assert found["epoch"] == 3
    assert found["optimizer"]["state"][0]["exp_avg"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_convert_writes_a_flat_set_in_any_file_format_and_records_the_state(
    save: Save, tmp_path: Path, suffix: str
) -> None:
    source = save("timm.pth", {"state_dict": weights(1), "state_dict_ema": weights(2), "epoch": 3})
    out = tmp_path / f"out{suffix}"
    report = ckpt_tools.convert(source, to="plain", out=out)
    assert report.placed[0].startswith("ema (state_dict_ema) → the whole f")
    assert set(report.dropped) == {"state_dict", "epoch"}
    found = load(out) if suffix == ".pth" else load_file(out if suffix else out / "model.safetensors")
    assert found.keys() == weights(2).keys()
    assert same_bits({name: found[name] for name in weights(2)}, weights(2))
    ckpt_tools.convert(source, to="plain", out=out, state="raw", force=True)
    assert same_bits(opened(out, "raw"), {name: weights(1)[name] for name in opened(out)})


def test_convert_uses_a_single_set_for_both(save: Save, tmp_path: Path) -> None:
    report = ckpt_tools.convert(save("ema.pth", weights(1)), to="timm-ema", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert same_bits(found["state_dict"], weights(1))
    assert found["state_dict"]["0.weight"].data_ptr() == found["state_dict_ema"]["0.weight"].data_ptr()
    assert "Raw and averaged weights get the same values: the checkpoint has one set." in report.notes
    ckpt_tools.convert(tmp_path / "out.pth", to="timm", state="ema", out=tmp_path / "one.pth")
    assert list(load(tmp_path / "one.pth")) == ["state_dict"]


def test_convert_to_averaged_model_lets_torch_go_on_averaging(save: Save, tmp_path: Path) -> None:
    nets = [nn.Linear(2, 2) for _ in range(4)]
    model = AveragedModel(nets[0])
    for net in nets[:3]:
        model.update_parameters(net)
    source = save("swa.pth", model.state_dict())
    ckpt_tools.convert(source, to="mmengine", out=tmp_path / "m.pth")
    assert load(tmp_path / "m.pth")["ema_state_dict"]["steps"].item() == 3
    ckpt_tools.convert(tmp_path / "m.pth", to="averaged-model", out=tmp_path / "a.pth")
    again = AveragedModel(nn.Linear(2, 2))
    again.load_state_dict(load(tmp_path / "a.pth"))
    assert same_bits(again.state_dict(), model.state_dict())
    for each in (model, again):
        each.update_parameters(nets[3])
    assert same_bits(again.state_dict(), model.state_dict())


def test_convert_takes_the_counter_from_a_uniform_average(runs: list[Path], tmp_path: Path) -> None:
    ckpt_tools.average(runs, state="raw", out=tmp_path / "avg.pth")
    ckpt_tools.convert(tmp_path / "avg.pth", to="averaged-model", out=tmp_path / "swa.pth")
    assert load(tmp_path / "swa.pth")["n_averaged"].item() == 12


def test_convert_keeps_ties_and_writes_views_whole(save: Save, tmp_path: Path) -> None:
    base = torch.arange(12.0)
    tree = OrderedDict(a=base[2:8].view(2, 3).t(), b=base, c=base)
    ckpt_tools.convert(save("in.pth", tree), to="averaged-model", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert torch.equal(found["module.a"], tree["a"])
    assert found["module.b"].data_ptr() == found["module.c"].data_ptr()


def test_convert_dtype_changes_only_floating_point_weights(save: Save, tmp_path: Path) -> None:
    tree = {"state_dict": weights(1), "optimizer": {"state": {0: torch.ones(2)}, "param_groups": []}}
    ckpt_tools.convert(save("in.pth", tree), to="timm", dtype="bf16", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert same_bits(
        found["state_dict"], {n: t.bfloat16() if t.is_floating_point() else t for n, t in weights(1).items()}
    )
    assert found["optimizer"]["state"][0].dtype is torch.float32
    with pytest.raises(NumericsError, match=r"overflows float16"):
        ckpt_tools.convert(
            save("big.pth", {"w": torch.tensor([1e6])}), to="plain", dtype="fp16", out=tmp_path / "o.pth"
        )


def test_convert_copies_nonfinite_values(save: Save, tmp_path: Path) -> None:
    mask = {"mask": torch.tensor([0.0, float("-inf"), float("nan")])}
    ckpt_tools.convert(save("in.pth", mask), to="plain", out=tmp_path / "out.safetensors")
    assert same_bits(load_file(tmp_path / "out.safetensors"), mask)


def test_convert_cuts_shards_by_size(save: Save, tmp_path: Path) -> None:
    source = save("in.pth", {f"w{i}": torch.full((1000,), float(i)) for i in range(4)})
    ckpt_tools.convert(source, to="plain", out=tmp_path / "out", max_shard_size="8kB")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert same_bits(opened(tmp_path / "out"), load(source))


def test_average_takes_a_converted_training_checkpoint_but_no_converted_average(save: Save, tmp_path: Path) -> None:
    for i in (1, 2):
        ckpt_tools.convert(
            save(f"in{i}.pth", {"w": torch.full((2,), float(i))}), to="plain", out=tmp_path / f"c-{i}.pth"
        )
    ckpt_tools.average([tmp_path / "c-1.pth", tmp_path / "c-2.pth"], out=tmp_path / "avg.pth")
    assert load(tmp_path / "avg.pth")["w"].tolist() == [1.5, 1.5]
    ckpt_tools.convert(tmp_path / "avg.pth", to="plain", out=tmp_path / "c-3.pth")
    report = ckpt_tools.average(str(tmp_path / "c-*.pth"), out=tmp_path / "again.pth")
    assert [i.name for i in report.inputs] == ["c-1.pth", "c-2.pth"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_convert_writes_a_dcp_folder_that_torch_and_average_read(save: Save, tmp_path: Path) -> None:
    for i in (1, 2):
        ckpt_tools.convert(save(f"{i}.pth", weights(i)), to="dcp", out=tmp_path / f"step-{i}", max_shard_size=100)
    found = weights(0)
    dcp.load(found, checkpoint_id=tmp_path / "step-2", no_dist=True)
    assert same_bits(found, weights(2))
    ckpt_tools.average([tmp_path / "step-1", tmp_path / "step-2"], out=tmp_path / "avg.safetensors")
    mean = (weights(1)["0.weight"].double() + weights(2)["0.weight"].double()) / 2
    assert torch.equal(load_file(tmp_path / "avg.safetensors")["0.weight"], mean.float())


_names = st.lists(st.text("ab01_", min_size=1, max_size=3), min_size=1, max_size=3).map(".".join)
_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn])


@st.composite
def _states(draw: st.DrawFn) -> State:
    state: State = OrderedDict()
    for name in draw(st.lists(_names, min_size=1, max_size=5, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        count = torch.Size(shape).numel()
        values = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
        state[name] = torch.tensor(values, dtype=torch.float32).view(shape).to(draw(_dtypes))
    return state


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@settings(max_examples=40)
@given(state=_states(), layouts=st.lists(st.sampled_from(PAIRS), min_size=1, max_size=3))
def test_convert_through_any_layouts_ends_where_it_began(scratch: Path, state: State, layouts: list[str]) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    ema = OrderedDict((name, tensor.clone()) for name, tensor in reversed(state.items()))
    path = scratch / "in.pth"
    torch.save({"state_dict": state, "state_dict_ema": ema}, path)
    for i, layout in enumerate(layouts):
        ckpt_tools.convert(path, to=layout, out=scratch / f"{i}.pth", updates=3)
        path = scratch / f"{i}.pth"
    ckpt_tools.convert(path, to="timm", out=scratch / "out.pth")
    found = load(scratch / "out.pth")
    assert same_bits(found["state_dict"], state)
    assert same_bits(found["state_dict_ema"], ema)


@settings(max_examples=30)
@given(state=_states(), formats=st.lists(st.sampled_from([".pth", ".safetensors", ""]), min_size=1, max_size=3))
def test_convert_through_any_file_formats_ends_where_it_began(scratch: Path, state: State, formats: list[str]) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    path = scratch / "in.pth"
    torch.save(state, path)
    for i, suffix in enumerate(formats):
        ckpt_tools.convert(path, to="plain", out=scratch / f"{i}{suffix}")
        path = scratch / f"{i}{suffix}"
    ckpt_tools.convert(path, to="plain", out=scratch / "out.pth")
    found = load(scratch / "out.pth")
    assert found.keys() == state.keys()
    assert same_bits({name: found[name] for name in state}, state)


@pytest.mark.parametrize("layout", WRITTEN)
def test_convert_writes_every_layout_from_one_set(save: Save, tmp_path: Path, layout: str) -> None:
    out = tmp_path / ("out" if layout == "dcp" else "out.pth")
    ckpt_tools.convert(save("in.pth", weights(1)), to=layout, out=out, updates=2, decay=0.9)
    names = tmp_path / "in.pth" if layout in ("pytorch-ema", "diffusers") else None
    ckpt_tools.convert(out, to="plain", out=tmp_path / "back.pth", names_from=names)
    assert same_bits(load(tmp_path / "back.pth"), weights(1))


def test_convert_copies_to_safetensors_without_torch(save: Save, tmp_path: Path) -> None:
    source = save("in.pth", weights(1))
    script = (
        "import sys, ckpt_tools\n"
        f"ckpt_tools.convert({str(source)!r}, to='plain', out={str(tmp_path / 'out.safetensors')!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    found = load_file(tmp_path / "out.safetensors")
    assert same_bits({name: found[name] for name in weights(1)}, weights(1))


def test_convert_rejects_an_input_that_changes_meanwhile(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save("in.pth", weights(1))
    copy = splice.copy

    def grow(*args: Any) -> None:
        copy(*args)
        with source.open("ab") as file:
            file.write(b"x")

    monkeypatch.setattr(splice, "copy", grow)
    with pytest.raises(CkptError, match="changed while it was read"):
        ckpt_tools.convert(source, to="plain", out=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_convert_keeps_entries_beside_a_nested_average(save: Save, tmp_path: Path) -> None:
    swa = {"n_averaged": 2, "average_model_state": weights(2)}
    tree = {"state_dict": weights(1), "callbacks": {"SWA": swa, "Checkpoint": {"best": 3}}, "epoch": 4}
    ckpt_tools.convert(save("swa.ckpt", tree), to="timm", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert found["callbacks"] == {"Checkpoint": {"best": 3}}
    assert same_bits(found["state_dict"], weights(1))
    assert torch.equal(found["state_dict_ema"]["0.weight"], weights(2)["0.weight"])
    assert torch.equal(found["state_dict_ema"]["1.running_mean"], weights(1)["1.running_mean"])
    extra = {"ema": weights(2), "epoch": 4}
    ckpt_tools.convert(save("f.pt", {"model": weights(1), "extra_state": extra}), to="dit", out=tmp_path / "dit.pt")
    assert load(tmp_path / "dit.pt")["extra_state"] == {"epoch": 4}


_PLACES = sorted({place[0] for layout in LAYOUTS for place in (layout.raw, layout.ema) if place} - {"callbacks"})
_FORMS: list[Callable[[State], Any]] = [
    OrderedDict, wrapped, lambda weights: wrapped(weights, "steps"),
    lambda weights: OrderedDict((f"module.{name}", tensor) for name, tensor in weights.items()),
    lambda weights: {"shadow_params": [weights["a.weight"]], "decay": 0.5, "num_updates": 4},
    lambda weights: {"ema": weights, "other": 3}, lambda _: None, lambda _: {"decay": 0.9}, lambda _: "x",
]  # fmt: skip


@st.composite
def _mixtures(draw: st.DrawFn) -> dict[str, Any]:
    places = draw(st.lists(st.sampled_from(_PLACES), min_size=1, max_size=4, unique=True))
    forms = [_FORMS[draw(st.sampled_from([0, 0, 0, *range(len(_FORMS))]))] for _ in places]
    tree = {place: form(bn_weights(i)) for i, (place, form) in enumerate(zip(places, forms, strict=True))}
    return {**tree, **draw(st.sampled_from([{}, {}, {"averaging_state": {"n_averaged": 4}}]))}


def test_convert_drops_an_entry_that_would_make_raw_weights_averages(save: Save, tmp_path: Path) -> None:
    """Lightning's swapped files are known by `current_model_state` and `averaging_state` beside `state_dict`."""
    lost = {"current_model_state": {"ema": bn_weights(2), "other": 3}, "averaging_state": {"n_averaged": 4}}
    source = save("in.pth", {"model": bn_weights(0), "ema": bn_weights(1), **lost})
    report = ckpt_tools.convert(source, to="timm", out=tmp_path / "out.pth")
    assert same_bits(opened(tmp_path / "out.pth"), bn_weights(1))
    assert same_bits(opened(tmp_path / "out.pth", "raw"), bn_weights(0))
    assert "current_model_state" in report.dropped


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(each, torch.Tensor) for each in value.values())


@settings(max_examples=60)
@given(tree=_mixtures(), layout=st.sampled_from(PAIRS))
def test_convert_of_any_mixture_reads_back_from_any_layout(scratch: Path, tree: dict[str, Any], layout: str) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    source, out, averaged = (scratch / name for name in ("in.pth", "out.pth", "averaged.pth"))
    torch.save(tree, source)
    try:
        before = opened(source)
        report = ckpt_tools.convert(source, to=layout, out=out, updates=200)
    except LayoutError:
        assert not out.exists()
        return
    assert same_bits(opened(out), before)
    if len(report.state) == 2:
        assert same_bits(opened(out, "raw"), opened(source, "raw"))
    try:
        ckpt_tools.average([source], out=averaged)
    except LayoutError:  # weights in yet another place, of which there is no average
        return
    try:
        again = opened(averaged)
    except LayoutError:  # raw weights at a path that no layout has: the average is there, too
        whole = torch.load(averaged)
        again = opened(averaged, next(key for key, value in whole.items() if _is_state(value)))
    assert list(again.values())[0].tolist() == list(before.values())[0].tolist()
