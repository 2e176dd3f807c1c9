"""DeepSpeed: what all ranks saved is read as the whole float32 weights."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zero_files import (
    BUFFERS,
    FROZEN,
    GROUPS,
    Arrays,
    arrays,
    edit,
    equal,
    fragment_address,
    full,
    load,
    masters,
    save,
    save_universal,
    save_zero,
    whole,
)

from ckpt_tools import average, convert, diff, open_checkpoint
from ckpt_tools.errors import (
    CorruptError,
    LayoutError,
    NotACheckpointError,
    ReadError,
    UnsupportedError,
)
from ckpt_tools.formats import read_header
from ckpt_tools.jobs.inspect import describe
from ckpt_tools.series.find import find_series

# Reading


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("stage", "padded"), [(1, False), (1, True), (2, False), (3, False)])
def test_the_weights_of_all_ranks_become_one_flat_file(tmp_path: Path, stage: int, padded: bool, ranks: int) -> None:
    folder = full(tmp_path / "global_step1", stage=stage, ranks=ranks, padded=padded)
    report = convert(folder, to="plain", out=tmp_path / "pytorch_model.bin")
    assert (report.format, report.layout, report.state) == ("deepspeed", "deepspeed", ("raw (fp32)",))
    found = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert equal(found, masters())
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()


SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=4).map(tuple), min_size=1, max_size=6)


@settings(max_examples=25)
@given(st.lists(SHAPES, min_size=1, max_size=3), st.integers(1, 9), st.sampled_from([1, 2, 3]))
def test_any_shapes_over_any_ranks_are_read(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[tuple[int, ...]]], ranks: int, stage: int
) -> None:
    groups = [arrays({f"{i}.{j}": shape for j, shape in enumerate(group)}, i) for i, group in enumerate(shapes)]
    folder = save_zero(tmp_path_factory.mktemp("any") / "step", groups, stage=stage, ranks=ranks)
    found = open_checkpoint(folder)
    assert list(found) == list(whole(groups))
    assert all(np.array_equal(found[name].numpy(), each) for name, each in whole(groups).items())


def test_dtypes_of_a_checkpoint_that_is_opened_are_those_of_the_files(tmp_path: Path) -> None:
    found = open_checkpoint(full(tmp_path / "step"))
    assert {name: t.dtype for name, t in found.items() if t.dtype != torch.float32} == {
        "norm.running_mean": torch.bfloat16,
        "norm.num_batches_tracked": torch.int64,
        "frozen.weight": torch.bfloat16,
        "frozen.bias": torch.bfloat16,
    }
    assert all(torch.equal(found[name].to(t.dtype), t) for name, t in masters().items())


def test_sub_groups_of_stage_3_may_differ_from_the_groups_of_shapes(tmp_path: Path) -> None:
    """Early versions have the shapes of all groups in one dict."""
    folder = save_zero(tmp_path / "step", GROUPS, stage=3, ranks=2)
    for path in folder.glob("*_model_states.pt"):
        states = load(path)
        states["param_shapes"] = OrderedDict((n, s) for group in states["param_shapes"] for n, s in group.items())
        save(path, states)
    found = open_checkpoint(folder)
    assert all(np.array_equal(found[name].numpy(), each) for name, each in whole().items())


def test_padding_behind_parameters_is_left_out(tmp_path: Path) -> None:
    """By the option parameter_alignment: the last parameter has none."""
    group = arrays({"a": (3,), "b": (2, 3), "c": (5,)})
    ends = {"a": 1, "b": 2, "c": 0}
    padded = {
        name: each
        for (own, values), gap in zip(group.items(), ends.values(), strict=True)
        for name, each in ((own, values), (f"{own} padding", np.full(gap, np.float32(np.nan))))
    }
    folder = save_zero(tmp_path / "step", [padded], stage=2, ranks=2)
    model = folder / "mp_rank_00_model_states.pt"
    states = load(model)
    states["param_shapes"] = [{n: s for n, s in states["param_shapes"][0].items() if n in group}]
    states["module"] = {n: t for n, t in states["module"].items() if n in group}
    save(model, states)
    for path in folder.glob("*_optim_states.pt"):
        edit(path, lambda state: state.update(param_alignment_paddings=[[*ends.values()]]))
    found = open_checkpoint(folder)
    assert list(found) == list(group)
    assert all(np.array_equal(found[name].numpy(), each) for name, each in group.items())


def test_parameters_that_stage_3_does_not_split_are_taken_whole(tmp_path: Path) -> None:
    folder = full(tmp_path / "step", ranks=2)
    for path in folder.glob("*_model_states.pt"):
        states = load(path)
        states["frozen_param_fragments"]["frozen.weight"] = torch.from_numpy(FROZEN["frozen.weight"])
        save(path, states)
    found = open_checkpoint(folder)
    assert np.array_equal(found["frozen.weight"].numpy(), FROZEN["frozen.weight"])


def test_empty_parameters_are_read(tmp_path: Path) -> None:
    groups = [arrays({"a": (3, 2), "none": (0, 4), "b": (5,)})]
    for stage in (2, 3):
        found = open_checkpoint(save_zero(tmp_path / f"{stage}", groups, stage=stage, ranks=2))
        assert (found["none"].shape, found["none"].dtype) == ((0, 4), torch.float32)


def test_a_rank_more_than_there_are_elements_has_padding_alone(tmp_path: Path) -> None:
    groups = [arrays({"a": (2,)})]
    for stage in (1, 3):
        found = open_checkpoint(save_zero(tmp_path / f"{stage}", groups, stage=stage, ranks=7))
        assert np.array_equal(found["a"].numpy(), groups[0]["a"])


def test_parameters_in_the_order_of_round_robin_are_read(tmp_path: Path) -> None:
    """`param_slice_mappings` are those of the other order then, in DeepSpeed 0.19."""
    folder = save_zero(tmp_path / "step", GROUPS[:1], stage=2, ranks=2)
    for path in folder.glob("*_optim_states.pt"):
        states = load(path)
        states["ds_config"]["zero_optimization"]["round_robin_gradients"] = True
        states["optimizer_state_dict"]["param_slice_mappings"] = [{"one": fragment_address(1, 0)}]
        save(path, states)
    assert np.array_equal(open_checkpoint(folder)["conv.weight"].numpy(), GROUPS[0]["conv.weight"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_universal_checkpoint_has_the_same_weights(tmp_path: Path, stage: int) -> None:
    source = full(tmp_path / "global_step1", stage=stage)
    folder = save_universal(source, tmp_path / "global_step1_universal", GROUPS, stage=stage)
    convert(folder, to="plain", out=tmp_path / "whole.pth")
    assert equal(torch.load(tmp_path / "whole.pth"), masters())
    assert diff(source, folder).identical


def test_copies_in_a_universal_checkpoint_are_not_taken(tmp_path: Path) -> None:
    """DeepSpeed 0.19 adds them: of buffers as floats, and of tied parameters from 16 bits."""
    source = full(tmp_path / "step", stage=2)
    folder = save_universal(source, tmp_path / "universal", GROUPS, stage=2)
    for name in ("norm.num_batches_tracked", "head.weight"):
        (folder / "zero" / name).mkdir()
        save(folder / "zero" / name / "fp32.pt", {"param": torch.zeros(13, 7)})
    convert(folder, to="plain", out=tmp_path / "whole.pth")
    assert equal(torch.load(tmp_path / "whole.pth"), masters())


def test_merged_weights_of_several_model_parallel_ranks_are_read(tmp_path: Path) -> None:
    half = [arrays({"embed.weight": (7, 7), "norm.weight": (7,)})]
    source = save_zero(tmp_path / "step", half, stage=1, ranks=1)
    merged = [arrays({"embed.weight": (14, 7), "norm.weight": (7,)})]
    folder = save_universal(source, tmp_path / "universal", merged, stage=1)
    (folder / "mp_rank_01_model_states.pt").write_bytes((folder / "mp_rank_00_model_states.pt").read_bytes())
    found = open_checkpoint(folder)
    assert all(np.array_equal(found[name].numpy(), each) for name, each in merged[0].items())
    source = full(tmp_path / "with buffers", stage=2)
    folder = save_universal(source, tmp_path / "more", GROUPS, stage=2)
    (folder / "mp_rank_01_model_states.pt").write_bytes((folder / "mp_rank_00_model_states.pt").read_bytes())
    with pytest.raises(UnsupportedError, match="more: its buffers or frozen parameters are still in the parts of 2 ra"):
        open_checkpoint(folder)


def test_a_vocabulary_without_its_padding_is_read(tmp_path: Path) -> None:
    source = save_zero(tmp_path / "step", [arrays({"w": (8, 2)})], stage=1, ranks=1)
    cut = [arrays({"w": (6, 2)})]
    folder = save_universal(source, tmp_path / "universal", cut, stage=1)
    with pytest.raises(CorruptError, match=r"fp32\.pt: has a tensor of shape \[6, 2\], and 'w' has the shape \[8, 2\]"):
        open_checkpoint(folder)
    save(folder / "zero" / "w" / "fp32.pt", {"vocab_tensor": True, "param": torch.from_numpy(cut[0]["w"])})
    assert np.array_equal(open_checkpoint(folder)["w"].numpy(), cut[0]["w"])


def test_without_zero_the_module_is_read(tmp_path: Path) -> None:
    module = {"w": torch.rand(3).bfloat16(), "b": torch.rand(2)}
    states = {"module": module, "optimizer": {"fp32_groups": [[torch.rand(3)]]}, "param_shapes": None}
    states |= {"buffer_names": [], "shared_params": None, "global_steps": 7, "mp_world_size": 1, "ds_version": "0.19.8"}
    (tmp_path / "global_step7").mkdir()
    save(tmp_path / "global_step7" / "mp_rank_00_model_states.pt", states)
    for path in (tmp_path / "global_step7", tmp_path / "global_step7" / "mp_rank_00_model_states.pt"):
        found = open_checkpoint(path)
        assert (found.state.label, found.state.layout, found.counters) == (
            "raw (module)",
            "deepspeed",
            {"global_steps": 7},
        )
        assert equal(found, module)
    (tmp_path / "global_step7" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(UnsupportedError, match=r"states\.pt: does not say what is in the partitions.*Give this file"):
        open_checkpoint(tmp_path / "global_step7")


# Sets of weights


@pytest.mark.parametrize("stage", [1, 2])
def test_the_weights_of_16_bits_are_read_if_they_are_asked_for(tmp_path: Path, stage: int) -> None:
    folder = full(tmp_path / "step", stage=stage)
    expected = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert equal(open_checkpoint(folder, state="module"), expected)
    average(folder, state="module", out=tmp_path / "o.pth")
    assert equal(torch.load(tmp_path / "o.pth"), expected)
    for state in ("auto", "raw"):
        assert open_checkpoint(folder, state=state).state.label == "raw (fp32)"
    with pytest.raises(LayoutError, match=r"has no ema weights, only raw \(fp32\)"):
        open_checkpoint(folder, state="ema")


def test_the_placeholders_of_stage_3_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="nothing at 'module'. The top level holds: fp32, lr_scheduler"):
        open_checkpoint(full(tmp_path / "step"), state="module")


def test_an_average_that_the_script_saved_with_it_is_found(tmp_path: Path) -> None:
    client = {"ema": {name: torch.from_numpy(each) + 1 for name, each in whole().items()}, "epoch": 2}
    folder = save_zero(tmp_path / "step", GROUPS, stage=3, ranks=2, client=client)
    found = open_checkpoint(folder)
    assert (found.state.label, found.states) == ("ema", ("raw", "ema"))
    assert torch.equal(found["one"], client["ema"]["one"])
    assert np.array_equal(open_checkpoint(folder, state="raw")["one"].numpy(), GROUPS[0]["one"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_entry_of_the_script_takes_the_place_of_the_weights(tmp_path: Path, stage: int) -> None:
    named = {"fp32": True, "state_dict": {name: torch.zeros(each.shape) for name, each in whole().items()}}
    assert equal(
        open_checkpoint(full(tmp_path / "named", stage=stage, client=named)),
        open_checkpoint(full(tmp_path / "step", stage=stage)),
    )


@pytest.mark.parametrize("text", ["global_step2", "", "\xff" * 10_000])
def test_a_folder_whose_latest_checkpoint_is_not_there_is_refused(tmp_path: Path, text: str) -> None:
    folder = full(tmp_path / "run" / "global_step1")
    (tmp_path / "run" / "latest").write_text(text, encoding="latin-1")
    with pytest.raises(CorruptError, match=f"latest' names .*not there.* To take that, give {folder}$"):
        open_checkpoint(tmp_path / "run")
    assert list(open_checkpoint(folder)) == list(masters())


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = full(tmp_path / "step")
    path = next(folder.glob("*_rank_1_*optim_states.pt"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ReadError, match=f"{path.name}: cannot be read .it is no regular file"):
        read_header(folder)


def test_the_hashes_of_an_average_are_those_of_all_files(tmp_path: Path) -> None:
    folder = full(tmp_path / "step", stage=2)
    universal = save_universal(folder, tmp_path / "universal", GROUPS, stage=2)
    (known,) = average([universal], out=tmp_path / "out.pth", hash=True).inputs
    expected = {f"zero/{name}/fp32.pt": universal / "zero" / name / "fp32.pt" for name in whole()}
    expected["mp_rank_00_model_states.pt"] = universal / "mp_rank_00_model_states.pt"
    assert known.sha256 == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in expected.items()}


def test_inspect_says_what_is_there(tmp_path: Path) -> None:
    found = describe(read_header(full(tmp_path / "step", stage=2, step=30)))
    (weights,) = found.sets
    assert (found.format, found.files, weights.label, found.counters) == (
        "deepspeed",
        4,
        "raw (fp32)",
        {"global_steps": 30},
    )
    assert found.other == {"module": len(masters())}
    assert found.optimizers == ()


# Series


def mean(steps: Sequence[Sequence[Arrays]], name: str) -> np.ndarray:
    return np.mean([whole(groups)[name].astype(np.float64) for groups in steps], axis=0).astype(np.float32)


@pytest.mark.parametrize("argument", ["run", "run/global_step*", "run/global_step?0"])
def test_the_folder_of_a_run_is_a_series(here: Path, argument: str) -> None:
    steps = []
    for step in (90, 100):
        steps.append([arrays({name: each.shape for name, each in group.items()}, step) for group in GROUPS])
        save_zero(Path(f"run/global_step{step}"), steps[-1], stage=3, ranks=2, step=step, buffers=BUFFERS)
    Path("run/latest").write_text("global_step100")
    Path("run/zero_to_fp32.py").touch()
    if argument.endswith("?0"):
        steps = steps[:1]
    series = find_series([argument])
    assert [member.step for member in series.members] == [90, 100][: len(steps)]
    assert series.notes == ()
    report = average(argument, out="mean.pth")
    assert "module" not in report.dropped
    found = torch.load("mean.pth", weights_only=True)
    assert found["norm.running_mean"].dtype == torch.float32
    assert all(np.array_equal(found[name].numpy(), mean(steps, name)) for name in whole())
    average(argument, out="folder", dtype="bfloat16")
    assert open_checkpoint("folder")["one"].dtype == torch.bfloat16
    with pytest.raises(
        NotACheckpointError,
        match="run: a folder of checkpoints, .* Name one in it, such as run/global",
    ):
        open_checkpoint("run")


@pytest.mark.parametrize(
    ("folder", "tag"),
    [("checkpoint-{}", "global_step{}"), ("epoch=1-step={}.ckpt", "checkpoint"), ("state_{}", "pytorch_model")],
)
def test_the_one_checkpoint_in_a_folder_is_that_of_the_folder(here: Path, folder: str, tag: str) -> None:
    """As Hugging Face's Trainer, Lightning and Accelerate have it."""
    for step in (5, 10):
        outer = Path("run") / folder.format(step)
        full(outer / tag.format(step), step=step)
        (outer / "latest").write_text(tag.format(step))
        (outer / "config.json").write_text('{"model_type": "toy"}')
        torch.save({}, outer / "rng_state_0.pth")
        torch.save({}, outer / "scheduler.pt")
    series = find_series(["run"])
    assert [(member.step, member.path.parent) for member in series.members] == [(5, Path("run")), (10, Path("run"))]
    assert series.notes == ()
    assert equal(open_checkpoint(outer), open_checkpoint(outer / tag.format(10)))
    for number, paths in enumerate((["run"], [f"run/*/{tag.format('*')}"], [outer])):
        out = Path(f"average-{number}")
        average(paths, out=out)
        assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_other_weights_of_a_trainer_stay_its_checkpoint_and_a_note_names_the_masters(
    here: Path,
) -> None:
    for step in (5, 10):
        full(Path(f"run/checkpoint-{step}/global_step{step}"), step=step)
        Path(f"run/checkpoint-{step}/latest").write_text(f"global_step{step}")
        convert(f"run/checkpoint-{step}/global_step{step}", to="plain", out=f"{step}", dtype="bfloat16")
        Path(f"{step}/model.safetensors").rename(f"run/checkpoint-{step}/model.safetensors")
    series = find_series(["run/checkpoint-*"])
    assert [member.header.format.name for member in series.members] == ["safetensors"] * 2
    assert series.notes == (
        "run/checkpoint-5 has DeepSpeed's float32 weights, too. To take these, use 'run/checkpoint-*/global_step*'.",
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_a_universal_copy_counts_once(here: Path, stage: int) -> None:
    for step in (1, 2):
        source = full(Path(f"run/global_step{step}"), stage=stage, step=step)
        save_universal(source, Path(f"run/global_step{step}_universal"), GROUPS, stage=stage)
    series = find_series(["run"])
    assert [member.path.name for member in series.members] == ["global_step1", "global_step2"]
    assert series.notes == tuple(
        f"run/global_step{i}_universal is run/global_step{i} again (the same weights): counted once." for i in (1, 2)
    )
