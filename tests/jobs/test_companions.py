"""Companions: which files go along beside the weights, from which folder, and which never do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import ckpt_tools
from ckpt_tools.jobs import companions

CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
TOKENIZER = [
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
]
TOKENIZER += ["special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
TRAINING = [
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "trainer_state.json",
    "all_results.json",
]
TRAINING += ["zero_to_fp32.py"]

Fill = Callable[..., Path]


@pytest.fixture
def fill(here: Path) -> Fill:
    """Put small files into a folder; each has its own name as its content."""

    def make(folder: str, *names: str, config: str | None = CONFIG) -> Path:
        path = here / folder
        path.mkdir(parents=True, exist_ok=True)
        for name in names:
            (path / name).write_text("{}" if name == "trainer_state.json" else name)
        if config is not None:
            (path / "config.json").write_text(config)
        return path

    return make


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value)}


def written(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()} - {"model.safetensors"}


def test_those_of_the_own_folder_go_along_and_the_state_of_the_training_does_not(fill: Fill) -> None:
    for step in (1, 2):
        folder = fill(f"checkpoint-{step}", *TOKENIZER, *TRAINING, "README.md", "model.py")
        save_file(weights(step), folder / "model.safetensors")
        (folder / "tokenizer.json").write_text(f"of step {step}")
    report = ckpt_tools.average(["checkpoint-1", "checkpoint-2"], out="averaged")
    assert written("averaged") == {*TOKENIZER, "config.json", "README.md"} == {*report.companions}
    assert Path("averaged/tokenizer.json").read_text() == "of step 2"


def test_code_of_the_model_goes_along_where_the_configuration_refers_to_it(fill: Fill) -> None:
    config = json.dumps({"auto_map": {"AutoModel": "modeling_mine.Mine"}})
    save_file(weights(), fill("a", "modeling_mine.py", "zero_to_fp32.py", config=config) / "model.safetensors")
    ckpt_tools.average("a", out="b")
    assert written("b") == {"config.json", "modeling_mine.py"}


def test_an_adapter_keeps_its_configuration(fill: Fill) -> None:
    folder = fill("a", "README.md", config=None)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    ckpt_tools.average("a", out="b")
    assert written("b") == {"adapter_model.safetensors", "adapter_config.json", "README.md"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("above", ["run/checkpoint-5", "run"])
def test_a_folder_of_weights_alone_has_them_in_a_folder_around_it(fill: Fill, above: str) -> None:
    dcp.save({"model": weights()}, checkpoint_id="run/checkpoint-5/pytorch_model_fsdp_0")
    fill(above, *TOKENIZER, *TRAINING, "train.json", "notes.txt", "train.py", "huge.model")
    for run in ("a", "b"):
        if run == "a":
            report = ckpt_tools.average("run/checkpoint-5/pytorch_model_fsdp_0", out="a")
            assert {*report.companions} == {*TOKENIZER, "config.json"}
        else:
            ckpt_tools.convert("run/checkpoint-5/pytorch_model_fsdp_0", to="plain", out="b")
        assert written(run) == {*TOKENIZER, "config.json"}


def test_the_nearest_folder_counts(fill: Fill) -> None:
    fill("run", "vocab.txt")
    save_file(weights(), fill("run/checkpoint-5", "vocab.json") / "model.safetensors")
    fill("run/checkpoint-5/global_step5", config=None)
    torch.save(weights(), "run/checkpoint-5/global_step5/model.pt")
    ckpt_tools.convert("run/checkpoint-5/global_step5/model.pt", to="plain", out="out")
    assert written("out") == {"config.json", "vocab.json"}


@pytest.mark.parametrize("config", ["{}", '{"lr": 0.1}', "[1]", "no JSON", None])
def test_a_folder_around_without_a_model_has_none(fill: Fill, config: str | None) -> None:
    fill("run", "tokenizer.json", config=config)
    torch.save(weights(), "run/model.pt")
    ckpt_tools.convert("run/model.pt", to="plain", out="out")
    assert written("out") == set()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model_fsdp.bin", "step=5.ckpt"])
def test_a_file_in_a_folder_of_a_model_has_its_companions(fill: Fill, name: str) -> None:
    torch.save(weights(), fill("run", "tokenizer.json", "train.json") / name)
    report = ckpt_tools.convert(f"run/{name}", to="plain", out="out")
    assert written("out") == {"config.json", "tokenizer.json"} == {*report.companions}
    report = ckpt_tools.convert(f"run/{name}", to="plain", out="out.safetensors")
    assert (report.companions, report.dropped) == ((), ())


def test_links_out_of_the_folder_and_large_files_stay_behind(fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "LARGEST", 1000)
    folder = fill("a", "merges.txt")
    Path("secret").write_text("of another folder")
    (folder / "vocab.json").symlink_to("../secret")
    (folder / "data.json").write_text("0" * 1001)
    (folder / "vocab.txt").symlink_to("merges.txt")
    save_file(weights(), folder / "model.safetensors")
    report = ckpt_tools.average("a", out="b")
    assert written("b") == {"config.json", "merges.txt", "vocab.txt"}
    assert report.dropped == ("data.json (too large for a companion)", "vocab.json (a link out of its folder)")


def test_files_in_the_cache_of_hugging_face_are_links_that_stay(fill: Fill) -> None:
    snapshot, blobs = fill("hub/snapshots/abc", config=None), fill("hub/blobs", config=None)
    save_file(weights(), blobs / "1")
    (blobs / "2").write_text(CONFIG)
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    ckpt_tools.average("hub/snapshots/abc", out="b")
    assert Path("b/config.json").read_text() == CONFIG


def cached(fill: Fill, name: str, *, blobs: str = "hub/blobs", snapshot: str = "hub/snapshots/abc") -> Path:
    """Make a snapshot of the Hub's cache with sharded weights and a link of this name."""
    folder = fill(snapshot, config=CONFIG)
    save_file({"module.w": torch.ones(2)}, fill(blobs, config=None) / "1")
    (folder / "model.safetensors").write_bytes((Path(blobs) / "1").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"module.w": "model.safetensors"}}))
    (Path(blobs) / "2").write_text("of the blobs")
    (folder / name).symlink_to(os.path.relpath(f"{blobs}/2", folder))
    return folder


COMMANDS: dict[str, Callable[[Path], object]] = {
    "average": lambda folder: ckpt_tools.average(folder, out="out"),
    "convert": lambda folder: ckpt_tools.convert(folder, to="plain", out="out"),
    "fix_prefix": lambda folder: ckpt_tools.fix_prefix(folder, out="out"),
}


@pytest.mark.parametrize("job", COMMANDS)
@pytest.mark.parametrize(
    ("blobs", "snapshot", "goes_along"),
    [
        ("hub/blobs", "hub/snapshots/abc", True),
        ("hub/blobs", "hub/snapshots/abc/unet", True),
        ("hub/blobs", "hub/other/abc", False),
        ("theirs/blobs", "hub/snapshots/abc", False),
        ("home/.ssh", "hub/snapshots/abc", False),
    ],
)
def test_a_link_is_followed_into_the_blobs_of_its_own_repository_alone(
    fill: Fill, job: str, blobs: str, snapshot: str, goes_along: bool
) -> None:
    COMMANDS[job](cached(fill, "tokenizer.json", blobs=blobs, snapshot=snapshot))
    assert (Path("out") / "tokenizer.json").exists() is goes_along
    assert "config.json" in written("out")


@pytest.mark.parametrize("job", COMMANDS)
def test_blobs_that_are_a_link_to_another_folder_are_not_followed(fill: Fill, job: str) -> None:
    folder = cached(fill, "tokenizer.json", blobs="home/.ssh")
    Path("hub/blobs").symlink_to("../home/.ssh")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../../blobs/2")
    assert (folder / "tokenizer.json").read_text() == "of the blobs"
    COMMANDS[job](folder)
    assert not (Path("out") / "tokenizer.json").exists()


def test_fix_prefix_says_which_links_it_left_behind(fill: Fill) -> None:
    report = ckpt_tools.fix_prefix(cached(fill, "notes.txt", blobs="elsewhere"), out="out")
    assert "Not copied into the new folder: notes.txt (a link out of its folder)." in report.notes
