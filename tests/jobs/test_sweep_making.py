"""Averages made together, against the same ones made one by one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_tools import average
from ckpt_tools.jobs.options import Matching
from ckpt_tools.jobs.provenance import short_names
from ckpt_tools.jobs.sweep.making import Maker
from ckpt_tools.jobs.sweep.options import Sweeping
from ckpt_tools.series.candidates import Candidate, candidates
from ckpt_tools.series.find import find_series
from ckpt_tools.series.member import Member
from ckpt_tools.series.schedules import Schedule
from ckpt_tools.tensors import parse_dtype

Save = Callable[..., Path]
N = 5


def weights(i: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    weight = torch.randn(300, 40, generator=generator)
    return {
        "weight": weight,
        "tied": weight,
        "half": torch.randn(50, generator=generator).bfloat16(),
        "strided": torch.randn(30, 20, generator=generator).T,
        "bn.running_mean": torch.randn(9, generator=generator),
        "bn.num_batches_tracked": torch.tensor(100 * i),
    }


def written(save: Save, kind: str) -> None:
    for i in range(N):
        tree: dict[str, Any] = {"model": weights(i), "epoch": i, "best": f"epoch {i}"}
        if kind == "flat":
            plain = {name: tensor.contiguous().clone() for name, tensor in weights(i).items()}
            save_file(plain, f"c-{i}.safetensors")
        elif kind == "folders":
            plain = {name: tensor.contiguous().clone() for name, tensor in weights(i).items()}
            save(f"c-{i}/model.safetensors", plain)
            Path(f"c-{i}/config.json").write_text(f'{{"step": {i}}}')
        else:
            prefix = "module." if kind == "wrapped" and i % 2 else ""
            tree["model"] = {prefix + name: tensor for name, tensor in tree["model"].items()}
            save(f"c-{i}.pth", tree)


def digest(path: Path) -> dict[str, str]:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(p.relative_to(path.parent)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def made(
    rules: dict[str, Any], selections: dict[str, Any], out: Path, suffix: str, **options: Any
) -> Sequence[Candidate]:
    members = find_series(["c-*"]).members
    names = short_names([member.path for member in members])

    def steps(_: Schedule, own: Sequence[Member]) -> Sequence[Any]:
        return [member.step for member in own]

    found = candidates(members, names, rules, selections, steps).candidates
    matching = Matching(**{name: value for name, value in options.items() if name != "dtype"})
    maker = Maker.of(members, names, matching, parse_dtype(options.get("dtype")), Sweeping(threads=2))
    maker.make(found, [out / str(i) / f"avg{suffix}" for i in range(len(found))])
    return found


@pytest.mark.parametrize(
    ("kind", "suffix", "options"),
    [
        ("nested", ".pth", {}),
        ("nested", ".pth", {"buffers": "last"}),
        ("nested", ".safetensors", {"dtype": "bfloat16"}),
        ("wrapped", ".pth", {}),
        ("flat", ".safetensors", {"buffers": "last"}),
        ("folders", "", {}),
    ],
)
def test_bytes_are_those_of_single_averages(
    save: Save, here: Path, kind: str, suffix: str, options: dict[str, Any]
) -> None:
    written(save, kind)
    for i in range(40):
        Path(f"out/{i}").mkdir(parents=True)
    rules = {"mode": ["uniform", "ema", "decay"], "decay": [0.3, 0.9]}
    found = made(rules, {"last": [2, 4], "to_step": [3, 4]}, Path("out"), suffix, **options)
    assert len(found) == 16 + N
    Path("alone").mkdir()
    for i, each in enumerate(found):
        own = each.options or {"from_step": each.members[0].step, "to_step": each.members[0].step}
        average("c-*", **own, **options, out=f"alone/avg{suffix}", force=True)
        assert digest(Path(f"out/{i}/avg{suffix}")) == digest(Path(f"alone/avg{suffix}")), each.label


@settings(max_examples=6)
@given(
    dtype=st.sampled_from(["float32", "float64", "bfloat16", "float16", "complex64"]),
    suffix=st.sampled_from([".pth", ".safetensors"]),
    out=st.sampled_from([None, "float32", "bfloat16"]),
    modes=st.lists(st.sampled_from(["uniform", "ema", "decay", "power"]), min_size=1, unique=True),
    last=st.lists(st.integers(1, N), min_size=1, max_size=2, unique=True),
    shape=st.lists(st.integers(0, 3), max_size=3),
)
def test_rows_of_any_sweep_are_single_averages(
    here: Path,
    dtype: str,
    suffix: str,
    out: str | None,
    modes: list[str],
    last: list[int],
    shape: list[int],
) -> None:
    for path in here.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for i in range(N):
        generator = torch.Generator().manual_seed(i)
        drawn = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
        tensor = torch.view_as_complex(drawn).to(torch.complex64) if dtype == "complex64" else drawn[..., 0]
        tree = {"w": tensor.to(getattr(torch, dtype)).contiguous(), "n": torch.tensor(i)}
        torch.save(tree, f"c-{i + 1}.pth") if suffix == ".pth" else save_file(tree, f"c-{i + 1}.safetensors")
    options = {} if out is None or dtype == "complex64" else {"dtype": out}
    for i in range(30):
        Path(f"out/{i}").mkdir(parents=True)
    rules = {"mode": modes} | ({"decay": [0.3, 0.9]} if "ema" in modes else {})
    rules |= {"sigma_rel": [0.1, 0.2]} if "power" in modes else {}
    found = made(rules, {"last": last}, Path("out"), suffix, **options)
    for i, each in enumerate(found):
        if each.kind == "average":
            average(f"c-*{suffix}", **each.options, **options, out=f"avg{suffix}", force=True)
            assert digest(Path(f"out/{i}/avg{suffix}")) == digest(Path(f"avg{suffix}")), each.label


def test_one_average_that_ends_before_the_series_takes_its_own_counters(save: Save, here: Path) -> None:
    written(save, "nested")
    members = find_series(["c-*"]).members
    names = short_names([member.path for member in members])
    maker = Maker.of(members, names, Matching(), None, Sweeping())
    schedule = Schedule("uniform")
    alone = Candidate("two", "average", {}, schedule, members[:2], (0, 1), schedule.coefficients((0, 1)))
    Path("out").mkdir()
    maker.make([alone], [Path("out/avg.pth")])
    average("c-*", to_step=1, out="avg.pth")
    assert digest(Path("out/avg.pth")) == digest(Path("avg.pth"))
