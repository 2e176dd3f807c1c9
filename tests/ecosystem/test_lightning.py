"""Lightning: real fits with both averaging callbacks; its files are read, and ours resume a fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from small import Net, Weights, differences, pair, weights_of
from torch.utils.data import DataLoader, TensorDataset

import ckpt_tools


class Module(lightning.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = Net(width)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return self.model(batch[0]).square().mean()

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("loss", self.model(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@dataclass
class Recorder(Callback):
    """Keeps what the weights were when a fit began, and whenever a checkpoint was saved."""

    averaging: Any
    raw: list[Weights] = field(default_factory=list)
    averages: list[Weights] = field(default_factory=list)
    start: dict[str, Any] = field(default_factory=dict)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.raw.append(weights_of(pl_module))
        self.averages.append(weights_of(getattr(self._average, "module", self._average)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if isinstance(self.averaging, WeightAveraging):
            average = weights_of(self._average.module)
            self.start = {"raw": weights_of(pl_module), "ema": average, "n": self._average.n_averaged.item()}

    @property
    def _average(self) -> Any:
        return self.averaging._average_model


def fit(folder: Path, averaging: Any, *, resume: Path | None = None, epochs: int = 2) -> Recorder:
    recorder = Recorder(averaging)
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    data = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8)), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[averaging, recorder, saving],
    )
    trainer.fit(Module(), data, data, ckpt_path=resume)
    return recorder


@pytest.mark.shows("lightning", "read raw")
@pytest.mark.shows("lightning", "read EMA")
@pytest.mark.parametrize("callback", [WeightAveraging, EMAWeightAveraging])
def test_the_swapped_sets_are_read_the_right_way_round(tmp_path: Path, callback: Any) -> None:
    recorder = fit(tmp_path, callback())
    assert len(recorder.raw) == 2
    for epoch in range(2):
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert differences(recorder.raw[epoch], recorder.averages[epoch]), "the sets must differ to be told apart"
        assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), recorder.raw[epoch])
        assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), recorder.averages[epoch])
        checkpoint = ckpt_tools.open_checkpoint(path)
        assert (checkpoint.state.which, checkpoint.state.layout) == ("ema", "lightning")


@pytest.mark.shows("lightning-swa", "read raw")
@pytest.mark.shows("lightning-swa", "read EMA")
def test_both_sets_of_stochastic_weight_averaging_are_read(tmp_path: Path) -> None:
    recorder = fit(tmp_path, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1), epochs=3)
    # Lightning adds an epoch of its own, in which the average becomes the model's weights; before that both differ.
    path, raw, average = tmp_path / "epoch=2.ckpt", recorder.raw[2], recorder.averages[2]
    assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), raw)
    parameters = dict(Module().named_parameters())
    found = ckpt_tools.open_checkpoint(path, state="ema")
    assert found.keys() == raw.keys()
    expected = {name: average[name] for name in parameters}
    assert not differences({name: found[name] for name in parameters}, expected)
    assert differences(expected, {name: raw[name] for name in parameters})


class OwnAveraging(StochasticWeightAveraging):
    """A callback's state is saved under the name of its class, so under this one."""


@pytest.mark.shows("lightning-swa", "read EMA")
def test_the_average_of_a_derived_callback_is_found(tmp_path: Path) -> None:
    recorder = fit(tmp_path, OwnAveraging(swa_lrs=0.05, swa_epoch_start=1), epochs=3)
    found = ckpt_tools.open_checkpoint(tmp_path / "epoch=2.ckpt", state="ema")
    assert not differences({"w": found["model.head.weight"]}, {"w": recorder.averages[2]["model.head.weight"]})


@pytest.mark.shows("lightning-swa", "read raw")
def test_a_checkpoint_from_before_swa_began_is_not_taken_for_an_average(tmp_path: Path) -> None:
    # swa_epoch_start counts from 1: in the first epoch the callback holds a copy of the untrained weights.
    recorder = fit(tmp_path, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2), epochs=3)
    first = ckpt_tools.open_checkpoint(tmp_path / "epoch=0.ckpt")
    assert first.state.which == "raw"
    assert not differences(first, recorder.raw[0])


@pytest.mark.shows("lightning", "write")
@pytest.mark.shows("lightning", "library loads")
@pytest.mark.parametrize("callback", [WeightAveraging, EMAWeightAveraging])
def test_a_fit_resumes_from_a_conversion_with_both_sets_and_the_counter(tmp_path: Path, callback: Any) -> None:
    recorder = fit(tmp_path / "run", WeightAveraging())
    out = tmp_path / "converted.ckpt"
    source = pair(tmp_path / "own.pth", recorder.raw[-1], recorder.averages[-1])
    ckpt_tools.convert(source, to="lightning", updates=4, out=out)
    resumed = fit(tmp_path / "again", callback(), resume=out, epochs=1).start
    assert not differences(resumed["raw"], recorder.raw[-1])
    assert not differences(resumed["ema"], recorder.averages[-1])
    assert resumed["n"] == 4


@pytest.mark.shows("lightning", "write")
@pytest.mark.shows("lightning", "library loads")
def test_a_conversion_loads_into_the_module_as_the_average(tmp_path: Path) -> None:
    recorder = fit(tmp_path / "run", WeightAveraging())
    out = tmp_path / "converted.ckpt"
    ckpt_tools.convert(tmp_path / "run" / "epoch=1.ckpt", to="lightning", out=out)
    assert not differences(Module.load_from_checkpoint(out).state_dict(), recorder.averages[-1])
    assert not differences(ckpt_tools.open_checkpoint(out, state="raw"), recorder.raw[-1])


@pytest.mark.shows("lightning", "library loads")
def test_an_average_over_checkpoints_loads_into_the_module(tmp_path: Path) -> None:
    fit(tmp_path / "run", WeightAveraging())
    out = tmp_path / "averaged.ckpt"
    ckpt_tools.average(tmp_path / "run", state="ema", out=out)
    model = Module.load_from_checkpoint(out)
    assert not differences(ckpt_tools.open_checkpoint(out), model.state_dict())
