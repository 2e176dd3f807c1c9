"""Layouts: the right set of weights is found, and always said; what misleads is refused."""

from __future__ import annotations

import argparse
import io
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load, same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ckpt_tools
from ckpt_tools import average, convert, open_checkpoint
from ckpt_tools.checkpoints.layouts import LAYOUTS, Encoding, Layout, StateDict, register, select, states, unregister
from ckpt_tools.checkpoints.layouts.layout import DETECTED, encoding_of
from ckpt_tools.checkpoints.optimizers import looks_like_training_state
from ckpt_tools.errors import LayoutError, UsageError
from ckpt_tools.formats import read_header
from ckpt_tools.tensors import TensorSpec

Save = Callable[..., Path]


def weights(value: float = 0.0, prefix: str = "") -> dict[str, torch.Tensor]:
    return OrderedDict({f"{prefix}w": torch.full((2,), value), f"{prefix}b": torch.full((1,), value)})


@pytest.mark.parametrize(
    ("tree", "auto", "both"),
    [
        (weights(), ("raw", ()), {"raw"}),
        ({"state_dict": weights(), "epoch": 3}, ("raw", ("state_dict",)), {"raw"}),
        ({"state_dict": weights(), "state_dict_ema": weights()}, ("ema", ("state_dict_ema",)), {"raw", "ema"}),
        ({"model": weights(), "model_ema": weights()}, ("ema", ("model_ema",)), {"raw", "ema"}),
        ({"model": weights(), "model_ema": None}, ("raw", ("model",)), {"raw"}),
        ({"model_state_dict": weights(), "ema_state_dict": weights()}, ("ema", ("ema_state_dict",)), {"raw", "ema"}),
        ({"state_dict": weights(), "state_dict_ema": {}}, ("raw", ("state_dict",)), {"raw"}),
    ],
)
def test_select_finds_each_layout_and_prefers_the_ema(
    save: Save, tree: Any, auto: tuple[str, Any], both: set[str]
) -> None:
    header = read_header(save("c.pth", tree))
    chosen = select(header)
    assert (chosen.which, chosen.path) == auto
    assert list(chosen.tensors) == ["w", "b"]
    assert set(states(header)) == both


def test_select_accepts_a_flat_state_dict_with_a_module_called_model(save: Save) -> None:
    header = read_header(save("c.pth", {"model.w": torch.zeros(1), "state_dict": torch.zeros(1)}))
    assert list(select(header).tensors) == ["model.w", "state_dict"]


def test_select_follows_a_dotted_path_to_any_place(save: Save) -> None:
    tree = {"nets": {"teacher.ema": weights(2), "student": weights(1)}}
    header = read_header(save("c.pth", tree))
    assert select(header, "nets.teacher.ema").path == ("nets", "teacher.ema")
    assert select(header, "nets.student").label == "nets.student"


@pytest.mark.parametrize("wrap", [lambda model: {"model": weights(), "model_ema": model}, lambda model: model])
def test_select_takes_prefix_and_update_count_off_an_averaged_model(save: Save, wrap: Any) -> None:
    model = AveragedModel(nn.Linear(2, 3))
    model.update_parameters(nn.Linear(2, 3))
    chosen = select(read_header(save("c.pth", wrap(model.state_dict()))))
    assert list(chosen.tensors) == ["weight", "bias"]
    assert chosen.which == "ema"
    assert isinstance(chosen.updates, TensorSpec)
    assert (chosen.updates.dtype.name, chosen.updates.shape) == ("int64", ())


def test_select_keeps_a_buffer_called_n_averaged_of_other_models(save: Save) -> None:
    chosen = select(read_header(save("c.pth", {**weights(), "n_averaged": torch.tensor(3)})))
    assert "n_averaged" in chosen.tensors


@pytest.mark.parametrize("other", ["ema_state_dict", "current_model_state"])
def test_select_rejects_sets_that_may_be_swapped(save: Save, other: str) -> None:
    header = read_header(save("c.pth", {"state_dict": weights(1), other: weights(2)}))
    with pytest.raises(LayoutError, match=f"`state='state_dict'` or `state='{other}'`"):
        select(header)
    assert select(header, "state_dict").path == ("state_dict",)


@pytest.mark.parametrize(
    ("tree", "state", "message"),
    [
        ({"state_dict": weights()}, "ema", r"has no ema weights, only raw \(state_dict\)\. Use `state='raw'`"),
        (
            {"actor": weights(), "critic": weights()},
            "auto",
            r"There are tensors in actor, critic\. Choose with `state='actor'`\. To average several .* for each",
        ),
        # As StyleGAN2 has them: the average first, with the raw weights whose name it has.
        (
            {"d": weights(1), "net_g": weights(2), "net_g_averaged": weights(3)},
            "auto",
            r"Choose with `state='net_g_averaged'`, an average by its name, or `state='net_g'`\. To average several",
        ),
        (
            {"raw": {"nets": weights(1)}, "shadow": {"nets": weights(3)}},
            "auto",
            r"Choose with `state='shadow\.nets'`, an average by its name, or `state='raw\.nets'`\.",
        ),
        ({"epoch": 3, "args": argparse.Namespace(lr=1)}, "auto", "no tensor inside"),
        ({"state_dict": {}}, "auto", "'state_dict' holds no tensor"),
        (
            {"model": {"encoder": weights(), "decoder": weights()}, "optimizer": {"state": {0: weights()}}},
            "auto",
            r"tensors in model\.encoder, model\.decoder\. Choose with `state='model\.encoder'`\. To average several",
        ),
        ({"model": {"encoder": weights()}}, "model", r"'model' is no state dict: .* `state='model\.encoder'`\.$"),
        ({"nets": [weights()]}, "auto", r"There are tensors in nets\.0\. Choose with `state='nets\.0'`"),
        ({"optimizer": {"state": {0: weights()}, "param_groups": []}}, "auto", "no tensor inside"),
        ({"a": {"b": 1}}, "a.c", r"nothing at 'a\.c'\. a holds: b"),
        ({"a": {"b": 1}}, "a", "'a' is no state dict"),
        (weights(), "w", r"pth: 'w' is a tensor, not a state dict\. Give the path of a dict of tensors"),
        (weights(), "w.x", r"nothing at 'w\.x': 'w' is a tensor"),
        ({"n": 1.5}, "n", "'n' is a number, not"),
        ({"n": "x"}, "n", "'n' is a text, not"),
        ({"n": None}, "n", "'n' is None, not"),
        ({"n": [weights()]}, "n.1", r"nothing at 'n\.1': 'n' is a list"),
        ({"n": nn.ReLU()}, "n", r"'n' is a pickled object \(torch\.nn\.modules\.activation\.ReLU\), not"),
        ([torch.zeros(1)], "auto", "tensors without names"),
        (torch.zeros(1), "auto", "tensors without names"),
    ],
)
def test_select_names_what_is_there_if_the_weights_asked_for_are_not(
    save: Save, tree: Any, state: str, message: str
) -> None:
    header = read_header(save("c.pth", tree))
    with pytest.raises(LayoutError, match=message):
        select(header, state)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"model": net}, lambda net: {"model": None, "ema": net}])
def test_select_finds_the_tensors_of_a_pickled_module_without_its_class(save: Save, wrap: Any) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 2)))
    net[0].register_buffer("passing", torch.ones(1), persistent=False)
    net[2].add_module("tied", net[2][0])
    header = read_header(save("c.pth", wrap(net)))
    assert list(select(header).tensors) == list(net.state_dict())
    assert {name: spec.shape for name, spec in select(header).tensors.items()} == {  # type: ignore[union-attr]
        name: tuple(tensor.shape) for name, tensor in net.state_dict().items()
    }


def test_select_names_pickled_objects_without_tensors(save: Save) -> None:
    with pytest.raises(LayoutError, match=r"'model' is a pickled object \(torch\.nn\.modules\.activation\.ReLU\)"):
        select(read_header(save("c.pth", {"model": nn.ReLU()})))
    with pytest.raises(LayoutError, match=r"a pickled object \(torch\.nn\.modules\.activation\.ReLU\)"):
        select(read_header(save("d.pth", nn.ReLU())))


def test_select_ends_for_a_module_that_holds_itself_many_times_over(save: Save) -> None:
    net: nn.Module = nn.ReLU()
    for _ in range(60):
        net = nn.ModuleDict({"a": net, "b": net})
    net.add_module("me", nn.Linear(1, 1))
    assert list(select(read_header(save("c.pth", net))).tensors) == ["me.weight", "me.bias"]


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"net": weights(), "best_acc": torch.tensor(90.0)}, "net"),
        ({"model": {"enc": weights(), "scale": torch.ones(1)}}, "model.enc"),
        ({"w": torch.ones(1), "nets": {"a": weights()}}, "nets.a"),
    ],
)
def test_select_rejects_a_stray_tensor_beside_the_weights(save: Save, tree: Any, place: str) -> None:
    header = read_header(save("c.pth", tree))
    with pytest.raises(LayoutError, match=rf"not clear which are the weights\. Choose with `state='{place}'`\.$"):
        select(header)
    assert list(select(header, place).tensors) == ["w", "b"]


def test_select_suggests_no_list_of_tensors_beside_the_weights(save: Save) -> None:
    with pytest.raises(LayoutError, match=r"not clear .*Save the weights as one dict of names to tensors\.$"):
        select(read_header(save("c.pth", {"w": torch.ones(1), "layers": [torch.ones(1)]})))


def test_select_follows_a_dotted_path_to_numbered_sets(save: Save) -> None:
    header = read_header(save("c.pth", {0: weights(0), 1: {"net": weights(1)}}))
    with pytest.raises(LayoutError, match=r"There are tensors in 0, 1\.net\. Choose with `state='0'`\."):
        select(header)
    assert (select(header, "0").label, select(header, "0").path) == ("0", (0,))
    assert select(header, "1.net").path == (1, "net")


@pytest.mark.parametrize("state", ["auto", "model"])
@pytest.mark.parametrize(
    ("among", "message"),
    [
        ({**weights(), 3: torch.ones(1)}, r"the tensor 'model\.3' has a name that is no text"),
        ({**weights(), "x": np.ones(3)}, r"'model\.x' is a NumPy array, not a tensor\. Save it as one"),
        ({0: torch.ones(1)}, r"'model\.0' has a name that is no text"),
        ({"x": np.ones(3)}, r"'model\.x' is a NumPy array"),
    ],
)
def test_select_rejects_what_would_be_lost_from_a_state_dict(
    save: Save, among: dict[Any, Any], message: str, state: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        select(read_header(save("nested.pth", {"model": among})), state)
    with pytest.raises(LayoutError, match=message.replace(r"model\.", "")):
        select(read_header(save("flat.pth", among)))


@pytest.mark.parametrize("protocol", [2, 5])
def test_select_accepts_arrays_of_a_random_state_beside_the_weights(save: Save, protocol: int) -> None:
    tree = {**weights(), "rng": np.ones(3), "np_rng_state": np.ones(3)}
    assert list(select(read_header(save("c.pth", tree, pickle_protocol=protocol))).tensors) == ["w", "b"]
    with pytest.raises(LayoutError, match="'x' is a NumPy array"):
        select(read_header(save("d.pth", tree | {"x": np.ones(3)}, pickle_protocol=protocol)))


@pytest.mark.parametrize("extra", [torch.ones(3), io.BytesIO(b"x"), None, {"scale": torch.ones(1)}])
def test_select_accepts_the_extra_state_of_a_module_among_its_weights(save: Save, extra: Any) -> None:
    assert {"w", "b"} <= select(read_header(save("c.pth", {**weights(), "fc._extra_state": extra}))).tensors.keys()


@pytest.mark.parametrize(
    "key",
    [
        "optimizer", "optimizer_g", "optimizerG", "optimizers", "optimizer_states", "optim", "optim_g", "lr_schedulers",
        "lr_scheduler_state_dict", "opt_param_scheduler", "scaler", "rng_state", "cuda_rng_state", "metric",
    ],
)  # fmt: skip
def test_looks_like_training_state_knows_training_state_by_its_name(key: str) -> None:
    assert looks_like_training_state(key, [])
    assert not looks_like_training_state(f"x.{key}", [])


@pytest.mark.parametrize("key", ["epoch", "hyper_parameters", "args", "opt", "optimal_threshold", "metrics", 0])
def test_looks_like_training_state_passes_over_what_a_user_may_want(key: Any) -> None:
    assert not looks_like_training_state(key, {"lr": 0.1})
    assert looks_like_training_state(key, {"state": {}, "param_groups": []})
    assert not looks_like_training_state("optimizer", "adamw")


def test_select_finds_the_ema_of_nemo_in_a_file_beside_it(save: Save) -> None:
    header = read_header(save("X.ckpt", {"state_dict": weights(1), "global_step": 3}))
    other_file = save("X-EMA.ckpt", {"state_dict": weights(2), "global_step": 3})
    assert select(header).which == "raw"
    assert (select(read_header(other_file)).which, select(read_header(other_file)).layout) == ("ema", "nemo")
    with pytest.raises(LayoutError, match=rf"has no ema weights; they are in {other_file}"):
        select(header, "ema")
    assert select(read_header(other_file), "raw").which == "raw"


def test_select_finds_no_average_in_a_callback_of_lightning_that_has_not_begun(save: Save) -> None:
    for n, which in ((0, "raw"), (2, "ema")):
        state = {"n_averaged": n, "average_model_state": weights(2)}
        header = read_header(save("c.ckpt", {"state_dict": weights(1), "callbacks": {"MyAveraging": state}}))
        assert select(header).which == which


def test_select_takes_the_single_precision_average_of_fairseq(save: Save) -> None:
    half = {name: tensor.half() for name, tensor in weights(1).items()}
    extra = {"ema": half, "ema_fp32_params": {"w": weights(3.0)["w"]}}
    chosen = select(read_header(save("c.pt", {"model": weights(1), "extra_state": extra})))
    assert {name: spec.dtype.name for name, spec in chosen.tensors.items()} == {"w": "float32", "b": "float16"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("tree", "layout"),
    [
        ({"model": weights(1), "ema": weights(2)}, "dit"),
        ({"model": weights(1), "ema_state": weights(2)}, "d2go"),
        ({"model": weights(1), "model_avg": weights(2), "batch_idx_train": 3}, "icefall"),
        ({"student": weights(1, "module."), "teacher": weights(2)}, "dino"),
        (
            {"state_dict": weights(2), "current_model_state": weights(1), "averaging_state": {"n_averaged": 1}},
            "lightning",
        ),
        (
            {
                "state_dict": weights(2),
                "ema_state_dict": {"steps": torch.tensor(1), **weights(1, "module.")},
            },
            "mmengine",
        ),
        (
            {
                "initted": torch.tensor(True), "step": torch.tensor(1),
                **weights(1, "online_model."), **weights(2, "ema_model."),
            },
            "ema-pytorch",
        ),
    ],
)  # fmt: skip
def test_open_checkpoint_reads_raw_and_ema_of_each_library_the_right_way_round(
    save: Save, tree: Any, layout: str
) -> None:
    path = save("c.pth", tree)
    for which, value in (("ema", 2), ("raw", 1)):
        checkpoint = open_checkpoint(path, state=which)
        assert checkpoint.state.layout == layout
        assert {name.removeprefix("module."): tensor[0].item() for name, tensor in checkpoint.items()} == {
            "w": value,
            "b": value,
        }


def test_average_of_averages_without_their_online_models_lists_none_as_lost(save: Save, tmp_path: Path) -> None:
    count = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    for i in range(2):
        save(f"{i}.pth", {"net_state_dict": weights(i), "ema_state_dict": {**count, **weights(i, "ema_model.")}})
    report = average(tmp_path / "*.pth", state="ema_state_dict", out=tmp_path / "out.pth")
    assert not any("online_model" in entry for entry in report.dropped)
    assert any("initted" in entry for entry in report.dropped)


def test_select_finds_the_only_checkpoint_one_level_below(save: Save) -> None:
    optimizer = {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}
    inside = {"model": weights(1), "optim": optimizer}
    chosen = select(read_header(save("c.pth", {"app": inside, "step": 3})))
    assert (chosen.path, chosen.home, chosen.layout) == (("app", "model"), ("app", "model"), "model")
    with pytest.raises(LayoutError, match=r"Choose with `state='G\.model'`"):
        select(read_header(save("gan.pth", {"G": inside, "D": inside})))


@pytest.mark.parametrize("lead", ["quantizer", "vq"])
def test_select_takes_no_codebook_for_a_litema(save: Save, lead: str) -> None:
    tree = {
        "embed": torch.ones(2), f"{lead}.decay": torch.ones(()), f"{lead}.num_updates": torch.tensor(3),
        f"{lead}.embed": torch.zeros(2),
    }  # fmt: skip
    chosen = select(read_header(save("in.pth", tree)))
    assert (chosen.which, chosen.layout, list(chosen.tensors)) == ("raw", "plain", list(tree))


@pytest.mark.parametrize("teacher", [{"a": torch.ones(3)}, {"other": torch.ones(2)}])
def test_select_takes_no_teacher_of_another_model_for_an_average(save: Save, teacher: Any) -> None:
    chosen = select(read_header(save("in.pth", {"model": {"a": torch.ones(2)}, "teacher": teacher})))
    assert (chosen.which, chosen.path) == ("raw", ("model",))
    chosen = select(read_header(save("mean.pth", {"model": {"a": torch.ones(2)}, "teacher": {"a": torch.zeros(2)}})))
    assert (chosen.which, chosen.path) == ("ema", ("teacher",))


# Layouts from outside


@pytest.fixture
def registered() -> Iterator[Callable[[Layout], Layout]]:
    """Register layouts for the time of a test."""
    known: list[Layout] = []

    def add(layout: Layout) -> Layout:
        register(layout)
        known.append(layout)
        return layout

    yield add
    for layout in known:
        unregister(layout)


def test_register_makes_two_paths_a_layout_that_is_read_and_written(
    save: Save, tmp_path: Path, registered: Callable[[Layout], Layout]
) -> None:
    source = save("c.pth", {"net": weights(1.0), "net_avg": weights(3.0), "epoch": 4})
    other = save("d.pth", {"net": weights(1.0), "net_avg": weights(6.0), "epoch": 5})
    with pytest.raises(LayoutError, match="in no known layout"):
        open_checkpoint(source)
    registered(Layout("toy", "my loop: net and net_avg", raw=("net",), ema=("net_avg",)))

    assert open_checkpoint(source).state.layout == "toy"
    average([source, other], out=tmp_path / "avg.pth")
    found = load(tmp_path / "avg.pth")
    assert (list(found), found["net"]["w"].tolist()) == (["net", "epoch"], [4.5, 4.5])
    convert(source, to="timm", out=tmp_path / "timm.pth")
    convert(tmp_path / "timm.pth", to="toy", out=tmp_path / "toy.pth")
    found = load(tmp_path / "toy.pth")
    assert found.keys() == {"net", "net_avg", "epoch"}
    assert same_bits(found["net"], weights(1.0))
    assert same_bits(found["net_avg"], weights(3.0))


def test_register_makes_an_encoding_known_that_is_read_and_written(
    save: Save, tmp_path: Path, registered: Callable[[Layout], Layout]
) -> None:
    halves = Encoding(
        "toy",
        lambda node: isinstance(node, dict) and isinstance(node.get("averages"), list),
        lambda node, names, raw: {"ema": StateDict({name: tensor for name, tensor in node["averages"]})},
        lambda weights, content: {"averages": [(name, tensor) for name, tensor in weights.items()]},
        flat=False,
    )
    registered(Layout("toy", "pairs in a list", ema=(), ema_encoding=halves))
    source = save("c.pth", {"averages": list(weights(3).items())})

    assert open_checkpoint(source).state.label == "ema (the whole file)"
    convert(source, to="plain", out=tmp_path / "plain.safetensors")
    convert(tmp_path / "plain.safetensors", to="toy", out=tmp_path / "toy.pth")
    assert same_bits(dict(load(tmp_path / "toy.pth")["averages"]), weights(3))
    with pytest.raises(UsageError, match=r"`to='toy'` nests its weights, which safetensors cannot hold"):
        convert(source, to="toy", out=tmp_path / "toy.safetensors")


def test_unregister_leaves_nothing_behind(save: Save) -> None:
    before = (list(LAYOUTS), list(DETECTED))
    own = Encoding("toy", lambda node: node == "toy", lambda node, names, raw: {})
    toy = Layout("toy", "", raw=("net",), ema=("net_avg",), ema_encoding=own)
    register(toy)
    assert (DETECTED[0], encoding_of("toy")) == (toy, own)
    with pytest.raises(ValueError, match="there is a layout named 'toy' already"):
        register(toy)
    unregister(toy)
    assert (list(LAYOUTS), list(DETECTED), encoding_of("toy")) == (*before, None)


def test_layouts_are_named_in_no_module_but_their_own() -> None:
    folder = Path(ckpt_tools.__file__).parent
    code = {path: path.read_text() for path in folder.rglob("*.py")}
    named = [
        f"{path}: {match}" for path, text in code.items() for match in re.findall(r"\blayout(?:\.name)? [!=]= .*", text)
    ]
    assert [line for line in named if '"' in line] == []


# Weights that are not in the file


def zero3(model: nn.Module, threshold: int) -> dict[str, Any]:
    """Lay a `*_model_states.pt` out as DeepSpeed's engine does with ZeRO-3; smaller parameters stay whole."""
    module = OrderedDict(
        (name, torch.empty(0) if t.is_floating_point() and t.numel() > threshold else t)
        for name, t in model.state_dict().items()
    )
    shapes = OrderedDict((name, p.shape) for name, p in model.named_parameters())
    return {
        "module": module,
        "buffer_names": [name for name, _ in model.named_buffers()],
        "optimizer": None,
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "shared_params": {},
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": 30,
        "dp_world_size": 2,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 3}},
        "ds_version": "0.16.4",
    }


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    return nn.Sequential(layer, nn.BatchNorm1d(8))


@pytest.mark.parametrize("threshold", [0, 20])
@pytest.mark.parametrize("with_shapes", [True, False])
def test_select_rejects_the_placeholders_of_zero_3(threshold: int, with_shapes: bool, tmp_path: Path) -> None:
    tree = zero3(encoder(), threshold)
    if not with_shapes:
        del tree["param_shapes"]
    torch.save(tree, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save(tree["module"], tmp_path / "pytorch_model.bin")  # as transformers saves it without gathering
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    message = (
        r"model_states\.pt: module has '0\.[\w.]*weight' of shape \[0\].*_optim_states\.pt files, which are not here\."
    )
    for job in (
        lambda: average(path, state="module", out=tmp_path / "o.pth"),
        lambda: select(read_header(path), "module"),
    ):
        with pytest.raises(LayoutError, match=message):
            job()
    with pytest.raises(
        LayoutError, match=r"pytorch_model\.bin: raw \(the whole file\) has .* Give the folder that has"
    ):
        average(tmp_path / "pytorch_model.bin", out=tmp_path / "o.pth")
    assert not (tmp_path / "o.pth").exists()


def test_select_rejects_weights_of_other_shapes_than_param_shapes(tmp_path: Path) -> None:
    tree = zero3(encoder(), 1000)
    tree["module"]["0.linear1.bias"] = torch.ones(3)
    torch.save(tree, tmp_path / "m.pt")
    with pytest.raises(
        LayoutError, match=r"module has '0\.linear1\.bias' of shape \[3\], from which its 'param_shapes'"
    ):
        average(tmp_path / "m.pt", state="module", out=tmp_path / "o.pth")


def test_select_takes_the_whole_weights_of_zero_1_and_few_empty_ones(tmp_path: Path) -> None:
    tree = zero3(encoder(), 1000)
    tree["module"]["spare.weight"] = torch.empty(0)
    torch.save(tree, tmp_path / "mp_rank_00_model_states.pt")
    average(tmp_path / "mp_rank_00_model_states.pt", state="module", out=tmp_path / "o.pth")
    found = torch.load(tmp_path / "o.pth")["module"]
    assert found.keys() == tree["module"].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tree["module"].items())
