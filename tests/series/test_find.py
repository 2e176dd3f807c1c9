"""Series: the order of training, whatever the files are called, and the selections from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from series_files import names, trainer_folder, weights

from ckpt_tools import average
from ckpt_tools.checkpoints.scalars import as_number
from ckpt_tools.checkpoints.steps import number_in_name, stored_counters
from ckpt_tools.errors import UsageError
from ckpt_tools.formats import read_header
from ckpt_tools.series.find import find_series

Save = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def scored(save: Save) -> list[Path]:
    """Five checkpoints with an epoch and a metric; the second and the fourth are equally good."""
    figures = [(1, 70.0), (2, 90.0), (3, 60.0), (4, 90.0), (5, 80.0)]
    return [save(f"e{n}.pth", {"state_dict": weights(n), "epoch": n, "metric": m}) for n, m in figures]


# Order


def test_find_series_orders_the_real_series_by_epoch(runs: list[Path]) -> None:
    series = find_series(sorted(runs))
    assert [member.path for member in series.members] == runs
    assert [member.step for member in series.members] == list(range(8, 20))
    assert series.ordered_by == "the epoch stored in the files"
    assert series.notes == ()


def test_find_series_prefers_a_stored_step_to_the_name(save: Save) -> None:
    late = save("checkpoint-1.pth", {"state_dict": weights(1), "epoch": 7})
    early = save("checkpoint-2.pth", {"state_dict": weights(2), "epoch": 3})
    assert names(find_series([late, early])) == ["checkpoint-2.pth", "checkpoint-1.pth"]


def test_find_series_prefers_a_step_to_an_epoch_and_ignores_a_constant_counter(save: Save) -> None:
    for name, step in (("b.pth", 10), ("a.pth", 20)):
        save(name, {"state_dict": weights(step), "global_step": step, "epoch": 1})
    assert find_series(["a.pth", "b.pth"]).ordered_by == "the global_step stored in the files"
    for name, epoch in (("b.pth", 1), ("a.pth", 2)):
        save(name, {"state_dict": weights(epoch), "global_step": 0, "epoch": epoch})
    series = find_series(["a.pth", "b.pth"])
    assert (names(series), series.ordered_by) == (["b.pth", "a.pth"], "the epoch stored in the files")


def test_find_series_orders_by_numbers_in_names_without_counters(plain: Callable[..., list[Path]]) -> None:
    series = find_series(plain("checkpoint-10.pth", "checkpoint-2.pth", "checkpoint-1.pth"))
    assert names(series) == ["checkpoint-1.pth", "checkpoint-2.pth", "checkpoint-10.pth"]
    assert series.ordered_by == "the numbers in the names"


def test_find_series_ignores_a_counter_that_one_file_lacks(save: Save) -> None:
    save("a-2.pth", {"state_dict": weights(), "epoch": 1})
    save("a-1.pth", weights(1))
    series = find_series(["a-2.pth", "a-1.pth"])
    assert (names(series), series.ordered_by) == (["a-1.pth", "a-2.pth"], "the numbers in the names")


def test_find_series_orders_by_names_without_numbers_and_says_so(plain: Callable[..., list[Path]]) -> None:
    plain("late.pth", "early.pth")
    series = find_series(["late.pth", "early.pth"])
    assert (names(series), series.ordered_by) == (["early.pth", "late.pth"], "the names")
    assert len(series.notes) == 1
    assert series.notes[0].startswith("No step found for early.pth; sorted by name.")
    assert "`order='given'`" in series.notes[0]


def test_find_series_by_given_keeps_the_order_of_the_arguments(plain: Callable[..., list[Path]]) -> None:
    plain("a-1.pth", "a-2.pth", "a-10.pth")
    assert names(find_series(["a-2.pth", "a-10.pth", "a-1.pth"], order="given")) == ["a-2.pth", "a-10.pth", "a-1.pth"]
    assert names(find_series(["a-*.pth"], order="given")) == ["a-1.pth", "a-2.pth", "a-10.pth"]


def test_find_series_by_natural_orders_by_names_despite_a_stored_epoch(save: Save) -> None:
    for name, epoch in (("a-2.pth", 9), ("a-10.pth", 1)):
        save(name, {"state_dict": weights(epoch), "epoch": epoch})
    assert names(find_series(["a-*.pth"], order="natural")) == ["a-2.pth", "a-10.pth"]


def test_find_series_by_mtime_orders_by_modification_time(plain: Callable[..., list[Path]]) -> None:
    for path, time in zip(plain("a-1.pth", "a-2.pth", "a-3.pth"), (300, 100, 200), strict=True):
        os.utime(path, (time, time))
    assert names(find_series(["a-*.pth"], order="mtime")) == ["a-2.pth", "a-3.pth", "a-1.pth"]


def test_find_series_notes_equal_steps_once(save: Save) -> None:
    for i in (3, 1, 2):
        save(f"a-{i}.pth", {"state_dict": weights(i), "epoch": 5})
    series = find_series(["a-*.pth"])
    assert names(series) == ["a-1.pth", "a-2.pth", "a-3.pth"]
    assert series.notes == ("a-1.pth, a-2.pth and 1 more have the same epoch, 5; they are ordered by name.",)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("checkpoint-12.pth.tar", 12),
        ("epoch=3-step=400.ckpt", 400),
        ("epoch=3-val_loss=0.25.ckpt", 3),
        ("model_step_0010000.safetensors", 10000),
        ("ema_0.9999_010000.pt", 10000),
        ("net-acc0.91.pth", None),
        ("last.pth", None),
        ("checkpoint-500", 500),
    ],
)
def test_number_in_name_finds_the_step(name: str, number: int | None) -> None:
    assert number_in_name(Path("run-7") / name) == number


@pytest.mark.parametrize(
    ("in_order", "steps"),
    [
        (["ckpt_3_v2", "ckpt_4_v2"], [3, 4]),
        (["ckpt_500", "ckpt_1k", "ckpt_1.5k", "ckpt_10k", "ckpt_1M"], [500, 1000, 1500, 10_000, 1_000_000]),
        (["llama-7B-step20", "llama-7B-step100"], [20, 100]),
        (["run_2023-12-20", "run_2024-01-15", "run_2024-02-03"], [None, None, None]),
        (["run_2024-01-15", "run_2024-01-16"], [15, 16]),
        (["1_500", "2_100"], [None, None]),
        (["epoch=2-step=100", "epoch=2-step=200", "epoch=10-step=300"], [100, 200, 300]),
        (["epoch_1_iter_500", "epoch_2_iter_100"], [1, 2]),
        (["acc_91_epoch_1", "acc_90_epoch_2"], [1, 2]),
        (["epoch=02-val_loss=0.9", "epoch=10-val_loss=0.32"], [2, 10]),
        (["acc0.91_7", "acc0.90_8"], [7, 8]),
        (["model.ckpt.9", "model.ckpt.10"], [9, 10]),
    ],
    ids=lambda value: str(value[0]),
)
def test_find_series_takes_the_numbers_that_vary_from_left_to_right(
    plain: Callable[..., list[Path]], in_order: list[str], steps: list[int | None]
) -> None:
    series = find_series(reversed(plain(*(f"{name}.pth" for name in in_order))))
    assert names(series) == [f"{name}.pth" for name in in_order]
    assert [member.step for member in series.members] == steps
    restarts = in_order[0] == "epoch_1_iter_500"
    assert series.notes == (
        ("The iter in the names does not grow with the epoch, which decides the order.",) if restarts else ()
    )


def test_find_series_notes_a_guess_where_numbers_in_names_do_not_line_up(plain: Callable[..., list[Path]]) -> None:
    paths = plain("checkpoint1.pt", "checkpoint2.pt", "checkpoint_1_500.pt")
    series = find_series(paths)
    assert [member.step for member in series.members] == [1, 2, 500]
    (note,) = series.notes
    assert note.startswith("The numbers of checkpoint1.pt and checkpoint_1_500.pt do not line up, so")
    assert find_series(paths[::-1]).notes == series.notes


@pytest.mark.parametrize("key", ["iter_num", "global_steps"])
def test_find_series_reads_the_counters_of_nanogpt_and_deepspeed(save: Save, key: str) -> None:
    for name, step in (("1", 2000), ("2", 500)):
        save(f"{name}/ckpt.pt", {"model": weights(step), key: step})
    assert [member.step for member in find_series(["*/ckpt.pt"]).members] == [500, 2000]


def test_find_series_orders_by_folders_where_all_files_have_one_name(plain: Callable[..., list[Path]]) -> None:
    paths = plain("iter_9/mp_rank_00/model_optim_rng.pt", "iter_10/mp_rank_00/model_optim_rng.pt")
    assert [member.step for member in find_series(paths[::-1]).members] == [9, 10]


def test_find_series_orders_by_a_stored_fraction(save: Save) -> None:
    for name, epoch in (("a.pth", 1.5), ("b.pth", 0.5), ("c.pth", 1.0)):
        save(name, {"state_dict": weights(epoch), "epoch": epoch})
    series = find_series(["*.pth"])
    assert [(m.path.name, m.step) for m in series.members] == [("b.pth", None), ("c.pth", 1), ("a.pth", None)]
    assert (series.ordered_by, series.notes) == ("the epoch stored in the files", ())


def test_find_series_reads_a_step_in_a_tensor(save: Save) -> None:
    for name, step in (("a-1.pth", 2), ("a-2.pth", 1)):
        save(name, {"state_dict": weights(step), "step": torch.tensor(step), "epoch": 3 - step})
    series = find_series(["*.pth"])
    assert [(member.path.name, member.step) for member in series.members] == [("a-2.pth", 1), ("a-1.pth", 2)]
    assert (series.ordered_by, series.notes) == ("the step stored in the files", ())


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [
        ("float16", [500, 2047, 2049, 3001, 40001]),
        ("float16", [65519, 65520, 70000, 10**6]),  # the last three are infinity in the file
        ("bfloat16", [255, 257, 1001, 10**6]),
        ("float32", [1, 10**7 + 1]),
    ],
)
def test_find_series_takes_from_the_name_what_16_bits_lost_of_a_step(save: Save, dtype: str, steps: list[int]) -> None:
    """ema-pytorch's PostHocEMA stores all of its state as float16, and names its files INDEX.STEP.pt."""
    for step in steps:
        save(f"0.{step}.pt", {**weights(step), "step": torch.tensor(step).to(getattr(torch, dtype))})
    found = find_series(["*.pt"])
    assert [member.step for member in found.members] == steps
    assert found.ordered_by == "the step stored in the files"


def test_find_series_ignores_a_rounded_step_that_the_name_does_not_tell(save: Save) -> None:
    for name, step in (("a-3001", 3001), ("b", 5003)):
        save(f"{name}.pt", {**weights(step), "step": torch.tensor(step).half(), "epoch": step // 1000})
    assert find_series(["*.pt"]).ordered_by == "the epoch stored in the files"


@pytest.mark.parametrize("key", ["step", "global_step", "epoch"])
def test_find_series_reads_the_step_in_the_metadata_of_safetensors(key: str) -> None:
    for name, step in (("a", "500"), ("b", "60")):
        save_file(weights(float(step)), f"{name}.safetensors", metadata={key: step, "iteration": "nan", "iter": "many"})
    series = find_series(["*.safetensors"])
    assert [member.step for member in series.members] == [60, 500]
    assert series.ordered_by == f"the {key} stored in the files"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.5, True, "3", None, 1 << 5000, -1])
def test_stored_counters_ignores_what_is_no_whole_number(save: Save, value: Any) -> None:
    assert stored_counters(read_header(save("a.pth", {"state_dict": weights(), "epoch": value}))) == {}


@settings(max_examples=12)
@given(st.data())
def test_average_writes_the_same_bytes_for_any_order_of_arguments(
    runs: list[Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    out = tmp_path_factory.mktemp("permuted") / "average.pth"
    shuffled = data.draw(st.permutations(runs))
    report = average(shuffled, mode="ema", decay=0.9, out=out)
    assert [i.name for i in report.inputs] == [path.name for path in runs]
    reference = tmp_path_factory.getbasetemp() / "average-in-order.pth"
    if not reference.exists():
        average(runs, mode="ema", decay=0.9, out=reference)
    assert out.read_bytes() == reference.read_bytes()


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("num_updates", lambda n: {"optimizer_history": [{"num_updates": 7}, {"num_updates": n}]}),
        ("epoch", lambda n: {"optimizer_history": [], "extra_state": {"train_iterator": {"epoch": n}}}),
        ("epoch", lambda n: {"reporter": {"epoch": n, "stats": {}}}),
    ],
)
def test_find_series_reads_the_counters_of_fairseq_and_espnet(
    save: Save, key: str, entry: Callable[[int], dict[str, Any]]
) -> None:
    for name, number in (("1", 300), ("2", 20)):
        save(f"{name}.pt", {"model": weights(number), **entry(number)})
    series = find_series(["*.pt"])
    assert [member.step for member in series.members] == [20, 300]
    assert series.ordered_by == f"the {key} stored in the files"


# Selection


def test_as_number_reads_the_value_that_torch_reads(tmp_path: Path) -> None:
    values = {
        "f": torch.tensor(1 / 3),
        "b": torch.tensor(-2.71828, dtype=torch.bfloat16),
        "i": torch.tensor([-(2**62)]),
    }
    values |= {"view": torch.arange(9, dtype=torch.float64)[4], "many": torch.ones(2)}
    torch.save(values, tmp_path / "a.pt")
    header = read_header(tmp_path / "a.pt")
    for name in ("f", "b", "i", "view"):
        assert as_number(header, header.tree[name]) == values[name].item()
    assert as_number(header, header.tree["many"]) is header.tree["many"]


def test_find_series_rejects_an_unknown_order(scored: list[Path]) -> None:
    with pytest.raises(UsageError, match="`order` is one of auto, given, natural, mtime, not 'time'"):
        find_series(scored, order="time")


@pytest.mark.parametrize("pattern", ["out", "out/checkpoint-*", "out/checkpoint-*/model.safetensors"])
def test_find_series_orders_trainer_folders_by_the_step_in_trainer_state(pattern: str) -> None:
    for step in (500, 1000, 1500):
        trainer_folder(Path(f"out/checkpoint-{step}"), step)
    series = find_series([pattern])
    assert [member.step for member in series.members] == [500, 1000, 1500]
    assert series.ordered_by == "the global_step stored in the files"


def test_find_series_orders_files_of_one_name_by_the_numbers_of_their_folders(save: Save) -> None:
    paths = [save(f"epoch_{i}/weights.pt", weights(i)) for i in (10, 9)]
    series = find_series(paths)
    assert [(member.step, member.path) for member in series.members] == [(9, paths[1]), (10, paths[0])]


def test_find_series_orders_names_that_are_no_unicode(plain: Callable[..., list[Path]]) -> None:
    plain(*(os.fsdecode(b"\xff-%d.pth" % i) for i in (10, 2)))
    assert [member.step for member in find_series(["*.pth"]).members] == [2, 10]
    assert [member.step for member in find_series(["."], order="natural").members] == [2, 10]
