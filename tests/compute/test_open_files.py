"""Open inputs: as many as the system allows, each from its first to its last use, and unchanged meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy as safetensors_library

import ckpt_tools
from ckpt_tools.compute import native
from ckpt_tools.errors import CorruptError, ReadError
from ckpt_tools.storage import source
from ckpt_tools.storage.local import LocalFile
from ckpt_tools.storage.source import OpenFiles

STEPS, SHARDS = 4, 5


@pytest.fixture
def series(here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Checkpoints in shards, of a few work units each; returns their mean."""
    monkeypatch.setattr(native, "SLICE", 512)
    rng = np.random.default_rng(0)
    mean: dict[str, np.ndarray] = {}
    Path("run").mkdir()
    for step in range(STEPS):
        weights = {f"layer{i}": rng.standard_normal((40, 50)).astype(np.float32) for i in range(2 * SHARDS)}
        safetensors_library.save_file(weights, f"{step}.safetensors")
        ckpt_tools.convert(f"{step}.safetensors", out=f"run/{step}/", max_shard_size=16_000)
        mean = {name: mean.get(name, 0) + value.astype(np.float64) / STEPS for name, value in weights.items()}
    assert len([*Path("run/0").glob("*.safetensors")]) == SHARDS
    return mean


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Count the files that are open, and the most that were at a time."""
    counts = {"now": 0, "most": 0}
    init, close = LocalFile.__init__, LocalFile.close

    def counted(self: LocalFile, path: Path) -> None:
        init(self, path)
        counts["now"] += 1
        counts["most"] = max(counts.values())

    def closed(self: LocalFile) -> None:
        close(self)
        counts["now"] -= 1

    monkeypatch.setattr(LocalFile, "__init__", counted)
    monkeypatch.setattr(LocalFile, "close", closed)
    yield counts
    assert counts["now"] == 0


def at_use(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> list[int]:
    """Act before the use of this number is noted; returns the numbers of those that have come."""
    used, seen = OpenFiles.used, []

    def call(self: OpenFiles, paths: Iterable[Path]) -> None:
        seen.append(len(seen))
        if seen[-1] == number:
            act()
        used(self, paths)

    monkeypatch.setattr(OpenFiles, "used", call)
    return seen


@pytest.mark.parametrize("allowed", [STEPS, 2 * STEPS - 1])
@pytest.mark.parametrize("out", ["out/", "out.safetensors"])
def test_no_more_files_are_open_than_the_system_allows(
    series: dict[str, np.ndarray],
    opened: dict[str, int],
    allowed: int,
    out: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "raise_file_limit", lambda count: allowed)
    opened["most"] = 0
    more = {"max_shard_size": 16_000} if out.endswith("/") else {}
    ckpt_tools.average("run/*", out=out, threads=1, **more)
    assert opened["most"] <= allowed
    files = [*Path("out").glob("*.safetensors")] or [Path(out)]
    found = {name: value for file in files for name, value in safetensors_library.load_file(file).items()}
    assert found.keys() == series.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, series[name].astype(np.float32))


def test_a_change_is_noticed_when_the_last_part_of_the_file_is_read(
    series: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = at_use(monkeypatch, -1, lambda: None)
    ckpt_tools.average("run/*", out="whole/", threads=1)
    units = len(seen)
    first = next(Path("run/1").glob("*-00001-*"))
    seen = at_use(monkeypatch, 0, lambda: os.utime(first, (1, 1)))
    with pytest.raises(CorruptError, match=rf"{first}: changed while it was read"):
        ckpt_tools.average("run/*", out="out/", threads=1)
    assert len(seen) == units // SHARDS
    assert not Path("out").exists()


def test_open_files_are_read_to_their_end_though_their_names_go(
    series: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_use(monkeypatch, 0, lambda: [path.unlink() for path in Path("run").glob("*/*-00004-*")])  # type: ignore[func-returns-value]
    ckpt_tools.average("run/*", out="out.safetensors", threads=1)
    for name, value in safetensors_library.load_file("out.safetensors").items():
        np.testing.assert_array_equal(value, series[name].astype(np.float32))


def test_a_file_that_is_gone_when_its_turn_comes_is_an_error(
    series: dict[str, np.ndarray], opened: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "raise_file_limit", lambda count: STEPS)
    at_use(monkeypatch, 0, lambda: [path.unlink() for path in Path("run").glob("1/*-00004-*")])  # type: ignore[func-returns-value]
    with pytest.raises(ReadError, match="run/1/model-00004-of-00005.safetensors: no such file"):
        ckpt_tools.average("run/*", out="out.safetensors", threads=1)
    assert not Path("out.safetensors").exists()


def test_inner_products_need_no_more_files_than_the_system_allows(
    series: dict[str, np.ndarray], opened: dict[str, int], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ckpt_tools.look("run/*", threads=1).to_dict()
    monkeypatch.setattr(source, "raise_file_limit", lambda count: STEPS)
    opened["most"] = 0
    assert ckpt_tools.look("run/*", threads=1).to_dict() == whole
    assert 0 < opened["most"] <= STEPS


def test_a_tensor_in_chunks_with_nan_is_read_again_from_files_that_were_closed(
    here: Path, opened: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C sums the chunks one after the other, and leaves the last one to torch, which takes the whole tensor."""
    monkeypatch.setattr(source, "raise_file_limit", lambda count: 2)
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((9, 40)).astype(np.float32) for _ in range(2)]
    values[0][-1, -1] = np.nan
    for step, value in enumerate(values):
        for process in range(3):
            path = Path(f"run/step-{step}/shard-{process + 1:05d}-model-00001-of-00001.safetensors")
            path.parent.mkdir(parents=True, exist_ok=True)
            about = json.dumps({"w": {"saved_offsets": [3 * process, 0]}})
            rows = np.ascontiguousarray(value[3 * process : 3 * process + 3])
            safetensors_library.save_file({"w": rows}, path, {"DCP_SHARDING_INFO": about, "DCP_VERSION": "1.0"})
    ckpt_tools.average(["run/step-0", "run/step-1"], out="out.safetensors", threads=1, allow_nonfinite=True)
    found = safetensors_library.load_file("out.safetensors")["w"]
    np.testing.assert_array_equal(found, ((values[0].astype(np.float64) + values[1]) / 2).astype(np.float32))
