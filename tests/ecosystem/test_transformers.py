"""transformers: sharded folders, tied embeddings, and `from_pretrained` of what avg and convert write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import differences, mean, save, weights_of
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import ckpt_tools


def bert() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=99, **sizes))


def llama() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.shows("sharded folder", "read raw")
@pytest.mark.parametrize("make", [bert, llama])
def test_a_sharded_model_is_read(tmp_path: Path, make: Any) -> None:
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not differences(ckpt_tools.open_checkpoint(tmp_path), stored(tmp_path))


@pytest.mark.shows("sharded folder", "write")
@pytest.mark.shows("sharded folder", "library loads")
@pytest.mark.parametrize("make", [bert, llama])
def test_an_average_of_sharded_models_loads(tmp_path: Path, make: Any) -> None:
    models = [make(), make()]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"checkpoint-{i}", max_shard_size="8KB")
    out = tmp_path / "averaged"
    ckpt_tools.average([tmp_path / "checkpoint-0", tmp_path / "checkpoint-1"], out=out)
    assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "checkpoint-0").iterdir()}
    again = type(models[0]).from_pretrained(out)
    assert not differences(again.state_dict(), mean(*(weights_of(model) for model in models)))


@pytest.mark.shows("sharded folder", "write")
@pytest.mark.shows("sharded folder", "library loads")
@pytest.mark.parametrize("make", [bert, llama])
def test_one_file_becomes_shards_that_load(tmp_path: Path, make: Any) -> None:
    model = make()
    model.save_pretrained(tmp_path / "whole")
    out = tmp_path / "shards"
    ckpt_tools.convert(tmp_path / "whole", to="plain", max_shard_size="8KB", out=out)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert not differences(type(model).from_pretrained(out).state_dict(), model.state_dict())


@pytest.mark.shows("sharded folder", "write")
@pytest.mark.shows("sharded folder", "library loads")
def test_shards_become_one_file_that_loads(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / name.partition(".")[2]
        folder.mkdir()
        model.config.save_pretrained(folder)
        ckpt_tools.convert(tmp_path / "shards", to="plain", out=folder / name)
        assert not differences(LlamaForCausalLM.from_pretrained(folder).state_dict(), model.state_dict())


@pytest.mark.shows("plain", "write")
@pytest.mark.shows("plain", "library loads")
def test_tied_embeddings_of_a_torch_file_stay_tied_in_the_folder(tmp_path: Path) -> None:
    model = llama()
    source = save(tmp_path / "pytorch_model.bin", model.state_dict())
    out = tmp_path / "folder"
    ckpt_tools.convert(source, to="plain", out=out)
    model.config.save_pretrained(out)
    again = LlamaForCausalLM.from_pretrained(out)
    assert not differences(again.state_dict(), model.state_dict())
    assert again.lm_head.weight is again.model.embed_tokens.weight
