"""Updating an average: equal to the average of all checkpoints in one go, with one read of each new one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load, same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckpt_tools
from ckpt_tools import average, convert, open_checkpoint
from ckpt_tools.errors import LayoutError, SeriesError, UsageError, WriteError
from ckpt_tools.formats import header as headers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {"float32": 23, "bfloat16": 7, "float16": 10}
EVEN = [{}, {"decay": 0.9}, {"decay": 0.7, "bias_correction": True}, {"decay": 0.97, "warmup": "litema"}]
ALONG_STEPS = [
    {"decay": 0.999, "per_step": True},
    {"half_life": 300},
    {"sigma_rel": 0.12},
    {"gamma": 6.0},
    {"mode": "ema", "warmup": "timm", "decay": 0.99, "warmup_power": 0.8},
]


def series(folder: Path, n: int, dtype: torch.dtype = torch.float32, *, seed: int = 0, first: int = 100) -> list[Path]:
    """Write checkpoints whose weights walk at random; steps are uneven, and stored."""
    generator = torch.Generator().manual_seed(seed)
    at, step, paths = torch.randn(64, generator=generator), first, []
    for i in range(n):
        at = at + 0.1 * torch.randn(64, generator=generator)
        path = folder / f"c-{i}.pth"
        torch.save({"model": {"w": at.to(dtype), "n": torch.tensor(i)}, "global_step": step}, path)
        paths.append(path)
        step += 50 + 10 * (i % 3)
    return paths


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load(path)["model"])


def assert_within_an_ulp(found: torch.Tensor, want: torch.Tensor, other: torch.Tensor, dtype: str) -> None:
    """Of the dtype, where the larger of the result and the average before is."""
    size = np.maximum(np.abs(want.double().numpy()), np.abs(other.double().numpy()))
    ulp = np.exp2(np.floor(np.log2(size)) - BITS[dtype])
    assert (np.abs(found.double().numpy() - want.double().numpy()) <= ulp).all()


def facts(path: Path) -> dict[str, Any]:
    said = open_checkpoint(path).provenance
    assert said is not None
    return {key: value for key, value in said.items() if key != "updates"}


@pytest.mark.parametrize("options", [*EVEN, *ALONG_STEPS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_updated_average_is_that_of_one_go(options: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    paths = series(tmp_path, 6, DTYPES[dtype])
    average(paths[:5], **options, out=tmp_path / "five.pth")
    report = average(paths[5], update=tmp_path / "five.pth", out=tmp_path / "six.pth")
    average(paths, **options, out=tmp_path / "go.pth")
    found, want = weights(tmp_path / "six.pth"), weights(tmp_path / "go.pth")
    assert found["n"].equal(want["n"])
    assert found["w"].dtype == want["w"].dtype == DTYPES[dtype]
    assert_within_an_ulp(found["w"], want["w"], weights(tmp_path / "five.pth")["w"], dtype)
    assert facts(tmp_path / "six.pth") == facts(tmp_path / "go.pth")
    assert [i.name for i in report.inputs] == [path.name for path in paths]


def by_hand(paths: Sequence[Path], coefficients: Sequence[float]) -> np.ndarray[Any, Any]:
    return sum(c * load(path)["model"]["w"].double().numpy() for c, path in zip(coefficients, paths, strict=True))  # type: ignore[return-value]


@settings(max_examples=25)
@given(
    n=st.integers(1, 6),
    new=st.integers(1, 4),
    options=st.sampled_from([*EVEN, *ALONG_STEPS]),
    seed=st.integers(0, 1000),
)
@example(n=1, new=1, options={}, seed=0)
def test_several_checkpoints_are_added_as_in_the_float64_sum(
    tmp_path: Path, n: int, new: int, options: dict[str, Any], seed: int
) -> None:
    paths = series(tmp_path, n + new, seed=seed)
    average(paths[:n], **options, dtype="float64", out=tmp_path / "old.pth", force=True)
    report = average(paths[n:], update=tmp_path / "old.pth", out=tmp_path / "new.pth", force=True)
    want = by_hand(paths, [i.coefficient for i in report.inputs])
    np.testing.assert_allclose(weights(tmp_path / "new.pth")["w"].numpy(), want, rtol=1e-13, atol=1e-14)


def test_a_mean_is_updated_by_1_over_n(tmp_path: Path) -> None:
    paths = series(tmp_path, 4)
    average(paths[:3], out=tmp_path / "three.pth")
    report = average(paths[3], update=tmp_path / "three.pth", dry_run=True, out=tmp_path / "four.pth")
    assert [i.coefficient for i in report.inputs] == [0.25] * 4
    assert any("three.pth counts 0.75 of the sum, for its 3 inputs" in note for note in report.notes)
    assert not (tmp_path / "four.pth").exists()


def test_an_update_reads_the_average_and_the_new_checkpoint_alone(tmp_path: Path) -> None:
    paths = series(tmp_path, 6)
    average(paths[:5], out=tmp_path / "five.pth")
    for path in paths[:5]:
        path.unlink()
    report = average(paths[5], update=tmp_path / "five.pth", out=tmp_path / "six.pth")
    assert report.bytes_read == 2 * 64 * 4 + 8


def test_an_average_is_replaced_in_place_by_force_alone(tmp_path: Path) -> None:
    paths, out = series(tmp_path, 4), tmp_path / "averaged.pth"
    average(paths[:3], out=out)
    before = out.read_bytes()
    with pytest.raises(WriteError, match="exists already. Pass `force=True`"):
        average(paths[3], update=out)
    assert out.read_bytes() == before
    average(paths[3], update=out, force=True)
    average(paths, out=tmp_path / "go.pth")
    np.testing.assert_array_max_ulp(weights(out)["w"].numpy(), weights(tmp_path / "go.pth")["w"].numpy(), maxulp=2)
    assert len(facts(out)["inputs"]) == 4
    average(series(tmp_path, 5)[4], update=out, out=out, force=True)
    assert len(facts(out)["inputs"]) == 5
    said = open_checkpoint(out).provenance
    assert said is not None
    assert said["updates"] == 2
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


def test_a_failed_update_leaves_the_average_as_it_was(tmp_path: Path) -> None:
    paths, out = series(tmp_path, 3), tmp_path / "averaged.pth"
    average(paths[:2], out=out)
    before = out.read_bytes()
    bad = torch.load(paths[2], weights_only=True)
    bad["model"]["w"][0] = float("nan")
    torch.save(bad, paths[2])
    with pytest.raises(ckpt_tools.CkptError, match="not finite|NaN"):
        average(paths[2], update=out, force=True)
    assert out.read_bytes() == before


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
@pytest.mark.parametrize("source", ["pth", "safetensors", "folder"])
def test_averages_of_all_formats_are_updated(source: str, suffix: str, tmp_path: Path) -> None:
    paths = []
    for i in range(4):
        tensors = {"a": torch.full((3,), float(i)), "b": torch.full((2,), 2.0 * i), "n": torch.tensor(i)}
        path = tmp_path / (f"step_{i + 1}" + ("" if source == "folder" else f".{source}"))
        if source == "pth":
            torch.save(tensors, path)
        elif source == "safetensors":
            save_file(tensors, path)
        else:
            path.mkdir()
            parts = {f"model-0000{j}-of-00002.safetensors": names for j, names in ((1, ["a"]), (2, ["b", "n"]))}
            for file, names in parts.items():
                save_file({name: tensors[name] for name in names}, path / file)
            index = {name: file for file, names in parts.items() for name in names}
            (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        paths.append(path)
    average(paths[:3], out=f"{tmp_path}/three{suffix}")
    average(paths[3], update=f"{tmp_path}/three{suffix}", force=True)
    out = tmp_path / f"three{suffix}"
    opened = open_checkpoint(out)
    assert {name: opened[name].tolist() for name in opened} == {"a": [1.5] * 3, "b": [3.0] * 2, "n": 3}
    assert [i["name"] for i in facts(out)["inputs"]] == [path.name for path in paths]


def test_the_averaged_set_is_extended_and_not_one_that_lies_beside_it(tmp_path: Path) -> None:
    """A GAN: the generator is averaged, and the discriminator is copied along, under the same names."""
    paths = []
    for i in range(1, 4):
        tree = {"g": {"w": torch.full((2,), float(i))}, "d": {"w": torch.full((2,), 100.0 * i)}, "step": i}
        paths.append(tmp_path / f"c-{i}.pth")
        torch.save(tree, paths[-1])
    average(paths[:2], state="g", out=tmp_path / "two.pth")
    average(paths[2], update=tmp_path / "two.pth", out=tmp_path / "three.pth")
    found = load(tmp_path / "three.pth")
    assert found["g"]["w"].tolist() == [2.0, 2.0]
    assert found["d"]["w"].tolist() == [300.0, 300.0]


def test_parts_of_a_model_are_updated_together(tmp_path: Path) -> None:
    paths = []
    for i in range(1, 5):
        tree = {"encoder": {"w": torch.full((2,), float(i))}, "decoder": {"w": torch.full((2,), 10.0 * i)}, "step": i}
        paths.append(tmp_path / f"c-{i}.pth")
        torch.save(tree, paths[-1])
    average(paths[:3], state=["encoder", "decoder"], out=tmp_path / "three.pth")
    average(paths[3], update=tmp_path / "three.pth", out=tmp_path / "four.pth")
    found = load(tmp_path / "four.pth")
    assert (found["encoder"]["w"].tolist(), found["decoder"]["w"].tolist()) == ([2.5] * 2, [25.0] * 2)


def test_the_average_of_emas_is_extended_by_an_ema(runs: list[Path], tmp_path: Path) -> None:
    average(runs[:5], mode="ema", decay=0.8, out=tmp_path / "five.pth")
    average(runs[5], update=tmp_path / "five.pth", out=tmp_path / "six.pth")
    average(runs[:6], mode="ema", decay=0.8, out=tmp_path / "go.pth")
    found, want = load(tmp_path / "six.pth"), load(tmp_path / "go.pth")
    assert found.keys() == want.keys()
    for name, tensor in want["state_dict"].items():
        np.testing.assert_allclose(found["state_dict"][name].numpy(), tensor.numpy(), rtol=3e-7, atol=1e-7)
    assert facts(tmp_path / "six.pth") == facts(tmp_path / "go.pth")


@pytest.mark.parametrize("options", [{"buffers": "last"}, {"dtype": "float32"}, {"state": "raw"}], ids=str)
def test_options_of_the_average_hold_for_the_new_checkpoint(
    options: dict[str, Any], runs: list[Path], tmp_path: Path
) -> None:
    average(runs[:3], **options, out=tmp_path / "three.pth")
    average(runs[3], update=tmp_path / "three.pth", out=tmp_path / "four.pth")
    average(runs[:4], **options, out=tmp_path / "go.pth")
    found, want = (load(tmp_path / name)["state_dict"] for name in ("four.pth", "go.pth"))
    assert list(found) == list(want)
    for name, tensor in want.items():
        np.testing.assert_allclose(found[name].numpy(), tensor.numpy(), rtol=3e-7, atol=1e-7)
    assert facts(tmp_path / "four.pth") == facts(tmp_path / "go.pth")


def test_a_dtype_of_the_average_other_than_that_of_the_inputs_stays(tmp_path: Path) -> None:
    paths = series(tmp_path, 4, torch.bfloat16)
    average(paths[:3], dtype="float32", out=tmp_path / "three.pth")
    average(paths[3], update=tmp_path / "three.pth", out=tmp_path / "four.pth")
    average(paths, dtype="float32", out=tmp_path / "go.pth")
    found, want = weights(tmp_path / "four.pth")["w"], weights(tmp_path / "go.pth")["w"]
    assert found.dtype == torch.float32
    assert_within_an_ulp(found, want, weights(tmp_path / "three.pth")["w"], "float32")


def test_names_that_not_all_have_are_left_out_of_an_update_too(tmp_path: Path) -> None:
    for i, names in enumerate(["abc", "abd", "abe"], 1):
        torch.save({name: torch.full((2,), float(i)) for name in names}, tmp_path / f"step_{i}.pth")
    paths = sorted(tmp_path.glob("step_*.pth"))
    average(paths[:2], keys="intersection", out=tmp_path / "two.pth")
    report = average(paths[2], update=tmp_path / "two.pth", out=tmp_path / "three.pth")
    assert {name: tensor.tolist() for name, tensor in load(tmp_path / "three.pth").items()} == {
        "a": [2.0, 2.0],
        "b": [2.0, 2.0],
    }
    assert report.left_out == ("e",)


def test_a_decay_that_was_chosen_stays_and_is_reported(tmp_path: Path) -> None:
    paths = series(tmp_path, 5)
    average(paths[:4], mode="ema", out=tmp_path / "four.pth")
    decay = facts(tmp_path / "four.pth")["arguments"]["decay"]
    report = average(paths[4], update=tmp_path / "four.pth", out=tmp_path / "five.pth")
    assert facts(tmp_path / "five.pth")["arguments"] == {"decay": decay}
    assert any(f"`decay={decay}` was chosen for 4 checkpoints and stays; for 5 it would" in n for n in report.notes)
    average(paths[:4], mode="ema", decay=0.9, out=tmp_path / "given.pth")
    report = average(paths[4], update=tmp_path / "given.pth", dry_run=True)
    assert not any("stays" in note for note in report.notes)


def test_hashes_of_an_average_stay_and_new_ones_are_added(tmp_path: Path) -> None:
    paths = series(tmp_path, 3)
    average(paths[:2], hash=True, out=tmp_path / "two.pth")
    average(paths[2], update=tmp_path / "two.pth", hash=True, out=tmp_path / "three.pth")
    average(paths, hash=True, out=tmp_path / "go.pth")
    assert facts(tmp_path / "three.pth") == facts(tmp_path / "go.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 2, 3]}, r"`mode='weights'` gives new checkpoints no weight by itself"),
        ({"mode": "decay"}, r"`mode='decay'` weighs its inputs otherwise against each other"),
        ({"half_life": "50%"}, r"weighs its inputs otherwise against each other"),
        ({"keys": "union"}, r"`keys='union'` it is not recorded which inputs have a tensor"),
        ({"mode": "posthoc", "target": "half-life=80", "allow_misfit": True}, r"gives new checkpoints no weight"),
    ],
    ids=str,
)
def test_averages_that_do_not_tell_enough_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    paths = series(tmp_path, 4)
    average(paths[:3], **options, out=tmp_path / "three.pth")
    with pytest.raises(LayoutError, match=message):
        average(paths[3], update=tmp_path / "three.pth", out=tmp_path / "four.pth")
    assert not (tmp_path / "four.pth").exists()


def test_only_newer_checkpoints_are_added(tmp_path: Path) -> None:
    paths = series(tmp_path, 5)
    average(paths[1:3], out=tmp_path / "two.pth")
    with pytest.raises(SeriesError, match=r"c-0.pth: its global_step, 100, is before 210"):
        average(paths[0], update=tmp_path / "two.pth", out=tmp_path / "x.pth")
    with pytest.raises(SeriesError, match=r"c-2.pth: .* has an input at the same global_step, 210"):
        average(paths[1:4], update=tmp_path / "two.pth", out=tmp_path / "x.pth", from_step=200)
    copy = tmp_path / "copy.pth"
    copy.write_bytes(paths[2].read_bytes())
    with pytest.raises(SeriesError, match=r"copy.pth: .* so it is in it already"):
        average(copy, update=tmp_path / "two.pth", out=tmp_path / "x.pth")
    other = torch.load(paths[4], weights_only=True)
    torch.save({"model": other["model"]}, tmp_path / "stepless.pth")
    with pytest.raises(SeriesError, match=r"stepless.pth: has no global_step that counts as those of the inputs of"):
        average(tmp_path / "stepless.pth", update=tmp_path / "two.pth", out=tmp_path / "x.pth")
    with pytest.raises(SeriesError, match=r"is the average itself"):
        average(tmp_path / "two.pth", update=tmp_path / "two.pth", out=tmp_path / "x.pth")
    other["model"]["w"] += 1
    torch.save(other, tmp_path / "again.pth")
    with pytest.raises(SeriesError, match=r"have the same global_step"):
        average([paths[4], tmp_path / "again.pth"], update=tmp_path / "two.pth", out=tmp_path / "x.pth")


def test_the_newer_checkpoints_of_a_folder_are_chosen_by_step(tmp_path: Path) -> None:
    paths = series(tmp_path, 5)
    average(paths[:3], out=tmp_path / "averaged.pth")
    with pytest.raises(SeriesError, match=r"Give newer checkpoints alone, or add `from_step=211`"):
        average(tmp_path, update=tmp_path / "averaged.pth", force=True)
    average(tmp_path, update=tmp_path / "averaged.pth", from_step=211, force=True)
    assert [i["name"] for i in facts(tmp_path / "averaged.pth")["inputs"]] == [path.name for path in paths]


def test_the_inputs_of_an_older_record_are_ordered_by_what_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = series(tmp_path, 3)
    monkeypatch.setattr("ckpt_tools.jobs.addends._places", lambda member, state: {})
    average(paths[:2], out=tmp_path / "two.pth")
    monkeypatch.undo()
    with pytest.raises(SeriesError, match=r"c-2.pth: has no step that counts as those of the inputs of"):
        average(paths[2], update=tmp_path / "two.pth", out=tmp_path / "x.pth")


def test_numbers_in_names_are_steps_of_an_update(plain: Callable[..., list[Path]], tmp_path: Path) -> None:
    paths = plain("epoch-1-lr-3.pth", "epoch-2-lr-3.pth", "epoch-3-lr-3.pth")
    average(paths[:2], out=tmp_path / "two.pth")
    with pytest.raises(SeriesError, match=r"number in its name, 2, so it is in it already"):
        average(paths[1], update=tmp_path / "two.pth", out=tmp_path / "x.pth")
    average(paths[2], update=tmp_path / "two.pth", out=tmp_path / "three.pth")
    assert [i["step"] for i in facts(tmp_path / "three.pth")["inputs"]] == [1, 2, 3]


@pytest.mark.parametrize("hashed", [False, True])
def test_a_checkpoint_without_step_is_refused_by_its_name_or_hash(hashed: bool, tmp_path: Path) -> None:
    for i, name in enumerate("abc"):
        torch.save({"w": torch.full((4,), float(i))}, tmp_path / f"{name}.pth")
    average([tmp_path / "a.pth", tmp_path / "b.pth"], hash=hashed, out=tmp_path / "two.pth")
    with pytest.raises(SeriesError, match=r"b.pth: an input of .*two.pth has its name and size"):
        average(tmp_path / "b.pth", update=tmp_path / "two.pth", out=tmp_path / "x.pth")
    average(tmp_path / "c.pth", update=tmp_path / "two.pth", out=tmp_path / "three.pth")
    assert load(tmp_path / "three.pth")["w"].tolist() == [1.0] * 4


def test_options_against_the_record_are_refused(runs: list[Path], tmp_path: Path) -> None:
    average(runs[:3], decay=0.9, out=tmp_path / "three.pth")
    more = {"update": tmp_path / "three.pth", "out": tmp_path / "four.pth"}
    with pytest.raises(UsageError, match=r"`decay=0.8`: .*three.pth was made with `decay=0.9`, and its record decides"):
        average(runs[3], decay=0.8, **more)
    with pytest.raises(UsageError, match=r"`mode='uniform'`: .* was made with `mode='ema'`"):
        average(runs[3], mode="uniform", **more)
    with pytest.raises(UsageError, match=r"`dtype='bfloat16'`: .* was made without it"):
        average(runs[3], dtype="bf16", **more)
    with pytest.raises(UsageError, match=r"`state='raw'`: .* was made without it"):
        average(runs[3], state="raw", **more)
    with pytest.raises(UsageError, match="do not go together"):
        average(runs[3], replay=tmp_path / "three.pth", **more)
    average(runs[3], mode="ema", decay=0.9, state="ema", **more)


def test_raw_weights_are_not_added_to_averages(runs: list[Path], tmp_path: Path, save: Callable[..., Path]) -> None:
    average(runs[:3], out=tmp_path / "three.pth")
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        tree = torch.load(runs[3], weights_only=True)
    raw = save("checkpoint-4.pth", {"state_dict": tree["state_dict"], "epoch": tree["epoch"]})
    with pytest.raises(LayoutError, match=r"an average of ema \(state_dict_ema\), and the weights of .* would be raw"):
        average(raw, update=tmp_path / "three.pth", out=tmp_path / "four.pth")


def test_what_is_no_average_of_ours_is_refused(tmp_path: Path) -> None:
    paths = series(tmp_path, 4)
    with pytest.raises(LayoutError, match="has no record of ckpt-tools"):
        average(paths[1], update=paths[0], out=tmp_path / "x.pth")
    average(paths[:3], out=tmp_path / "three.pth")
    convert(tmp_path / "three.pth", out=tmp_path / "three.safetensors")
    with pytest.raises(LayoutError, match=r"was written by 'ckpt convert' from three.pth, and is not the average"):
        average(paths[3], update=tmp_path / "three.safetensors", out=tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "its 'inputs' are no list"),
        ({"inputs": 3}, "its 'inputs' are no list"),
        ({"inputs": [{"name": "a"}]}, "it has no 'size'"),
        ({"inputs": [{"name": "../a", "size": 1, "step": 1, "coefficient": 1.0}]}, "is no name of an input"),
        ({"inputs": [{"name": "/a", "size": 1, "step": 1, "coefficient": 1.0}]}, "is no name of an input"),
        ({"inputs": [{"name": "a", "size": -1, "step": 1, "coefficient": 1.0}]}, "is no whole number"),
        ({"inputs": [{"name": "a", "size": 1, "step": 1, "coefficient": 10**400}]}, "record is damaged"),
        ({"inputs": [{"name": "a", "size": 1, "step": 1, "coefficient": "1"}]}, "is no number"),
        ({"inputs": [{"name": "a/" * 3000, "size": 1, "step": 1, "coefficient": 1.0}]}, "is no name of an input"),
        ({"arguments": {"decay": {}}}, "are no options"),
        ({"arguments": {"state": True}}, "are no options"),
        ({"arguments": {"half_life": 10**400}, "mode": "ema"}, "are no options"),
        ({"arguments": {"decay": float("nan")}, "mode": "ema"}, "are no options"),
        ({"arguments": {"decay": "x"}, "mode": "ema"}, "do not fit its mode"),
        ({"mode": "ema", "arguments": {"decay": 0.9}}, "the coefficients of the inputs are not those of `mode='ema'`"),
        ({"arguments": {"dtype": "float7"}}, "dtype in its record is unknown"),
        ({"arguments": {"buffers": "all"}}, "`buffers` is one of average, last"),
        ({"arguments": {"match": "shape"}}, "`match` is one of name, order"),
        ({"mode": "magic"}, "the mode 'magic', which this ckpt-tools does not know"),
        ({"mode": None}, "'mode' or 'state' is no text"),
        ({"places": [1]}, "no list of names"),
        ({"counter": 1}, "wrong type"),
        ({"command": "recal-bn", "input": {"name": "averaged.pth"}}, "'ckpt recal-bn' from averaged.pth, and is not"),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["update", "replay"])
def test_damaged_records_are_refused(
    how: str, change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "replay" and ("fit its mode" in message or "not those of" in message):
        return  # which takes its coefficients, not its options
    paths = series(tmp_path, 3)
    average(paths[:2], out=tmp_path / "two.pth")
    parse = headers.parse_provenance
    damaged = lambda text: None if (said := parse(text)) is None else {**said, **change}  # noqa: E731
    monkeypatch.setattr("ckpt_tools.formats.torch_zip.parse_provenance", damaged)
    with pytest.raises((LayoutError, UsageError), match=message):
        average(paths[2:] if how == "update" else [], **{how: tmp_path / "two.pth"}, out=tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_tied_tensors_and_safetensors_stay_as_in_one_go(tmp_path: Path) -> None:
    paths = []
    for i in range(4):
        w = torch.full((3, 3), float(i))
        paths.append(tmp_path / f"step_{i}.pth")
        torch.save({"a.weight": w, "b.weight": w}, paths[-1])
    average(paths[:3], out=tmp_path / "three.safetensors")
    average(paths[3], update=tmp_path / "three.safetensors", force=True)
    average(paths, out=tmp_path / "go.safetensors")
    assert same_bits(load_file(tmp_path / "three.safetensors"), load_file(tmp_path / "go.safetensors"))
    assert len(load_file(tmp_path / "three.safetensors")) == 1


def of_ranks(folder: Path, step: int) -> Path:
    for rank in range(2):
        path = folder / f"iter_{step:07d}" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        model = {"language_model": {"encoder": {"w": torch.full((3,), float(step + 10 * rank))}}}
        torch.save({"iteration": step, "model": model}, path)
    return folder / f"iter_{step:07d}"


def test_folders_of_ranks_are_updated_and_replayed_file_by_file(tmp_path: Path) -> None:
    paths = [of_ranks(tmp_path / "run", step) for step in (1, 2, 3, 4)]
    average(paths[:3], out=f"{tmp_path}/averaged")
    assert average([tmp_path / "run"], replay=tmp_path / "averaged", out=f"{tmp_path}/again").same is True
    average(paths[3], update=tmp_path / "averaged", force=True)
    for rank in range(2):
        found = torch.load(tmp_path / "averaged" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", weights_only=True)
        assert found["model"]["language_model"]["encoder"]["w"].tolist() == [2.5 + 10 * rank] * 3


def test_what_is_computed_from_an_optimizer_is_added_too(tmp_path: Path) -> None:
    """Schedule-free: x = y / 0.5 + (1 - 1 / 0.5) z = 2 y - z."""
    paths = []
    for i in range(1, 5):
        state = {"state": {0: {"z": torch.full((2,), float(i)), "exp_avg_sq": torch.ones(2)}}}
        groups = [{"betas": (0.5, 0.999), "train_mode": True, "weight_sum": 1.0, "params": [0]}]
        tree = {"model": {"w": torch.full((2,), 2.0 * i)}, "optimizer": {**state, "param_groups": groups}, "step": i}
        paths.append(tmp_path / f"c-{i}.pth")
        torch.save(tree, paths[-1])
    average(paths[:3], state="eval", out=tmp_path / "three.pth")
    assert average([], replay=tmp_path / "three.pth").same is True
    average(paths[3], update=tmp_path / "three.pth", out=tmp_path / "four.pth")
    assert load(tmp_path / "four.pth")["model"]["w"].tolist() == [7.5, 7.5]
    average(paths, state="eval", out=tmp_path / "go.pth")
    assert facts(tmp_path / "four.pth") == facts(tmp_path / "go.pth")


def test_codes_with_scales_are_added_as_what_they_stand_for(tmp_path: Path) -> None:
    paths = []
    for i in range(1, 5):
        codes = torch.full((128, 128), 2.0).to(torch.float8_e4m3fn)
        paths.append(tmp_path / f"step_{i}.safetensors")
        save_file({"a.weight": codes, "a.weight_scale_inv": torch.full((1, 1), float(i))}, paths[-1])
    average(paths[:3], dequantize=True, out=tmp_path / "three.safetensors")
    assert average([], replay=tmp_path / "three.safetensors").same is True
    average(paths[3], update=tmp_path / "three.safetensors", out=tmp_path / "four.safetensors")
    found = load_file(tmp_path / "four.safetensors")
    assert {name: (tensor.dtype, tensor.unique().tolist()) for name, tensor in found.items()} == {
        "a.weight": (torch.bfloat16, [5.0])
    }


def test_products_of_adapters_are_replayed_but_not_updated(tmp_path: Path) -> None:
    paths = []
    for i in range(3):
        factors = {"q.lora_down.weight": torch.randn(2, 5), "q.lora_up.weight": torch.randn(4, 2)}
        paths.append(tmp_path / f"lora-{i}.safetensors")
        save_file({**factors, "q.alpha": torch.tensor(2.0)}, paths[-1])
    average(paths[:2], lora="product", out=tmp_path / "two.safetensors")
    assert average([], replay=tmp_path / "two.safetensors").same is True
    with pytest.raises(LayoutError, match="the ranks of the updates add up"):
        average(paths[2], update=tmp_path / "two.safetensors", out=tmp_path / "three.safetensors")


def test_weights_matched_by_order_need_files_in_one_order(tmp_path: Path) -> None:
    paths = []
    for i, (first, second) in enumerate([("z", "a"), ("y", "b"), ("x", "c")], 1):
        paths.append(tmp_path / f"step_{i}.pth")
        torch.save({first: torch.full((2,), float(i)), second: torch.full((2,), 10.0 * i)}, paths[-1])
    average(paths[:2], match="order", out=tmp_path / "two.safetensors")
    with pytest.raises(LayoutError, match="keep their tensors in different orders"):
        average(paths[2], update=tmp_path / "two.safetensors", out=tmp_path / "x.pth")
    average(paths[:2], match="order", out=tmp_path / "two.pth")
    average(paths[2], update=tmp_path / "two.pth", out=tmp_path / "three.pth")
    assert {name: tensor.tolist() for name, tensor in load(tmp_path / "three.pth").items()} == {
        "x": [2.0, 2.0],
        "c": [20.0, 20.0],
    }


def test_a_recorded_input_is_never_replaced(tmp_path: Path) -> None:
    paths = series(tmp_path, 3)
    average(paths[:2], out=tmp_path / "two.pth")
    before = paths[0].read_bytes()
    with pytest.raises(WriteError, match=r"c-0\.pth: is one of the inputs, which are never changed"):
        average(paths[2], update=tmp_path / "two.pth", out=paths[0], force=True)
    assert paths[0].read_bytes() == before
    (tmp_path / "other.pth").write_text("no checkpoint")
    assert average(paths[2], update=tmp_path / "two.pth", out=tmp_path / "other.pth", force=True).written


def test_an_input_without_step_is_told_by_its_folder_from_within_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.save({"w": torch.randn(4)}, tmp_path / name / "model.pth")
    average([tmp_path / "a/model.pth", tmp_path / "b/model.pth"], out=tmp_path / "both.pth")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(SeriesError, match=r"model\.pth: an input of .*both\.pth has its name and size"):
        average("model.pth", update="../both.pth", out="x.pth")
