"""Finding and reading pretrained models and their tokenizers, with errors that say what is wrong with the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from gatedadapters.config.search import BUNDLED
from gatedadapters.data.bundled import model_folder
from gatedadapters.errors import ConfigError


def locate_model(name: str) -> str:
    """The argument of `from_pretrained` for a model that is named by a folder, a file, a hub id, or `bundled:NAME`.

    Raises:
        DataError: there is no such bundled model, or the package that carries it is not installed.
    """
    path = model_folder(name.removeprefix(BUNDLED)) if name.startswith(BUNDLED) else Path(name)
    return str(path) if path.exists() else name


def is_causal(model_config: object) -> bool:
    """Whether a transformers configuration is that of a causal language model."""
    names = getattr(model_config, "architectures", None) or ()
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


@contextmanager
def reading_model(
    name: str, expected: str = "a folder that from_pretrained reads, or the id of a model on the hub"
) -> Iterator[None]:
    """A context in which transformers reads the model `name`. What it raises becomes a ConfigError.

    Args:
        name: the model, as the configuration names it.
        expected: what `name` should be, for the error.

    Raises:
        ConfigError: the model cannot be read.
    """
    try:
        yield
    except SafetensorError as error:
        raise ConfigError(
            "the model's weights cannot be read",
            expected="whole .safetensors files",
            got=str(error),
            where=f"model: {name}",
            fix="copy or save the model again: a file is damaged, or its copy was cut off",
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "the model cannot be read",
            expected=expected,
            got=str(error).splitlines()[0],
            where=f"model: {name}",
            fix="check the name; without a network give what lies on this machine",
        ) from error


def load_config_and_tokenizer(
    name: str, max_length: int, revision: str | None = None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The transformers configuration and the tokenizer of a model, without its weights.

    Args:
        name: a folder, a hub id, or `bundled:NAME`.
        max_length: tokens of the longest text that the model is to read.
        revision: commit of the model on the hub; None takes the newest.

    Raises:
        ConfigError: they cannot be read, the tokenizer knows no words, cannot pad, or knows tokens that the model does
            not, or the model does not read so many tokens.
        DataError: there is no such bundled model, or the package that carries it is not installed.
    """
    folder = locate_model(name)
    with reading_model(name):
        model_config: PreTrainedConfig = AutoConfig.from_pretrained(folder, revision=revision or "main")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, revision=revision or "main")
    # For a folder without a tokenizer, transformers makes one that knows special tokens (and "▁", a space) only.
    if not {token for token in tokenizer.get_vocab() if token.strip("▁")} - set(tokenizer.all_special_tokens):
        raise ConfigError(
            "the model has no tokenizer: every word would be unknown",
            expected="the tokenizer's files beside the weights (tokenizer.json, vocab.txt or the like)",
            got=f"{len(tokenizer)} special tokens and no words",
            where=f"model: {name}",
            fix="save it there: AutoTokenizer.from_pretrained(ITS_ORIGIN).save_pretrained(FOLDER)",
        )
    _check_length(max_length, model_config, tokenizer)
    _check_vocabulary(name, model_config, tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                "the tokenizer cannot pad",
                expected="a token for padding, or one for the end of a text",
                got="neither",
                where=f"model: {name}",
                fix="name a token that it knows, tokenizer.pad_token = ..., and save it beside the model",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return model_config, tokenizer


def load_causal_model(name: str, revision: str | None = None) -> nn.Module:
    """A causal language model with its weights in fp32; `revision` is its commit on the hub.

    Raises:
        ConfigError: it cannot be read.
    """
    with reading_model(name):
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            locate_model(name), dtype=torch.float32, revision=revision or "main"
        )
    return model


def _check_vocabulary(name: str, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    size = getattr(model_config.get_text_config(), "vocab_size", None)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if isinstance(size, int) and largest >= size:
        raise ConfigError(
            "the tokenizer has tokens that the model does not know",
            expected=f"token ids below {size:,}, the model's vocabulary",
            got=f"{largest:,} for {token!r}",
            where=f"model: {name}",
            fix="give the model its own tokenizer; or model.resize_token_embeddings(len(tokenizer)), and save both",
        )


def _check_length(max_length: int, model_config: object, tokenizer: PreTrainedTokenizerBase) -> None:
    limits = [tokenizer.model_max_length, getattr(model_config, "max_position_embeddings", None)]
    limit = min(value for value in limits if isinstance(value, int) and value > 0)
    if max_length > limit:
        raise ConfigError(
            "texts would be longer than the model reads",
            expected=f"at most {limit} tokens",
            got=max_length,
            where="training: max_length",
            fix="lower it",
        )
