"""Series: the files of each one, as names, shapes and sizes; `child.py` writes them with seeded numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Series:
    """A series of checkpoints.

    Attributes:
        shapes: of the tensors, for a scale of the file size; their number does not depend on the scale.
        suffix: of the files, which decides the format; without one, folders of shards as Hugging Face writes them.
        quick: the scale without --full.
    """

    name: str
    title: str
    shapes: Callable[[float], Shapes]
    files: int
    dtype: str = "float32"
    suffix: str = ".pth"
    quick: float = 1.0

    def numel(self, scale: float) -> int:
        return sum(math.prod(shape) for shape in self.shapes(scale).values())

    def file_bytes(self, scale: float) -> int:
        return self.numel(scale) * ITEMSIZE[self.dtype]

    def paths(self, folder: Path, scale: float) -> list[str]:
        """Return the paths. Names contain the scale, and only complete files get them, so files can be reused."""
        return [str(folder / f"{self.name}-x{scale:g}-{i:03d}{self.suffix}") for i in range(self.files)]


def vit_l(scale: float) -> Shapes:
    """ViT-L/16 at 224 pixels, 1000 classes: 304 million parameters."""
    dim = max(16, round(1024 * scale**0.5 / 16) * 16)
    shapes: Shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, (224 // 16) ** 2 + 1, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
    }
    matrices = {
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc1": (4 * dim, dim),
        "mlp.fc2": (dim, 4 * dim),
    }
    for i in range(24):
        for name, shape in {"norm1": (dim,), "norm2": (dim,), **matrices}.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return shapes | {"norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (1000, dim), "head.bias": (1000,)}


def resnet50(scale: float) -> Shapes:
    """ResNet-50: 25.6 million parameters, with the statistics and counters of BatchNorm."""
    width = max(4, round(64 * scale**0.5))
    shapes: Shapes = {}

    def conv(name: str, norm: str, out: int, inner: int, side: int) -> None:
        shapes[f"{name}.weight"] = (out, inner, side, side)
        shapes.update({f"{norm}.{key}": (out,) for key in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{norm}.num_batches_tracked"] = ()

    conv("conv1", "bn1", width, 3, 7)
    before = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = width * 2**stage
        for block in range(blocks):
            here = f"layer{stage + 1}.{block}"
            conv(f"{here}.conv1", f"{here}.bn1", inner, before, 1)
            conv(f"{here}.conv2", f"{here}.bn2", inner, inner, 3)
            conv(f"{here}.conv3", f"{here}.bn3", 4 * inner, inner, 1)
            if block == 0:
                conv(f"{here}.downsample.0", f"{here}.downsample.1", 4 * inner, before, 1)
            before = 4 * inner
    return shapes | {"fc.weight": (1000, before), "fc.bias": (1000,)}


def language_model(scale: float) -> Shapes:
    """A Llama-like model of 2.5 billion parameters."""
    dim = max(64, round(2560 * scale**0.5 / 64) * 64)
    wide = dim * 11 // 4
    shapes: Shapes = {"model.embed_tokens.weight": (16384, dim)}
    for i in range(30):
        here = f"model.layers.{i}"
        shapes |= {f"{here}.self_attn.{name}_proj.weight": (dim, dim) for name in "qkvo"}
        shapes |= {f"{here}.mlp.{name}_proj.weight": (wide, dim) for name in ("gate", "up")}
        shapes |= {f"{here}.mlp.down_proj.weight": (dim, wide), f"{here}.input_layernorm.weight": (dim,)}
    return shapes | {"model.norm.weight": (dim,), "lm_head.weight": (16384, dim)}


def one_tensor(scale: float) -> Shapes:
    return {"weight": (max(1, int(500_000_000 * scale)),)}


def tiny_tensors(scale: float) -> Shapes:
    return {f"blocks.{i // 8}.t{i % 8}.weight": (max(1, int(1024 * scale)),) for i in range(10_000)}


def small_network(scale: float) -> Shapes:
    dim = max(4, round(128 * scale**0.5))
    layers = {f"layers.{i}.weight": (dim, dim) for i in range(16)}
    return layers | {f"layers.{i}.bias": (dim,) for i in range(16)}


SERIES = (
    Series("resnet50", "ResNet-50", resnet50, 20),
    Series("vit-l", "ViT-L fp32", vit_l, 6),
    Series("vit-l-st", "ViT-L fp32", vit_l, 6, suffix=".safetensors"),
    Series("vit-l-bf16", "ViT-L bf16", vit_l, 6, "bfloat16", ".safetensors"),
    Series("vit-l-fp16", "ViT-L fp16", vit_l, 6, "float16", ".safetensors"),
    Series("sharded", "sharded LLM bf16", language_model, 2, "bfloat16", "", quick=0.25),
    Series("one-tensor", "one tensor", one_tensor, 2, quick=0.5),
    Series("tiny", "10,000 tensors", tiny_tensors, 12),
    Series("tiny-st", "10,000 tensors", tiny_tensors, 12, suffix=".safetensors"),
    Series("small-files", "200 small files", small_network, 200),
)
BY_NAME = {each.name: each for each in SERIES}
