"""Pages that run: the commands and the Python in a page, and the files that they find.

The tests run each page (tests/cli/test_recipes.py), and the site shows what the commands print (docs/hooks.py).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ckpt_tools import open_checkpoint

DOCS = Path(__file__).parent
FIXTURES = DOCS.parent / "fixtures"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A block that runs: of commands, or of Python. Other languages (`text`, `py`) are for what does not run here."""
PROGRESS = re.compile(r"[a-z][a-z0-9, ]*: \d+(%| of \d+| images|\.\d+ [kMG]?B)|.* \.\.\.$")
"""A line that only a slow machine prints: how far a step is, or that one goes on."""


@dataclass(frozen=True)
class Block:
    """A block of a page: its language, text, and where it ends."""

    language: str
    text: str
    end: int

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each command, without comments and without `ckpt`."""
        for line in self.text.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line, comments=True) or [""]
            if program == "ckpt":
                yield words
            elif program and line not in INSTALLING:
                raise ValueError(f"{line}: neither ckpt nor a known line. Take ```text for what is not to be run.")


INSTALLING = ("pip install ckpt-tools", "pip install 'ckpt-tools[vision]'", "pip install 'ckpt-tools[remote]'")


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page, such as `recipes/timm.md`, that run."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [Block(found[1], found[2], found.end()) for found in BLOCK.finditer(text)]


def lay_out(page: str, folder: Path) -> None:
    """Make the files that a page starts from: the digits, and their checkpoints as a library writes them."""
    shutil.copytree(FIXTURES / "digits", folder / "digits")
    shutil.copy(FIXTURES / "digits_net.py", folder)
    MAKERS.get(page, _timm)(folder)


def _timm(folder: Path) -> None:
    shutil.copytree(FIXTURES / "runs", folder / "runs")


def _nothing(folder: Path) -> None:
    """The page trains by itself."""


def _weights(number: int, *, batchnorm: bool = True) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint of the digits run; without BatchNorm, as a transformer would have them."""
    found = open_checkpoint(FIXTURES / "runs" / f"checkpoint-{number}.pth", state="raw")
    bare = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in bare.items() if batchnorm or not name.startswith("bn")}


def _moments(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """State of an optimizer, as large as that of Adam."""
    state = {
        i: {"step": torch.tensor(1.0), "exp_avg": w * 0, "exp_avg_sq": w * 0} for i, w in enumerate(weights.values())
    }
    return {"state": state, "param_groups": [{"lr": 1e-3, "params": [*state]}]}


def _lightning(folder: Path) -> None:
    place = folder / "lightning_logs" / "version_0" / "checkpoints"
    place.mkdir(parents=True)
    for epoch in range(6):
        weights = {f"model.{name}": tensor for name, tensor in _weights(epoch + 1).items()}
        step = (epoch + 1) * 100
        torch.save(
            {
                "epoch": epoch,
                "global_step": step,
                "pytorch-lightning_version": "2.6.6",
                "state_dict": weights,
                "optimizer_states": [_moments(weights)],
                "lr_schedulers": [],
                "hyper_parameters": {"lr": 1e-3},
            },
            place / f"epoch={epoch}-step={step}.ckpt",
        )


def _trainer(folder: Path) -> None:
    for number in range(1, 7):
        place = folder / "out" / f"checkpoint-{number * 500}"
        place.mkdir(parents=True)
        weights = _weights(number, batchnorm=False)
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text('{"architectures": ["DigitsNet"], "model_type": "digits"}')
        (place / "preprocessor_config.json").write_text('{"size": 8}')
        log = [{"step": step * 500, "eval_loss": 1 / step} for step in range(1, number + 1)]
        (place / "trainer_state.json").write_text(json.dumps({"global_step": number * 500, "log_history": log}))
        torch.save(_moments(weights), place / "optimizer.pt")


def _diffusion(folder: Path) -> None:
    (folder / "run").mkdir()
    series = [_weights(number, batchnorm=False) for number in range(1, 13)]
    averages = {gamma: {name: w.double() for name, w in series[0].items()} for gamma in (16.97, 6.94)}
    for number, weights in enumerate(series, 1):
        for (gamma, average), width in zip(averages.items(), ("0.050", "0.100"), strict=True):
            beta = (1 - 1 / number) ** (gamma + 1)
            for name, w in weights.items():
                average[name] = beta * average[name] + (1 - beta) * w.double() if w.is_floating_point() else w
            stored = {name: average[name].to(w.dtype) for name, w in weights.items()}
            torch.save({"step": number * 1000, "ema": stored}, folder / "run" / f"ema-{number * 1000:06d}-{width}.pt")


def _llm(folder: Path) -> None:
    for number in range(1, 9):
        place = folder / "run" / f"step-{number * 1000}"
        place.mkdir(parents=True)
        weights = {
            name: w.bfloat16() if w.is_floating_point() else w for name, w in _weights(number, batchnorm=False).items()
        }
        names, index = sorted(weights), {}
        for part in (1, 2):
            file = f"model-0000{part}-of-00002.safetensors"
            chosen = {name: weights[name] for name in names[part - 1 :: 2]}
            save_file(chosen, place / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(chosen, file))
        size = sum(w.nbytes for w in weights.values())
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
        (place / "model.safetensors.index.json").write_text(text)
        (place / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
        (place / "tokenizer.json").write_text('{"version": "1.0"}')


def _speech(folder: Path) -> None:
    (folder / "exp").mkdir()
    series = [_weights(number) for number in range(1, 13)]
    mean = {name: w.double() for name, w in series[0].items()}
    for epoch, weights in enumerate(series, 1):
        for name, w in weights.items():
            mean[name] = mean[name] + (w.double() - mean[name]) / epoch
        averaged = {name: mean[name].to(w.dtype) for name, w in weights.items()}
        torch.save(
            {"model": weights, "model_avg": averaged, "batch_idx_train": epoch * 100, "optimizer": _moments(weights)},
            folder / "exp" / f"epoch-{epoch}.pt",
        )


MAKERS: dict[str, Callable[[Path], None]] = {
    "recipes.md": _nothing,
    "recipes/lightning.md": _lightning,
    "recipes/transformers.md": _trainer,
    "recipes/diffusion.md": _diffusion,
    "recipes/llm.md": _llm,
    "recipes/speech.md": _speech,
}
