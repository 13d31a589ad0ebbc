"""Every registered noise and perturbation meets the contract."""

from __future__ import annotations

from gatedadapters.robustness import corruption_kinds
from gatedadapters.testing import CorruptionContract


class TestRegisteredKinds(CorruptionContract):
    corruptions = list(corruption_kinds().values())  # noqa: RUF012
