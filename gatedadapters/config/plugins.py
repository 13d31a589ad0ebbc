"""What other installed packages add: paths, scores, strategies, noise and perturbations of their own."""

from __future__ import annotations

from importlib.metadata import entry_points

from gatedadapters.errors import ConfigError

GROUP = "gatedadapters"


def load_plugins() -> None:
    """Import every module that an installed package names under the entry-point group `gatedadapters`, so that what it
    registers is known to the command line and to the workers of a study.

    Raises:
        ConfigError: one cannot be imported.
    """
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # whatever somebody else's module does
            raise ConfigError(
                "a plugin cannot be imported",
                expected=f"an importable {entry.value}",
                got=f"{type(error).__name__}: {error}",
                where=f"entry point {entry.name} of the group {GROUP}",
                fix="repair or uninstall the package that names it",
            ) from error
