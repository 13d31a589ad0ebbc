"""Every registered path kind meets the contract."""

from __future__ import annotations

from gatedadapters.config import PathOptions
from gatedadapters.paths import path_kinds
from gatedadapters.testing import PathContract


class TestRegisteredKinds(PathContract):
    options = [PathOptions.registry[kind]() for kind in path_kinds()]  # noqa: RUF012
