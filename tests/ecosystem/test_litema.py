"""LitEma of latent diffusion (ldm/modules/ema.py): the class is not on PyPI, so its behaviour is written anew here."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small import Net, Weights, differences, load, pair, save, train, weights_of
from torch import nn

import ckpt_tools


class LitEma(nn.Module):
    """Keeps averages of the trainable parameters as buffers; a buffer's name may hold no dot, so dots go."""

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        self.short = {name: name.replace(".", "") for name, p in model.named_parameters() if p.requires_grad}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))
        for name, short in self.short.items():
            self.register_buffer(short, model.get_parameter(name).detach().clone())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, short in self.short.items():
            average = getattr(self, short)
            average.sub_((1.0 - decay) * (average - model.get_parameter(name)))

    def copy_to(self, model: nn.Module) -> None:
        for name, short in self.short.items():
            model.get_parameter(name).data.copy_(getattr(self, short))


class Diffusion(nn.Module):
    """What holds the model there, its average beside it, and a first stage that nothing averages."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("betas", torch.linspace(0.1, 0.9, 4))
        self.model = nn.ModuleDict({"diffusion_model": Net()})
        self.model_ema = LitEma(self.model, decay=0.9)
        self.first_stage_model = nn.Linear(2, 2)

    def step(self, times: int = 1) -> None:
        train(self.model["diffusion_model"], times, lambda: self.model_ema(self.model))

    def sets(self) -> tuple[Weights, Weights]:
        """Raw and averaged weights under the names that the state dict has."""
        smooth = copy.deepcopy(self)
        smooth.model_ema.copy_to(smooth.model)
        return tuple(
            {name: tensor for name, tensor in weights_of(each).items() if not name.startswith("model_ema.")}
            for each in (self, smooth)
        )


@pytest.fixture
def diffusion() -> Diffusion:
    made = Diffusion()
    made.step(3)
    return made


@pytest.mark.shows("litema", "read raw")
@pytest.mark.shows("litema", "read EMA")
def test_both_sets_are_read_under_the_names_of_the_raw_weights(diffusion: Diffusion, tmp_path: Path) -> None:
    raw, average = diffusion.sets()
    content = {"state_dict": diffusion.state_dict(), "epoch": 1, "global_step": 3, "pytorch-lightning_version": "1.4.2"}
    path = save(tmp_path / "last.ckpt", content)
    assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), raw)
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), average)
    checkpoint = ckpt_tools.open_checkpoint(path)
    assert (checkpoint.state.which, checkpoint.state.layout) == ("ema", "litema")


@pytest.mark.shows("litema", "read EMA")
def test_what_is_not_averaged_comes_from_the_raw_weights(tmp_path: Path) -> None:
    diffusion = Diffusion()
    diffusion.model["diffusion_model"].head.requires_grad_(False)
    diffusion.model_ema = LitEma(diffusion.model, decay=0.9)
    assert not any("head" in name for name in diffusion.model_ema.state_dict())
    with torch.no_grad():
        diffusion.model["diffusion_model"].head.bias.add_(1.0)
        diffusion.model["diffusion_model"].stem[0].weight.add_(1.0)
    diffusion.model_ema(diffusion.model)
    path = save(tmp_path / "last.ckpt", {"state_dict": diffusion.state_dict()})
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), diffusion.sets()[1])


@pytest.mark.shows("litema", "read EMA")
def test_names_that_two_parameters_share_without_their_dots_are_refused(tmp_path: Path) -> None:
    model = {"model.a.bc": torch.ones(2), "model.ab.c": torch.zeros(2)}
    ema = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(1, dtype=torch.int32)}
    path = save(tmp_path / "last.ckpt", {"state_dict": {**model, **ema, "model_ema.abc": torch.ones(2)}})
    with pytest.raises(ckpt_tools.CkptError, match=r"model\.a\.bc.*model\.ab\.c"):
        ckpt_tools.open_checkpoint(path, state="ema")


@pytest.mark.shows("litema", "write")
@pytest.mark.shows("litema", "library loads")
def test_the_next_update_goes_on_where_the_original_does(diffusion: Diffusion, tmp_path: Path) -> None:
    raw, average = diffusion.sets()
    names = [name for name in raw if name.startswith("model.")]
    source = pair(tmp_path / "own.pth", {n: raw[n] for n in names}, {n: average[n] for n in names})
    out = tmp_path / "last.ckpt"
    ckpt_tools.convert(source, to="litema", updates=3, decay=0.9, out=out)
    written = load(out)["state_dict"]
    ours = Diffusion()
    result = ours.load_state_dict(written, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith(("betas", "first_stage_model.")) for name in result.missing_keys)
    assert ours.model_ema.num_updates.dtype is torch.int32
    assert not differences(ours.model_ema.state_dict(), diffusion.model_ema.state_dict())
    diffusion.step()
    ours.model.load_state_dict(diffusion.model.state_dict())
    ours.model_ema(ours.model)
    assert not differences(ours.model_ema.state_dict(), diffusion.model_ema.state_dict())
