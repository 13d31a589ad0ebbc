"""The versions of the packages that computed a result."""

from __future__ import annotations

from importlib import metadata


def versions() -> dict[str, str]:
    """Installed versions by package name; `unknown` for a package that is not installed."""
    found = {}
    for name in ("gatedadapters", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
