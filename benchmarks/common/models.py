"""Backbones that costs are measured on, and their linear maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import gatedadapters as ga
from gatedadapters.data.bundled import load_encoder


def block_maps(model: nn.Module) -> list[str]:
    """Names of the linear maps of the blocks."""
    return [linear.name for _, _, linear in ga.discover(model).maps()]


def lora_space(rank: int, **where: list[str]) -> ga.SearchSpace:
    """LoRA of one rank at every linear map of the blocks, or only at the maps that `where` describes."""
    return ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": rank, "at": where}]}, where="benchmark")


def _llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8192,
    )
    return LlamaModel(config)


# MiniLM-L6 as released, and a 12-layer Llama-like model of about 50 M parameters
BACKBONES: dict[str, Callable[[], nn.Module]] = {"minilm-l6": lambda: load_encoder("minilm-l6")[0], "llama-12": _llama}


def random_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    """Random tokens, 8 x 128, without padding."""
    ids = torch.randint(5, model.config.vocab_size - 1, (8, 128))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
