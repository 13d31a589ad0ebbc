"""Every importance score of `masking`, as a placement score."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.allocation.maps import MapScore
from gatedadapters.allocation.probe import Probe
from gatedadapters.masking.scores import Scores
from gatedadapters.masking.scoring import score
from gatedadapters.paths import Path


class Importance(MapScore):
    """The mean importance of the elements of the map that a path goes to, by a score of `masking`.

    Args:
        kind: a kind of `ga.score`.
    """

    kind = "importance"
    needs_data = True

    def __init__(self, kind: str) -> None:
        self.masking_kind = kind
        self._scores: Scores | None = None

    def read(self, probe: Probe) -> None:
        """Score the backbone, with the candidates switched off."""
        with probe.adapters.disabled():
            batches = [*probe.learn, *probe.held_out]
            self._scores = score(probe.model, batches, kind=self.masking_kind, loss=probe.loss, seed=probe.seed)

    def rate(self, probe: Probe, path: Path, weight: Tensor) -> float:
        """0 for a weight that was not scored."""
        name = f"{path.site.write.module}.{path.site.write.parameter or 'weight'}"
        assert self._scores is not None
        return float(self._scores[name].float().mean()) if name in self._scores.names else 0.0
