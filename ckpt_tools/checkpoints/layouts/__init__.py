"""Layouts: where the weights are inside a checkpoint, raw and averaged, and how they are encoded there.

A layout of a library is a `Layout` in one of the modules here. One from outside takes a few lines, and all commands
know it then::

    from ckpt_tools.checkpoints.layouts import Layout, register

    register(Layout("mine", "my loop: net and net_avg", raw=("net",), ema=("net_avg",)))

Where a library keeps more than names and tensors, give the layout an `Encoding` with functions that detect, read and
write it, as `averaged_model` does; where finding the sets takes more than two paths, override `Layout.read`, as
`lightning` does. `unregister` takes a layout out again.
"""

from __future__ import annotations

from .averaged_model import AVERAGED_MODEL, MMENGINE, TORCHVISION
from .deepspeed import DEEPSPEED
from .ema_pytorch import EMA_PYTORCH
from .layout import DETECTED, LAYOUTS, Encoding, Layout, StateDict, register, unregister
from .lightning import LIGHTNING, LIGHTNING_SWA, NEMO
from .litema import LITEMA
from .pairs import D2GO, DEIT, DINO, DIT, FAIRSEQ, ICEFALL, MODEL_STATE_DICT, TIMM, TIMM_EMA
from .parameter_lists import DIFFUSERS, PYTORCH_EMA
from .plain import DCP, PLAIN
from .select import called, select, states
from .torchtitan import TORCHTITAN
from .ultralytics import ULTRALYTICS

# As the list of layouts shows them. Raw weights alone are looked for in this order, too, which is timm's.
LAYOUTS += [
    PLAIN, TIMM, TIMM_EMA, DEIT, TORCHVISION, MODEL_STATE_DICT, AVERAGED_MODEL, LITEMA, LIGHTNING, LIGHTNING_SWA, NEMO,
    MMENGINE, ULTRALYTICS, TORCHTITAN, D2GO, EMA_PYTORCH, DIT, ICEFALL, DINO, FAIRSEQ, DIFFUSERS, PYTORCH_EMA, DCP,
    DEEPSPEED,
]  # fmt: skip
# The order of detection of averaged weights: what is known for certain goes first, then timm's order. Where two
# layouts differ in the encoding of the average alone, the plain one is the second.
DETECTED += [
    DEEPSPEED, TORCHTITAN, LIGHTNING, MMENGINE, TIMM, TORCHVISION, DEIT, MODEL_STATE_DICT, D2GO, ULTRALYTICS, DIT,
    ICEFALL, DINO, FAIRSEQ, LIGHTNING_SWA,
]  # fmt: skip

__all__ = ["LAYOUTS", "Encoding", "Layout", "StateDict", "called", "register", "select", "states", "unregister"]
