"""Every verb with every format that it writes, on small checkpoints."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
NEW = ("new.pth", "new.safetensors", "new-folder")
OLD = ("old.pth", "old.safetensors", "old-folder")


@dataclass(frozen=True)
class Job:
    """A run of `ckpt`.

    Attributes:
        arguments: of the command line.
        target: what it writes; None if nothing.
        torch: it needs torch, which makes a fork slower.
        needs: inputs that its arguments do not name.
        beside: what else it writes, whole or not at all.
        scratch: folder that a run leaves behind when it is stopped, and from which the next one goes on.
    """

    arguments: tuple[str, ...]
    target: str | None = None
    torch: bool = False
    needs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    scratch: str | None = None

    @property
    def verb(self) -> str:
        return self.arguments[0]

    @property
    def name(self) -> str:
        return " ".join(each.replace(f"{HERE}/", "") for each in self.arguments)

    @property
    def outputs(self) -> tuple[str, ...]:
        return (*([] if self.target is None else [self.target]), *self.beside)


def jobs() -> Iterator[Job]:
    """Yield every verb with every format that it writes, into a new place and over an old one."""
    one = ("--threads", "1")
    network = ("--model", f"{HERE}/small_network.py:Net", "--data", f"{HERE}/small_network.py:labelled")
    recal = ("--model", network[1], "--recal-bn", network[3])
    batches = ("--batch-size", "8", "--workers", "0", "--device", "cpu")
    score = ("--eval-function", f"{HERE}/small_network.py:score", "--in-memory", "--keep", "0")
    train = ("--epochs", "1", "--lr", "0.1", "--seed", "0", "--scratch", ".")
    for out in (*NEW, *OLD):
        over = (*(("--force",) if out in OLD else ()), "-o", out)
        if out != "old-folder":  # whose configuration only another one replaces
            yield Job(("avg", "a.pth", "b.pth", *over, *one), out)
        yield Job(("avg", "m-1", "m-2", *over, *one), out)
        if out.endswith(".pth"):
            yield Job(("strip", "a.pth", *over), out)
            yield Job(("fix-prefix", "a.pth", *over), out)
            yield Job(("avg", "c.pth", "--update", "averaged.pth", *over, *one), out)
            yield Job(("avg", "--replay", "averaged.pth", *over, *one), out, True, needs=("a.pth", "b.pth"))
            yield Job(("recal-bn", "n-1.pth", *network, *batches, *over), out, torch=True)
            yield Job(("tune", "n-1.pth", *network, *batches, *train, *over), out, torch=True)
        elif out.endswith(".safetensors"):
            yield Job(("fix-prefix", "s.safetensors", *over), out)
            yield Job(("recal-bn", "n.safetensors", *network, *batches, *over), out, torch=True)
            yield Job(("tune", "n.safetensors", *network, *batches, *train, *over), out, torch=True)
        else:
            yield Job(("fix-prefix", "m-1", *over), out)
            yield Job(("recal-bn", "n-folder", *network, *batches, *over), out, torch=True)
            yield Job(("tune", "n-folder", *network, *batches, *train, *over), out, torch=True)
        yield Job(("convert", "m-1", "--to", "plain", *over), out)
        if out == "old-folder":
            continue  # only a folder with a configuration replaces it
        yield Job(("avg", "n-1.pth", "n-2.pth", *recal, *batches, *one, *over), out, torch=True)
        sweep = ("sweep", "n-1.pth", "n-2.pth", "n-3.pth", "--last", "2,3", *one, *score, *over)
        table = ("--csv", "new.csv", "--scratch", "scratch")
        yield Job((*sweep, *table), out, torch=True, beside=("new.csv",), scratch="scratch")
    yield Job(("avg", "dcp-1", "dcp-2", "-o", "new-dcp", *one), "new-dcp")
    yield Job(("convert", "dcp-1", "--to", "plain", "-o", "new.pth"), "new.pth")
    yield Job(("strip", "dcp-1", "-o", "new-dcp"), "new-dcp", torch=True)
    yield Job(("recal-bn", "n-dcp", *network, *batches, "-o", "new-dcp"), "new-dcp", torch=True)
    yield Job(("fix-prefix", "a.pth"), "a.pth")
    yield Job(("fix-prefix", "s.safetensors"), "s.safetensors")
    for path in ("a.pth", "s.safetensors", "m-1", "dcp-1"):
        yield Job(("inspect", path, "--json"))
        yield Job(("verify", path, "--json", *one), torch=True)
    yield Job(("verify", "averaged.pth", "--json", *one), torch=True, needs=("a.pth", "b.pth"))
    yield Job(("look", "n-1.pth", "n-2.pth", "n-3.pth", "--json", *one), torch=True)
    yield Job(("diff", "a.pth", "b.pth", "--json"), torch=True)
    yield Job(("diff", "m-1", "m-2", "--json"), torch=True)
    yield Job(("clean", ".", "--json"))


def make_inputs(folder: Path, numbers: int = 4, seed: int = 0) -> None:
    """Write small checkpoints of several formats, and old targets.

    Args:
        numbers: columns of the larger matrix in checkpoints without a network.
        seed: of all values.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file
    from small_network import trained

    from ckpt_tools import average

    def weights(which: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * seed + which)
        return {
            f"module.{n}": torch.randn(shape, generator=generator) for n, shape in (("w", (3, numbers)), ("b", (4,)))
        }

    def model(name: str, state: dict[str, torch.Tensor]) -> None:
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["L"]}))
        (folder / name / "tokenizer.json").write_text("{}")

    for i, name in enumerate("abc"):
        torch.save({"state_dict": weights(i), "epoch": i, "optimizer": {"state": {}}}, folder / f"{name}.pth")
    save_file(weights(1), folder / "s.safetensors")
    for i in (1, 2, 3):
        torch.save({"state_dict": trained(100 * seed + i), "epoch": i}, folder / f"n-{i}.pth")
    save_file(trained(100 * seed + 1), folder / "n.safetensors")
    model("n-folder", trained(100 * seed + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in (1, 2):
            model(f"m-{i}", weights(i))
            tree = {"model": weights(i), "optimizer": {"state": {"module.w": {"exp_avg": weights(i)["module.w"]}}}}
            dcp.save(tree, checkpoint_id=folder / f"dcp-{i}", no_dist=True)
        dcp.save({"model": trained(100 * seed + 1)}, checkpoint_id=folder / "n-dcp", no_dist=True)
    with contextlib.chdir(folder):
        average(["a.pth", "b.pth"], out="averaged.pth")
    for name in ("old.pth", "old.safetensors"):
        (folder / name).write_text("old")
    (folder / "old-folder").mkdir()
    (folder / "old-folder/config.json").write_text("old")
    (folder / "old-folder/model.safetensors").write_text("old")
