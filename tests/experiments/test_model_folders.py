"""Folders of models that a run cannot use as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import M2M100Config, M2M100Model, T5Config, T5ForConditionalGeneration

from gatedadapters import experiments
from gatedadapters.config import SearchConfig
from gatedadapters.data import TextTask
from gatedadapters.errors import ConfigError
from gatedadapters.experiments.models import load_config_and_tokenizer
from gatedadapters.experiments.task_models import build_model, load_tasks

Configured = Callable[..., Path]


def test_damaged_weights_are_named(tables: Path, encoder: Path, configured: Configured) -> None:
    folder = shutil.copytree(encoder, tables / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    config = SearchConfig.load(configured(model=str(folder)))
    with pytest.raises(ConfigError, match=r"(?s)weights cannot be read.*safetensors.*where:.*model.*fix:.*again"):
        build_model(config, load_tasks(config))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, encoder: Path, decoder: Path) -> None:
    for number, whole in enumerate((encoder, decoder)):
        assert load_config_and_tokenizer(str(whole), 16)[1].get_vocab()["dog"] > 0
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(whole / name, folder)
        with pytest.raises(ConfigError, match=rf"where: +model: {folder}"):
            load_config_and_tokenizer(str(folder), 16)
    with pytest.raises(ConfigError, match=r"(?s)no tokenizer.*tokenizer\.json.*5 special tokens.*save_pretrained"):
        load_config_and_tokenizer(str(tmp_path / "0"), 16)


def test_t5_is_searched_by_its_encoder(tables: Path, encoder: Path, configured: Configured) -> None:
    size = json.loads((encoder / "config.json").read_text())["vocab_size"]
    shape = T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    T5ForConditionalGeneration(shape).save_pretrained(tables / "t5")
    for file in encoder.glob("tokenizer*"):
        shutil.copy(file, tables / "t5")
    training = {"steps": 3, "batch_size": 4, "precision": "fp32", "device": "cpu", "max_length": 16}
    path = configured(model=str(tables / "t5"), training=training)
    assert experiments.search(path, out=tables / "out").arms[0].structure.params > 0


def test_an_encoder_decoder_that_wants_more_than_texts_is_refused(
    tables: Path, encoder: Path, configured: Configured
) -> None:
    shape = M2M100Config(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=128,
    )
    M2M100Model(shape).save_pretrained(tables / "translator")
    for file in encoder.glob("tokenizer*"):
        shutil.copy(file, tables / "translator")
    config = SearchConfig.load(configured(model=str(tables / "translator")))
    tasks: list[TextTask] = load_tasks(config)
    with pytest.raises(ConfigError, match=r"(?s)does not run on texts alone.*T5.*decoder_input.*fix: +give another"):
        build_model(config, tasks)
