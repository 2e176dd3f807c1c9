"""Series of ranks: each file is the average of its namesakes, in a folder of the same shape, or nothing is written."""

from __future__ import annotations

import argparse
import io
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt_tools
from ckpt_tools import strip
from ckpt_tools.errors import (
    AlignmentError,
    LayoutError,
    NumericsError,
    SeriesError,
    UnsupportedError,
    UsageError,
    WriteError,
)
from ckpt_tools.formats import read_header
from ckpt_tools.jobs.inspect import describe

STEPS = (100, 200, 300)
Tree = dict[str, Any]
Make = Callable[[int, int, torch.Generator], Tree]


def weights(g: torch.Generator) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict(
        {
            "layers.0.weight": torch.randn(5, 4, generator=g),
            "layers.0.bias": torch.randn(4, generator=g, dtype=torch.float64),
            "layers.1.weight": torch.randn(6, generator=g).bfloat16(),
        }
    )


def optimizer(g: torch.Generator) -> Tree:
    state = {0: {"step": 3, "exp_avg": torch.randn(4, generator=g), "exp_avg_sq": torch.randn(4, generator=g)}}
    return {"optimizer": {"state": state, "param_groups": [{"params": [0], "lr": 0.1}]}}


def megatron(step: int, rank: int, g: torch.Generator) -> Tree:
    """The model of the pipelines before Megatron Core: nested dicts."""
    embedding = {"word_embeddings": OrderedDict(weight=torch.randn(8, 4, generator=g))}
    model = {"language_model": {"embedding": embedding, "encoder": weights(g)}}
    return {
        "args": argparse.Namespace(lr=0.1),
        "checkpoint_version": 3.0,
        "iteration": step,
        "model": model,
        "optimizer": optimizer(g),
        "opt_param_scheduler": {"num_steps": step},
        "rng_state": [{"random_rng_state": random.getstate(), "torch_rng_state": torch.get_rng_state()}],
    }


def core(step: int, rank: int, g: torch.Generator) -> Tree:
    """Megatron Core, with an interleaved pipeline, and the scales of FP8 as Transformer Engine keeps them."""
    models = {f"model{i}": weights(g) for i in range(2)}
    for model in models.values():
        model["layers.0._extra_state"] = torch.full((3,), step % 251, dtype=torch.uint8)
        model["layers.1._extra_state"] = None  # type: ignore[assignment]
    return {"iteration": step, **models, "optimizer": optimizer(g), "rng_state": [{"torch_rng_state": torch.ones(3)}]}


def flat(step: int, rank: int, g: torch.Generator) -> Tree:
    return dict(weights(g))


MEGATRON = [f"mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt" for tp in (0, 1) for pp in (0, 1)]
META = ["consolidated.00.pth", "consolidated.01.pth"]
PIPELINE = [f"layer_{layer:02d}-model_{tp:02d}-model_states.pt" for layer in (1, 3) for tp in (0, 1)]


@pytest.fixture
def run(here: Path) -> Callable[..., Path]:
    """Make a run of several steps, each a folder of ranks."""

    def make(names: list[str], content: Make, folder: str = "run/iter_{:07d}") -> Path:
        for step in STEPS:
            for rank, name in enumerate(names):
                path = here / folder.format(step) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(content(step, rank, torch.Generator().manual_seed(100 * step + rank)), path)
        return here / "run"

    return make


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    elif isinstance(node, torch.Tensor):
        yield path, node


def assert_means(out: Path, run: Path, names: list[str], keys: tuple[str, ...] = ()) -> None:
    """Compare each file with the means of its namesakes, by NumPy in float64."""
    for name in names:
        found = loaded(out / name)
        steps = [loaded(folder / name) for folder in sorted(run.glob("*")) if folder.is_dir()]
        for key in keys or ("",):
            ours = dict(leaves(found[key] if key else found))
            theirs = [dict(leaves(step[key] if key else step)) for step in steps]
            assert ours.keys() == theirs[-1].keys()
            for path, tensor in ours.items():
                assert tensor.dtype is theirs[-1][path].dtype
                if not tensor.is_floating_point():
                    assert tensor.equal(theirs[-1][path])
                    continue
                mean = np.mean([each[path].double().numpy() for each in theirs], axis=0)
                want = torch.from_numpy(mean).to(tensor.dtype)
                torch.testing.assert_close(tensor, want, rtol=1e-6, atol=0, msg=str((name, path)))


@pytest.mark.parametrize(
    ("names", "content", "keys"),
    [
        (MEGATRON, megatron, ("model",)),
        (MEGATRON[:1], megatron, ("model",)),
        (["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"], core, ("model0", "model1")),
        (META, flat, ()),
        (PIPELINE, flat, ()),
    ],
)
def test_each_file_is_the_average_of_its_namesakes(
    run: Callable[..., Path], here: Path, names: list[str], content: Make, keys: tuple[str, ...]
) -> None:
    folder = run(names, content)
    ckpt_tools.average([folder], out=here / "averaged")
    assert sorted(p.relative_to(here / "averaged").as_posix() for p in (here / "averaged").rglob("*.p*")) == names
    assert_means(here / "averaged", folder, names, keys)


def test_the_report_names_files_and_what_is_left_out(run: Callable[..., Path], here: Path) -> None:
    folder = run(MEGATRON, megatron)
    for path in folder.glob("*/mp_rank_*"):
        torch.save({"bucket": torch.ones(2)}, path / "distrib_optim.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("300")
    report = ckpt_tools.average("run/iter_*", out="averaged")
    assert report.ordered_by == "the iteration stored in the files"
    assert [entry.step for entry in report.inputs] == [*STEPS]
    assert {entry.state for entry in report.inputs} == {"raw (4 files)"}
    assert f"{MEGATRON[3]}: model.language_model.encoder.layers.0.weight" in report.averaged
    assert len(report.averaged) == 16
    left_out = ["optimizer", "opt_param_scheduler", "rng_state", "distrib_optim.pt"]
    assert list(report.dropped) == [f"{name} (of 4 ranks)" for name in left_out]
    assert loaded(here / "averaged" / MEGATRON[0]).keys() == {"args", "checkpoint_version", "iteration", "model"}
    assert loaded(here / "averaged" / MEGATRON[0])["iteration"] == 300


def test_extra_states_come_from_the_last(run: Callable[..., Path], here: Path) -> None:
    def content(step: int, rank: int, g: torch.Generator) -> Tree:
        file = io.BytesIO()
        torch.save({"scale": torch.full((2,), float(step))}, file)
        tensor = torch.full((3,), step % 251, dtype=torch.uint8)
        extra = {"a._extra_state": tensor, "b._extra_state": file, "c._extra_state": None}
        return {"iteration": step, "model": {**weights(g), **extra}}

    run(MEGATRON, content)
    report = ckpt_tools.average("run/iter_*", out="averaged")
    assert report.dropped == ()
    for name in MEGATRON:
        model = loaded(here / "averaged" / name)["model"]
        assert model["a._extra_state"].tolist() == [300 % 251] * 3
        assert torch.load(model["b._extra_state"])["scale"].tolist() == [300.0, 300.0]
        assert model["c._extra_state"] is None


def test_companions_are_carried_along(run: Callable[..., Path], here: Path) -> None:
    folder = run(META, flat)
    for step in folder.iterdir():
        (step / "params.json").write_text(json.dumps({"dim": 4, "step": step.name}))
        (step / "tokenizer.model").write_bytes(b"tok")
        (step / "checklist.chk").write_text("a checksum of the weights")
    report = ckpt_tools.average("run/*", out="averaged")
    assert json.loads((here / "averaged/params.json").read_text())["step"] == "iter_0000300"
    assert {p.name for p in (here / "averaged").iterdir()} == {*META, "params.json", "tokenizer.model"}
    assert report.dropped == ("checklist.chk",)


def test_an_average_of_several_models_in_each_rank_follows_state(run: Callable[..., Path], here: Path) -> None:
    def content(step: int, rank: int, g: torch.Generator) -> Tree:
        return {"iteration": step, "model": weights(g), "ema": weights(g)}

    folder = run(MEGATRON, content)
    ckpt_tools.average("run/iter_*", out="ema")
    ckpt_tools.average("run/iter_*", out="raw", state="raw")
    for name in MEGATRON:
        assert loaded(here / "ema" / name).keys() == loaded(here / "raw" / name).keys() == {"iteration", "model"}
        steps = [loaded(folder / f"iter_{step:07d}" / name) for step in STEPS]
        for out, key in (("ema", "ema"), ("raw", "model")):
            mean = sum(step[key]["layers.0.bias"] for step in steps) / 3
            torch.testing.assert_close(loaded(here / out / name)["model"]["layers.0.bias"], mean)


def test_a_rank_that_one_step_lacks_is_named(run: Callable[..., Path], here: Path) -> None:
    folder = run(MEGATRON, megatron)
    for path in (folder / "iter_0000200").glob("mp_rank_*_001"):
        (path / "model_optim_rng.pt").unlink()
        path.rmdir()
    with pytest.raises(
        AlignmentError, match=r"iter_0000200 has no file mp_rank_00_001/model_optim_rng\.pt \(2 of 3 checkpoints have"
    ):
        ckpt_tools.average("run/iter_*", out="averaged")
    assert not (here / "averaged").exists()


def test_ranks_of_two_steps_in_one_folder_are_refused(run: Callable[..., Path]) -> None:
    folder = run(MEGATRON, megatron)
    (folder / "iter_0000100" / MEGATRON[2]).replace(folder / "iter_0000200" / MEGATRON[2])
    torch.save(megatron(100, 2, torch.Generator()), folder / "iter_0000100" / MEGATRON[2])
    with pytest.raises(
        LayoutError, match=r"not of one step: mp_rank_00_000/.* has the iteration 200, and mp_rank_01_000/.* has 100"
    ):
        ckpt_tools.average("run/iter_*", out="averaged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "averaged.pth"}, "averaged.pth: the checkpoints are folders with a file for each rank, and so is"),
        ({"out": "averaged", "max_shard_size": "1MB"}, "`max_shard_size` does not go with folders of ranks"),
    ],
)
def test_an_output_of_another_form_is_refused(run: Callable[..., Path], options: Tree, message: str) -> None:
    run(META, flat)
    with pytest.raises(UsageError, match=message):
        ckpt_tools.average("run/*", **options)


def test_the_default_output_is_a_folder(run: Callable[..., Path], here: Path) -> None:
    run(META, flat)
    assert ckpt_tools.average("run/*").out == "averaged"
    assert (here / "averaged" / META[1]).is_file()


def test_nothing_is_left_of_an_average_that_fails_in_the_last_file(run: Callable[..., Path], here: Path) -> None:
    def content(step: int, rank: int, g: torch.Generator) -> Tree:
        return {"w": torch.full((3,), float("nan") if rank == 1 else 1.0)}

    run(META, content)
    before = sorted(here.iterdir())
    with pytest.raises(NumericsError, match=r"consolidated\.01\.pth: w"):
        ckpt_tools.average("run/*", out="averaged")
    assert sorted(here.iterdir()) == before


def test_an_older_output_is_replaced_whole_and_other_files_are_kept_safe(run: Callable[..., Path], here: Path) -> None:
    folder = run(MEGATRON, megatron)
    ckpt_tools.average("run/iter_*", out="averaged")
    with pytest.raises(WriteError, match="exists already"):
        ckpt_tools.average("run/iter_0000100", out="averaged")
    ckpt_tools.average("run/iter_0000100", out="averaged", force=True)
    old = loaded(folder / "iter_0000100" / MEGATRON[1])["model"]["language_model"]["encoder"]["layers.0.bias"]
    new = loaded(here / "averaged" / MEGATRON[1])["model"]["language_model"]["encoder"]["layers.0.bias"]
    assert new.equal(old)
    for stray in ("mp_rank_00_000/notes.txt", "mp_rank_00_000/more/notes.txt"):
        (here / "averaged" / stray).parent.mkdir(exist_ok=True)
        (here / "averaged" / stray).write_text("mine")
        with pytest.raises(
            WriteError,
            match=r"averaged: is a folder that also holds mp_rank_00_000/(notes\.txt|more), and a folder of shards",
        ):
            ckpt_tools.average("run/iter_*", out="averaged", force=True)
        (here / "averaged" / stray).unlink()


def test_hashes_of_all_files_are_recorded(run: Callable[..., Path]) -> None:
    run(MEGATRON, megatron)
    report = ckpt_tools.average("run/iter_*", out="averaged", hash=True)
    assert list(report.inputs[0].sha256) == MEGATRON
    assert len(set(report.inputs[0].sha256.values())) == 4


def test_outputs_and_copies_in_the_folder_are_left_out(run: Callable[..., Path], here: Path) -> None:
    folder = run(META, flat)
    ckpt_tools.average("run/*", out="run/averaged")
    (folder / "copy").mkdir()
    for name in META:
        (folder / "copy" / name).write_bytes((folder / "iter_0000300" / name).read_bytes())
    report = ckpt_tools.average("run/*", out="averaged")
    assert [entry.name for entry in report.inputs] == [f"iter_{step:07d}" for step in STEPS]


def test_a_rank_alone_is_refused_and_the_folder_named(run: Callable[..., Path]) -> None:
    run(MEGATRON, megatron)
    advice = r"Give the folder of all ranks: run/iter_0000100, or 'run/iter_\*' for a series"
    with pytest.raises(SeriesError, match=rf"is one rank of several, .* {advice}"):
        ckpt_tools.average("run/iter_*/mp_rank_00_001/model_optim_rng.pt", out="x.pt")
    with pytest.raises(SeriesError, match=rf"differ only in the rank, so they are shards of one .* {advice}"):
        ckpt_tools.average("run/iter_*/*/*.pt", out="x.pt")


def test_convert_and_recalibrate_refuse_ranks(run: Callable[..., Path]) -> None:
    run(META, flat)
    message = "each of its 2 files has the part of one rank, so it is no whole set of weights. Merge the ranks first"
    with pytest.raises(LayoutError, match=message):
        ckpt_tools.convert("run/iter_0000100", to="plain", out="x.pth")
    with pytest.raises(LayoutError, match=message):
        ckpt_tools.open_checkpoint("run/iter_0000100")


def test_fix_prefix_names_the_files(run: Callable[..., Path]) -> None:
    run(META, flat)
    with pytest.raises(UnsupportedError, match=r"one by one: run/iter_0000100/consolidated\.00\.pth"):
        ckpt_tools.fix_prefix("run/iter_0000100", out="x")


def test_diff_compares_all_ranks(run: Callable[..., Path]) -> None:
    run(MEGATRON, megatron)
    assert ckpt_tools.diff("run/iter_0000100", "run/iter_0000100").verdict == "identical"
    report = ckpt_tools.diff("run/iter_0000100", "run/iter_0000200")
    assert (report.verdict, report.compared) == ("different", 16)


def test_inspect_shows_the_weights_of_all_ranks(run: Callable[..., Path], here: Path) -> None:
    run(MEGATRON, megatron)
    found = describe(read_header(here / "run/iter_0000200"))
    (weights,) = found.sets
    assert (weights.label, len(weights.tensors), found.counters) == ("raw (4 files)", 16, {"iteration": 200})
    assert [each.name for each in found.optimizers] == ["Adam family"] * 4


def test_strip_writes_ranks_without_their_training_state(run: Callable[..., Path], here: Path) -> None:
    folder = run(MEGATRON, megatron)
    strip("run/iter_0000100", out="stripped")
    for name in MEGATRON:
        new, old = loaded(here / "stripped" / name), loaded(folder / "iter_0000100" / name)
        assert new.keys() == {"args", "checkpoint_version", "iteration", "model"}
        assert all(a[1].equal(b[1]) for a, b in zip(leaves(new["model"]), leaves(old["model"]), strict=True))
