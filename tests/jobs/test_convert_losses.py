"""What conversions lose, or cannot know: refused, dropped or noted, as it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load, same_bits
from two_sets import bn_weights, opened, weights, wrapped

import ckpt_tools
from ckpt_tools.errors import CkptError, LayoutError, UsageError, WriteError

Save = Callable[..., Path]
LIT_EMA = {"m_ema.decay": torch.ones(()), "m_ema.num_updates": torch.ones(())}


@pytest.mark.parametrize(
    ("tree", "options", "error", "message"),
    [
        ({"w": torch.ones(1)}, {"to": "tmm"}, UsageError, r"`to` is one of plain, .*, not 'tmm'\. Did you mean timm\?"),
        ({"w": torch.ones(1)}, {"to": "qqqq"}, UsageError, r"`to` is one of plain, .*, not 'qqqq'\.$"),
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
        (-1, "averaged-model", 1, "EMA update count unknown"),
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
    assert [text for text in report.notes if "update count unknown" in text or "replace" in text] == (
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
