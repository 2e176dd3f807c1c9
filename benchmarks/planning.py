"""Measure what planning costs: user seconds and memory for each tensor and file, with no payload read.

    python benchmarks/planning.py --json build/planning.json
    python benchmarks/planning.py --code OTHER_CHECKOUT --case moe

The checkpoints are sparse: their headers are those of large models, their payloads are holes, so that a checkpoint of
671 GB takes 12 MB of disk. (The zip files of torch are whole and small.) The command is `ckpt avg --dry-run`, or
`ckpt inspect` for a single checkpoint. Of several rounds the least user seconds and the least peak memory count: other
work on the machine only adds to both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

HERE = Path(__file__).resolve()
ITEMSIZE = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
INDEX = "model.safetensors.index.json"

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype, shape."""


def dense_70b() -> Iterator[Tensor]:
    """A dense language model of 70 billion parameters: 80 blocks, 723 tensors."""
    wide, inner, narrow, words = 8192, 28672, 1024, 128256
    yield "model.embed_tokens.weight", "BF16", (words, wide)
    for i in range(80):
        block = f"model.layers.{i}"
        for name, shape in {
            "self_attn.q_proj": (wide, wide), "self_attn.k_proj": (narrow, wide), "self_attn.v_proj": (narrow, wide),
            "self_attn.o_proj": (wide, wide), "mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide),
            "mlp.down_proj": (wide, inner), "input_layernorm": (wide,), "post_attention_layernorm": (wide,),
        }.items():  # fmt: skip
            yield f"{block}.{name}.weight", "BF16", shape
    yield "model.norm.weight", "BF16", (wide,)
    yield "lm_head.weight", "BF16", (words, wide)


def moe_671b() -> Iterator[Tensor]:
    """A mixture of experts of 671 billion parameters: 61 blocks, 58 of them with 256 experts, in fp8 with scales."""
    wide, words = 7168, 129280

    def scaled(name: str, rows: int, columns: int) -> Iterator[Tensor]:
        yield f"{name}.weight", "F8_E4M3", (rows, columns)
        yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))

    def feed_forward(name: str, inner: int) -> Iterator[Tensor]:
        yield from scaled(f"{name}.gate_proj", inner, wide)
        yield from scaled(f"{name}.up_proj", inner, wide)
        yield from scaled(f"{name}.down_proj", wide, inner)

    yield "model.embed_tokens.weight", "BF16", (words, wide)
    for i in range(61):
        block = f"model.layers.{i}"
        yield from scaled(f"{block}.self_attn.q_a_proj", 1536, wide)
        yield from scaled(f"{block}.self_attn.q_b_proj", 24576, 1536)
        yield from scaled(f"{block}.self_attn.kv_a_proj_with_mqa", 576, wide)
        yield from scaled(f"{block}.self_attn.kv_b_proj", 32768, 512)
        yield from scaled(f"{block}.self_attn.o_proj", wide, 16384)
        for norm, size in {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}.items():
            yield f"{block}.{norm}.weight", "BF16", (size,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{norm}.weight", "BF16", (wide,)
        if i < 3:
            yield from feed_forward(f"{block}.mlp", 18432)
            continue
        yield f"{block}.mlp.gate.weight", "BF16", (256, wide)
        yield f"{block}.mlp.gate.e_score_correction_bias", "F32", (256,)
        yield from feed_forward(f"{block}.mlp.shared_experts", 2048)
        for expert in range(256):
            yield from feed_forward(f"{block}.mlp.experts.{expert}", 2048)
    yield "model.norm.weight", "BF16", (wide,)
    yield "lm_head.weight", "BF16", (words, wide)


def shards(tensors: list[Tensor], number: int) -> list[list[Tensor]]:
    """Cut the tensors, in their order, into shards of about equal bytes."""
    sizes = [ITEMSIZE[dtype] * prod(shape) for _, dtype, shape in tensors]
    cut: list[list[Tensor]] = [[]]
    limit, filled = sum(sizes) / number, 0.0
    for tensor, size in zip(tensors, sizes, strict=True):
        if filled >= limit and len(cut) < number:
            cut.append([])
            filled -= limit
        cut[-1].append(tensor)
        filled += size
    return cut


def write_sparse(path: Path, tensors: list[Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file with a real header and a payload that is one hole."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + ITEMSIZE[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def make_sharded(folder: Path, model: Callable[[], Iterator[Tensor]], number: int, files: int, variant: str) -> int:
    """Write sparse sharded checkpoints.

    Args:
        folder: where, an existing folder.
        model: its tensors.
        number: of shards in a checkpoint.
        files: how many checkpoints.
        variant: ``equal`` headers, equal but for their ``metadata``, or ``unequal``: the tensors of each shard
            in another order, and so at other offsets, in each checkpoint.

    Returns:
        The number of tensors in a checkpoint.
    """
    tensors = list(model())
    cut = shards(tensors, number)
    names = [f"model-{i + 1:05d}-of-{len(cut):05d}.safetensors" for i in range(len(cut))]
    where = {name: file for file, shard in zip(names, cut, strict=True) for name, _, _ in shard}
    total = sum(ITEMSIZE[dtype] * prod(shape) for _, dtype, shape in tensors)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
    for i in range(files):
        step = 1000 * (i + 1)
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        metadata = {"format": "pt"} | ({"step": str(step)} if variant == "metadata" else {})
        for file, shard in zip(names, cut, strict=True):
            turn = i % len(shard) if variant == "unequal" else 0
            write_sparse(checkpoint / file, shard[turn:] + shard[:turn], metadata)
        (checkpoint / INDEX).write_text(index)
    return len(tensors)


def make_zips(folder: Path, count: int, files: int, variant: str) -> int:
    """Write files of torch with `count` tensors of 16 numbers each; ``unequal``: each stores its epoch, too."""
    import torch

    for i in range(files):
        values = torch.randn(count, 16, generator=torch.Generator().manual_seed(i))
        weights = {f"blocks.{j // 9}.part{j % 9}.weight": values[j].clone() for j in range(count)}
        content = {"epoch": i + 1, "state_dict": weights} if variant == "unequal" else weights
        torch.save(content, folder / f"checkpoint-{i + 1}.pth")
    return count


@dataclass(frozen=True)
class Case:
    """One series to plan.

    Attributes:
        model: ``dense``, ``moe``, or the number of tensors in a file of torch.
        files: how many checkpoints; a single one is inspected.
        variant: how the headers of the checkpoints differ.
    """

    model: str
    files: int
    variant: str = "equal"

    @property
    def name(self) -> str:
        return f"{self.model} x {self.files} {self.variant}"

    def make(self, folder: Path) -> int:
        """Write the checkpoints into an existing folder; return the number of tensors in one."""
        if self.model == "dense":
            return make_sharded(folder, dense_70b, 30, self.files, self.variant)
        if self.model == "moe":
            return make_sharded(folder, moe_671b, 163, self.files, self.variant)
        return make_zips(folder, int(self.model.partition(" ")[2]), self.files, self.variant)


VARIANTS = ("equal", "metadata", "unequal")
CASES = (
    Case("zip 1", 2),  # start-up, which the figures for each tensor do not count
    Case("dense", 1),
    *(Case("dense", files, variant) for variant in VARIANTS for files in (2, 8, 20)),
    Case("moe", 1),
    *(Case("moe", files, variant) for variant in VARIANTS for files in (2, 8, 20)),
    *(Case(f"zip {count}", 12, how) for how in ("equal", "unequal") for count in (300, 1_000, 10_000, 90_000)),
)


@dataclass(frozen=True)
class Cost:
    """What one case costs.

    Attributes:
        user, system: CPU seconds of the process, the least of all rounds.
        rss: peak memory in MB, the least of all rounds.
    """

    case: str
    tensors: int
    files: int
    user: float
    system: float
    rss: float


def measure(code: Path, words: list[str], rounds: int) -> tuple[float, float, float]:
    """Run a command of `ckpt` some times; return user seconds, system seconds and MB of peak memory."""
    found = []
    for _ in range(rounds):
        environment = os.environ | {"PYTHONPATH": str(code), "COLUMNS": "100"}
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "ckpt_tools", *words], env=environment, stdout=said, stderr=said, cwd=code
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                said.seek(0)
                sys.exit(f"ckpt {' '.join(words[:2])} ... failed: {said.read().decode(errors='replace')[-500:]}")
        found.append((usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024 / 1e6))
    user, system, rss = (min(values) for values in zip(*found, strict=True))
    return user, system, rss


def cost(case: Case, code: Path, folder: Path, rounds: int) -> Cost:
    """Write the checkpoints of a case, measure it, and remove them."""
    here = folder / case.name.replace(" ", "-")
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    try:
        # In a process of its own: on Linux the peak memory of a child starts from what its parent holds.
        tensors = int(subprocess.check_output([sys.executable, str(HERE), "--make", case.name, str(here)]))
        checkpoints = sorted(map(str, here.iterdir()))
        out = str(here / "out") if Path(checkpoints[0]).is_dir() else str(here / "out.pth")
        words = ["inspect", *checkpoints] if case.files == 1 else ["avg", *checkpoints, "--dry-run", "-o", out]
        return Cost(case.name, tensors, case.files, *measure(code, words, rounds))
    finally:
        shutil.rmtree(here)


def table(costs: list[Cost]) -> str:
    """Draw the costs as a table of Markdown; those for each tensor and file leave the start-up out."""
    start = next((each for each in costs if each.case == CASES[0].name), None)
    lines = [
        "| series | tensors | user, s | system, s | peak RSS, MB | us a tensor and file | kB a tensor and file |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in costs:
        units = each.tensors * each.files
        own = ["", ""]
        if start is not None and each is not start:
            own = [f"{1e6 * (each.user - start.user) / units:.1f}", f"{1e3 * (each.rss - start.rss) / units:.2f}"]
        figures = [str(each.tensors), f"{each.user:.2f}", f"{each.system:.2f}", f"{each.rss:.0f}", *own]
        lines.append(f"| {' | '.join([each.case, *figures])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, metavar="DIR", default=HERE.parents[1], help="checkout to measure")
    parser.add_argument(
        "--case", action="append", metavar="TEXT", help="only cases with this in their name; repeatable"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        case = next(case for case in CASES if case.name == given.make[0])
        print(case.make(Path(given.make[1])))  # noqa: T201
        return
    chosen = [case for case in CASES[1:] if not given.case or any(text in case.name for text in given.case)]
    costs = []
    with tempfile.TemporaryDirectory(prefix="planning-", dir=given.folder) as folder:
        for case in (CASES[0], *chosen):
            costs.append(cost(case, given.code.resolve(), Path(folder), given.rounds))
            print(table(costs).splitlines()[-1], file=sys.stderr, flush=True)  # noqa: T201
            if given.json:
                given.json.write_text(
                    json.dumps({"code": str(given.code), "costs": list(map(asdict, costs))}, indent=1)
                )
    print(table(costs))  # noqa: T201


if __name__ == "__main__":
    main()
