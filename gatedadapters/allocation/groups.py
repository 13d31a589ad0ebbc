"""Groups of candidates that are judged together."""

from __future__ import annotations

from collections.abc import Mapping

from gatedadapters.paths import Path

Group = tuple[str, str, str]


def group_of(path: Path) -> Group:
    """Sub-layer, role and kind."""
    return path.site.sublayer, path.site.role, path.kind


def grouped(paths: Mapping[str, Path]) -> dict[Group, list[str]]:
    """The keys of each group, in the order of `paths`, which is that of the blocks."""
    found: dict[Group, list[str]] = {}
    for key, path in paths.items():
        found.setdefault(group_of(path), []).append(key)
    return found
