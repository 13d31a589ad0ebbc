"""Every registered score meets the contract."""

from __future__ import annotations

from gatedadapters.masking.scores import score_kinds
from gatedadapters.testing import ScoreContract


class TestRegisteredKinds(ScoreContract):
    scores = [kind() for kind in score_kinds().values()]  # noqa: RUF012
