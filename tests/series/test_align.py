"""Alignment: what the checkpoints do not share is refused with the way on; what is copied need not be alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import run
from conftest import load
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools import average
from ckpt_tools.errors import AlignmentError

Save = Callable[..., Path]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=2, max_size=4, unique=True),
    kind=st.sampled_from([torch.uint8, torch.float32]),
)
def test_average_takes_extra_state_of_any_length_from_the_last_checkpoint(
    tmp_path: Path, lengths: list[int], kind: torch.dtype
) -> None:
    paths = [tmp_path / f"{i}.pth" for i in range(len(lengths))]
    for i, (path, length) in enumerate(zip(paths, lengths, strict=True)):
        torch.save(
            {"fc.weight": torch.full((2,), float(i)), "fc._extra_state": torch.full((length,), i, dtype=kind)}, path
        )
    report = average(paths, out=tmp_path / "out.pth", dtype="float16", force=True)
    found = load(tmp_path / "out.pth")
    assert found["fc._extra_state"].tolist() == [len(lengths) - 1] * lengths[-1]
    assert found["fc._extra_state"].dtype is kind
    assert found["fc.weight"].tolist() == [(len(lengths) - 1) / 2] * 2
    assert any("'fc._extra_state'" in note and "taken from the last" in note for note in report.notes)


def test_average_takes_integers_of_another_dtype_or_shape_from_the_last_checkpoint(save: Save, tmp_path: Path) -> None:
    ids = [torch.arange(4, dtype=torch.int16), torch.arange(6, dtype=torch.int32)[None], torch.arange(8)[None]]
    paths = [save(f"{i}.pth", {"w": torch.full((2,), float(i)), "position_ids": each}) for i, each in enumerate(ids)]
    report = average(paths, out=tmp_path / "out.pth")
    assert torch.equal(load(tmp_path / "out.pth")["position_ids"], ids[-1])
    assert any("'position_ids'" in note for note in report.notes)
    paths.append(save("3.pth", {"w": torch.ones(2), "position_ids": torch.ones(4)}))
    for order in (paths, paths[::-1]):
        with pytest.raises(AlignmentError, match="'position_ids'"):
            average(order, order="given", out=tmp_path / "other.pth")


@pytest.mark.parametrize("lead", ["model.", "net.encoder.", "student."])
@pytest.mark.parametrize("options", [{}, {"keys": "intersection"}])
def test_average_names_the_prefix_that_some_files_lack(
    save: Save, tmp_path: Path, lead: str, options: dict[str, Any]
) -> None:
    state = {"a.weight": torch.ones(2), "a.bias": torch.ones(2), "head.weight": torch.ones(1)}
    paths = [save("1.pth", state), save("2.pth", {lead + name: tensor for name, tensor in state.items()})]
    for order in (paths, paths[::-1]):
        with pytest.raises(AlignmentError, match=rf"names in 2.pth .* 1.pth with '{lead}' before .*strip='{lead}'"):
            average(order, order="given", out=tmp_path / "out.pth", **options)


def test_average_says_that_files_without_a_common_name_are_of_different_models(save: Save, tmp_path: Path) -> None:
    actor, critic = ({f"{who}.{i}.weight": torch.ones(2) for i in range(3)} for who in ("actor", "critic"))
    paths = [save(f"{who}_{i}.pth", state) for i in range(2) for who, state in (("A", actor), ("C", critic))]
    with pytest.raises(AlignmentError, match=r"2 of 4 files .*different models: give the files of one\."):
        average(paths, out=tmp_path / "out.pth")
    shared = save("A_9.pth", {**actor, **critic})
    with pytest.raises(AlignmentError, match="`keys='intersection'`"):
        average([*paths[::2], shared], out=tmp_path / "out.pth")


def test_average_by_order_refuses_names_that_one_file_has_sorted(save: Save, tmp_path: Path) -> None:
    state = {name: torch.ones(2) for name in ("to_q", "to_k", "to_v")}
    paths = [save("1.pth", state), save("2.pth", dict(sorted(state.items())))]
    with pytest.raises(AlignmentError, match=r"1\.pth holds the same names as 2\.pth, in another order"):
        average(paths, match="order", out=tmp_path / "out.pth")


def test_avg_names_the_command_that_takes_a_prefix_off(save: Save, here: Path) -> None:
    torch.save({"w": torch.ones(2)}, "1.pth")
    torch.save({"model.w": torch.ones(2)}, "2.pth")
    assert "ckpt fix-prefix --strip model." in run("avg", "1.pth", "2.pth", "-o", "out.pth").err
