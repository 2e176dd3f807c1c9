"""Progress: every step of a job is told when it begins, and up to all of it, never beyond."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_network
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import ckpt_tools
from ckpt_tools.errors import UsageError

TENSORS, ELEMENTS = 300, 3
PAYLOAD = TENSORS * ELEMENTS * 4  # far less than the names


def small_tensors(i: int) -> dict[str, torch.Tensor]:
    return {f"module.a_layer_of_a_long_name.{j}.weight": torch.full((ELEMENTS,), float(i + j)) for j in range(TENSORS)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(suffix: str, i: int) -> Path:
    path = Path(f"net-{i}{suffix}")
    if suffix == ".safetensors":
        save_file(small_tensors(i), path)
    elif suffix == "":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is one process
            dcp.save({**small_tensors(i)}, checkpoint_id=path)
    else:
        torch.save({"model": small_tensors(i), "optimizer": {"state": {}, "param_groups": []}}, path)
    return path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("job", "suffix", "out", "moved"),
    [
        (ckpt_tools.convert, ".safetensors", "o.safetensors", 2 * PAYLOAD),
        (ckpt_tools.convert, ".pth", "o.safetensors", 2 * PAYLOAD),
        (ckpt_tools.convert, ".safetensors", "o.pth", 2 * PAYLOAD),
        (ckpt_tools.convert, "", "o.safetensors", 2 * PAYLOAD),
        (ckpt_tools.convert, ".safetensors", "folder/", 2 * PAYLOAD),
        (ckpt_tools.strip, ".pth", "o.pth", 2 * PAYLOAD),
        (
            lambda path, **options: ckpt_tools.average([path, write(path.suffix, 2)], **options),
            ".pth",
            "o.pth",
            3 * PAYLOAD,
        ),
    ],
)
def test_jobs_report_progress_up_to_all_bytes_of_tensors(
    job: Callable[..., Any], suffix: str, out: str, moved: int
) -> None:
    seen = Seen()
    job(write(suffix, 1), out=out, on_progress=seen)
    moving = [counted for what, counted in seen.items() if what.unit == "bytes"]
    assert [counted[0] for counted in moving] == [(0, moved)]
    assert [counted[-1] for counted in moving] == [(moved, moved)]
    assert [*seen][-1] == "syncing to disk"
    seen.check()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_fix_prefix_reports_progress_up_to_all(suffix: str) -> None:
    seen = Seen()
    ckpt_tools.fix_prefix(write(suffix, 1), out=f"o{suffix}", on_progress=seen)
    assert {*seen} == {"copying", "syncing to disk"}
    assert seen["copying"][-1][0] >= PAYLOAD
    seen.check()


class Seen(dict[Any, list[tuple[int, int | None]]]):
    """What a job tells: each activity with its counts."""

    def __call__(self, what: Any, done: int, total: int | None) -> None:
        self.setdefault(what, []).append((done, total))

    def check(self) -> None:
        for what, counted in self.items():
            done, total = counted[-1]
            assert 0 < done == total, what
            assert counted[0][0] == 0, what
            assert [each for each, _ in counted] == sorted(each for each, _ in counted), what


NETWORK: dict[str, Any] = {"model": f"{small_network.__file__}:Net", "batch_size": 10, "workers": 0}
LABELLED = f"{small_network.__file__}:labelled"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("job", "told"),
    [
        (lambda paths, show: ckpt_tools.look(paths, on_progress=show), {"reading headers", "measuring"}),
        (
            lambda paths, show: ckpt_tools.verify(paths[0], expect_sha256=sha256(paths[0]), on_progress=show),
            {"hashing inputs", "checking crc32", "loading torch", "verifying", "loading the checkpoint"},
        ),
        (
            lambda paths, show: ckpt_tools.average(paths[1:], base=paths[0], out="o.pth", on_progress=show),
            {"reading headers", "measuring", "averaging", "syncing to disk"},
        ),
        (
            lambda paths, show: ckpt_tools.average(
                paths, out="o.pth", recal_bn=LABELLED, hash=True, on_progress=show, **NETWORK
            ),
            {
                "reading headers",
                "loading torch",
                "loading the model",
                "opening the images",
                "hashing inputs",
                "averaging",
                "checking the fit before",
                "measuring",
                "checking the fit after",
                "writing",
                "syncing to disk",
            },
        ),
        (
            lambda paths, show: ckpt_tools.recalibrate_checkpoint(
                paths[0], data=LABELLED, eval_data=LABELLED, passes=2, on_progress=show, **NETWORK
            ),
            {
                "loading the model",
                "opening the images",
                "evaluating before",
                "measuring, pass 1 of 2",
                "evaluating after",
                "writing",
                "syncing to disk",
            },
        ),
        (
            lambda paths, show: ckpt_tools.diff(*paths[:2], part="2/3", on_progress=show),
            {"loading torch", "comparing"},
        ),
        (
            lambda paths, show: ckpt_tools.average(paths, out="o.pth", part="2/3", on_progress=show),
            {"reading headers", "averaging"},
        ),
        (
            lambda paths, show: ckpt_tools.average(paths, out="o.pth", resume=True, on_progress=show),
            {"reading headers", "averaging", "syncing to disk"},
        ),
        (
            lambda paths, show: ckpt_tools.average(
                paths, out="o.pth", hash=True, write_checksums=True, on_progress=show
            ),
            {"reading headers", "averaging", "hashing inputs", "hashing the output", "syncing to disk"},
        ),
        (
            lambda paths, show: ckpt_tools.convert(paths[0], out="o.pth", sign_off="s.json", on_progress=show),
            {"hashing inputs", "converting", "hashing the output", "syncing to disk"},
        ),
        (
            lambda paths, show: ckpt_tools.evaluate(paths, eval_command="echo {ckpt} 1; echo 1", on_progress=show),
            {"reading headers", "evaluating"},
        ),
    ],
    ids=[
        "look",
        "verify",
        "stock",
        "recal_bn",
        "recalibrate",
        "diff_part",
        "part",
        "resume",
        "hashes",
        "sign_off",
        "command",
    ],
)
def test_each_kind_of_work_is_told_up_to_its_end(job: Callable[..., Any], told: set[str]) -> None:
    paths = [Path(f"{i}.pth") for i in range(3)]
    for i, path in enumerate(paths):
        torch.save({"state_dict": small_network.trained(i), "epoch": i}, path)
    seen = Seen()
    job(paths, seen)
    assert {*seen} == told
    seen.check()


@pytest.mark.usefixtures("here")
def test_the_headers_of_a_folder_are_counted_and_copies_are_told_while_they_are_compared() -> None:
    for name in ("1", "2", "3", "last"):
        torch.save({"state_dict": small_tensors(3 if name == "last" else int(name))}, f"net-{name}.pth")
    seen = Seen()
    ckpt_tools.look(".", on_progress=seen)
    assert (seen["reading headers"][0], seen["reading headers"][-1]) == ((0, 4), (4, 4))
    assert seen["comparing copies"][-1] == (2 * PAYLOAD, 2 * PAYLOAD)
    assert {what.unit for what in seen} == {"files", "bytes"}


@pytest.mark.usefixtures("here")
def test_the_files_of_a_folder_are_counted_as_they_get_to_the_disk() -> None:
    seen = Seen()
    ckpt_tools.convert(write(".pth", 1), out="o/", max_shard_size="1kB", on_progress=seen)
    files = len([*Path("o").iterdir()])
    assert files > 3
    assert seen["syncing to disk"] == [(done, files) for done in range(files + 1)]


@pytest.mark.usefixtures("here")
def test_a_function_that_cannot_be_told_the_progress_is_refused_before_the_work() -> None:
    with pytest.raises(UsageError, match=r"`on_progress` is called with \(what is done, how much of it so far, all"):
        ckpt_tools.strip(write(".pth", 1), on_progress=lambda done, total: None)
    with pytest.raises(UsageError, match=r"`on_progress` is a function, not 3\."):
        ckpt_tools.average("gone.pth", on_progress=3)
