"""Conversion: every layout there and back, what is lost is said, and the original classes load the result."""

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

import ckpt_tools
from ckpt_tools.checkpoints.layouts import LAYOUTS
from ckpt_tools.errors import CkptError, LayoutError, NumericsError, UsageError, WriteError
from ckpt_tools.storage import splice

Save = Callable[..., Path]
State = dict[str, torch.Tensor]
WRITTEN = [layout.name for layout in LAYOUTS if layout.written]
# These keep both sets whole, whatever they hold.
PAIRS = [
    "timm", "timm-ema", "deit", "torchvision", "model-state-dict", "lightning", "mmengine", "d2go", "ema-pytorch",
    "dit", "icefall", "dino", "fairseq",
]  # fmt: skip

LIT_EMA = {"m_ema.decay": torch.ones(()), "m_ema.num_updates": torch.ones(())}


def weights(seed: int = 0, lead: str = "") -> State:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 2)))
    return OrderedDict(
        (lead + name, torch.randn_like(t) if t.is_floating_point() else t + seed)
        for name, t in net.state_dict().items()
    )


def opened(path: Path, state: str = "auto") -> State:
    return dict(ckpt_tools.open_checkpoint(path, state=state))


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
    assert "The only set of weights is used for both, raw and averaged." in report.notes
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


class LitEma(nn.Module):
    """What latent diffusion's class keeps: decay, num_updates, and parameters without the dots of their names."""

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(7, dtype=torch.int))
        for name, parameter in model.named_parameters():
            self.register_buffer(name.replace(".", ""), parameter.detach() + 1)


class Diffusion(nn.Module):
    """A model under `model.`, its averages under `model_ema.`, and more beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(OrderedDict(net=nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))))
        self.model_ema = LitEma(self.model, decay=0.99)
        self.first_stage = nn.Linear(1, 1)


def test_convert_restores_lit_ema_names_from_the_raw_names(save: Save, tmp_path: Path) -> None:
    net = Diffusion()
    source = save("sd.ckpt", {"state_dict": net.state_dict(), "global_step": 9})
    ema, raw = opened(source, "ema"), opened(source, "raw")
    assert list(raw) == [name for name in net.state_dict() if not name.startswith("model_ema.")] == list(ema)
    assert torch.equal(ema["model.net.0.weight"], net.model.net[0].weight + 1)  # type: ignore[union-attr,index,operator]
    assert torch.equal(ema["model.net.1.running_var"], raw["model.net.1.running_var"])
    ckpt_tools.convert(source, to="torchvision", out=tmp_path / "t.pth")
    assert load(tmp_path / "t.pth")["model_ema"]["n_averaged"].item() == 7
    ckpt_tools.convert(tmp_path / "t.pth", to="litema", out=tmp_path / "back.ckpt", decay=0.99)
    net.load_state_dict(load(tmp_path / "back.ckpt")["state_dict"])
    assert same_bits({n: t for n, t in load(tmp_path / "back.ckpt")["state_dict"].items() if n in net.state_dict()},
                     {n: net.state_dict()[n] for n in load(tmp_path / "back.ckpt")["state_dict"]})  # fmt: skip


def test_convert_restores_lit_ema_names_from_another_checkpoint(save: Save, tmp_path: Path) -> None:
    net = Diffusion()
    source = save("ema.pth", net.model_ema.state_dict())
    with pytest.raises(LayoutError, match="names have lost their dots, .* Give `names_from`, or `model`"):
        ckpt_tools.convert(source, to="plain", out=tmp_path / "out.pth")
    names = save("model.pth", net.model.state_dict())
    ckpt_tools.convert(source, to="plain", out=tmp_path / "out.pth", names_from=names)
    assert list(load(tmp_path / "out.pth")) == list(net.model.state_dict())
    assert torch.equal(load(tmp_path / "out.pth")["net.0.bias"], net.model_ema.net0bias)


@pytest.mark.parametrize("to", ["pytorch-ema", "diffusers"])
def test_convert_names_a_list_of_parameters(save: Save, tmp_path: Path, to: str) -> None:
    source = save("timm.pth", {"state_dict": weights(1), "state_dict_ema": weights(2)})
    report = ckpt_tools.convert(source, to=to, out=tmp_path / "list.pth", updates=4, decay=0.5)
    found = load(tmp_path / "list.pth")
    parameters = [t for n, t in weights(2).items() if "running" not in n and "num_batches" not in n]
    assert all(map(torch.equal, found["shadow_params"], parameters))
    assert (found["decay"], found.get("num_updates", found.get("optimization_step"))) == (0.5, 4)
    assert any("'1.running_mean' and 2 more are lost: the list holds parameters alone" in note for note in report.notes)
    with pytest.raises(LayoutError, match="a list of 6 tensors without names. Give `names_from`, or `model`"):
        ckpt_tools.convert(tmp_path / "list.pth", to="plain", out=tmp_path / "out.pth")
    ckpt_tools.convert(
        tmp_path / "list.pth", to="plain", names_from=save("raw.pth", weights(1)), out=tmp_path / "out.pth"
    )
    expected = {n: (weights(1) if "running" in n or "num_batches" in n else weights(2))[n] for n in weights(1)}
    assert same_bits(load(tmp_path / "out.pth"), expected)


def test_convert_names_a_list_by_the_raw_weights_beside_it(save: Save) -> None:
    shadow = [t + 1 for n, t in weights(1).items() if "running" not in n and "num_batches" not in n]
    tree = {"model": weights(1), "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": shadow}, "step": 3}
    found = opened(save("score.pth", tree))
    assert torch.equal(found["2.0.weight"], weights(1)["2.0.weight"] + 1)
    assert torch.equal(found["1.running_mean"], weights(1)["1.running_mean"])


def test_convert_takes_names_but_no_values_from_a_model(save: Save, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 2)))\n"
    )
    shadow = [t for n, t in weights(1).items() if "running" not in n and "num_batches" not in n]
    source = save("list.pth", {"decay": 0.9, "num_updates": None, "shadow_params": shadow, "collected_params": None})
    ckpt_tools.convert(source, to="plain", model=f"{tmp_path}/net.py:make", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert same_bits(found, {n: t for n, t in weights(1).items() if "running" not in n and "num_batches" not in n})


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


@pytest.mark.parametrize(
    ("tree", "options", "error", "message"),
    [
        ({"w": torch.ones(1)}, {"to": "tmm"}, UsageError, r"`to='tmm'`: no such layout\. Did you mean timm"),
        ({"w": torch.ones(1)}, {"to": "qqqq"}, UsageError, r"no such layout\. There are plain, "),
        ({"w": torch.ones(1)}, {"to": "ultralytics"}, UsageError, "can be read, but not written"),
        ({"w": torch.ones(1)}, {"to": "ema-pytorch"}, LayoutError, r"how many there were\. Give `updates`"),
        ({"w": torch.ones(1)}, {"to": "plain", "state": "ema"}, LayoutError, "has no ema weights, only raw"),
        ({"w": torch.ones(1)}, {"to": "plain", "updates": -1}, UsageError, "`updates=-1`: must be a whole number"),
        ({"w": torch.ones(1)}, {"to": "plain", "decay": 1.5}, UsageError, "`decay=1.5`: must be from 0 to 1"),
        ({"w": torch.ones(1)}, {"to": "plain", "max_shard_size": "5GB"}, UsageError, "`max_shard_size` needs a folder"),
        ({"w": torch.ones(1)}, {"to": "plain", "names_from": "x", "model": "y"}, UsageError, "Leave one of them out"),
        ({"w": torch.ones(1)}, {"to": "plain", "out": "in.pth"}, WriteError, "is one of the inputs"),
        ({"w": torch.ones(1)}, {"to": "timm", "out": "out.safetensors"}, UsageError, "nests its weights"),
        ({"w": torch.ones(1)}, {"to": "timm", "out": "out"}, UsageError, "a folder of safetensors cannot hold"),
        ({"w": torch.ones(1)}, {"to": "plain", "threads": 0}, UsageError, "`threads=0`: must be a whole number"),
        ({"w": torch.ones(1)}, {"to": "dcp"}, UsageError, "`to='dcp'` makes a folder"),
        ({"w": torch.ones(1)}, {"to": "plain", "dtype": "int8"}, UsageError, "`dtype` is one of"),
        ({"w": torch.ones(1).to_sparse()}, {"to": "plain"}, CkptError, "'w' is sparse, which cannot be written"),
        (
            {"a.b.c": torch.ones(1), "ab.c": torch.ones(1)}, {"to": "litema"}, LayoutError,
            r"'a\.b\.c' and 'ab\.c' are both 'model_ema\.abc' without their dots",
        ),
        ({"model_ema.x": torch.ones(1)}, {"to": "litema"}, LayoutError, "the prefix that LitEma gives its averages"),
        ({"model.decay": torch.ones(1)}, {"to": "litema"}, LayoutError, "a name that LitEma gives an entry"),
        (
            {"model": {"module.a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}, {"to": "litema"}, LayoutError,
            "'a' is the name of an averaged weight and of no raw one, so LitEma could not find it",
        ),
        (
            {**LIT_EMA, "a.b.c": torch.ones(1), "ab.c": torch.ones(1), "m_ema.abc": torch.ones(1)},
            {"to": "plain"}, LayoutError, r"'m_ema\.abc' may be 'a\.b\.c' or 'ab\.c'",
        ),
        (
            {**LIT_EMA, "a.b": torch.ones(1), "m_ema.ax": torch.ones(1)},
            {"to": "plain"}, LayoutError, r"'m_ema\.ax' is the name of no raw weight",
        ),
        (
            {"model": {"a": torch.ones(1)}, "ema": {"shadow_params": [torch.ones(1), torch.ones(2)]}}, {"to": "plain"},
            LayoutError, "a list of 2 tensors; the model whose names it should get has 1 parameters",
        ),
        (
            {"model": {"a": torch.ones(1)}, "ema": {"shadow_params": [torch.ones(2)]}}, {"to": "plain"},
            LayoutError, r"a list, in which a tensor of shape \[2\] would be 'a', which has shape \[1\]",
        ),
    ],
)  # fmt: skip
def test_convert_rejects_bad_input_and_writes_nothing(
    save: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tree: Any,
    options: Any,
    error: type[CkptError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = save("in.pth", tree)
    before = source.read_bytes()
    with pytest.raises(error, match=message):
        ckpt_tools.convert(source, **{"out": "out.pth", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]
    assert source.read_bytes() == before


def bn_weights(value: float, lead: str = "") -> State:
    return OrderedDict(
        {f"{lead}a.weight": torch.full((2,), float(value)), f"{lead}bn.running_mean": torch.full((2,), value + 0.5)}
    )


def wrapped(weights: State, counter: str = "n_averaged", count: int = 7) -> State:
    return OrderedDict({counter: torch.tensor(count), **{f"module.{name}": t for name, t in weights.items()}})


SWA = {"n_averaged": 7, "latest_update_epoch": 2, "average_model_state": bn_weights(2)}
LIT = {
    **bn_weights(1, "model."), "model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(7).int(),
    "model_ema.aweight": bn_weights(2)["a.weight"],
}  # fmt: skip
LIST = {"decay": 0.5, "num_updates": 7, "shadow_params": [bn_weights(2)["a.weight"]], "collected_params": None}


@pytest.mark.parametrize(
    ("tree", "to", "options", "dropped"),
    [
        # counters that go along are not called lost; those that do not are
        ({"model": wrapped(bn_weights(2)), "epoch": 1}, "averaged-model", {}, ["epoch"]),
        ({"model": bn_weights(1), "model_ema": wrapped(bn_weights(2))}, "timm", {}, ["model_ema.n_averaged"]),
        ({"model": bn_weights(1), "model_ema": wrapped(bn_weights(2))}, "mmengine", {}, []),
        (
            {"state_dict": bn_weights(2), "ema_state_dict": wrapped(bn_weights(1), "steps")}, "deit", {},
            ["ema_state_dict.steps"],
        ),
        ({"state_dict": LIT}, "torchvision", {}, ["state_dict.model_ema.decay"]),
        ({"model": bn_weights(1), "ema": LIST}, "timm", {}, ["ema.decay", "ema.num_updates"]),
        ({"model": bn_weights(1), "ema": LIST}, "litema", {}, []),
        (
            {"state_dict": bn_weights(2), "current_model_state": bn_weights(1),
             "averaging_state": {"n_averaged": torch.tensor(7)}}, "lightning", {}, [],
        ),
        ({"state_dict": bn_weights(1), "callbacks": {"StochasticWeightAveraging": SWA, "Timer": {"time": 3}}},
         "torchvision", {}, ["callbacks.StochasticWeightAveraging.latest_update_epoch"]),
        # a set that is left, wherever it stands
        ({"state_dict": LIT}, "timm", {"state": "raw"}, ["state_dict.model_ema.*"]),
        ({"state_dict": LIT}, "timm", {"state": "ema"},
         ["state_dict.* (raw)", "state_dict.model_ema.decay", "state_dict.model_ema.num_updates"]),
        ({"nets": {"G": LIT}, "epoch": 1}, "plain", {"state": "nets.G"},
         ["epoch", "nets.G.* (raw)", "nets.G.model_ema.decay", "nets.G.model_ema.num_updates"]),
        ({"model": bn_weights(1), "model_ema": bn_weights(2), "ema": bn_weights(3)}, "timm", {}, ["ema"]),
        ({"model": bn_weights(1), "ema": bn_weights(2)}, "timm", {"state": "model"}, ["ema"]),
        # what stands among the weights and is none
        (
            {"state_dict": {**bn_weights(1), "a._extra_state": {"scale": 1}}}, "deit", {},
            ["state_dict.a._extra_state"],
        ),
        # where the output has something of its own
        ({"state_dict": bn_weights(1), "state_dict_ema": bn_weights(2), "ema": 0.999}, "dit", {}, ["ema"]),
        ({"state_dict": bn_weights(1), "state_dict_ema": bn_weights(2), "extra_state": [1]}, "fairseq", {},
         ["extra_state"]),
        # what was of use is not lost
        ({"model": bn_weights(1), "extra_state": {"ema": bn_weights(2), "ema_fp32_params": bn_weights(3)}}, "deit", {},
         []),
    ],
)  # fmt: skip
def test_convert_reports_exactly_what_is_dropped(
    save: Save, tmp_path: Path, tree: Any, to: str, options: Any, dropped: list[str]
) -> None:
    report = ckpt_tools.convert(save("in.pth", tree), to=to, out=tmp_path / "out.pth", **options)
    assert sorted(report.dropped) == sorted(dropped)


def test_convert_reads_the_ema_of_the_lightning_callback(save: Save, tmp_path: Path) -> None:
    callbacks = {"StochasticWeightAveraging": SWA, "Timer": {"time": 3}}
    source = save("last.ckpt", {"state_dict": bn_weights(1), "callbacks": callbacks, "epoch": 2})
    ckpt_tools.convert(source, to="torchvision", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert same_bits(found["model"], bn_weights(1))
    # Its statistics are those of the day it began.
    expected = wrapped({**bn_weights(2), "bn.running_mean": bn_weights(1)["bn.running_mean"]})
    assert same_bits(found["model_ema"], expected)
    assert (found["callbacks"], found["epoch"]) == ({"Timer": {"time": 3}}, 2)


def test_convert_writes_a_deep_path_into_a_nested_layout(save: Save, tmp_path: Path) -> None:
    tree = {"a": {"b": {"c": bn_weights(1), "d": 4}}}
    ckpt_tools.convert(save("in.pth", tree), to="timm", state="a.b.c", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert found["a"] == {"b": {"d": 4}}
    assert same_bits(found["state_dict"], bn_weights(1))


def test_convert_knows_that_a_path_leads_to_an_average(save: Save, tmp_path: Path) -> None:
    source = save("in.pth", {"nets": {"G": wrapped(bn_weights(2))}})
    report = ckpt_tools.convert(source, to="averaged-model", state="nets.G", out=tmp_path / "out.pth")
    assert report.placed == ("ema (nets.G) → the whole file",)
    assert same_bits(load(tmp_path / "out.pth"), wrapped(bn_weights(2)))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"model": bn_weights(1), "ema": {"a.weight": torch.ones(2)}},
            "averaged weights lack 'bn.running_mean', which the raw ones hold",
        ),
        (
            {"model": bn_weights(1, "module."), "ema": bn_weights(2)},
            "averaged weights hold 'a.weight' and 1 more, which the raw ones do not",
        ),
        ({"model": bn_weights(1), "ema": LIST}, "Not averaged, but taken from the raw weights: 'bn.running_mean'"),
        ({"state_dict": LIT}, "Not averaged, but taken from the raw weights: 'model.bn.running_mean'"),
    ],
)
def test_convert_notes_incomplete_averages(save: Save, tmp_path: Path, tree: Any, message: str) -> None:
    report = ckpt_tools.convert(save("in.pth", tree), to="timm", out=tmp_path / "out.pth")
    assert any(message in note for note in report.notes)


def test_convert_notes_values_from_another_checkpoint(save: Save, tmp_path: Path) -> None:
    names = save("names.pth", {"model": bn_weights(1), "model_ema": bn_weights(3)})
    report = ckpt_tools.convert(save("list.pth", LIST), to="plain", names_from=names, out=tmp_path / "out.pth")
    assert f"Not averaged, but taken from {names}: ema (model_ema): 'bn.running_mean'." in report.notes
    assert load(tmp_path / "out.pth")["bn.running_mean"].tolist() == [3.5, 3.5]


def test_convert_never_replaces_the_checkpoint_that_gives_names(save: Save, tmp_path: Path) -> None:
    names = save("names.pth", bn_weights(1))
    before = names.read_bytes()
    with pytest.raises(WriteError, match="is one of the inputs, which are never changed"):
        ckpt_tools.convert(save("list.pth", LIST), to="plain", names_from=names, out=names, force=True)
    assert names.read_bytes() == before


def test_convert_notes_an_average_equal_to_the_raw_weights(save: Save, tmp_path: Path) -> None:
    weights = bn_weights(1)
    source = save("in.pth", {"model": weights, "ema": OrderedDict(weights)})
    report = ckpt_tools.convert(source, to="plain", out=tmp_path / "out.pth")
    assert report.notes == ("The averaged weights and the raw ones are the same bytes. Was the EMA ever updated?",)


@pytest.mark.parametrize("out", ["ema", "ema.pth"])
def test_convert_keeps_the_settings_of_diffusers(save: Save, tmp_path: Path, out: str) -> None:
    kept = {"inv_gamma": 2.0, "power": 0.75, "use_ema_warmup": True, "min_decay": 0.1, "update_after_step": 5}
    tree = {"decay": 0.5, "optimization_step": 9, **kept, "shadow_params": [torch.ones(2)]}
    names = save("names.pth", {"w": torch.zeros(2)})
    ckpt_tools.convert(save("list.pth", tree), to="diffusers", names_from=names, out=tmp_path / out)
    if out == "ema":  # and on from the folder
        ckpt_tools.convert(tmp_path / "ema", to="diffusers", out=tmp_path / "ema.pth")
    found = load(tmp_path / "ema.pth")
    assert [tensor.tolist() for tensor in found.pop("shadow_params")] == [[1, 1]]
    assert found == {"decay": 0.5, "optimization_step": 9, **kept}


@pytest.mark.parametrize(
    ("count", "to", "written", "note"),
    [
        (0, "mmengine", 1, "with 0 the next update would replace the average"),
        (1 << 40, "averaged-model", 1 << 40, None),
        (1 << 40, "litema", (1 << 31) - 1, None),
        (7, "ema-pytorch", 7, r"replaces the average until its step, 7 here"),
        (101, "ema-pytorch", 101, None),
        (-1, "averaged-model", 1, "EMA update count is not known"),
    ],
)
def test_convert_notes_a_counter_that_lets_the_next_update_replace_the_average(
    save: Save, tmp_path: Path, count: int, to: str, written: int, note: str | None
) -> None:
    source = save("swa.pth", wrapped(bn_weights(1), count=count))
    report = ckpt_tools.convert(source, to=to, out=tmp_path / "out.pth", decay=0.9)
    found = load(tmp_path / "out.pth")
    counters = [
        tensor.item()
        for tree in (found, *(value for value in found.values() if isinstance(value, dict)))
        for name, tensor in tree.items()
        if name.rpartition(".")[2] in ("n_averaged", "steps", "step", "num_updates")
    ]
    assert counters == [written]
    assert [text for text in report.notes if "update count is not" in text or "replace" in text] == (
        [] if note is None else [next(text for text in report.notes if note in text)]
    )


def test_convert_gives_raw_weights_no_counter(save: Save, tmp_path: Path) -> None:
    tree = {"state_dict": bn_weights(2), "ema_state_dict": wrapped(bn_weights(1), "steps")}
    ckpt_tools.convert(save("in.pth", tree), to="averaged-model", state="raw", out=tmp_path / "out.pth")
    assert load(tmp_path / "out.pth")["n_averaged"].item() == 1


def test_convert_rejects_a_raw_set_that_would_lose_a_tensor(save: Save, tmp_path: Path) -> None:
    source = save("in.pth", {"model": {"a": torch.ones(2), 3: torch.ones(2)}, "ema": {"a": torch.ones(2)}})
    with pytest.raises(LayoutError, match=r"the tensor 'model\.3' has a name that is no text"):
        ckpt_tools.convert(source, to="timm", out=tmp_path / "out.pth")
    assert ckpt_tools.convert(source, to="plain", out=tmp_path / "out.pth").dropped == ("model",)


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


def test_convert_notes_that_an_average_of_parameters_lacks_buffers(save: Save, tmp_path: Path) -> None:
    ema = {name: tensor for name, tensor in weights(2).items() if "running" not in name and "num_b" not in name}
    source = save("c.pth", {"model": weights(1), "ema": ema})
    report = ckpt_tools.convert(source, to="plain", out=tmp_path / "out.pth")
    assert report.notes == ("The averaged weights lack '1.running_mean' and 2 more, which the raw ones hold.",)
    assert same_bits(load(tmp_path / "out.pth"), ema)


@pytest.mark.parametrize(
    ("tree", "state", "dropped"),
    [
        ({"model": bn_weights(1), "model_ema": bn_weights(2), "ema": bn_weights(3)}, "auto", ["model_ema", "ema"]),
        ({"model": bn_weights(1), "model_ema": bn_weights(2), "teacher": bn_weights(3)}, "raw", ["teacher"]),
        ({"net": bn_weights(1), "ema": bn_weights(2)}, "net", ["ema"]),
        ({"state_dict": LIT}, "ema", ["state_dict.* (raw)", "state_dict.model_ema.decay", "model_ema.num_updates"]),
        ({"state_dict": LIT}, "raw", ["state_dict.model_ema.*"]),
        ({"model": bn_weights(1), "ema": LIST}, "auto", ["ema"]),
        ({"state_dict": bn_weights(1), "callbacks": {"StochasticWeightAveraging": SWA}}, "ema", ["callbacks"]),
        (
            {"state_dict": bn_weights(2), "current_model_state": bn_weights(1), "averaging_state": {"n_averaged": 7}},
            "raw", ["current_model_state", "averaging_state"],
        ),
    ],
)  # fmt: skip
def test_convert_writes_averages_that_read_back_the_same_in_any_layout(
    save: Save, tmp_path: Path, tree: Any, state: str, dropped: list[str]
) -> None:
    paths = [save(f"step-{i}.pth", tree) for i in (1, 2)]
    expected = opened(paths[0], state)
    report = ckpt_tools.average(paths, state=state, out=tmp_path / "out.pth", order="given")
    found = opened(tmp_path / "out.pth", "net" if state == "net" else "auto")
    assert same_bits(found, expected)
    assert all(any(path.endswith(each) for path in report.dropped) for each in dropped)
    with pytest.raises(LayoutError, match="has no ema weights|holds weights in no known|in no known layout"):
        opened(tmp_path / "out.pth", "ema")


def test_convert_reports_companions_that_one_file_cannot_keep(save: Save, tmp_path: Path) -> None:
    ckpt_tools.convert(save("in.pth", bn_weights(1)), to="plain", out=tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert ckpt_tools.convert(tmp_path / "model", to="plain", out=tmp_path / "o.pth").dropped == ("config.json",)
    assert ckpt_tools.convert(tmp_path / "model", to="plain", out=tmp_path / "again").dropped == ()
    assert (tmp_path / "again" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("counter", [5, None, [7], {"n_averaged": "x"}, {"n_averaged": 10**400}])
def test_convert_ignores_a_counter_of_none(save: Save, tmp_path: Path, counter: Any) -> None:
    tree = {"state_dict": bn_weights(2), "current_model_state": bn_weights(1), "averaging_state": counter}
    if counter is None:
        with pytest.raises(LayoutError, match="Some libraries swap raw and averaged weights, so say which you mean"):
            ckpt_tools.convert(save("in.ckpt", tree), to="torchvision", out=tmp_path / "out.pth")
        return
    ckpt_tools.convert(save("in.ckpt", tree), to="torchvision", out=tmp_path / "out.pth")
    assert load(tmp_path / "out.pth")["model_ema"]["n_averaged"].item() == 1


def test_convert_keeps_empty_parameters_apart_in_a_list(save: Save, tmp_path: Path) -> None:
    empty = torch.ones(0)
    state = OrderedDict({"a": empty, "b": empty, "c": torch.ones(2)})
    source = save("in.pth", state)
    tree = {"decay": 0.5, "num_updates": 1, "shadow_params": list(state.values()), "collected_params": None}
    ckpt_tools.convert(save("list.pth", tree), to="plain", names_from=source, out=tmp_path / "out.pth")
    assert same_bits(load(tmp_path / "out.pth"), state)


@pytest.mark.parametrize("names", [("mp_rank_00", "mp_rank_01"), ("consolidated.00.pth", "consolidated.01.pth")])
def test_convert_notes_that_a_checkpoint_is_one_rank_of_several(tmp_path: Path, names: tuple[str, str]) -> None:
    files = [tmp_path / name if name.endswith(".pth") else tmp_path / name / "model.pt" for name in names]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        torch.save(weights(1), path)
    report = ckpt_tools.convert(files[0], to="plain", out=tmp_path / "out.safetensors")
    assert any("one rank of several, and holds a part of the weights" in note for note in report.notes)
    files[1].unlink()
    assert not ckpt_tools.convert(files[0], to="plain", out=tmp_path / "alone.safetensors").notes


ATTENTION = ("to_q", "to_k", "to_v", "to_out")  # of one shape, so only their order tells them apart


def attention(seed: int) -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return OrderedDict((f"{name}.weight", torch.randn(3, 3)) for name in ATTENTION)


@pytest.mark.parametrize("out", ["names.safetensors", "names"])
def test_convert_takes_no_names_for_a_list_from_a_file_that_sorts_them(save: Save, tmp_path: Path, out: str) -> None:
    ckpt_tools.convert(save("names.pth", attention(1)), to="plain", out=tmp_path / out)
    tree = {"decay": 0.5, "num_updates": 1, "shadow_params": list(attention(2).values()), "collected_params": None}
    source = save("list.pth", tree)
    with pytest.raises(LayoutError, match="in the order of the model's parameters, .* keeps names in another order"):
        ckpt_tools.convert(source, to="plain", names_from=tmp_path / out, out=tmp_path / "out.pth")
    ckpt_tools.convert(source, to="plain", names_from=tmp_path / "names.pth", out=tmp_path / "out.pth")
    assert same_bits(load(tmp_path / "out.pth"), attention(2))


@pytest.mark.parametrize("to", ["pytorch-ema", "diffusers"])
def test_convert_makes_no_list_of_names_that_a_file_has_sorted(save: Save, tmp_path: Path, to: str) -> None:
    source, sorted_one = save("in.pth", attention(1)), tmp_path / "in.safetensors"
    ckpt_tools.convert(source, to="plain", out=sorted_one)
    with pytest.raises(LayoutError, match="the list .* in the order of the model, .* Give `names_from`"):
        ckpt_tools.convert(sorted_one, to=to, updates=3, out=tmp_path / "out.pth")
    ckpt_tools.convert(sorted_one, to=to, updates=3, names_from=source, out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")["shadow_params"]
    assert all(torch.equal(a, b) for a, b in zip(found, attention(1).values(), strict=True))


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


@settings(max_examples=150)
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


class Versioned(nn.Linear):
    """A layer that takes only its own version, as torchvision's MNASNet does; a file without one is version None."""

    _version = 3

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        assert local_metadata.get("version") == 3, f"{prefix} is of version {local_metadata.get('version')}"
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class TwoModels(nn.Module):
    """As ema-pytorch's EMA keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.online_model, self.ema_model = versioned(1), versioned(2)
        self.register_buffer("initted", torch.tensor(True))
        self.register_buffer("step", torch.tensor(0))


def versioned(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(Versioned(2, 3), nn.BatchNorm1d(3), nn.Sequential(Versioned(3, 2)))


def averaged(seed: int) -> nn.Module:
    return AveragedModel(versioned(seed))


@pytest.mark.parametrize("source", ["timm", "ema-pytorch", "lightning", "mmengine", "litema"])
@pytest.mark.parametrize("layout", [*PAIRS, "litema"])
def test_convert_keeps_module_versions_in_any_layout(save: Save, tmp_path: Path, source: str, layout: str) -> None:
    raw, ema = versioned(1).state_dict(), versioned(2).state_dict()
    path = save("timm.pth", {"state_dict": raw, "state_dict_ema": ema})
    if source != "timm":
        given, path = path, tmp_path / "source.pth"
        ckpt_tools.convert(given, to=source, out=path, updates=5, decay=0.9)
    ckpt_tools.convert(path, to=layout, out=tmp_path / "there.pth", updates=5, decay=0.9)
    for state, seed in (("raw", 1), ("ema", 2)):
        out = tmp_path / f"{state}.pth"
        ckpt_tools.convert(tmp_path / "there.pth", to="plain", state=state, out=out)
        made = versioned(0)
        made.load_state_dict(load(out))  # fails without the versions
        assert torch.equal(made.state_dict()["0.weight"], versioned(seed).state_dict()["0.weight"])


@pytest.mark.parametrize(
    ("layout", "keys", "make"),
    [
        ("plain", [], versioned),
        ("timm", ["state_dict", "state_dict_ema"], versioned),
        ("averaged-model", [], averaged),
        ("torchvision", ["model_ema"], averaged),
        ("ema-pytorch", [], lambda seed: TwoModels()),
    ],
)
def test_convert_writes_state_dicts_that_modules_with_versions_load(
    save: Save, tmp_path: Path, layout: str, keys: list[str], make: Callable[[int], nn.Module]
) -> None:
    source = save("deit.pth", {"model": versioned(1).state_dict(), "model_ema": versioned(2).state_dict()})
    ckpt_tools.convert(source, to=layout, out=tmp_path / "out.pth", updates=5)
    found = load(tmp_path / "out.pth")
    for state in [found[key] for key in keys] or [found]:
        made = make(0)
        made.load_state_dict(state)
        shells = {"", "module"}  # modules that have no version in any release
        assert (
            dict(state._metadata).items()
            >= {key: version for key, version in made.state_dict()._metadata.items() if key not in shells}.items()
        )


def test_convert_takes_the_prefix_of_an_averaged_model_off_its_module_versions(save: Save, tmp_path: Path) -> None:
    ckpt_tools.convert(save("swa.pth", averaged(1).state_dict()), to="plain", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert found._metadata == versioned(0).state_dict()._metadata
    versioned(0).load_state_dict(found)


def test_convert_gives_an_average_without_versions_those_of_the_raw_weights(save: Save, tmp_path: Path) -> None:
    ema = {name: tensor.clone() for name, tensor in versioned(2).state_dict().items()}
    source = save("own.pth", {"model": versioned(1).state_dict(), "model_ema": ema})
    ckpt_tools.convert(source, to="plain", dtype="float16", out=tmp_path / "out.pth")
    made = versioned(0)
    made.load_state_dict(load(tmp_path / "out.pth"))  # fails without the versions
    assert torch.equal(made.state_dict()["0.weight"], ema["0.weight"].half().float())


@pytest.mark.parametrize("metadata", [None, 3, [1], {1: 2}, {"": 10**5000}, {10**5000: 2, "0": {"version": 3}}])
def test_convert_takes_module_versions_of_any_kind(save: Save, tmp_path: Path, metadata: Any) -> None:
    state = weights(1)
    state._metadata = metadata  # type: ignore[attr-defined]
    ckpt_tools.convert(save("odd.pth", state), to="averaged-model", out=tmp_path / "out.pth")
    assert same_bits(opened(tmp_path / "out.pth"), weights(1))
