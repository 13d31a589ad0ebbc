"""Where a model is, and what kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "the model cannot be read",
            expected=expected,
            got=str(error).splitlines()[0],
            where=f"model: {name}",
            fix="check the name; without a network give what lies on this machine",
        ) from error
