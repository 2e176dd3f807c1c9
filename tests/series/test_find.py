"""Series: the right files, once each, in the order of training, whatever they are called."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore
from safetensors.torch import save_file

from ckpt_tools import average
from ckpt_tools.checkpoints.scalars import as_number
from ckpt_tools.checkpoints.steps import number_in_name, stored_counters
from ckpt_tools.errors import LayoutError, NotACheckpointError, SeriesError, UnsupportedError, UsageError
from ckpt_tools.formats import read_header
from ckpt_tools.series.find import Series, find_series
from ckpt_tools.series.paths import expand
from ckpt_tools.storage.source import STORES

Save = Callable[..., Path]


def weights(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), value)}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plain(save: Save) -> Callable[..., list[Path]]:
    """Write checkpoints without any counter inside, each of its own content."""

    def write(*names: str) -> list[Path]:
        return [save(name, weights(float(i))) for i, name in enumerate(names)]

    return write


@pytest.fixture
def scored(save: Save) -> list[Path]:
    """Five checkpoints with an epoch and a metric; the second and the fourth are equally good."""
    figures = [(1, 70.0), (2, 90.0), (3, 60.0), (4, 90.0), (5, 80.0)]
    return [save(f"e{n}.pth", {"state_dict": weights(n), "epoch": n, "metric": m}) for n, m in figures]


def names(series: Series) -> list[str]:
    return [member.path.name for member in series.members]


def sharded(folder: Path, value: float) -> Path:
    folder.mkdir(parents=True)
    save_file({"a": torch.full((2,), value)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.full((2,), value)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def trainer_folder(folder: Path, step: int) -> Path:
    """What Hugging Face's Trainer leaves for one checkpoint."""
    folder.mkdir(parents=True)
    save_file(weights(step), folder / "model.safetensors")
    torch.save({"state": {}}, folder / "optimizer.pt")
    torch.save({"state": {}}, folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": step / 500}))
    return folder


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
    assert series.notes[0].startswith(
        "early.pth has no step, neither inside nor in its name, so the files are ordered by name."
    )
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


@pytest.mark.parametrize("order", ["auto", "natural", "mtime"])
def test_find_series_finds_the_same_for_any_order_of_links_and_copies(save: Save, order: str) -> None:
    paths = [save(f"c-{i}.pth", {"state_dict": weights(i), "epoch": i}) for i in (1, 2)]
    Path("last.pth").hardlink_to(paths[1])
    Path("best.pth").symlink_to(paths[1])
    shutil.copy2(paths[0], "first.pth")
    every = [*paths, Path("last.pth"), Path("best.pth"), Path("first.pth")]
    forward, backward = (find_series(p, order=order) for p in (every, every[::-1]))
    assert names(forward) == names(backward) == ["c-1.pth", "c-2.pth"]
    assert sorted(forward.notes) == sorted(backward.notes)


# The same content under several names


def test_find_series_counts_links_once_under_the_numbered_name(save: Save) -> None:
    save("checkpoint-3.pth.tar", weights())
    Path("last.pth.tar").hardlink_to("checkpoint-3.pth.tar")
    Path("model_best.pth.tar").symlink_to("checkpoint-3.pth.tar")
    series = find_series(["last.pth.tar", "model_best.pth.tar", "checkpoint-3.pth.tar"])
    assert names(series) == ["checkpoint-3.pth.tar"]
    assert series.notes == (
        "last.pth.tar is checkpoint-3.pth.tar under another name: counted once.",
        "model_best.pth.tar is checkpoint-3.pth.tar under another name: counted once.",
    )


def test_find_series_counts_copies_once_under_the_numbered_name(plain: Callable[..., list[Path]]) -> None:
    plain("checkpoint-1.pth", "checkpoint-2.pth")
    shutil.copy2("checkpoint-2.pth", "last.pth")
    series = find_series(["last.pth", "checkpoint-1.pth", "checkpoint-2.pth"])
    assert names(series) == ["checkpoint-1.pth", "checkpoint-2.pth"]
    assert series.notes == ("last.pth is checkpoint-2.pth again (the same weights): counted once.",)


@pytest.mark.parametrize("write", ["zip", "legacy", "safetensors", "folder", "sharded"])
def test_find_series_counts_copies_of_every_format_once_but_for_a_flipped_bit(save: Save, write: str) -> None:
    """All tensors but one stand still, as where only a small head is trained."""
    for i in (1, 2):
        state = {"a": torch.ones(5000), "head": torch.full((5,), float(i)), "z": torch.ones(5000)}
        if write in ("zip", "legacy"):
            save(f"c-{i}", state, _use_new_zipfile_serialization=write == "zip")
        elif write == "safetensors":
            save_file(state, f"c-{i}")
        elif write == "folder":
            Path(f"c-{i}").mkdir()
            save_file(state, f"c-{i}/model.safetensors")
        else:
            sharded(Path(f"c-{i}"), float(i))
    copy = shutil.copytree if Path("c-2").is_dir() else shutil.copy
    copy("c-2", "last")
    copy("c-2", "flipped")
    damaged = Path("flipped") if Path("flipped").is_file() else max(Path("flipped").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[content.index(bytes(torch.full((2,), 1.0 if write != "sharded" else 2.0).numpy().data)) + 2] ^= 4
    damaged.write_bytes(content)
    series = find_series(["c-1", "last", "c-2", "flipped"])
    assert sorted(names(series)) == ["c-1", "c-2", "flipped"]
    assert series.notes[0] == "last is c-2 again (the same weights): counted once."


def test_find_series_counts_a_checkpoint_saved_twice_once(save: Save) -> None:
    """torchvision and Lightning save `checkpoint` and `last` anew, so that their bytes are others."""

    def lightning(step: int, last: str) -> dict[str, Any]:
        callbacks = {"ModelCheckpoint": {"last_model_path": last, "current_score": torch.tensor(len(last))}}
        return {"state_dict": weights(step), "global_step": step, "callbacks": callbacks}

    for i in (1, 2):
        save(f"tv/model_{i}.pth", {"model": weights(i), "optimizer": {"m": torch.ones(9)}, "epoch": i})
        save(f"pl/epoch={i}.ckpt", lightning(i, ""))
    save("tv/checkpoint.pth", {"model": weights(2), "epoch": 2})
    save("tv/other.pth", {"model": weights(3), "epoch": 2})
    save("pl/last.ckpt", lightning(2, "pl/last.ckpt"), _use_new_zipfile_serialization=False)
    assert names(find_series(["tv"])) == ["model_1.pth", "model_2.pth", "other.pth"]
    series = find_series(["pl"])
    assert names(series) == ["epoch=1.ckpt", "epoch=2.ckpt"]
    assert series.notes == ("pl/last.ckpt is pl/epoch=2.ckpt again (the same weights): counted once.",)


def test_find_series_keeps_equal_weights_at_another_step(save: Save) -> None:
    for name, step in (("checkpoint-500", 500), ("final", 1000)):
        save_file(weights(), trainer_folder(Path(name), step) / "model.safetensors")
    assert names(find_series(["."])) == ["checkpoint-500", "final"]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_find_series_keeps_equal_files_with_other_numbers(save: Save, suffix: str) -> None:
    first = save("tmp.pth", weights())
    if suffix == "safetensors":
        save_file(weights(), first)
    for name in ("c-1", "c-2", "last"):
        shutil.copy(first, f"{name}.{suffix}")
    series = find_series([f"*[12t].{suffix}"])
    assert names(series) == [f"c-1.{suffix}", f"c-2.{suffix}"]
    assert series.notes == (f"last.{suffix} is c-1.{suffix} again (the same weights): counted once.",)


@pytest.mark.parametrize("duplicate", [shutil.copy, os.link, os.symlink])
@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 99), st.integers(1, 10**6)), min_size=3, max_size=7, unique_by=lambda eu: eu[1]),
    st.data(),
)
def test_find_series_keeps_the_name_of_two_copies_that_lines_up_with_the_rest(
    tmp_path_factory: pytest.TempPathFactory,
    duplicate: Callable[[Path, Path], None],
    pairs: list[tuple[int, int]],
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("copies")
    in_order = sorted(pairs)
    saved = [folder / f"net_{epoch}_{update}.pt" for epoch, update in in_order]
    for value, path in enumerate(saved):
        torch.save(weights(float(value)), path)
    again = data.draw(st.dictionaries(st.sampled_from(range(1, 99)), st.sampled_from(saved), max_size=len(pairs) - 1))
    for number, path in again.items():
        duplicate(path, folder / f"net{number}.pt")
    series = find_series([folder])
    assert [member.path for member in series.members] == saved
    assert sum("counted once" in note for note in series.notes) == len(again)


def test_find_series_counts_a_copy_in_another_layout_once(save: Save) -> None:
    """Beside the weights of each epoch, ESPnet keeps all that a run needs to go on."""
    for i in (3, 4, 5):
        save(f"{i}ep.pth", weights(i))
    save("resume.pth", {"model": weights(5), "optimizers": [{"state": {0: {"m": torch.ones(9)}}}], "reporter": {}})
    save("ddp.pth", {"state_dict": {f"module.{key}": value for key, value in weights(4).items()}, "epoch": 4})
    save_file(weights(3), "3ep.safetensors")
    save("new.pth", {"model": weights(6)})
    series = find_series(["."])
    assert sorted(names(series)) == ["3ep.pth", "4ep.pth", "5ep.pth", "new.pth"]
    assert series.notes[:3] == (
        "3ep.safetensors is 3ep.pth again (the same weights): counted once.",
        "ddp.pth is 4ep.pth again (the same weights): counted once.",
        "resume.pth is 5ep.pth again (the same weights): counted once.",
    )


def test_find_series_keeps_copies_of_equal_weights_at_their_own_steps(save: Save) -> None:
    for name, step in (("frozen-1.pth", 1), ("early.pth", 1), ("frozen-2.pth", 2), ("late.pth", 2)):
        save(name, {"model": weights(), "epoch": step})
    series = find_series(["."])
    assert names(series) == ["frozen-1.pth", "frozen-2.pth"]
    assert series.notes == (
        "early.pth is frozen-1.pth again (the same weights): counted once.",
        "late.pth is frozen-2.pth again (the same weights): counted once.",
    )


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


def test_find_series_keeps_files_that_differ_in_one_value(save: Save) -> None:
    state = {f"w{i}": torch.zeros(100) for i in range(5)}
    save("a-1.pth", state)
    state["w3"] = torch.zeros(100)
    state["w3"][50] = 1e-30
    save("a-2.pth", state)
    assert names(find_series(["a-*.pth"])) == ["a-1.pth", "a-2.pth"]


def test_find_series_counts_the_same_argument_once_without_a_note(plain: Callable[..., list[Path]]) -> None:
    paths = plain("a-1.pth", "a-2.pth")
    series = find_series([*paths, "a-1.pth", "./a-2.pth", "*.pth", "."])
    assert (names(series), series.notes) == (["a-1.pth", "a-2.pth"], ())


# Own outputs


@pytest.fixture
def with_output(plain: Callable[..., list[Path]]) -> list[Path]:
    paths = plain("a-1.pth", "a-2.pth")
    average(paths, out="averaged.pth")
    average(paths, mode="ema", out="averaged.safetensors")
    return paths


@pytest.mark.usefixtures("with_output")
def test_find_series_leaves_out_own_outputs_and_says_so() -> None:
    series = find_series(["."])
    assert names(series) == ["a-1.pth", "a-2.pth"]
    assert series.notes == tuple(
        f"averaged.{suffix} was written by ckpt-tools: left out (add it with `include_outputs`)."
        for suffix in ("pth", "safetensors")
    )


@pytest.mark.usefixtures("with_output")
def test_find_series_takes_own_outputs_by_name_or_where_nothing_else_is() -> None:
    everything = ["a-1.pth", "a-2.pth", "averaged.pth", "averaged.safetensors"]
    assert sorted(names(find_series(["."], include_outputs=True))) == everything
    alone = find_series(["averaged.pth", "averaged.safetensors"])
    assert (sorted(names(alone)), len(alone.members)) == (everything[2:], 2)


# Averages by other tools


@settings(max_examples=40)
@given(
    st.sampled_from(["ave", "avg", "average", "Averaged", "SWA", "ema", "soup", "merged"]),
    st.sampled_from(["{}_3to5", "net.{}.final", "dev-{}7best", "{}"]),
)
def test_find_series_leaves_out_one_average_by_its_name(
    tmp_path_factory: pytest.TempPathFactory, word: str, form: str
) -> None:
    folder = tmp_path_factory.mktemp("named")
    for value, name in enumerate(["net-3", "net-4", "net-5", form.format(word)]):
        torch.save(weights(float(value)), folder / f"{name}.pt")
    for given_as in (folder, folder / "*.pt"):
        series = find_series([given_as])
        assert names(series) == ["net-3.pt", "net-4.pt", "net-5.pt"]
        (note,) = series.notes
        assert note == f"{form.format(word)}.pt is an average by its name: left out (add it with `include_outputs`)."
        assert len(find_series([given_as], include_outputs=True).members) == 4


def test_find_series_leaves_out_all_averages_of_a_folder_but_those_given_by_path(
    plain: Callable[..., list[Path]],
) -> None:
    plain("exp/6.pt", "exp/7.pt", "exp/dev.wer.ave_2best.pt", "exp/swa/model.safetensors", "exp/7-avg-2.pt")
    series = find_series(["exp", "exp/7-avg-2.pt"])
    assert sorted(names(series)) == ["6.pt", "7-avg-2.pt", "7.pt"]
    assert series.notes[:2] == (
        "By their names these are averages, and count because their paths are given: exp/7-avg-2.pt.",
        "dev.wer.ave_2best.pt is an average by its name: left out (add it with `include_outputs`).",
    )


def test_find_series_knows_the_folder_of_an_average_where_all_files_have_one_name(
    plain: Callable[..., list[Path]],
) -> None:
    plain("step_1/net.pt", "step_2/net.pt", "step_average/net.pt")
    assert [member.step for member in find_series(["*/net.pt"]).members] == [1, 2]


@pytest.mark.parametrize(
    "series",
    [
        ["avg-of-3_1.pt", "avg-of-3_2.pt"],
        ["net-ema-2.pth", "net-ema-3.pth", "net-ema-10.pth"],
        ["average_1.pt", "swa_2.pt"],
        ["cave_1.pt", "cave_2.pt", "schema_3.pt", "emma_4.pt"],
    ],
)
def test_find_series_takes_a_series_of_averages(plain: Callable[..., list[Path]], series: list[str]) -> None:
    plain(*series)
    found = find_series(["."], order="given")
    assert sorted(names(found)) == sorted(series)
    assert found.notes == ()


def test_find_series_leaves_an_average_out_of_a_series_of_averages(plain: Callable[..., list[Path]]) -> None:
    plain("ema-1.pth", "ema-2.pth", "ema-swa.pth")
    assert names(find_series(["."])) == ["ema-1.pth", "ema-2.pth"]


def test_find_series_takes_a_series_of_averages_with_a_copy_of_another_name(plain: Callable[..., list[Path]]) -> None:
    plain("avg-1.pth", "avg-2.pth")
    shutil.copy("avg-2.pth", "last.pth")
    assert names(find_series(["."])) == ["avg-1.pth", "avg-2.pth"]


def test_average_rejects_a_folder_of_raw_weights_and_several_emas(plain: Callable[..., list[Path]]) -> None:
    plain("net_1.pt", "net_2.pt", "ema_1.pt", "ema_2.pt")
    with pytest.raises(LayoutError, match=r"ema_1.pt is an EMA by its name, net_1.pt is not \(2 of 4 are\)"):
        average(".", out="o.pt")


def test_find_series_rejects_one_checkpoint_beside_averages(plain: Callable[..., list[Path]]) -> None:
    paths = plain("net.pt", "soup.pt", "net-swa.pt")
    with pytest.raises(SeriesError, match=r"averages by their names, beside net\.pt alone\. Give the paths"):
        find_series(["*.pt"])
    assert len(find_series(paths).members) == len(find_series(["."], include_outputs=True).members) == 3


# Selection


def test_find_series_with_last_takes_the_newest_and_says_if_there_are_fewer(scored: list[Path]) -> None:
    assert names(find_series(scored, last=2)) == ["e4.pth", "e5.pth"]
    more = find_series(scored, last=9)
    assert (len(more.members), more.notes) == (5, ("`last=9`: there are only 5; all are used.",))


def test_find_series_with_best_keeps_the_order_of_training_and_the_earlier_of_two_equals(scored: list[Path]) -> None:
    assert names(find_series(scored, best=1)) == ["e2.pth"]
    assert names(find_series(scored, best=2)) == ["e2.pth", "e4.pth"]
    assert names(find_series(scored, best=3)) == ["e2.pth", "e4.pth", "e5.pth"]
    assert find_series(scored, best=8).notes == ("`best=8`: there are only 5; all are used.",)


def test_find_series_with_lower_is_better_reverses_the_ranking(scored: list[Path]) -> None:
    assert names(find_series(scored, best=2, lower_is_better=True)) == ["e1.pth", "e3.pth"]


def test_find_series_takes_a_nested_metric_and_hints_at_a_loss(save: Save) -> None:
    for i, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
        save(f"a-{i}.pth", {"state_dict": weights(i), "val": {"loss": loss}})
    assert names(find_series(["a-*.pth"], best=1, metric="val.loss", lower_is_better=True)) == ["a-2.pth"]
    wrong_way = find_series(["a-*.pth"], best=1, metric="val.loss")
    assert names(wrong_way) == ["a-1.pth"]
    assert wrong_way.notes == ("`best` takes the highest 'val.loss'; if lower is better, add `lower_is_better`.",)


def test_find_series_names_the_file_without_a_metric_and_what_it_has(scored: list[Path], save: Save) -> None:
    save("e6.pth", {"state_dict": weights(), "epoch": 6, "top1": 50.0})
    with pytest.raises(SeriesError, match=r"e6\.pth: has no number under 'metric'.*it has epoch, top1\."):
        find_series([*scored, "e6.pth"], best=2)


@pytest.mark.parametrize("metric", ["90", True, None, 10**400])
def test_find_series_rejects_a_metric_that_is_no_number(save: Save, metric: Any) -> None:
    save("a.pth", {"state_dict": weights(), "metric": metric})
    with pytest.raises(SeriesError, match="under 'metric', so `best` cannot rank it. It stores no numbers"):
        find_series(["a.pth"], best=1)


@pytest.mark.parametrize(
    ("metric", "what"), [(float("nan"), "is NaN"), (torch.ones(2), "is a tensor"), (torch.tensor(math.nan), "is NaN")]
)
def test_find_series_says_what_a_metric_is_that_cannot_be_ranked(save: Save, metric: Any, what: str) -> None:
    save("a.pth", {"state_dict": weights(), "metric": metric})
    with pytest.raises(SeriesError, match=f"a.pth: its 'metric' {what}.*so `best` cannot rank it"):
        find_series(["a.pth"], best=1)


@pytest.mark.parametrize("write", ["zip", "legacy", "safetensors", "dcp"])
@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]
)
def test_find_series_with_best_reads_a_metric_that_is_a_tensor(save: Save, write: str, dtype: str) -> None:
    scores = torch.tensor([3, 100, 40, 77, 12], dtype=getattr(torch, dtype))
    for i, score in enumerate(scores):
        state = {"net": weights(i), "val": {"score": score.reshape(1, 1) if i % 2 else score}}
        if write == "safetensors":
            save_file({**weights(i), "val.score": score.clone()}, f"run-{i}.st")
        elif write == "dcp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is one process
                dcp.save(state, checkpoint_id=f"run-{i}.st")
        else:
            save(f"run-{i}.st", state, _use_new_zipfile_serialization=write == "zip")
    (best,) = find_series(["run-*.st"], best=1, metric="val.score").members
    worst = find_series(["run-*.st"], best=2, metric="val.score", lower_is_better=True)
    assert best.path.name == f"run-{int(scores.double().argmax())}.st"
    assert names(worst) == [f"run-{i}.st" for i in sorted(scores.double().argsort()[:2].tolist())]


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


def test_find_series_takes_the_metrics_of_trainer_folders_at_their_step() -> None:
    log = []
    for step, loss in ((500, 0.3), (1000, 0.1), (1500, 0.2)):
        folder = trainer_folder(Path(f"checkpoint-{step}"), step)
        log += [{"step": step, "loss": 9.0 - loss}, {"step": step, "eval_loss": loss}]
        state = {"global_step": step, "best_metric": 0.1, "log_history": log}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert names(find_series(["checkpoint-*"], best=2, metric="eval_loss", lower_is_better=True)) == [
        "checkpoint-1000",
        "checkpoint-1500",
    ]
    with pytest.raises(SeriesError, match=r"has no number under 'metric'.*it has step, loss, eval_loss\."):
        find_series(["checkpoint-*"], best=1)


def test_find_series_ranks_an_infinite_loss_last(save: Save) -> None:
    for i, loss in ((1, float("inf")), (2, 0.1)):
        save(f"a-{i}.pth", {"state_dict": weights(i), "loss": loss})
    assert names(find_series(["a-*.pth"], best=1, metric="loss", lower_is_better=True)) == ["a-2.pth"]


def test_find_series_with_every_counts_from_the_last(scored: list[Path]) -> None:
    assert names(find_series(scored, every=2)) == ["e1.pth", "e3.pth", "e5.pth"]
    assert names(find_series(scored, every=3)) == ["e2.pth", "e5.pth"]
    assert names(find_series(scored, every=3, last=1)) == ["e5.pth"]


def test_find_series_includes_from_step_and_to_step(scored: list[Path]) -> None:
    assert names(find_series(scored, from_step=2, to_step=4)) == ["e2.pth", "e3.pth", "e4.pth"]
    assert names(find_series(scored, from_step=4)) == ["e4.pth", "e5.pth"]
    assert names(find_series(scored, to_step=1)) == ["e1.pth"]


def test_find_series_combines_selections_in_the_documented_order(scored: list[Path]) -> None:
    assert names(find_series(scored, from_step=2, best=3, every=2, last=1)) == ["e5.pth"]


def test_find_series_rejects_missing_steps_and_names_those_there_are(scored: list[Path]) -> None:
    with pytest.raises(
        SeriesError, match="`from_step=6` `to_step=9`: no checkpoint in this range; they go from epoch 1 to 5"
    ):
        find_series(scored, from_step=6, to_step=9)


def test_find_series_rejects_a_range_of_steps_for_an_unknown_step(plain: Callable[..., list[Path]]) -> None:
    with pytest.raises(SeriesError, match=r"best\.pth: its step is unknown, so `to_step=3` cannot apply to it"):
        find_series(plain("best.pth"), to_step=3)


@pytest.mark.parametrize("option", ["last", "best", "every"])
def test_find_series_rejects_counts_below_one(scored: list[Path], option: str) -> None:
    with pytest.raises(UsageError, match=f"`{option}=0`: must be 1 or more"):
        find_series(scored, **{option: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["last", "best", "every", "from_step", "to_step"])
@pytest.mark.parametrize("value", [1.5, True, "2"])
def test_find_series_rejects_counts_that_are_no_whole_numbers(scored: list[Path], option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"`{option}` is a whole number, not {value!r}"):
        find_series(scored, **{option: value})


def test_find_series_rejects_a_metric_without_best_and_an_unknown_order(scored: list[Path]) -> None:
    with pytest.raises(UsageError, match="go with `best`"):
        find_series(scored, metric="loss")
    with pytest.raises(UsageError, match="`order` is one of auto, given, natural, mtime, not 'time'"):
        find_series(scored, order="time")


# Folders


def test_find_series_takes_each_checkpoint_of_a_timm_folder_once(save: Save) -> None:
    for i in (2, 10, 9):
        save(f"out/checkpoint-{i}.pth.tar", {"state_dict": weights(i), "epoch": i})
    Path("out/last.pth.tar").hardlink_to("out/checkpoint-10.pth.tar")
    Path("out/model_best.pth.tar").hardlink_to("out/checkpoint-9.pth.tar")
    Path("out/summary.csv").write_text("epoch,loss\n")
    Path("out/args.yaml").write_text("model: resnet50\n")
    series = find_series(["out"])
    assert names(series) == ["checkpoint-2.pth.tar", "checkpoint-9.pth.tar", "checkpoint-10.pth.tar"]
    assert len(series.notes) == 2


def test_expand_leaves_out_optimizers_hidden_files_and_dangling_links(save: Save) -> None:
    for name in ("model-1.pt", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", ".model-1.pt.77.partial.pt"):
        save(f"out/{name}", weights())
    Path("out/gone.pt").symlink_to("nowhere.pt")
    sharded(Path("out/.averaged.77.partial"), 0.0)
    assert [path.name for path in expand(["out"])] == ["model-1.pt"]


def test_find_series_takes_a_sharded_folder_as_one_checkpoint() -> None:
    for i in (2, 10):
        sharded(Path(f"all/step-{i}"), i)
    one = find_series(["all/step-2"])
    assert names(one) == ["step-2"]
    assert set(one.members[0].header.tree) == {"a", "b"}
    assert names(find_series(["all"])) == names(find_series(["all/*"])) == ["step-2", "step-10"]


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


@pytest.mark.parametrize("argument", ["out", "ou?"])
def test_find_series_rejects_the_final_model_next_to_a_series_in_folders(argument: str) -> None:
    trainer_folder(Path("out"), 1000)
    for step in (500, 1000):
        trainer_folder(Path(f"out/checkpoint-{step}"), step)
    with pytest.raises(SeriesError, match=r"use 'out/checkpoint-\*'\. To take the one alone, give out/model\.safetens"):
        find_series([argument])
    assert len(find_series(["out/checkpoint-*"]).members) == 2
    assert names(find_series(["out/model.safetensors"])) == ["model.safetensors"]


def test_find_series_notes_the_series_in_each_of_several_folders() -> None:
    for run in ("a", "b"):
        trainer_folder(Path(run), 1000)
        trainer_folder(Path(f"{run}/step_500"), 500)
        Path(f"{run}/step_500/global_step500").mkdir()
        torch.save(weights(), f"{run}/step_500/global_step500/mp_rank_00_model_states.pt")
    assert find_series(["a", "b"], order="given").notes[:2] == tuple(
        f"{run} is one checkpoint itself. For those in its folder, use '{run}/step_*'." for run in ("a", "b")
    )
    assert names(find_series(["a/step_500"])) == ["step_500"]


@pytest.mark.parametrize(
    ("alone", "series", "glob"),
    [
        ("run/pytorch_model.bin", ["run/step-1.safetensors", "run/step-2.safetensors"], "run/step-*.safetensors"),
        ("run/net.pt", ["run/epochs/1.pt", "run/epochs/2.pt"], "run/epochs"),
        ("run/net.pt", ["run/it_100/w.pt", "run/it_200/w.pt"], "run/it_*"),
        ("rank_0/run/net.pt", ["rank_0/run/all/1.pt", "rank_0/run/all/2.pt"], "rank_0/run/all"),
    ],
)
def test_find_series_rejects_one_file_next_to_a_series_unless_it_is_given_by_its_path(
    plain: Callable[..., list[Path]], alone: str, series: list[str], glob: str
) -> None:
    plain(alone, *series)
    for argument in (str(Path(alone).parent), f"{alone[:-1]}?"):
        advice = f"To average the series, use '{glob}'. To take the one alone, give {alone}."
        with pytest.raises(SeriesError, match=re.escape(advice)):
            find_series([argument])
    assert names(find_series([alone])) == [Path(alone).name]
    assert len(find_series([glob]).members) == 2


def test_find_series_takes_a_folder_with_other_files_of_one_checkpoint(plain: Callable[..., list[Path]]) -> None:
    plain("run/model.safetensors", "run/model.fp16.safetensors", "run/consolidated.00.pth", "run/consolidated.01.pth")
    Path("run/logs").mkdir()
    series = find_series(["run"])
    assert (names(series), series.notes) == (["run"], ())


@pytest.mark.parametrize("further", ["model_1.safetensors", "pytorch_model_1.bin"])
def test_find_series_rejects_folders_with_several_models_but_takes_the_files_of_one(
    plain: Callable[..., list[Path]], further: str
) -> None:
    first = further.replace("_1", "")
    plain(*(f"ckpt_{step}/{name}" for step in (5, 10) for name in (first, further)))
    for paths in (["ckpt_5"], ["ckpt_*"]):
        with pytest.raises(
            UnsupportedError, match=rf"ckpt_5: has several models: {first}, {further}\. Give one by the"
        ):
            find_series(paths)
    for name in (first, further):
        assert [member.step for member in find_series([f"ckpt_*/{name}"]).members] == [5, 10]


def test_find_series_rejects_loose_shards() -> None:
    sharded(Path("model"), 0.0)
    with pytest.raises(SeriesError, match="are shards of one checkpoint, not two. Give the folder"):
        find_series(["model/*.safetensors"])


@pytest.mark.parametrize(
    "pattern",
    [
        "consolidated.0{}.pth",
        "mp_rank_0{}_model_states.pt",
        "bf16_zero_pp_rank_{}_mp_rank_00_model_states.pt",
        "mp_rank_00_00{}/model_optim_rng.pt",
        "tp_rank_00_pp_rank_00{}/model_optim_rng.pt",
        "model_rank_{}.pt",
        "rank{}.pt",
        "pytorch_model_fsdp_{}.bin",
        "layer_0{}-model_00-model_states.pt",
    ],
)
def test_find_series_rejects_several_ranks_of_one_checkpoint(plain: Callable[..., list[Path]], pattern: str) -> None:
    paths = plain(*(f"{folder}/{pattern.format(rank)}" for folder in ("iter_9", "iter_10") for rank in (0, 1)))
    with pytest.raises(SeriesError, match="differ only in the rank, so they are shards of one checkpoint"):
        find_series(paths)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"),
        ("mp_rank_01_000/model_optim_rng.pt", "mp_rank_00_000/model_optim_rng.pt"),
        ("consolidated.00.pth", "consolidated.01.pth"),
        ("layer_03-model_00-model_states.pt", "layer_04-model_00-model_states.pt"),
        ("layer_03-model_states.pt", "layer_04-model_states.pt"),
        ("checkpoint_1_100-model_part-0.pt", "checkpoint_1_100-model_part-1.pt"),
        ("checkpoint_last-shard1.pt", "checkpoint_last-shard0.pt"),
    ],
)
def test_find_series_rejects_one_rank_of_several(
    plain: Callable[..., list[Path]], one: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = one.startswith(("mp_rank", "consolidated", "layer"))
    advice = (
        r"Give the folder of all ranks: .*run/iter_\d+, or '.*run/iter_\*'" if together else "Merge the ranks first"
    )
    paths = plain(*(f"run/iter_{i}/{rank}" for i in (9, 10) for rank in (one, other)))
    message = rf"{re.escape(one)} is one rank of several, .*; .*{re.escape(other)} holds another\. {advice}"
    with pytest.raises(SeriesError, match=message):
        find_series([paths[2], paths[0]])
    with pytest.raises(SeriesError, match=message):
        find_series([f"run/iter_*/{one}"])
    monkeypatch.chdir(paths[0].parent)
    with pytest.raises(SeriesError, match="is one rank of several"):
        find_series([Path(one).name])


@pytest.mark.parametrize(
    ("one", "others"),
    [
        ("mp_rank_00/model_optim_rng.pt", ["mp_rank_00/distrib_optim.pt", "rng_state/mp_rank_01/rng.pt"]),
        (
            "mp_rank_00_model_states.pt",
            ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"],
        ),
        ("consolidated.00.pth", ["consolidated.pth", "params.pth"]),
        ("lora_rank_8/model.pt", ["lora_rank_16/model.pt", "lora_rank_4/model.pt"]),
        ("pytorch_model_fsdp_0/model.pt", ["pytorch_model_fsdp_1/model.pt"]),
        ("ranking0.pt", ["ranking1.pt"]),
    ],
)
def test_find_series_takes_the_only_rank_and_what_is_named_alike(
    plain: Callable[..., list[Path]], one: str, others: list[str]
) -> None:
    plain(*(f"step_{i}/{name}" for i in (9, 10) for name in (one, *others)))
    assert [member.path for member in find_series([f"step_*/{one}"]).members] == [
        Path(f"step_{i}/{one}") for i in (9, 10)
    ]


def test_find_series_rejects_one_rank_of_several_in_another_store() -> None:
    data = io.BytesIO()
    torch.save(weights(1), data)
    files = {Path(f"memory:/run/iter_1/mp_rank_0{i}/m.pt"): data.getvalue() for i in (0, 1)}
    STORES["memory"] = MemoryStore(files)
    try:
        with pytest.raises(
            SeriesError, match=r"mp_rank_00/m\.pt is one rank of several.*mp_rank_01/m\.pt holds another"
        ):
            find_series(["memory://run/iter_1/mp_rank_00/m.pt"])
    finally:
        del STORES["memory"]


def test_find_series_says_what_it_looked_for_in_a_folder_without_checkpoints() -> None:
    Path("logs").mkdir()
    Path("logs/events.txt").touch()
    with pytest.raises(SeriesError, match=r"logs: no checkpoints in this folder \(looked for \*\.pth"):
        find_series(["logs"])


# Globs and names


def test_find_series_expands_a_quoted_glob(plain: Callable[..., list[Path]]) -> None:
    plain("runs/a-1.pth", "runs/a-2.pth", "runs/a-10.pth", "runs/b-1.pth")
    assert names(find_series(["runs/a-*.pth"])) == ["a-1.pth", "a-2.pth", "a-10.pth"]
    assert names(find_series([f"{Path.cwd()}/runs/a-[12].pth"])) == ["a-1.pth", "a-2.pth"]
    assert names(find_series(["runs/?-1.pth"], order="natural")) == ["a-1.pth", "b-1.pth"]


def test_find_series_expands_two_stars_into_folders_but_not_hidden_ones(plain: Callable[..., list[Path]]) -> None:
    plain("runs/a-1.pth", "runs/deep/er/a-2.pth", "runs/.old/a-3.pth")
    assert names(find_series(["runs/**/*.pth"])) == ["a-1.pth", "a-2.pth"]


def test_find_series_ignores_links_in_circles(plain: Callable[..., list[Path]]) -> None:
    """Two of them made 2^40 paths."""
    plain("runs/one/a-1.pth", "runs/two/a-2.pth")
    for run in ("one", "two"):
        Path(f"runs/{run}/root").symlink_to("..")
    for pattern in ("runs/**/*.pth", "**/a-?.pth", "**/runs/**/a-*"):
        series = find_series([pattern])
        assert (names(series), series.notes) == (["a-1.pth", "a-2.pth"], ())


def test_find_series_expands_two_stars_at_the_end_to_all_files_below(plain: Callable[..., list[Path]]) -> None:
    plain("runs/a-1.pth", "runs/deep/a-2.pth")
    assert names(find_series(["runs/**"])) == ["a-1.pth", "a-2.pth"]


def test_find_series_takes_brackets_in_a_name_literally(plain: Callable[..., list[Path]]) -> None:
    plain("lr=[1]/run[1].pth", "lr=[1]/run[2].pth", "run1.pth")
    assert names(find_series(["lr=[1]/run[1].pth"])) == ["run[1].pth"]
    assert names(find_series(["lr=[1]/*.pth"])) == ["run[1].pth", "run[2].pth"]


def test_find_series_says_where_to_look_for_a_glob_that_matches_nothing() -> None:
    Path("runs").mkdir()
    with pytest.raises(SeriesError, match=r"no file matches 'runs/\*\.pth'. Look at the folder: ls runs"):
        find_series(["runs/*.pth"])
    Path("runs.pth").touch()
    for pattern in ("rums/*.pth", "rums/sub/*.pth", "rums/**/*.pth", "rums/c-1.pth"):
        with pytest.raises(SeriesError, match=r"The folder rums does not exist\. Did you mean runs\?$"):
            find_series([pattern])
    with pytest.raises(SeriesError, match=r"The folder runs/sub does not exist\.$"):
        find_series(["runs/sub/*.pth"])
    with pytest.raises(SeriesError, match=r"no file matches 'r\*/gone/\*\.pth'. Look at the folder: ls \."):
        find_series(["r*/gone/*.pth"])
    with pytest.raises(SeriesError, match=r"no file matches 'runs\.pth/\*\.pth'. Look at the folder: ls \."):
        find_series(["runs.pth/*.pth"])


def test_find_series_names_other_files_that_a_glob_matches(plain: Callable[..., list[Path]]) -> None:
    plain("runs/a-1.pth")
    Path("runs/summary.csv").write_text("epoch,loss\n1,0.5\n")
    with pytest.raises(NotACheckpointError, match=r"runs/summary\.csv: not a checkpoint"):
        find_series(["runs/*"])


def test_find_series_suggests_a_name_for_a_missing_file(plain: Callable[..., list[Path]]) -> None:
    plain("runs/checkpoint-12.pth")
    with pytest.raises(SeriesError, match=r"no such file or folder\. Did you mean runs/checkpoint-12\.pth\?"):
        find_series(["runs/checkpont-12.pth"])
    with pytest.raises(SeriesError, match=r"no such file or folder\. The folder rums does not exist\."):
        find_series(["rums/checkpoint-12.pth"])


def test_find_series_expands_home(plain: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    plain("runs/a-1.pth", "runs/a-2.pth")
    assert names(find_series(["~/runs/*.pth"])) == names(find_series(["~/runs"])) == ["a-1.pth", "a-2.pth"]
    with pytest.raises(SeriesError, match="~nobody-of-this-name/a.pth: no such file or folder"):
        find_series(["~nobody-of-this-name/a.pth"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "an empty path. Is a variable of the shell unset"),
        ("x" * 300 + ".pth", "File name too long"),
        ("gone.pth", r"gone\.pth: a broken link to nowhere\.pth"),
        ("go*.pth", r"gone\.pth: a broken link to nowhere\.pth"),
        ("loop.pth", r"loop\.pth: a broken link to loop\.pth"),
        ("a-1.pth/b.pth", "no such file or folder"),
    ],
)
def test_find_series_rejects_a_path_that_leads_nowhere(
    plain: Callable[..., list[Path]], path: str, message: str
) -> None:
    plain("a-1.pth")
    Path("gone.pth").symlink_to("nowhere.pth")
    Path("loop.pth").symlink_to("loop.pth")
    with pytest.raises(SeriesError, match=message):
        find_series([path])


def test_find_series_rejects_no_arguments() -> None:
    nothing: Sequence[Path] = []
    with pytest.raises(SeriesError, match="no checkpoint given"):
        find_series(nothing)


@pytest.mark.parametrize("paths", [None, [None], [b"x"], b"x", "a.pth", 3])
def test_find_series_rejects_what_is_no_path(paths: Any) -> None:
    with pytest.raises(UsageError, match="paths is a list of paths, not|a path is text, not"):
        find_series(paths)


def test_find_series_orders_names_that_are_no_unicode(plain: Callable[..., list[Path]]) -> None:
    plain(*(os.fsdecode(b"\xff-%d.pth" % i) for i in (10, 2)))
    assert [member.step for member in find_series(["*.pth"]).members] == [2, 10]
    assert [member.step for member in find_series(["."], order="natural").members] == [2, 10]
