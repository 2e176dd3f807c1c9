"""Model Stock (arXiv 2403.19522), against its formula in NumPy on the whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runner import run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ckpt_tools import average, open_checkpoint
from ckpt_tools.compute import native
from ckpt_tools.errors import AlignmentError, CkptError, LayoutError, NumericsError, SeriesError, UsageError
from ckpt_tools.series.schedules import Schedule

Save = Callable[..., Path]
State = dict[str, torch.Tensor]
GRAIN = 2.0**-20


def models(n: int = 3, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    """Make a start and n models: a tensor that all move alike, one that they move apart, and a frozen one."""
    generator = torch.Generator().manual_seed(n)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    start = {"alike": noise(40, 30), "apart": noise(500), "frozen": noise(7)}
    common = noise(40, 30)
    tuned = [
        {
            "alike": start["alike"] + 0.1 * (common + 0.3 * noise(40, 30)),
            "apart": start["apart"] + 0.1 * noise(500) * (1 + i),
            "frozen": start["frozen"],
        }
        for i in range(n)
    ]
    return (
        {name: tensor.to(dtype) for name, tensor in start.items()},
        [{name: tensor.to(dtype) for name, tensor in each.items()} for each in tuned],
    )


def ratio(w0: np.ndarray, tuned: list[np.ndarray]) -> float:
    """Compute t of the paper's equation (3)."""
    moves = [each - w0 for each in tuned]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(moves, 2)]
    cosine, n = max(float(np.mean(cosines)), 0.0), len(tuned)
    return n * cosine / (1 + (n - 1) * cosine)


def wanted(start: State, tuned: list[State], name: str) -> np.ndarray:
    w0, *others = [each[name].double().numpy().ravel() for each in (start, *tuned)]
    t = ratio(w0, others)
    return t * np.mean(others, axis=0) + (1 - t) * w0


def write(save: Save, start: State, tuned: list[State], suffix: str = ".safetensors") -> list[str]:
    save(f"start{suffix}", start)
    return [str(save(f"m-{i}{suffix}", each)) for i, each in enumerate(tuned)]


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_each_tensor_lies_where_the_formula_has_it(save: Save, here: Path, n: int, suffix: str) -> None:
    start, tuned = models(n)
    report = average(write(save, start, tuned, suffix), mode="stock", base=f"start{suffix}", out=f"out{suffix}")
    found = open_checkpoint(f"out{suffix}")
    for name in ("alike", "apart"):
        np.testing.assert_allclose(
            found[name].double().numpy().ravel(), wanted(start, tuned, name), rtol=2**-24, atol=4 * GRAIN
        )
    assert torch.equal(found["frozen"], start["frozen"])
    assert [each.name for each in report.inputs] == [f"start{suffix}", *[f"m-{i}{suffix}" for i in range(n)]]
    assert (set(report.averaged), report.copied) == ({"alike", "apart", "frozen"}, ())
    assert sum(each.coefficient for each in report.inputs) == pytest.approx(1, abs=1e-12)
    sizes = sum(t.numel() * t.element_size() for t in start.values())
    assert report.bytes_read > (n + 1) * sizes  # once to measure, and once to sum what counts


def test_the_ratio_of_each_tensor_is_recorded(save: Save, here: Path) -> None:
    start, tuned = models()
    average(write(save, start, tuned), mode="stock", base="start.safetensors", out="out.safetensors")
    made = open_checkpoint("out.safetensors").provenance
    assert made is not None
    assert made["arguments"] == {}
    for name in ("alike", "apart"):
        w0, *others = [each[name].double().numpy().ravel() for each in (start, *tuned)]
        assert made["ratios"][name] == pytest.approx(ratio(w0, others), abs=GRAIN)
    assert made["ratios"]["alike"] > 0.9
    assert made["ratios"]["apart"] < 0.2
    assert made["ratios"]["frozen"] == 0


def test_bfloat16_models_are_rounded_once(save: Save, here: Path) -> None:
    start, tuned = models(3, torch.bfloat16)
    average(write(save, start, tuned), mode="stock", base="start.safetensors", out="out.safetensors")
    found = load_file("out.safetensors")["alike"]
    assert found.dtype == torch.bfloat16
    exact = torch.from_numpy(wanted(start, tuned, "alike")).view(40, 30)
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=4 * GRAIN)


def test_bytes_are_the_same_without_the_c_extension(save: Save, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native._native is None:
        pytest.skip("there is no extension")
    start, tuned = models()
    paths = write(save, start, tuned)
    average(paths, mode="stock", base="start.safetensors", out="c.safetensors", threads=2)
    with monkeypatch.context() as without:
        without.setattr(native, "_native", None)
        average(paths, mode="stock", base="start.safetensors", out="torch.safetensors", threads=1)
    assert Path("c.safetensors").read_bytes() == Path("torch.safetensors").read_bytes()


def test_models_that_went_opposite_ways_leave_the_start(save: Save, here: Path) -> None:
    start = {"w": torch.arange(6.0)}
    paths = write(save, start, [{"w": start["w"] + 1}, {"w": start["w"] - 2}])
    average(paths, mode="stock", base="start.safetensors", out="out.safetensors")
    assert torch.equal(load_file("out.safetensors")["w"], start["w"])


def test_integers_are_those_of_the_last_model(save: Save, here: Path) -> None:
    start, tuned = models()
    for i, each in enumerate((start, *tuned)):
        each["n"] = torch.tensor(i)
    average(write(save, start, tuned), mode="stock", base="start.safetensors", out="out.safetensors")
    assert load_file("out.safetensors")["n"] == 3


def test_a_start_among_the_paths_is_no_model(save: Save, here: Path) -> None:
    start, tuned = models()
    write(save, start, tuned)
    report = average("*.safetensors", mode="stock", base="start.safetensors", out="a/out.safetensors", dry_run=True)
    assert [each.name for each in report.inputs][0] == "start.safetensors"
    assert len(report.inputs) == 4


def test_the_start_may_be_a_folder_and_lack_the_average_that_the_models_have(save: Save, here: Path) -> None:
    start, tuned = models()
    save("base/model.safetensors", start)
    for i, each in enumerate(tuned):
        save(f"run/m-{i}.pth", {"state_dict": tuned[0], "state_dict_ema": each, "epoch": i})
    average("run", mode="stock", base="base", out="out.safetensors")
    found = load_file("out.safetensors")["alike"].double().numpy().ravel()
    np.testing.assert_allclose(found, wanted(start, tuned, "alike"), rtol=2**-24, atol=4 * GRAIN)


def test_what_the_start_lacks_is_the_mean_of_the_models(save: Save, here: Path) -> None:
    start, tuned = models()
    for i, each in enumerate(tuned):
        each["head"] = torch.full((3,), float(i))
    paths = write(save, start, tuned)
    with pytest.raises(AlignmentError, match="head"):
        average(paths, mode="stock", base="start.safetensors", out="out.safetensors")
    average(paths, mode="stock", base="start.safetensors", keys="union", out="out.safetensors")
    assert torch.equal(load_file("out.safetensors")["head"], torch.full((3,), 1.0))


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_coefficients_are_of_the_start_and_equal_for_all_models(n: int, seed: int) -> None:
    moves = np.random.default_rng(seed).normal(size=(n, 9))
    w0 = np.arange(9.0)
    rows = np.vstack([moves, w0])
    found = Schedule("stock", base="w0").coefficients((rows @ rows.T).tolist())
    assert found[0] == pytest.approx(1 - ratio(w0, [w0 + each for each in moves]), abs=GRAIN)
    assert len(set(found[1:])) == 1
    assert sum(found) == pytest.approx(1, abs=1e-15)


def broken(start: State, tuned: list[State], which: str) -> None:
    if which == "shape":
        start["alike"] = start["alike"][:20]
    elif which == "huge":
        for each in (start, *tuned):
            each["apart"] = each["apart"].double() * 1e200
    elif which == "nan":
        start["apart"][3] = torch.nan
    else:
        tuned[1]["apart"][3] = torch.inf


@pytest.mark.parametrize(
    ("which", "error", "says"),
    [
        ("shape", AlignmentError, r"'alike'.*\[20, 30\].*start\.safetensors"),
        ("nan", NumericsError, "'apart'.*NaN or infinity"),
        ("infinity", NumericsError, "'apart'.*NaN or infinity"),
        ("huge", NumericsError, "'apart'.*too large to be squared"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    save: Save, here: Path, which: str, error: type[CkptError], says: str
) -> None:
    start, tuned = models()
    broken(start, tuned, which)
    paths = write(save, start, tuned)
    with pytest.raises(error, match=says):
        average(paths, mode="stock", base="start.safetensors", out="out.safetensors")
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "stock"}, "needs `base`"),
        ({"mode": "stock", "base": "m-0.safetensors"}, "there is one"),
        ({"mode": "stock", "base": "start.safetensors", "lora": "product"}, "`lora='product'` does not go"),
        ({"mode": "ema", "base": "start.safetensors"}, "`base` goes with `mode='stock'`"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    save: Save, here: Path, options: Mapping[str, str], says: str
) -> None:
    paths = write(save, *models(2))
    with pytest.raises(UsageError, match=says):
        average(paths, out="out.safetensors", **options)


def test_a_start_that_is_not_there_is_said(save: Save, here: Path) -> None:
    paths = write(save, *models(2))
    shown = run("avg", *paths, "--base", "nowhere.pth", "-o", "out.safetensors")
    assert shown.code == 1
    assert "nowhere.pth" in shown.err
    assert "no such file" in shown.err


def test_base_alone_means_stock_and_a_dry_run_draws_it(save: Save, here: Path) -> None:
    paths = write(save, *models(3))
    shown = run("avg", *paths, "--base", "start.safetensors", "--dry-run")
    assert shown.code == 0
    assert "mode stock" in shown.out
    assert "The start, start.safetensors, counts" in shown.out


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_replay_makes_the_same_bytes_from_the_recorded_ratios(save: Save, here: Path, suffix: str) -> None:
    start, tuned = models()
    average(write(save, start, tuned, suffix), mode="stock", base=f"start{suffix}", out=f"out{suffix}")
    report = average([], replay=f"out{suffix}", out=f"again{suffix}")
    assert report.same is True
    for name in start:
        assert torch.equal(open_checkpoint(f"again{suffix}")[name], open_checkpoint(f"out{suffix}")[name])


def test_a_replay_takes_the_start_that_lacks_the_average_of_the_models(save: Save, here: Path) -> None:
    start, tuned = models()
    save("start.pth", {"model": start})
    for i, each in enumerate(tuned):
        save(f"m-{i}.pth", {"state_dict": tuned[0], "state_dict_ema": each, "epoch": i})
    average("m-*.pth", base="start.pth", out="out.safetensors")
    assert average([], replay="out.safetensors", out="again.safetensors").same is True


def test_model_stock_is_not_extended(save: Save, here: Path) -> None:
    start, tuned = models()
    paths = write(save, start, tuned)
    average(paths[:2], mode="stock", base="start.safetensors", out="out.safetensors")
    with pytest.raises(LayoutError, match="cannot be extended: `mode='stock'` gives new checkpoints no weight"):
        average(paths[2:], update="out.safetensors", out="more.safetensors")


def test_the_start_has_no_place_in_the_order(save: Save, here: Path) -> None:
    start, tuned = models(3)
    save("runs/start.safetensors", start)
    for step, each in zip((200, 300, 1000), tuned, strict=True):
        save(f"runs/step-{step}.safetensors", each)
    report = average("runs", base="runs/start.safetensors", window=800, out="out.safetensors")
    assert [i.name for i in report.inputs] == [
        "start.safetensors",
        *(f"step-{n}.safetensors" for n in (200, 300, 1000)),
    ]
    assert report.ordered_by == "the numbers in the names"
    assert not any("no step" in note for note in report.notes)


def test_a_shard_is_no_start_of_whole_models(save: Save, here: Path) -> None:
    start, tuned = models(2)
    paths = write(save, start, tuned)
    shard = save("start-00001-of-00002.safetensors", {"alike": start["alike"]})
    with pytest.raises(SeriesError, match=r"start-00001-of-00002\.safetensors is a shard, and holds a part"):
        average(paths, base=shard, keys="union", out="out.safetensors")
    whole = save("start-00001-of-00001.safetensors", start)
    assert average(paths, base=whole, out="out.safetensors").written


def test_ranks_are_measured_file_by_file_and_that_is_said(save: Save, here: Path) -> None:
    start, tuned = models(2)
    for step, each in enumerate((start, *tuned)):
        for rank in (0, 1):
            tree = {"iteration": step, "model": {"language_model": {"w": each["alike"][20 * rank : 20 * rank + 20]}}}
            save(f"iter_{step}/mp_rank_0{rank}/model_optim_rng.pt", tree)
    report = average(["iter_1", "iter_2"], base="iter_0", dry_run=True)
    assert any("Each file of a rank is measured by itself" in note for note in report.notes)


def test_a_model_that_is_the_start_is_refused(save: Save, here: Path) -> None:
    start, tuned = models(2)
    paths = write(save, start, tuned)
    copy = save("step-0.safetensors", start)
    with pytest.raises(SeriesError, match=r"step-0\.safetensors: has the weights of the start, start\.safetensors"):
        average([*paths, copy], base="start.safetensors", out="out.safetensors")
    average([copy, *paths], base="step-0.safetensors", out="a/", max_shard_size=2500)
    index = next(Path("a").glob("*.index.json"))
    assert [i.name for i in average(["a", *paths], base=index, include_outputs=True, dry_run=True).inputs][0] == "a"
