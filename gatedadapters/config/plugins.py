"""Plugins: other installed packages that register paths, scores, strategies, noise or perturbations."""

from __future__ import annotations

from importlib.metadata import entry_points

from gatedadapters.errors import ConfigError

GROUP = "gatedadapters"


def load_plugins() -> None:
    """Import every module that an installed package names under the entry-point group `gatedadapters`.

    The command line and the workers of a study call this first, so that they know what the modules register.

    Raises:
        ConfigError: a module cannot be imported.
    """
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # a module of others may raise anything
            raise ConfigError(
                "a plugin cannot be imported",
                expected=f"an importable {entry.value}",
                got=f"{type(error).__name__}: {error}",
                where=f"entry point {entry.name} of the group {GROUP}",
                fix="repair or uninstall the package that names it",
            ) from error
