"""The versions that a result was computed with."""

from __future__ import annotations

from importlib import metadata


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    found = {}
    for name in ("gatedadapters", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
