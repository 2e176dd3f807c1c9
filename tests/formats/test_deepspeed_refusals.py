"""DeepSpeed: what does not fit together, or is a part alone, is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zero_files import GROUPS, edit, full, save, save_universal

from ckpt_tools import average, open_checkpoint
from ckpt_tools.errors import (
    CkptError,
    CorruptError,
    LayoutError,
    UnsupportedError,
    UsageError,
)
from ckpt_tools.formats import read_header
from ckpt_tools.jobs.fix_prefix import fix_prefix
from ckpt_tools.jobs.strip import strip


def of(rank: int, what: str = "optim") -> str:
    return f"{'bf16_' if what == 'optim' else ''}zero_pp_rank_{rank}_mp_rank_00_{what}_states.pt"


def without_paddings(folder: Path) -> None:
    """As before version 0.19."""
    for path in folder.glob("*_optim_states.pt"):
        edit(path, lambda state: state.pop("param_alignment_paddings"))


MODEL = "mp_rank_00_model_states.pt"
Damage = Callable[[Path], Any]


def step_of(path: Path, step: int, *, each: bool = False) -> None:
    """Have the optimizer count its steps: in its groups as FusedAdam, or for each parameter as DeepSpeedCPUAdam."""

    def count(state: Any) -> None:
        own = state["base_optimizer_state" if "base_optimizer_state" in state else "optimizer_state_dict"]
        for entry in own["state"].values() if each else own["param_groups"]:
            entry["step"] = step

    edit(path, count)


DAMAGED: dict[str, tuple[int, Damage, str]] = {
    "a rank is missing": (
        2,
        lambda folder: (folder / of(1)).unlink(),
        rf"folder: {of(1)} is missing; {of(0)} is of 3 ranks\. Was the save interrupted",
    ),
    "the first rank is missing": (3, lambda folder: (folder / of(0)).unlink(), rf"{of(0)} is missing"),
    "the last model states are missing": (
        3,
        lambda folder: (folder / of(2, "model")).unlink(),
        rf"folder: {of(2, 'model')} is missing; {of(0)} is of 3 ranks",
    ),
    "a rank too much": (
        2,
        lambda folder: (folder / of(3)).write_bytes((folder / of(2)).read_bytes()),
        rf"folder: {of(0)} is of 3 ranks, and there is {of(3)}\. The folder has files of two saves",
    ),
    "two files of a rank": (
        2,
        lambda folder: (folder / of(1).removeprefix("bf16_")).write_bytes((folder / of(1)).read_bytes()),
        r"folder: bf16_.* and zero_pp_rank_1_.* are of the same rank",
    ),
    "another number of ranks": (
        2,
        lambda folder: edit(folder / of(1), lambda state: state.update(partition_count=[2, 2])),
        rf"folder: {of(0)} is of stage 2 with 3 ranks, and {of(1)} of stage 2 with 2",
    ),
    "another stage": (
        2,
        lambda folder: edit(folder / of(2), lambda state: state.update(zero_stage=1)),
        rf"folder: {of(0)} is of stage 2 with 3 ranks, and {of(2)} of stage 1 with 3",
    ),
    "model states of another stage": (
        2,
        lambda folder: (folder / MODEL).rename(folder / of(0, "model")),
        rf"{of(0)} is of stage 2, and {of(0, 'model')} is of another one",
    ),
    "model states of two stages": (
        3,
        lambda folder: (folder / MODEL).write_bytes((folder / of(0, "model")).read_bytes()),
        "has the model states of stage 3, and those of another stage",
    ),
    "no model states": (2, lambda folder: (folder / MODEL).unlink(), r"folder: has no \*_model_states\.pt"),
    "no optimizer states": (
        2,
        lambda folder: [path.unlink() for path in folder.glob("*_optim_*")],
        r"folder: has no \*_optim_states\.pt, which have the float32 weights",
    ),
    "no module": (2, lambda folder: edit(folder / MODEL, lambda states: states.pop("module")), "has no 'module', so"),
    "an older rank": (
        2,
        lambda folder: edit(
            folder / of(1), lambda state: state["base_optimizer_state"]["param_groups"][0].update(lr=0.5)
        ),
        rf"folder: {of(0)} and {of(1)} differ in their learning rates",
    ),
    "older model states": (
        3,
        lambda folder: edit(folder / of(2, "model"), lambda states: states.update(global_steps=0)),
        rf"folder: {of(0, 'model')} and {of(2, 'model')} differ in their 'global_steps'",
    ),
    "other shapes": (
        3,
        lambda folder: edit(folder / of(1, "model"), lambda states: states["param_shapes"][0].popitem()),
        rf"{of(0, 'model')} and {of(1, 'model')} differ in their 'param_shapes'",
    ),
    "a short partition in the middle": (
        2,
        lambda folder: edit(
            folder / of(1),
            lambda state: state.update(
                single_partition_of_fp32_groups=[each[:-1] for each in state["single_partition_of_fp32_groups"]]
            ),
        ),
        "the partitions of group 0 have 44, 43, 41 elements, and all but the last ones have to be equal",
    ),
    "an empty first partition": (
        2,
        lambda folder: edit(
            folder / of(0), lambda state: state.update(single_partition_of_fp32_groups=[torch.zeros(0)] * 2)
        ),
        "the partitions of group 0 have 0, 44, 41 elements",
    ),
    "a parameter less": (
        2,
        lambda folder: (
            without_paddings(folder),
            edit(folder / MODEL, lambda states: states["param_shapes"][0].pop("conv.weight")),
        ),
        "the partitions of group 0 have 129 elements, and its parameters 99",
    ),
    "a parameter more": (
        2,
        lambda folder: (
            without_paddings(folder),
            edit(folder / MODEL, lambda states: states["param_shapes"][0].update(more=torch.Size([2]))),
        ),
        "the partitions of group 0 have 129 elements, and its parameters 131",
    ),
    "two parameters in another order": (
        2,
        lambda folder: edit(folder / MODEL, lambda states: states["param_shapes"][0].move_to_end("embed.weight")),
        r"by the shapes, 'norm\.weight' has elements 0 to 7 of the partition of rank 0, and by its 'param_slice",
    ),
    "a group less": (
        2,
        lambda folder: edit(folder / MODEL, lambda states: states["param_shapes"].pop()),
        "there are 1 groups of parameters, and 2 of partitions",
    ),
    "a flat tensor less": (
        3,
        lambda folder: edit(folder / of(1), lambda state: state["fp32_flat_groups"].pop()),
        "differ in their number of flat tensors",
    ),
    "a part of another size": (
        3,
        lambda folder: edit(folder / of(1), lambda state: state["fp32_flat_groups"].append(torch.zeros(4))),
        "differ in their number of flat tensors",
    ),
    "parts that do not add up": (
        3,
        lambda folder: edit(folder / of(1), lambda state: state["fp32_flat_groups"].__setitem__(1, torch.zeros(5))),
        "the partitions of rank 1 have 45, 5 elements, and its parts of the parameters 45, 6",
    ),
    "a frozen parameter is missing": (
        3,
        lambda folder: edit(folder / of(1, "model"), lambda states: states["frozen_param_fragments"].clear()),
        r"lacks the frozen parameter 'frozen\.weight'",
    ),
    "a frozen parameter of another size": (
        3,
        lambda folder: edit(
            folder / of(1, "model"),
            lambda states: states["frozen_param_fragments"].update({"frozen.bias": torch.zeros(3)}),
        ),
        r"the frozen parameter 'frozen\.bias' of shape \[5\] has parts of shapes \[2\], \[3\], \[2\]",
    ),
    "partitions of two dtypes": (
        3,
        lambda folder: edit(
            folder / of(1),
            lambda state: state.update(fp32_flat_groups=[each.half() for each in state["fp32_flat_groups"]]),
        ),
        r"'embed\.weight' of shape \[13, 7\] has 91 elements of dtype float32 and float16",
    ),
    "partitions that are not flat": (
        3,
        lambda folder: edit(folder / of(1), lambda state: state["fp32_flat_groups"].__setitem__(0, torch.zeros(45, 1))),
        "its 'fp32_flat_groups' are no flat tensors",
    ),
    "partitions that are missing": (
        3,
        lambda folder: edit(folder / of(1), lambda state: state.pop("fp32_flat_groups")),
        r"has no 'optimizer_state_dict\.fp32_flat_groups' as DeepSpeed writes it",
    ),
    "shapes that are none": (
        3,
        lambda folder: edit(folder / of(0, "model"), lambda states: states["param_shapes"][0].update(one=(-1,))),
        "'param_shapes' or 'frozen_param_shapes' are no shapes",
    ),
    "one name twice": (
        2,
        lambda folder: edit(folder / MODEL, lambda states: states["param_shapes"][1].update(one=torch.Size([1]))),
        "'one' is twice in its 'param_shapes'",
    ),
    "paddings that are none": (
        2,
        lambda folder: edit(folder / of(0), lambda state: state.update(param_alignment_paddings=[[0, -1, 0, 1], []])),
        "its 'param_alignment_paddings' do not fit its parameters",
    ),
    "no stage": (
        3,
        lambda folder: edit(folder / of(0), lambda state: state.pop("zero_stage")),
        "does not say its 'zero_stage' or 'partition_count'",
    ),
    "no number of ranks": (
        2,
        lambda folder: edit(folder / of(0), lambda state: state.update(partition_count=[["two"], -1])),
        "does not say its 'zero_stage' or 'partition_count'",
    ),
    "a truncated file": (
        2,
        lambda folder: (folder / of(1)).write_bytes((folder / of(1)).read_bytes()[:-100]),
        r"optim_states\.pt: truncated|optim_states\.pt: .*damaged",
    ),
    "ranks of two steps, by the optimizer's count": (
        2,
        lambda folder: [step_of(folder / of(rank), 100 + rank) for rank in range(3)],
        "differ in their steps.*files of two saves",
    ),
    "ranks of two steps, by the count of each parameter": (
        3,
        lambda folder: [step_of(folder / of(rank), 100 + (rank == 2), each=True) for rank in range(3)],
        "differ in their steps.*files of two saves",
    ),
    "an empty file": (2, lambda folder: (folder / of(1)).write_bytes(b""), r"optim_states\.pt: empty file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_ranks_that_do_not_fit_together_are_refused(tmp_path: Path, case: str) -> None:
    stage, damage, message = DAMAGED[case]
    folder = full(tmp_path / "folder", stage=stage)
    damage(folder)
    with pytest.raises(CorruptError, match=message):
        read_header(folder)


OTHERS: dict[str, tuple[Damage, str]] = {
    "tensor parallel": (
        lambda folder: (folder / MODEL.replace("00", "01")).write_bytes((folder / MODEL).read_bytes()),
        r"folder: weights are split over model-parallel ranks \(mp_rank_01_.*ds_to_universal\.py, and give its folder",
    ),
    "one rank of a tensor parallel model": (
        lambda folder: edit(folder / MODEL, lambda states: states.update(mp_world_size=2)),
        r"states\.pt: says that weights are split \('mp_world_size'\)\. Make a universal",
    ),
    "a pipeline of one stage for each rank": (
        lambda folder: (folder / "mp_rank_00_001_model_states.pt").touch(),
        r"folder: has the layers of a pipeline, in mp_rank_00_001",
    ),
    "optimizer states of experts": (
        lambda folder: (folder / "expp_rank_0_mp_rank_00_optim_states.pt").touch(),
        "folder: a mixture of experts",
    ),
    "groups over other ranks": (
        lambda folder: [
            edit(path, lambda state: state.update(partition_count=[3, 1])) for path in folder.glob("*_optim_*")
        ],
        "its groups are split over 1 and over 3 ranks, as those of a mixture of experts",
    ),
    "experts over the ranks": (
        lambda folder: edit(folder / MODEL, lambda states: states.update(ds_autoep_layers=[{"moe_layer_id": 0}])),
        "its experts are split over the ranks in another way",
    ),
    "experts of stage 3": (
        lambda folder: edit(folder / of(0), lambda state: state.update(ds_zero_partition_groups=[{}])),
        "its experts are split over the ranks in another way",
    ),
    "another file": (
        lambda folder: (folder / "my_model_states.pt").touch(),
        r"my_model_states\.pt is no file that DeepSpeed writes",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_weights_that_are_split_in_another_way_are_refused(tmp_path: Path, case: str) -> None:
    damage, message = OTHERS[case]
    folder = full(tmp_path / "folder", stage=2)
    damage(folder)
    with pytest.raises(UnsupportedError, match=message):
        read_header(folder)


def test_a_universal_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    source = full(tmp_path / "step", stage=2)
    folder = save_universal(source, tmp_path / "universal", GROUPS, stage=2)
    (folder / "zero" / "what").mkdir()
    save(folder / "zero" / "what" / "fp32.pt", torch.zeros(1))
    with pytest.raises(CorruptError, match=r"universal: zero/what is of no parameter in its \*_model_states"):
        read_header(folder)
    (folder / "zero" / "what" / "fp32.pt").unlink()
    read_header(folder)
    save(folder / "zero" / "one" / "fp32.pt", {"param": [1.0]})
    with pytest.raises(CorruptError, match=r"one/fp32\.pt: has no tensor, and 'one' has the shape \[1\]"):
        read_header(folder)
    (folder / "zero" / "one" / "fp32.pt").unlink()
    with pytest.raises(CorruptError, match=r"universal: zero/one/fp32\.pt is missing\. Was the save interrupted"):
        read_header(folder)


def test_a_universal_checkpoint_of_round_robin_is_refused(tmp_path: Path) -> None:
    """ds_to_universal.py of DeepSpeed 0.19 takes the slices of another order than that of the partitions."""
    source = full(tmp_path / "step", stage=2)
    edit(source / MODEL, lambda states: states["ds_config"]["zero_optimization"].update(round_robin_gradients=True))
    folder = save_universal(source, tmp_path / "universal", GROUPS, stage=2)
    with pytest.raises(
        UnsupportedError, match="universal: with round_robin_gradients, as here, .* mixes the parameters"
    ):
        read_header(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_strip_does_not_say_that_there_is_nothing_to_strip(tmp_path: Path, stage: int) -> None:
    with pytest.raises(UsageError, match="a deepspeed checkpoint, which is read, not written"):
        strip(full(tmp_path / "step", stage=stage))


@pytest.mark.parametrize("job", [strip, fix_prefix])
@pytest.mark.parametrize("out", ["o.pth", "o"])
def test_no_folder_of_ranks_is_written(here: Path, job: Callable[..., Any], out: str) -> None:
    full(Path("step"))
    with pytest.raises(UsageError, match=r"step: a deepspeed checkpoint, which is read, not written\. Make plain wei"):
        job("step", out=out)
    with pytest.raises(UnsupportedError, match=r"step: a DeepSpeed checkpoint, with names in many files\. Convert it"):
        fix_prefix("step")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_of_one_rank_names_the_folder(tmp_path: Path, stage: int, ranks: int) -> None:
    folder = full(tmp_path / "step", stage=stage, ranks=ranks)
    for path in folder.iterdir():
        with pytest.raises(CkptError, match=rf"{path.name}.*{re.escape(str(folder))}(\. |$)") as caught:
            average(path, out=tmp_path / "o.pth")
        assert ("state='module'" in str(caught.value)) == (path.name == MODEL)
        with pytest.raises(LayoutError, match=rf"{path.name}: the .* states .*: {re.escape(str(folder))}$"):
            open_checkpoint(path)
    if ranks == 2:
        with pytest.raises(CkptError, match=rf"differ only in the rank.* Give the folder: {re.escape(str(folder))}$"):
            average([*folder.glob("*_optim_states.pt")], out=tmp_path / "o.pth")


@pytest.mark.parametrize("stage", [2, 3])
def test_model_states_alone_say_that_the_others_are_not_there(tmp_path: Path, stage: int) -> None:
    folder = full(tmp_path / "step", stage=stage, ranks=1)
    for path in [*folder.glob("*_model_states.pt")]:
        alone = tmp_path / path.name
        path.rename(alone)
        with pytest.raises(LayoutError, match="which are not here. Give the folder that has those of all ranks"):
            open_checkpoint(alone)
