"""Where a model is, and what kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from gatedadapters.config.search import BUNDLED
from gatedadapters.data.bundled import model_folder
from gatedadapters.errors import ConfigError


def located(name: str) -> str:
    """What `from_pretrained` takes for a folder, a file, a hub id, or `bundled:NAME`.

    Raises:
        DataError: the package that carries a bundled model is not installed.
    """
    path = model_folder(name.removeprefix(BUNDLED)) if name.startswith(BUNDLED) else Path(name)
    return str(path) if path.exists() else name


def is_causal(shape: object) -> bool:
    """Whether a model's config is that of a causal language model."""
    names = getattr(shape, "architectures", None) or ()
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


@contextmanager
def reading(
    name: str, expected: str = "a folder that from_pretrained reads, or the id of a model on the hub"
) -> Iterator[None]:
    """Within this context transformers reads what `name` names.

    Raises:
        ConfigError: it cannot.
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


def shape_and_tokenizer(name: str, max_length: int) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of a model that shall read texts of `max_length` tokens.

    Raises:
        ConfigError: they cannot be read, the tokenizer knows no words, or the model does not read so many tokens.
        DataError: the package that carries a bundled model is not installed.
    """
    folder = located(name)
    with reading(name):
        shape: PreTrainedConfig = AutoConfig.from_pretrained(folder)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    # without its files transformers makes a tokenizer of special tokens alone (and of "▁", which stands for a space)
    if not {token for token in tokenizer.get_vocab() if token.strip("▁")} - set(tokenizer.all_special_tokens):
        raise ConfigError(
            "the model has no tokenizer: every word would be unknown",
            expected="the tokenizer's files beside the weights (tokenizer.json, vocab.txt or the like)",
            got=f"{len(tokenizer)} special tokens and no words",
            where=f"model: {name}",
            fix="save it there: AutoTokenizer.from_pretrained(ITS_ORIGIN).save_pretrained(FOLDER)",
        )
    _check_length(max_length, shape, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return shape, tokenizer


def _check_length(max_length: int, shape: object, tokenizer: PreTrainedTokenizerBase) -> None:
    limits = [tokenizer.model_max_length, getattr(shape, "max_position_embeddings", None)]
    limit = min(value for value in limits if isinstance(value, int) and value > 0)
    if max_length > limit:
        raise ConfigError(
            "texts would be longer than the model reads",
            expected=f"at most {limit} tokens",
            got=max_length,
            where="training: max_length",
            fix="lower it",
        )
