"""The table: which layouts there are, and where each keeps its weights."""

from __future__ import annotations

from dataclasses import dataclass

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where one family of training scripts keeps its weights, raw and averaged.

    Attributes:
        name: as the parameter `to` of `convert` takes it.
        about: a line for the list of layouts.
        raw, ema: where the sets stand; None where a layout has none, or keeps it beside the other in one dict.
        raw_form, ema_form: how they are written there, see `forms`.
        home: where a checkpoint of these scripts keeps weights when there is one set alone.
        updates: where the average's counter stands, if not in its form.
        needs: entries without which it is another layout.
        exact: where parameters of the average stand in a wider dtype.
        parameters: the average has parameters alone; its buffers are stale, and the raw ones are taken.
        alone: raw weights without averaged ones are a checkpoint of this layout, too.
        flat: a dict of names to tensors and no more, so that any file format can hold it.
        written: ``convert`` writes it.
    """

    name: str
    about: str
    raw: Path | None = None
    ema: Path | None = None
    raw_form: str = "plain"
    ema_form: str = "plain"
    home: Path = ()
    updates: Path | None = None
    needs: tuple[Path, ...] = ()
    exact: Path | None = None
    parameters: bool = False
    alone: bool = False
    flat: bool = False
    written: bool = True

    @property
    def places(self) -> tuple[Path, ...]:
        """Return all its places, each once."""
        named = (self.raw, self.ema, self.updates and (self.updates[:-1] or self.updates), self.exact)
        return tuple(dict.fromkeys(place for place in named if place))


LAYOUTS = (
    Layout("plain", "names to tensors: one set of weights", raw=(), alone=True, flat=True),
    Layout(
        "timm", "timm: state_dict and, where there is one, state_dict_ema", ("state_dict",), ("state_dict_ema",),
        home=("state_dict",), alone=True,
    ),
    Layout(
        "timm-ema", "timm, with the weights as state_dict_ema", ("state_dict",), ("state_dict_ema",),
        home=("state_dict",),
    ),
    Layout("deit", "DeiT and alike: model and model_ema", ("model",), ("model_ema",), home=("model",), alone=True),
    Layout(
        "torchvision", "torchvision's reference scripts: model, and model_ema as an AveragedModel",
        ("model",), ("model_ema",), ema_form="averaged-model", home=("model",),
    ),
    Layout(
        "model-state-dict", "hand-written loops: model_state_dict and ema_state_dict",
        ("model_state_dict",), ("ema_state_dict",), home=("model_state_dict",), alone=True,
    ),
    Layout(
        "averaged-model", "torch's AveragedModel: module.* and n_averaged",
        ema=(), ema_form="averaged-model", flat=True,
    ),
    Layout(
        "litema", "LitEma of latent diffusion: raw names, and model_ema.* with the dots deleted",
        ("state_dict",), ("state_dict",), ema_form="litema", home=("state_dict",), flat=True,
    ),
    Layout(
        "lightning", "Lightning's WeightAveraging: current_model_state, and the average as state_dict",
        ("current_model_state",), ("state_dict",), home=("state_dict",),
        updates=("averaging_state", "n_averaged"), needs=(("averaging_state",), ("current_model_state",)),
    ),
    Layout(
        "lightning-swa", "Lightning's StochasticWeightAveraging: the average in the callback's state",
        ("state_dict",), ("callbacks", "StochasticWeightAveraging", "average_model_state"), home=("state_dict",),
        updates=("callbacks", "StochasticWeightAveraging", "n_averaged"), parameters=True, written=False,
    ),
    Layout(
        "nemo", "NeMo: X.ckpt, and the EMA in X-EMA.ckpt beside it", ("state_dict",),
        home=("state_dict",), written=False,
    ),
    Layout(
        "mmengine", "mmengine's EMAHook: ema_state_dict holds the raw weights, state_dict the average",
        ("ema_state_dict",), ("state_dict",), raw_form="mmengine", home=("state_dict",),
        updates=("ema_state_dict", "steps"), needs=(("ema_state_dict", "steps"),),
    ),
    Layout(
        "ultralytics", "Ultralytics: pickled modules, model and ema",
        ("model",), ("ema",), ema_form="module", home=("model",), updates=("updates",), written=False,
    ),
    Layout("d2go", "d2go: model and ema_state", ("model",), ("ema_state",), home=("model",)),
    Layout("ema-pytorch", "ema-pytorch: online_model.* and ema_model.*", (), (), ema_form="ema-pytorch", flat=True),
    Layout("dit", "DiT, guided-diffusion: model and ema", ("model",), ("ema",), home=("model",)),
    Layout("icefall", "icefall: model and model_avg", ("model",), ("model_avg",), home=("model",)),
    Layout("dino", "DINO: student and teacher, which is the average", ("student",), ("teacher",), home=("teacher",)),
    Layout(
        "fairseq", "fairseq: model and extra_state.ema", ("model",), ("extra_state", "ema"), home=("model",),
        exact=("extra_state", "ema_fp32_params"),
    ),
    Layout(
        "diffusers", "diffusers' EMAModel: a folder with its config, or a list of parameters",
        ema=(), ema_form="diffusers",
    ),
    Layout("pytorch-ema", "torch_ema: a list of parameters", ema=(), ema_form="pytorch-ema"),
    Layout("dcp", "torch.distributed.checkpoint: a folder, names to tensors", raw=(), alone=True, flat=True),
)  # fmt: skip
BY_NAME = {layout.name: layout for layout in LAYOUTS}

RAW_PLACES: tuple[Path, ...] = (("state_dict",), ("model",), ("model_state_dict",))
"""Where weights stand that have no averaged ones beside them, in timm's order."""
SWAPPERS = ("ema_state_dict", "current_model_state")
"""Beside these, `state_dict` is not what its name says: mmengine and Lightning swap the sets on saving."""
SET_KEYS = ("state_dict", "state_dict_ema", "model", "model_ema", "model_state_dict", "ema_state_dict")
"""Keys of which each has weights below it, in some layout, whatever form they have."""
