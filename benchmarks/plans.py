"""Measure the plans of averages that many processes share: time, memory, and how evenly the work can be shared.

    python benchmarks/plans.py --json build/plans.json
    python benchmarks/plans.py --model 70b --files 2

The checkpoints are sparse, as in planning.py; no payload is read. The job is cut into its work units, and process i of
n takes those whose middle lies in the i-th of n equal parts of all bytes. Each plan is made in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from planning import Tensor, dense_70b, make_sharded, moe_671b

HERE = Path(__file__).resolve()
RANKS = (8, 64, 512)


def moe_1t() -> Iterator[Tensor]:
    """A mixture of experts of a trillion parameters in bfloat16: 61 blocks, 60 of them with 384 experts."""
    wide, words = 7168, 163840
    yield "model.embed_tokens.weight", "BF16", (words, wide)
    for i in range(61):
        block = f"model.layers.{i}"
        for name, rows, columns in (
            ("q_a_proj", 1536, wide), ("q_b_proj", 12288, 1536), ("kv_a_proj_with_mqa", 576, wide),
            ("kv_b_proj", 16384, 512), ("o_proj", wide, 8192),
        ):  # fmt: skip
            yield f"{block}.self_attn.{name}.weight", "BF16", (rows, columns)
        for norm, size in (("self_attn.q_a_layernorm", 1536), ("self_attn.kv_a_layernorm", 512)):
            yield f"{block}.{norm}.weight", "BF16", (size,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{norm}.weight", "BF16", (wide,)
        experts = [("mlp", 18432)] if i == 0 else [("mlp.shared_experts", 2048)]
        if i:
            yield f"{block}.mlp.gate.weight", "BF16", (384, wide)
            experts += [(f"mlp.experts.{expert}", 2048) for expert in range(384)]
        for name, inner in experts:
            yield f"{block}.{name}.gate_proj.weight", "BF16", (inner, wide)
            yield f"{block}.{name}.up_proj.weight", "BF16", (inner, wide)
            yield f"{block}.{name}.down_proj.weight", "BF16", (wide, inner)
    yield "model.norm.weight", "BF16", (wide,)
    yield "lm_head.weight", "BF16", (words, wide)


MODELS: dict[str, tuple[Callable[[], Iterator[Tensor]], int]] = {
    "70b": (dense_70b, 30),
    "671b": (moe_671b, 163),
    "1t": (moe_1t, 61),
}
"""Name to tensors, and the number of shards."""


def balance(sizes: Sequence[int], ranks: int) -> float:
    """Return the bytes of the rank that moves most over their mean: 1 if all move the same."""
    sys.path.insert(0, str(HERE.parents[1]))
    from ckpt_tools.compute.shares import shares

    most = max(sum(sizes[unit] for unit in own) for own in shares(sizes, ranks))
    return most * ranks / sum(sizes)


@dataclass(frozen=True)
class Plan:
    """What the plan of one average costs, and how its work is shared.

    Attributes:
        model, files: the series.
        tensors: of a checkpoint.
        nbytes: read and written by the job.
        seconds, user: from the paths to the layout of the output.
        cutting: user seconds to cut it into work units.
        rss: peak memory in MB.
        units: how many work units.
        balance: by the number of ranks.
    """

    model: str
    files: int
    tensors: int
    nbytes: int
    seconds: float
    user: float
    cutting: float
    rss: float
    units: int
    balance: dict[int, float]


def plan(folder: Path, model: str) -> Plan:
    """Plan the uniform average of the checkpoints in a folder, and cut it."""
    sys.path.insert(0, str(HERE.parents[1]))
    from ckpt_tools.compute import native
    from ckpt_tools.compute.work_units import OutFile, cut
    from ckpt_tools.formats.format import Writing
    from ckpt_tools.formats.sharded import SHARDED
    from ckpt_tools.jobs.lined_up import line_up
    from ckpt_tools.jobs.options import Matching
    from ckpt_tools.series.find import find_series
    from ckpt_tools.series.weighted_sums import weighted_sums

    start, began = time.perf_counter(), time.process_time()
    members = find_series([folder], dry_run=True).members
    matching = Matching(dequantize=MODELS[model][0] is moe_671b)
    lined_up = line_up(members, [each.path.name for each in members], matching, mixed_dtypes=False)
    coefficients = [1 / len(members)] * len(members)
    tensors = weighted_sums(
        lined_up.aligned,
        coefficients,
        dtype=lined_up.states[-1].dtype,
        keep_running=False,
        shared=lined_up.shared,
    )
    files = SHARDED.plan(tensors, Writing(name="out", like=members[-1].header))
    seconds, user = time.perf_counter() - start, time.process_time() - began
    began = time.process_time()
    units = cut([OutFile(each, -1) for each in files], slice_size=native.SLICE, other=native.SLICE)
    sizes = array("Q", (sum(each.bytes_moved for each in unit.slices) for unit in units))
    cutting = time.process_time() - began
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    shared = {ranks: balance(sizes, ranks) for ranks in RANKS}
    return Plan(model, len(members), len(tensors), sum(sizes), seconds, user, cutting, rss, len(sizes), shared)


def table(plans: Sequence[Plan], rate: float) -> str:
    """Draw the plans as a table of Markdown.

    Args:
        rate: bytes read and written in a second by a rank.
    """
    lines = [
        "| series | tensors | bytes moved, TB | plan, s | user, s | cutting, s | peak RSS, MB | units"
        + "".join(f" | balance, {ranks} ranks | units a rank | minutes" for ranks in RANKS)
        + " |",
        "|---|" + "---:|" * (7 + 3 * len(RANKS)),
    ]
    for each in plans:
        cells = [f"{each.tensors:,}", f"{each.nbytes / 1e12:.2f}", f"{each.seconds:.1f}", f"{each.user:.1f}"]
        cells += [f"{each.cutting:.1f}", f"{each.rss:.0f}", f"{each.units:,}"]
        for ranks, most in each.balance.items():
            minutes = most * each.nbytes / ranks / rate / 60
            cells += [f"{most:.4f}", f"{each.units / ranks:,.0f}", f"{minutes:.1f}"]
        lines.append(f"| {each.model} x {each.files} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the plans and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="only these; repeatable")
    parser.add_argument("--files", type=int, default=8, help="checkpoints in a series (default: 8)")
    parser.add_argument("--variant", choices=("equal", "metadata", "unequal"), default="equal", help="of the headers")
    parser.add_argument("--rate", type=float, default=1.0, help="GB a second that a rank reads and writes (default: 1)")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("--plan", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plan:
        print(json.dumps(asdict(plan(Path(given.plan[1]), given.plan[0]))))  # noqa: T201
        return
    plans = []
    for model in given.model or MODELS:
        with tempfile.TemporaryDirectory(prefix="plans-", dir=given.folder) as folder:
            make_sharded(Path(folder), *MODELS[model], given.files, given.variant)
            found = json.loads(subprocess.check_output([sys.executable, str(HERE), "--plan", model, folder]))
            plans.append(Plan(**(found | {"balance": {int(n): most for n, most in found["balance"].items()}})))
        print(table(plans[-1:], given.rate * 1e9).splitlines()[-1], file=sys.stderr, flush=True)  # noqa: T201
        if given.json:
            given.json.write_text(json.dumps({"plans": [asdict(each) for each in plans]}, indent=1))
    print(table(plans, given.rate * 1e9))  # noqa: T201


if __name__ == "__main__":
    main()
