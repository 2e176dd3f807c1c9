"""Hugging Face's Trainer: what avg and convert write loads with `from_pretrained`, model and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from small import differences, mean
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import ckpt_tools

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny model, with a checkpoint after two steps and after four."""
    folder = tmp_path_factory.mktemp("run")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "a", "b", "c"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        learning_rate=0.1,
    )
    Trainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=8, tie_word_embeddings=True, **sizes)),
        arguments,
        train_dataset=[tokenizer("a b c") for _ in range(8)],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ).train()
    return folder


def stored(run: Path, step: int) -> Weights:
    return load_file(run / f"checkpoint-{step}" / "model.safetensors")


def assert_loads(folder: Path, expected: Weights) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    found = {name: tensor for name, tensor in model.state_dict().items() if name in expected}
    assert not differences(found, expected)
    assert model.generation_config is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a c x")["input_ids"] == [2, 4, 0]
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.shows("sharded folder", "library loads")
def test_the_average_of_a_run_loads_with_its_tokenizer(run: Path, tmp_path: Path) -> None:
    report = ckpt_tools.average(run, out=tmp_path / "averaged")
    assert [entry.step for entry in report.inputs] == [2, 4]
    assert_loads(tmp_path / "averaged", mean(stored(run, 2), stored(run, 4)))
    first = {path.name for path in (run / "checkpoint-2").iterdir()}
    training = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    assert {path.name for path in (tmp_path / "averaged").iterdir()} == first - training


def test_an_average_of_folders_of_fsdp_loads_with_what_the_run_has(run: Path, tmp_path: Path) -> None:
    # As Accelerate lays it out, with the names of the wrapped model's state dict below model; the Trainer then saves no
    # configuration in a checkpoint, but in the folder of the run.
    for step in (2, 4):
        dcp.save({"model": stored(run, step)}, checkpoint_id=tmp_path / f"checkpoint-{step}" / "pytorch_model_fsdp_0")
        dcp.save({"optimizer": {"lr": 0.1}}, checkpoint_id=tmp_path / f"checkpoint-{step}" / "optimizer_0")
    for path in (run / "checkpoint-4").glob("*[!rs].json*"):
        shutil.copy(path, tmp_path)
    shutil.copy(run / "checkpoint-4" / "tokenizer.json", tmp_path)
    shutil.copy(run / "checkpoint-4" / "chat_template.jinja", tmp_path)
    ckpt_tools.average(f"{tmp_path}/checkpoint-*", out=tmp_path / "averaged")
    assert_loads(tmp_path / "averaged", mean(stored(run, 2), stored(run, 4)))


@pytest.mark.shows("sharded folder", "write")
def test_a_torch_file_is_converted_to_a_folder_that_loads(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(run / "checkpoint-4", folder)
    torch.save(stored(run, 4), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    ckpt_tools.convert(folder / "pytorch_model.bin", to="plain", out=tmp_path / "file")
    assert_loads(tmp_path / "file", stored(run, 4))
    ckpt_tools.convert(folder, to="plain", out=tmp_path / "folder")
    assert_loads(tmp_path / "folder", stored(run, 4))
