"""Where a model is, and what kind."""

from __future__ import annotations

from pathlib import Path

from gatedadapters.config.search import BUNDLED
from gatedadapters.data.bundled import model_folder


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
