"""Copies and averages: each checkpoint of a series counts once, and none that was made of the others does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from series_files import names, sharded, trainer_folder, weights

from ckpt_tools import average
from ckpt_tools.errors import LayoutError, SeriesError
from ckpt_tools.series.find import find_series

Save = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("here")


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


def test_find_series_keeps_files_that_differ_in_one_value(save: Save) -> None:
    state = {f"w{i}": torch.zeros(100) for i in range(5)}
    save("a-1.pth", state)
    state["w3"] = torch.zeros(100)
    state["w3"][50] = 1e-30
    save("a-2.pth", state)
    assert names(find_series(["a-*.pth"])) == ["a-1.pth", "a-2.pth"]


def bytes_read() -> int:
    """All that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_copies_are_compared_up_to_the_first_difference_and_in_a_dry_run_not_at_all(save: Save) -> None:
    size = 16 << 20
    state = {"a": torch.zeros(size // 4), "b": torch.zeros(size // 4)}
    first = save("c-1.pth", state)
    shutil.copy(first, "last.pth")
    state["a"][0] = 1
    save("other.pth", state)

    before = bytes_read()
    dry = find_series(["c-1.pth", "last.pth"], dry_run=True)
    assert bytes_read() - before < size / 16
    assert names(dry) == ["c-1.pth"]
    assert dry.notes == ("last.pth is c-1.pth again, as 64 bytes of each tensor say: counted once.",)
    before = bytes_read()
    assert len(find_series(["c-1.pth", "other.pth"]).members) == 2
    assert bytes_read() - before < size  # a few blocks of each file for each thread
    before = bytes_read()
    assert names(find_series(["c-1.pth", "last.pth"])) == ["c-1.pth"]
    assert bytes_read() - before > 4 * size


def test_find_series_counts_the_same_argument_once_without_a_note(plain: Callable[..., list[Path]]) -> None:
    paths = plain("a-1.pth", "a-2.pth")
    series = find_series([*paths, "a-1.pth", "./a-2.pth", "*.pth", "."])
    assert (names(series), series.notes) == (["a-1.pth", "a-2.pth"], ())


# Own outputs


@pytest.fixture
def with_output(here: Path, plain: Callable[..., list[Path]]) -> list[Path]:
    paths = plain("a-1.pth", "a-2.pth")
    average(paths, out=here / "averaged.pth")
    average(paths, mode="ema", out=here / "averaged.safetensors")
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
    with pytest.raises(LayoutError, match=r"Only 2 of 4 checkpoints look like an EMA by name: ema_1.pt, ema_2.pt\."):
        average(".", out="o.pt")


def test_find_series_rejects_one_checkpoint_beside_averages(plain: Callable[..., list[Path]]) -> None:
    paths = plain("net.pt", "soup.pt", "net-swa.pt")
    with pytest.raises(SeriesError, match=r"averages by their names, beside net\.pt alone\. Give the paths"):
        find_series(["*.pt"])
    assert len(find_series(paths).members) == len(find_series(["."], include_outputs=True).members) == 3


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
