"""ema-pytorch: both models are read, and an EMA that loads ours goes on as the original does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ema_pytorch import EMA, PostHocEMA
from ema_pytorch.post_hoc_ema import solve_weights
from small import Net, differences, load, pair, save, train, weights_of

import ckpt_tools

OPTIONS = {"beta": 0.9, "update_every": 1, "update_after_step": 1}


def averaged(updates: int = 5) -> tuple[Net, EMA]:
    model = Net()
    ema = EMA(model, **OPTIONS)
    train(model, updates, ema.update)
    return model, ema


@pytest.mark.shows("ema-pytorch", "read raw")
@pytest.mark.shows("ema-pytorch", "read EMA")
def test_both_models_are_read_under_bare_names(tmp_path: Path) -> None:
    model, ema = averaged()
    path = save(tmp_path / "ema.pt", ema.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), model.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), ema.ema_model.state_dict())
    assert ckpt_tools.open_checkpoint(path).state.layout == "ema-pytorch"


@pytest.mark.shows("ema-pytorch", "read EMA")
def test_an_average_saved_without_its_online_model_is_read(tmp_path: Path) -> None:
    model = Net()
    ema = EMA(model, include_online_model=False, **OPTIONS)
    train(model, 4, ema.update)
    path = save(tmp_path / "ema.pt", ema.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path), ema.ema_model.state_dict())
    with pytest.raises(ckpt_tools.CkptError, match="no raw weights"):
        ckpt_tools.open_checkpoint(path, state="raw")


@pytest.mark.shows("ema-pytorch", "write")
@pytest.mark.shows("ema-pytorch", "library loads")
def test_the_next_update_goes_on_where_the_original_does(tmp_path: Path) -> None:
    model, original = averaged()
    source = pair(tmp_path / "own.pth", weights_of(model), weights_of(original.ema_model))
    out = tmp_path / "ema.pt"
    ckpt_tools.convert(source, to="ema-pytorch", updates=5, out=out)
    twin = copy.deepcopy(model)
    ours = EMA(Net(), **OPTIONS)
    ours.load_state_dict(load(out))
    assert not differences(ours.state_dict(), original.state_dict())
    train(model, 1)
    ours.online_model.load_state_dict(model.state_dict())
    ours.update()
    original.update()
    assert not differences(ours.ema_model.state_dict(), original.ema_model.state_dict())
    assert differences(ours.ema_model.state_dict(), twin.state_dict()), "the update copied the model over the average"


@pytest.mark.shows("ema-pytorch", "write")
@pytest.mark.shows("ema-pytorch", "library loads")
def test_one_set_alone_is_written_as_both_models(tmp_path: Path) -> None:
    _, original = averaged()
    source = save(tmp_path / "plain.pth", weights_of(original.ema_model))
    out = tmp_path / "ema.pt"
    ckpt_tools.convert(source, to="ema-pytorch", updates=5, out=out)
    ours = EMA(Net(), **OPTIONS)
    ours.load_state_dict(load(out))
    assert not differences(ours.ema_model.state_dict(), original.ema_model.state_dict())
    assert not differences(ours.online_model.state_dict(), original.ema_model.state_dict())
    assert ours.step.item() == 5
    assert ours.initted.item() is True


WIDTHS = (0.05, 0.10)
PROFILES = [f"{i}.*.pt=sigma-rel:{width}" for i, width in enumerate(WIDTHS)]


def post_hoc(folder: Path, dtype: torch.dtype, *, every: int, steps: int) -> PostHocEMA:
    """A random walk with its averages of two widths, kept and saved by the library."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    kept = PostHocEMA(
        model, sigma_rels=WIDTHS, update_every=1, checkpoint_every_num_steps=every, checkpoint_folder=str(folder),
        checkpoint_dtype=dtype,
    )  # fmt: skip
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        kept.update()
    return kept


def sum_of_weights(kept: PostHocEMA, folder: Path, gamma: float) -> float:
    names = [tuple(map(int, path.stem.split("."))) for path in folder.glob("*.pt")]
    steps = torch.tensor([step for _, step in names])
    gammas = torch.tensor([kept.gammas[index] for index, _ in names])
    return solve_weights(steps, gammas, steps.max()[None], torch.tensor([gamma])).sum().item()


@pytest.mark.parametrize("width", [0.06, 0.08, 0.12])
def test_posthoc_is_what_the_library_synthesizes_from_its_own_snapshots(tmp_path: Path, width: float) -> None:
    """The weights of the library sum to 0.99995 or so, because the fit is not exact; ours are divided by their sum."""
    folder = tmp_path / "kept"
    kept = post_hoc(folder, torch.float64, every=100, steps=2000)
    synthesized = kept.synthesize_ema_model(sigma_rel=width)
    total = sum_of_weights(kept, folder, synthesized.gamma)
    assert total == pytest.approx(1, abs=1e-4)
    assert total != 1
    report = ckpt_tools.average(
        folder, mode="posthoc", target=f"sigma-rel={width}", profile=PROFILES, out=tmp_path / "a.pth"
    )
    assert len(report.inputs) == 40
    ours = load(tmp_path / "a.pth")
    for name, tensor in synthesized.ema_model.state_dict().items():
        torch.testing.assert_close(ours[name], tensor / total, rtol=0, atol=1e-6)


def test_the_steps_of_its_float16_snapshots_are_those_in_their_names(tmp_path: Path) -> None:
    """By default it stores all of its state as float16, the step too: 3001 becomes 3000."""
    folder = tmp_path / "kept"
    post_hoc(folder, torch.float16, every=1003, steps=3009)
    report = ckpt_tools.average(
        folder, mode="posthoc", target="sigma-rel=0.08", profile=PROFILES, allow_misfit=True, dry_run=True
    )
    assert [(entry.name, entry.step) for entry in report.inputs] == [
        (f"{i}.{step}.pt", step) for step in (1003, 2006, 3009) for i in (0, 1)
    ]
