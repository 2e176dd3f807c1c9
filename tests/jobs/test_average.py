"""Averaging end to end: real files in, against float64 sums by NumPy, and out to the real libraries."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import types
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import load, same_bits
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import ckpt_tools
from ckpt_tools.errors import CorruptError, LayoutError, NumericsError, UsageError, WriteError
from ckpt_tools.storage.source import OpenFiles

Save = Callable[..., Path]


def bare(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def raw_states(paths: Sequence[Path], key: str) -> list[dict[str, torch.Tensor]]:
    """Read state dicts with torch alone, names put right by hand."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return [bare(torch.load(path, weights_only=True)[key]) for path in paths]


def oracle(states: Sequence[Mapping[str, torch.Tensor]], coefficients: Sequence[float]) -> dict[str, np.ndarray]:
    return {
        name: sum(c * s[name].double().numpy() for c, s in zip(coefficients, states, strict=True))
        for name in states[-1]
        if states[-1][name].is_floating_point()
    }


def assert_is_oracle(found: Mapping[str, torch.Tensor], want: Mapping[str, np.ndarray]) -> None:
    for name, values in want.items():
        np.testing.assert_array_max_ulp(found[name].numpy(), values.astype(np.float32), maxulp=1)


def ema_by_hand(n: int, decay: float) -> list[float]:
    coefficients = [1.0]
    for _ in range(n - 1):
        coefficients = [c * decay for c in coefficients] + [1 - decay]
    return coefficients


def test_average_ema_equals_the_float64_oracle(runs: list[Path], tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(runs, len(runs))
    report = ckpt_tools.average(shuffled, mode="ema", decay=0.99, out=tmp_path / "out.pth")
    assert [Path(i.path).name for i in report.inputs] == [f"checkpoint-{i}.pth" for i in range(1, 13)]
    assert {i.state for i in report.inputs} == {"ema (state_dict_ema)"}
    states = raw_states(runs, "state_dict_ema")
    found = load(tmp_path / "out.pth")["state_dict"]
    assert list(found) == list(states[0])
    assert_is_oracle(found, oracle(states, ema_by_hand(12, 0.99)))


def test_average_copies_integers_from_the_last_checkpoint(runs: list[Path], tmp_path: Path) -> None:
    ckpt_tools.average(runs, state="raw", out=tmp_path / "out.pth")
    last = raw_states(runs, "state_dict")[-1]
    found = load(tmp_path / "out.pth")["state_dict"]
    counters = [name for name in found if name.endswith("num_batches_tracked")]
    assert len(counters) == 3
    assert all(found[name].dtype == torch.int64 and found[name].equal(last[name]) for name in counters)


def test_average_divides_by_the_number_of_existing_files(save: Save, tmp_path: Path) -> None:
    paths = [save(f"{i}.pth", {"w": torch.tensor([float(i)])}) for i in (1, 2, 6)]
    ckpt_tools.average(paths, last=10, out=tmp_path / "out.pth")
    assert load(tmp_path / "out.pth")["w"].tolist() == [3.0]


def test_average_handles_scalars_views_and_empty_tensors(save: Save, tmp_path: Path) -> None:
    def state() -> dict[str, torch.Tensor]:
        base = torch.randn(6, 8)
        return {
            "logit_scale": torch.randn(()), "none": torch.empty(0, 3), "view": base.t()[1:, ::2],
            "expanded": torch.randn(3, 1).expand(3, 4), "base": base,
        }  # fmt: skip

    states = [state() for _ in range(3)]
    ckpt_tools.average([save(f"{i}.pth", s) for i, s in enumerate(states)], out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in states[0].items()}
    assert_is_oracle(found, oracle(states, [1 / 3] * 3))


def test_average_reads_objects_of_missing_libraries(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lightning keeps omegaconf's in its hyper-parameters."""
    library = types.ModuleType("omegaconf")
    library.DictConfig = type("DictConfig", (), {"__module__": "omegaconf"})
    with monkeypatch.context() as installed:
        installed.setitem(sys.modules, "omegaconf", library)
        tree = {"state_dict": {"w": torch.ones(2)}, "epoch": 3, "hyper_parameters": {"cfg": library.DictConfig()}}
        path = save("last.ckpt", tree)
    report = ckpt_tools.average(path, out=tmp_path / "out.pth")
    assert report.dropped == ("hyper_parameters.cfg",)
    assert load(tmp_path / "out.pth") | {"state_dict": None} == {"state_dict": None, "epoch": 3, "hyper_parameters": {}}
    assert ckpt_tools.open_checkpoint(path).foreign == {"omegaconf.DictConfig": 1}


def test_average_of_copies_is_the_copy(save: Save, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=7).double()
    state = model.state_dict() | {"half": torch.randn(50).half(), "bf": torch.randn(50).bfloat16()}
    paths = [save(f"c-{i}.pth", {"state_dict": state, "epoch": i}) for i in range(5)]
    for mode in ("uniform", "ema"):
        ckpt_tools.average(paths, mode=mode, out=tmp_path / f"{mode}.pth")
        assert same_bits(load(tmp_path / f"{mode}.pth")["state_dict"], state)


def test_average_keeps_the_container_that_timm_loads(save: Save, tmp_path: Path) -> None:
    from timm.models import load_checkpoint

    model = timm.create_model("test_resnet", num_classes=7)
    paths = []
    for i in range(2):
        torch.manual_seed(i)
        other = timm.create_model("test_resnet", num_classes=7)
        optimizer = torch.optim.AdamW(other.parameters())
        other(torch.randn(2, 3, 64, 64)).sum().backward()
        optimizer.step()
        ema = nn.DataParallel(other).state_dict()
        tree = {
            "epoch": i, "arch": "test_resnet", "state_dict": other.state_dict(), "state_dict_ema": ema, "version": 2,
            "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=0.1), "amp_scaler": {"scale": 2.0},
            "metric": 71.0,
        }  # fmt: skip
        paths.append(save(f"checkpoint-{i}.pth.tar", tree))
    report = ckpt_tools.average(paths, out=tmp_path / "out.pth")
    tree = load(tmp_path / "out.pth")
    assert list(tree) == ["epoch", "arch", "state_dict", "version", "args"]
    assert (tree["epoch"], tree["arch"], tree["args"]) == (1, "test_resnet", {"lr": 0.1})
    assert set(report.dropped) >= {"optimizer", "amp_scaler", "state_dict_ema", "metric"}
    assert tree["state_dict"]._metadata["bn1"] == {"version": 2}
    load_checkpoint(model, str(tmp_path / "out.pth"))
    assert same_bits(model.state_dict(), tree["state_dict"])


@pytest.mark.parametrize(
    ("around", "kept", "gone"),
    [
        # As MosaicML's Composer, torch's recipe for FSDP, a script of one's own, and fastai keep them.
        (
            lambda w, o: {"state": {"model": w, "optimizers": {"Adam": o}, "schedulers": {"a": 1}, "run_name": "x"}},
            {"state": {"model": {}, "run_name": "x"}},
            {"state.optimizers", "state.schedulers"},
        ),
        (lambda w, o: {"app": {"model": w, "optim": o}}, {"app": {"model": {}}}, {"app.optim"}),
        (
            lambda w, o: {"net": w, "trainer": {"lr": 1, "inner": {"opt": o, "rng_state": torch.ones(2)}, "epoch": 2}},
            {"net": {}, "trainer": {"lr": 1, "inner": {}, "epoch": 2}},
            {"trainer.inner.opt", "trainer.inner.rng_state"},
        ),
        (
            lambda w, o: {"model": w, "opt": {"state": [{"grad_avg": torch.ones(9)}], "hypers": [{"lr": 0.1}]}},
            {"model": {}},
            {"opt"},
        ),
        (lambda w, o: {"net": w, "run": {"gan": [o, o], "lr": 1}}, {"net": {}, "run": {"lr": 1}}, {"run.gan"}),
        # Configuration, and modules with such names.
        (
            lambda w, o: {"model": {"scheduler.w": torch.ones(2)}, "config": {"optimizer": {"name": "adam"}}},
            {"model": {}, "config": {"optimizer": {"name": "adam"}}},
            set(),
        ),
    ],
)
def test_average_leaves_training_state_out_wherever_it_is(
    save: Save, tmp_path: Path, around: Any, kept: Any, gone: set[str]
) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    paths = [save(f"{i}.pth", around(model.state_dict(), optimizer.state_dict())) for i in (1, 2)]
    state = "net" if "net" in kept else "auto"
    report = ckpt_tools.average(paths, state=state, out=tmp_path / "out.pth")

    def without_weights(node: Any) -> Any:
        is_dict = isinstance(node, dict)
        return {k: without_weights(v) for k, v in node.items() if not isinstance(v, torch.Tensor)} if is_dict else node

    assert set(report.dropped) == gone
    assert without_weights(load(tmp_path / "out.pth")) == kept


@pytest.mark.parametrize("key", [0, 1.5, None, True, ("x", 1)])
def test_average_copies_tensors_beside_the_weights_under_keys_that_are_no_text(
    key: object, save: Save, tmp_path: Path
) -> None:
    beside = torch.arange(3.0)
    ckpt_tools.average([save("a.pth", {"model": {"w": torch.ones(2)}, key: {"v": beside}})], out=tmp_path / "out.pth")
    assert torch.equal(load(tmp_path / "out.pth")[key]["v"], beside)


def test_average_of_a_checkpoint_that_contains_itself_leaves_its_optimizer_out(save: Save, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    inner: dict[str, Any] = {"my_opt": torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), "lr": 1}
    inner["self"] = inner
    path = save("loop.pth", {"model": model.state_dict(), "run": inner})
    assert ckpt_tools.average(path, out=tmp_path / "out.pth").dropped == ("run.my_opt",)
    assert load(tmp_path / "out.pth")["run"]["lr"] == 1


def test_average_keeps_the_layout_of_torchvision(save: Save, tmp_path: Path) -> None:
    import torchvision
    from torch.optim.swa_utils import AveragedModel

    model = torchvision.models.squeezenet1_1(num_classes=3)
    averaged = AveragedModel(model)
    tree = {
        "model": model.state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 4,
        "model_ema": averaged.state_dict(),
    }
    path = save("model_4.pth", tree)
    ckpt_tools.average([path, save("model_5.pth", tree | {"epoch": 5})], out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert list(found) == ["model", "epoch"]
    model.load_state_dict(found["model"])


def test_average_keeps_a_flat_state_dict_and_adds_provenance(save: Save, tmp_path: Path) -> None:
    paths = [save(f"step_{i}.pth", {"w": torch.full((2,), float(i))}) for i in (2, 10)]
    ckpt_tools.average(paths, out=tmp_path / "out.pth", hash=True)
    assert {k: v.tolist() for k, v in load(tmp_path / "out.pth").items()} == {"w": [6.0, 6.0]}
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        said = json.loads(archive.read("archive/ckpt_tools.json"))
    assert [(i["name"], i["step"], i["coefficient"]) for i in said["inputs"]] == [
        ("step_2.pth", 2, 0.5),
        ("step_10.pth", 10, 0.5),
    ]
    assert said["inputs"][0]["sha256"] == {"step_2.pth": hashlib.sha256(paths[0].read_bytes()).hexdigest()}
    assert ckpt_tools.open_checkpoint(tmp_path / "out.pth").provenance == said


def test_average_lines_up_wrapped_and_unwrapped_names(save: Save, tmp_path: Path) -> None:
    names = ["module.", "_orig_mod.module.", "", "module._orig_mod."]
    paths = [
        save(f"c{i}.pth", {f"{lead}w": torch.tensor([float(i)]), f"{lead}b": torch.tensor([1.0])})
        for i, lead in enumerate(names)
    ]
    ckpt_tools.average(paths, out=tmp_path / "out.pth")
    assert {k: v.tolist() for k, v in load(tmp_path / "out.pth").items()} == {"w": [1.5], "b": [1.0]}


def test_average_renames_module_versions_with_names(save: Save, tmp_path: Path) -> None:
    wrapped = nn.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    ckpt_tools.average([save("c.pth", wrapped.state_dict())], out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert found._metadata == wrapped.module.state_dict()._metadata
    wrapped.module.load_state_dict(found)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def test_average_writes_tied_tensors_once(save: Save, tmp_path: Path) -> None:
    paths = [save(f"{i}.pth", Tied().state_dict()) for i in range(3)]
    report = ckpt_tools.average(paths, out=tmp_path / "out.pth")
    assert report.tied == ("head.weight",)
    found = load(tmp_path / "out.pth")
    assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()
    states = [torch.load(path) for path in paths]
    assert_is_oracle(found, oracle(states, [1 / 3] * 3))


def test_average_to_safetensors_keeps_one_name_of_a_tie_and_records_it(save: Save, tmp_path: Path) -> None:
    paths = [save(f"{i}.pth", Tied().state_dict()) for i in range(2)]
    ckpt_tools.average(paths, out=tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert list(file.keys()) == ["embed.weight"]
        assert file.metadata()["head.weight"] == "embed.weight"
        assert file.metadata()["format"] == "pt"
    model = Tied()
    load_model(model, tmp_path / "out.safetensors")
    ckpt_tools.average(paths, out=tmp_path / "untied.safetensors", untie=True)
    untied = load_file(tmp_path / "untied.safetensors")
    assert untied["head.weight"].equal(model.head.weight)
    assert untied["embed.weight"].equal(model.head.weight)


def test_average_unties_tensors_that_one_file_unties(save: Save, tmp_path: Path) -> None:
    shared = torch.ones(3)
    one = save("1.pth", {"a": shared, "b": shared})
    two = save("2.pth", {"a": torch.zeros(3), "b": torch.full((3,), 3.0)})
    ckpt_tools.average([one, two], out=tmp_path / "out.pth")
    assert {k: v.tolist() for k, v in load(tmp_path / "out.pth").items()} == {"a": [0.5] * 3, "b": [2.0] * 3}


def test_average_lines_up_safetensors_aliases_and_torch_ties(save: Save, tmp_path: Path) -> None:
    one, two = Tied(), Tied()
    save_model(one, str(tmp_path / "1.safetensors"))
    ckpt_tools.average([tmp_path / "1.safetensors", save("2.pth", two.state_dict())], out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert_is_oracle(found, oracle([one.state_dict(), two.state_dict()], [0.5, 0.5]))


def test_average_mixes_formats_and_writes_that_of_the_suffix(tmp_path: Path, save: Save) -> None:
    states = [{"w": torch.randn(5, 3), "n": torch.tensor(i)} for i in range(3)]
    save_file(states[0], tmp_path / "1.safetensors")
    paths = [
        tmp_path / "1.safetensors",
        save("2.pth", states[1]),
        save("3.pth", states[2], _use_new_zipfile_serialization=False),
    ]
    for suffix in (".pth", ".safetensors"):
        ckpt_tools.average(paths, out=tmp_path / f"out{suffix}")
    a, b = load(tmp_path / "out.pth"), load_file(tmp_path / "out.safetensors")
    assert_is_oracle(a, oracle(states, [1 / 3] * 3))
    assert a["w"].equal(b["w"])
    assert a["n"].item() == b["n"].item() == 2


def test_average_rounds_once_to_the_output_dtype(tmp_path: Path, save: Save) -> None:
    states = [
        {"w": torch.randn(500), "n": torch.tensor(3), "c": torch.randn(3, dtype=torch.complex64)} for _ in range(3)
    ]
    paths = [save(f"{i}.pth", state) for i, state in enumerate(states)]
    ckpt_tools.average(paths, out=tmp_path / "out.pth", dtype="fp16")
    found = load(tmp_path / "out.pth")
    assert (found["w"].dtype, found["n"].dtype, found["c"].dtype) == (torch.float16, torch.int64, torch.complex64)
    mean = sum(state["w"].double().numpy() for state in states) / 3
    np.testing.assert_array_max_ulp(found["w"].numpy(), mean.astype(np.float16), maxulp=1)


def test_average_union_averages_over_files_with_the_tensor(tmp_path: Path, save: Save) -> None:
    paths = [
        save("1.pth", {"a": torch.ones(1), "b": torch.full((1,), 7.0)}),
        save("2.pth", {"a": torch.full((1,), 3.0)}),
    ]
    ckpt_tools.average(paths, out=tmp_path / "out.pth", keys="union")
    assert {k: v.item() for k, v in load(tmp_path / "out.pth").items()} == {"a": 2.0, "b": 7.0}


def test_average_union_rejects_weights_that_cancel(tmp_path: Path, save: Save) -> None:
    w, b = torch.ones(2), torch.ones(3)
    paths = [save("1.pth", {"w": w, "b": b}), save("2.pth", {"w": w, "b": 2 * b}), save("3.pth", {"w": w})]
    for pair in ([1.0, -1.0], [0.3, -0.1 - 0.2]):  # -0.1 - 0.2 is 0.3 but for rounding
        with pytest.raises(UsageError, match="that have 'b' weigh 0 together"):
            ckpt_tools.average(paths, out=tmp_path / "o.pth", keys="union", mode="weights", weights=[*pair, 1.0])
    # A small share is a share: a tensor of the oldest file alone, in a long and fast average.
    ckpt_tools.average(
        [save("1.pth", {"w": w, "b": b}), *(save(f"{i}.pth", {"w": i * w}) for i in range(2, 70))],
        out=tmp_path / "o.pth", keys="union", mode="ema", decay=0.5,
    )  # fmt: skip
    assert load(tmp_path / "o.pth")["b"].equal(b)


def test_average_ignores_values_of_a_file_with_weight_zero(tmp_path: Path, save: Save) -> None:
    first, last = torch.randn(5), torch.full((5,), -float("inf"))
    paths = [save("1.pth", {"w": first}), save("2.pth", {"w": last})]
    ckpt_tools.average(paths, out=tmp_path / "o.pth", mode="ema", decay=1.0)
    assert load(tmp_path / "o.pth")["w"].equal(first)


@pytest.mark.parametrize("options", [{"last": 1}, {"buffers": "last"}, {"keys": "union"}])
def test_average_rejects_nan_in_a_copied_tensor(tmp_path: Path, save: Save, options: dict[str, Any]) -> None:
    bad = torch.tensor([1.0, float("nan")])
    name = "bn.running_mean" if "buffers" in options else "b"
    state = {"w": torch.ones(2), "bn.running_mean": torch.ones(2)}
    paths = [save("1.pth", state), save("2.pth", state | {name: bad})]
    with pytest.raises(NumericsError, match=r"2\.pth: '(b|bn\.running_mean)' holds NaN at \[1\]"):
        ckpt_tools.average(paths, out=tmp_path / "o.pth", **options)
    assert not (tmp_path / "o.pth").exists()
    ckpt_tools.average(paths, out=tmp_path / "o.pth", allow_nonfinite=True, **options)
    # What stands beside the weights is nobody's to judge.
    ckpt_tools.average(save("3.pth", {"state_dict": {"w": torch.ones(2)}, "best": bad}), out=tmp_path / "best.pth")
    assert load(tmp_path / "best.pth")["best"].isnan().tolist() == [False, True]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("how", ["replaced", "overwritten"])
def test_average_rejects_a_file_replaced_after_its_header_was_read(tmp_path: Path, suffix: str, how: str) -> None:
    write = torch.save if suffix == ".pth" else save_file
    paths = [tmp_path / f"{i}{suffix}" for i in range(3)]
    for i, path in enumerate(paths):
        write({"a": torch.full((3,), float(i)), "b": torch.zeros(30)}, path)
    later = tmp_path / "later"
    write({"b": torch.ones(30), "a": torch.zeros(3)}, later)

    def meanwhile(_: object) -> None:
        if how == "replaced":
            later.replace(paths[1])
        else:
            paths[1].write_bytes(later.read_bytes())

    with pytest.raises(CorruptError, match=rf"1{suffix}: changed while it was read"):
        ckpt_tools.average(paths, out=tmp_path / "o.pth", on_plan=meanwhile)
    assert not (tmp_path / "o.pth").exists()


def test_open_checkpoint_notices_that_its_file_was_replaced(tmp_path: Path, save: Save) -> None:
    checkpoint = ckpt_tools.open_checkpoint(save("a.pth", {"w": torch.ones(3)}))
    save("b.pth", {"v": torch.zeros(90), "w": torch.zeros(3)}).replace(tmp_path / "a.pth")
    with pytest.raises(CorruptError, match=r"a\.pth: changed while it was read"):
        checkpoint["w"]


def test_average_copies_running_statistics_with_buffers_last(tmp_path: Path, save: Save) -> None:
    paths = [
        save(f"{i}.pth", {"bn.running_mean": torch.full((1,), float(i)), "bn.weight": torch.full((1,), float(i))})
        for i in (1, 3)
    ]
    ckpt_tools.average(paths, out=tmp_path / "out.pth", buffers="last")
    assert {k: v.item() for k, v in load(tmp_path / "out.pth").items()} == {"bn.running_mean": 3.0, "bn.weight": 2.0}


def test_average_keeps_entries_beside_the_weights(tmp_path: Path, save: Save) -> None:
    queue = torch.randn(4, 4).t()
    tree = {
        "teacher": {"w": torch.ones(2)},
        "state_dict": {"w": torch.ones(2)},
        "queue": queue,
        "names": ["a", ("b", {"c"})],
    }
    ckpt_tools.average([save("1.pth", tree)], out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert found["queue"].equal(queue)
    assert found["names"] == ["a", ("b", {"c"})]
    assert found["state_dict"]["w"].equal(torch.ones(2))
    assert "teacher" not in found  # DINO's average


def test_average_rejects_a_mixture_of_raw_and_ema(tmp_path: Path, save: Save) -> None:
    w = {"w": torch.ones(1)}
    paths = [save("1.pth", {"state_dict": w, "state_dict_ema": w}), save("2.pth", {"state_dict": w})]
    with pytest.raises(LayoutError, match=r"1\.pth holds EMA weights, 2\.pth does not \(1 of 2 do\).*`state='raw'`"):
        ckpt_tools.average(paths, out=tmp_path / "out.pth")


@pytest.mark.parametrize(
    ("raw", "ema"),
    [("model010000.pt", "ema_0.9999_010000.pt"), ("X.ckpt", "X-EMA.ckpt"), ("unet/1.pt", "unet_ema/1.pt")],
)
def test_average_rejects_a_mixture_of_raw_and_ema_by_file_names(tmp_path: Path, save: Save, raw: str, ema: str) -> None:
    paths = [save(raw, {"w": torch.zeros(1)}), save(ema, {"w": torch.ones(1)})]
    with pytest.raises(
        LayoutError,
        match=rf"{ema} holds EMA weights, {raw} does not \(1 of 2 do\)\.|looks like an EMA by name: {ema}\.",
    ):
        ckpt_tools.average(paths, out=tmp_path / "out.pth")
    ckpt_tools.average(paths, state="raw", out=tmp_path / "out.pth")
    assert load(tmp_path / "out.pth")["w"].item() == 0.5


def test_average_keeps_shards_and_companions(tmp_path: Path) -> None:
    states = []
    for i in range(2):
        folder = tmp_path / f"checkpoint-{i + 1}"
        folder.mkdir()
        parts = {
            "model-00001-of-00002.safetensors": {"b": torch.randn(9)},
            "model-00002-of-00002.safetensors": {"a": torch.randn(4, 4)},
        }
        for name, part in parts.items():
            save_file(part, folder / name, metadata={"format": "pt"})
        weight_map = {key: name for name, part in parts.items() for key in part}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 100}, "weight_map": weight_map})
        )
        (folder / "config.json").write_text("{}")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 500 * (i + 1)}))
        states.append({key: value for part in parts.values() for key, value in part.items()})
    report = ckpt_tools.average([tmp_path / "checkpoint-2", tmp_path / "checkpoint-1"], out=tmp_path / "soup")
    assert [i.step for i in report.inputs] == [500, 1000]
    out = tmp_path / "soup"
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 9 * 4 + 16 * 4
    found = {key: load_file(out / name)[key] for key, name in index["weight_map"].items()}
    assert_is_oracle(found, oracle(states, [0.5, 0.5]))
    ckpt_tools.average(tmp_path / "soup", out=tmp_path / "one.safetensors", include_outputs=True)
    assert same_bits(dict(sorted(load_file(tmp_path / "one.safetensors").items())), dict(sorted(found.items())))


def test_average_shards_by_size(tmp_path: Path, save: Save) -> None:
    state = {f"w{i}": torch.randn(100) for i in range(5)}
    ckpt_tools.average([save("1.pth", state)], out=tmp_path / "out", max_shard_size="1kB")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json"]
    opened = ckpt_tools.open_checkpoint(tmp_path / "out")
    assert same_bits({k: opened[k] for k in state}, state)


def test_average_names_the_default_output_by_the_inputs(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.ones(1)}, "1.safetensors")
    assert ckpt_tools.average("1.safetensors").out == "averaged.safetensors"
    assert ckpt_tools.average(["1.safetensors", save("2.pth", {"w": torch.zeros(1)})]).out == "averaged.pth"


def test_average_leaves_nothing_behind_on_failure(tmp_path: Path, save: Save) -> None:
    good = save("in/1.pth", {"w": torch.ones(3)})
    bad = save("in/2.pth", {"w": torch.tensor([1.0, float("nan"), 0.0])})
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (good, bad)}
    with pytest.raises(NumericsError, match=r"2\.pth: 'w' holds NaN at \[1\]"):
        ckpt_tools.average([good, bad], out=tmp_path / "out.pth")
    with pytest.raises(WriteError, match="is one of the inputs"):
        ckpt_tools.average([good], out=good, force=True)
    bad.write_bytes(bad.read_bytes()[:-30])
    with pytest.raises(CorruptError, match="truncated or damaged"):
        ckpt_tools.average([good, bad], out=tmp_path / "out.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    assert (good.read_bytes(), good.stat().st_mtime_ns) == before[good]


def test_average_dry_run_reads_no_payload_and_writes_nothing(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("payload was read")

    monkeypatch.setattr(OpenFiles, "open", refuse)
    report = ckpt_tools.average(runs, out=tmp_path / "out.pth", dry_run=True)
    assert not report.written
    assert report.bytes_read > 12 * 60_000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "median"}, "uniform, ema, weights"),
        ({"mode": "uniform", "decay": 0.9}, "`decay` goes with `mode='ema'`"),
        ({"mode": "ema", "decay": 1.5}, r"outside \[0, 1\]"),
        ({"mode": "ema", "per_step": True, "warmup": "timm"}, "cannot go together"),
        ({"mode": "weights"}, "needs `weights`"),
        ({"mode": "weights", "weights": [1, 2]}, "2 numbers for 12 checkpoints"),
        ({"mode": "weights", "weights": [1, -1]}, "sum to 0"),
        ({"buffers": "first"}, "average, last"),
        ({"dtype": "int8"}, "`dtype` is one of"),
        ({"threads": 0}, "whole number from 1 to 256"),
        ({"threads": 100_000}, "whole number from 1 to 256"),
        ({"threads": 1.5}, "whole number from 1 to 256"),
        ({"mode": "weights", "weights": "1,2"}, "takes numbers, not '1'"),
        ({"mode": "weights", "weights": [1e308] * 12}, "too large to be summed"),
        ({"mode": "weights", "weights": [1e308] * 12, "normalize": False}, "too large to be summed"),
        ({"mode": "ema", "decay": "0.9"}, "takes numbers, not '0.9'"),
        ({"max_shard_size": "many"}, "is not a size"),
        ({"out": "x.pht"}, r"\.pht is not a known suffix\. Did you mean \.pt or \.pth\?"),
        ({"out": "x.pth", "max_shard_size": "1GB"}, "needs a folder"),
    ],
)
def test_average_rejects_bad_options_before_any_work(runs: list[Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ckpt_tools.average(runs, **options)


def test_average_notes_a_decay_near_one(runs: list[Path], tmp_path: Path) -> None:
    report = ckpt_tools.average(runs, mode="ema", decay=0.9999, out=tmp_path / "out.pth", dry_run=True)
    assert any("checkpoint-1.pth, holds 99.9%" in note for note in report.notes)


def test_average_places_a_nested_ema_where_raw_weights_belong(tmp_path: Path, save: Save) -> None:
    paths = [save(f"{i}.pth", {"app": {"ema": {"w": torch.full((2,), float(i))}, "step": i}}) for i in (1, 2)]
    ckpt_tools.average(paths, out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert found["app"]["model"]["w"].tolist() == [1.5, 1.5]
    assert (found["app"].keys(), found["app"]["step"]) == ({"model", "step"}, 2)
    assert dict(ckpt_tools.open_checkpoint(tmp_path / "out.pth"))["w"].tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"),
        ("emb.lora_embedding_A.default", "emb.lora_embedding_B.default"),
        ("attn.wq.lora_A", "attn.wq.lora_B"),
        ("layers.0.q_proj.lora_a.weight", "layers.0.q_proj.lora_b.weight"),
        ("lora_unet_mid_to_q.lora_down.weight", "lora_unet_mid_to_q.lora_up.weight"),
        ("to_q_lora.down.weight", "to_q_lora.up.weight"),
    ],
)
def test_average_notes_that_lora_factors_are_averaged_apart(tmp_path: Path, save: Save, a: str, b: str) -> None:
    torch.manual_seed(0)
    states = [{a: torch.randn(2, 8), b: torch.randn(8, 2)} for _ in range(2)]
    paths = [save(f"{i}.pth", state) for i, state in enumerate(states)]
    report = ckpt_tools.average(paths, out=tmp_path / "out.pth")
    (note,) = report.notes
    assert note.startswith(f"'{a}' is a factor of a LoRA update. The factors are averaged apart")
    found = load(tmp_path / "out.pth")
    products = torch.stack([state[b] @ state[a] for state in states]).mean(0)
    assert not torch.allclose(found[b] @ found[a], products, atol=0.1)
    assert ckpt_tools.average(paths[0], out=tmp_path / "one.pth").notes == ()


def test_average_notes_no_lora_where_names_are_only_alike(tmp_path: Path, save: Save) -> None:
    names = ("flora.a.weight", "exploratory.lora_about", "lora_alpha", "explora_a.weight")
    paths = [save(f"{i}.pth", dict.fromkeys(names, torch.full((2,), float(i)))) for i in range(2)]
    assert ckpt_tools.average(paths, out=tmp_path / "out.pth").notes == ()
