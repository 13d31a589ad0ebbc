"""The default sample batch, for users who give none."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 8


def default_sample(model: nn.Module) -> dict[str, Tensor]:
    """One row of ``TOKENS`` ordinary tokens, or one blank image, on the model's device.

    Returns:
        ``input_ids`` (1, TOKENS), for encoder-decoders also ``decoder_input_ids``, for models of several tasks also
        ``task_ids`` (1,); or ``pixel_values`` (1, channels, height, width).

    Raises:
        LookupError: the model takes no images and has no token embeddings.
    """
    backbone = next((m for m in model.modules() if hasattr(m, "get_input_embeddings")), model)
    config: Any = getattr(backbone, "config", None)
    if getattr(backbone, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (1, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.zeros(shape, device=device_of(model), dtype=_dtype_of(model))}
    embedding = next((m for m in backbone.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise LookupError("no nn.Embedding to draw token ids from")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = (getattr(text, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "mask"))
    special = {i for token in named for i in (token if isinstance(token, list) else [token])}
    vocabulary = getattr(text, "vocab_size", embedding.num_embeddings)
    ordinary = [i for i in range(min(vocabulary, 4 * TOKENS)) if i not in special] or [0]
    row = [ordinary[i % len(ordinary)] for i in range(TOKENS)]
    eos = getattr(text, "eos_token_id", None)
    if isinstance(eos, int) and 0 <= eos < vocabulary:
        row[-1] = eos  # BART's classification head reads the last end-of-sequence token
    ids = torch.tensor([row], dtype=torch.long).to(device_of(model))
    sample = {"input_ids": ids}
    if (
        getattr(config, "is_encoder_decoder", False)
        and "decoder_input_ids" in inspect.signature(backbone.forward).parameters
    ):
        sample["decoder_input_ids"] = ids.clone()
    if "task_ids" in inspect.signature(model.forward).parameters:
        sample["task_ids"] = torch.zeros(len(ids), dtype=torch.long).to(ids.device)
    return sample


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter, where it expects its inputs."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
