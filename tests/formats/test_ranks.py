"""Folders of ranks: which folders they are, and what is in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_tools import average
from ckpt_tools.errors import CorruptError, UnsupportedError
from ckpt_tools.formats import is_checkpoint, read_header
from ckpt_tools.formats.format import Writing
from ckpt_tools.formats.ranks import RANKS, further_files, rank_files
from ckpt_tools.tensors import TensorSpec

MEGATRON = ["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of files, each with a tensor of its own."""

    def make(*names: str) -> Path:
        for i, name in enumerate(names):
            path = tmp_path / "step" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": {"w": torch.full((2,), float(i))}}, path)
        return tmp_path / "step"

    return make


@pytest.mark.parametrize(
    "names",
    [
        MEGATRON,
        ["mp_rank_00/model_optim_rng.pt"],
        ["mp_rank_00_000/model_optim_rng.pt", "mp_rank_00_001/model_optim_rng.pt"],
        [f"mp_rank_{tp:02d}_{pp:03d}_{ep:03d}/model_rng.pt" for tp in (0, 1) for pp in (0, 1, 2) for ep in (0, 1)],
        ["tp_rank_00_pp_rank_000/model--step=5.ckpt", "tp_rank_00_pp_rank_001/model--step=5.ckpt"],
        ["consolidated.00.pth", "consolidated.01.pth"],
        ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
        ["layer_00-model_states.pt", "layer_03-model_states.pt"],
        [
            "mp_rank_00_model_states.pt",
            *(f"layer_{n:02d}-model_0{tp}-model_states.pt" for n in (1, 3) for tp in (0, 1)),
        ],
        ["mp_rank_00_model_states.pt", *(f"layer_0_expert_{e}_mp_rank_00_model_states.pt" for e in (0, 1, 2))],
    ],
)
def test_the_files_of_ranks_are_one_checkpoint(folder: Callable[..., Path], names: list[str]) -> None:
    step = folder(*names)
    assert is_checkpoint(step)
    header = read_header(step)
    assert (header.format.name, header.in_folder) == ("ranks", True)
    assert set(header.tree) == set(header.ranks) == set(names)
    assert {stamp.path for stamp in header.files} == {step / name for name in names}
    for i, name in enumerate(names):
        spec = header.tree[name]["model"]["w"]
        assert isinstance(spec, TensorSpec)
        assert spec.paths == (step / name,)
        assert spec == header.ranks[name].tree["model"]["w"], i


@pytest.mark.parametrize(
    "names",
    [
        ["consolidated.00.pth"],
        ["mp_rank_00_model_states.pt"],
        ["lora_rank_8/model.pt", "lora_rank_16/model.pt"],
        ["pytorch_model_fsdp_0/model.pt", "pytorch_model_fsdp_1/model.pt"],
        ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"],
        ["rank_0/model.pt", "rank_1/model.pt"],
        ["amp_rank_00/model.pt", "amp_rank_01/model.pt"],
        ["mp_rank_00/optim.pt", "mp_rank_01/distrib_optim.pt"],
        ["mp_rank_00/step=1.ckpt", "mp_rank_00/step=2.ckpt", "mp_rank_01/step=1.ckpt", "mp_rank_01/step=2.ckpt"],
        ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        ["consolidated.00.pth/x.pt"],
    ],
)
def test_names_that_are_alike_are_not(folder: Callable[..., Path], names: list[str]) -> None:
    step = folder(*names)
    assert rank_files(step) == []
    assert not RANKS.sniff(step, b"")


def test_distributed_optimizers_are_beside_the_ranks(folder: Callable[..., Path]) -> None:
    names = [f"{rank}/{file}" for rank in ("mp_rank_00", "mp_rank_01") for file in ("distrib_optim.pt", "model_rng.pt")]
    step = folder(*names, "mp_rank_00_000/optim.pt", "notes.txt")
    assert rank_files(step) == [name for name in names if name.endswith("model_rng.pt")]
    beside = ["notes.txt", "mp_rank_00/distrib_optim.pt", "mp_rank_01/distrib_optim.pt"]
    assert list(further_files(step, rank_files(step))) == beside


def test_a_layer_without_parameters_is_no_part_of_the_model(folder: Callable[..., Path]) -> None:
    step = folder("layer_00-model_states.pt", "layer_01-model_states.pt")
    torch.save({}, step / "layer_02-model_states.pt")
    torch.save({"module": None, "global_steps": 5}, step / "mp_rank_00_model_states.pt")
    header = read_header(step)
    assert list(header.ranks) == ["layer_00-model_states.pt", "layer_01-model_states.pt"]
    assert header.tree["mp_rank_00_model_states.pt"] == {"module": None, "global_steps": 5}


@pytest.mark.parametrize(
    ("names", "missing", "here"),
    [
        (["mp_rank_00/m.pt", "mp_rank_02/m.pt"], "1", "mp_rank_00 and 1 more"),
        (["mp_rank_01/m.pt"], "0", "mp_rank_01"),
        (["mp_rank_00_000/m.pt", "mp_rank_00_001/m.pt", "mp_rank_01_000/m.pt"], "1_1", "mp_rank_00_000 and 2 more"),
        (["consolidated.00.pth", "consolidated.99.pth"], "1", "consolidated.00.pth and 1 more"),
        (
            ["layer_01-model_00-model_states.pt", "layer_02-model_01-model_states.pt"],
            "0",
            "layer_02-model_01-model_states.pt",
        ),
        (["mp_rank_01_model_states.pt", "layer_01-model_states.pt"], "0", "mp_rank_01_model_states.pt"),
    ],
)
def test_a_missing_rank_is_named(folder: Callable[..., Path], names: list[str], missing: str, here: str) -> None:
    with pytest.raises(
        CorruptError, match=rf"step: has {here}, and not the one of rank {missing}\. .*Get a complete copy"
    ):
        read_header(folder(*names))


def test_ranks_of_one_layer_are_not_fewer_than_those_of_another(folder: Callable[..., Path]) -> None:
    names = [f"layer_{n:02d}-model_{tp:02d}-model_states.pt" for n in (1, 2) for tp in (0, 1)]
    with pytest.raises(
        CorruptError, match=r"ranks of layer_02-model_00-model_states\.pt there are 1, and 2 of layer_01"
    ):
        read_header(folder(*names[:-1]))


@pytest.mark.parametrize(
    ("one", "other"),
    [("mp_rank_00/m.pt", "mp_rank_00_000/m.pt"), ("layer_01-model_00-model_states.pt", "layer_01-model_states.pt")],
)
def test_names_of_two_saves_are_refused(folder: Callable[..., Path], one: str, other: str) -> None:
    with pytest.raises(CorruptError, match=r"step: has .* and .*, which are not of one save"):
        read_header(folder(one, other))


def test_a_rank_that_is_no_torch_file_is_refused(folder: Callable[..., Path]) -> None:
    step = folder(*MEGATRON)
    save_file({"w": torch.ones(2)}, step / MEGATRON[1])
    with pytest.raises(UnsupportedError, match=r"mp_rank_01/model_optim_rng\.pt: a safetensors file, and the files of"):
        read_header(step)


def test_a_damaged_rank_is_named(folder: Callable[..., Path]) -> None:
    step = folder(*MEGATRON)
    data = (step / MEGATRON[1]).read_bytes()
    (step / MEGATRON[1]).write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptError, match=r"mp_rank_01/model_optim_rng\.pt"):
        read_header(step)


def test_plans_have_the_names_of_the_ranks() -> None:
    plans = RANKS.plan({name: {"a": 1} for name in MEGATRON}, Writing(name="averaged", provenance={"x": 1}))
    assert [plan.name for plan in plans] == MEGATRON


def test_an_output_replaces_the_ranks_of_an_older_one_alone(folder: Callable[..., Path]) -> None:
    step = folder(*MEGATRON)
    assert list(RANKS.replaced(step, [MEGATRON[0]])) == MEGATRON
    assert list(RANKS.replaced(step, ["model.safetensors"])) == []


def test_layers_of_a_pipeline_are_averaged_beside_the_masters_of_zero_which_is_said(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / f"global_step{step}"
        folder.mkdir()
        for layer in (1, 2):
            weight = torch.full((2, 3), float(10 * layer + step), dtype=torch.bfloat16)
            torch.save({"weight": weight}, folder / f"layer_0{layer}-model_00-model_states.pt")
        torch.save({"module": [], "global_steps": step}, folder / "mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": {}}, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    report = average(tmp_path, out=tmp_path / "o")
    assert any(
        "masters of ZeRO (bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt) are not read" in n for n in report.notes
    )
    for layer in (1, 2):
        averaged = torch.load(tmp_path / "o" / f"layer_0{layer}-model_00-model_states.pt")["weight"]
        assert averaged.tolist() == [[10 * layer + 1.5] * 3] * 2


def test_a_universal_checkpoint_is_no_folder_of_ranks(folder: Callable[..., Path]) -> None:
    step = folder("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt")
    assert rank_files(step)
    (step / "zero").mkdir()
    assert not rank_files(step)
