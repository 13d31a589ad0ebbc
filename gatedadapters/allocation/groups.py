"""Groups of candidates that are judged together."""

from __future__ import annotations

from gatedadapters.paths import Path

Group = tuple[str, str, str]


def group_of(path: Path) -> Group:
    """Sub-layer, role and kind."""
    return path.site.sublayer, path.site.role, path.kind
