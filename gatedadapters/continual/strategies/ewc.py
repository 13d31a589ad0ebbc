"""Elastic weight consolidation: full fine-tuning that is pulled back to what earlier tasks needed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PrivateAttr

from gatedadapters.continual.strategies.base import Strategy, Tuned
from gatedadapters.masking import ElasticPenalty, Scores, score

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class EWC(Strategy):
    """`½ weight Σ F (θ - θ*)²`, F the sum of the Fisher informations of all earlier tasks, θ* the weights after the
    last of them (one penalty for all, not one per task).

    Attributes:
        weight: λ.
        fisher_batches, fisher_batch_size: of each task's training data, after it is trained.

    References:
        Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3; Huszár 2018, "Note on the quadratic penalties in elastic
        weight consolidation", PNAS 115(11), for the single penalty.
    """

    kind = "ewc"
    weight: float = Field(1e4, gt=0)
    fisher_batches: int = Field(16, gt=0)
    fisher_batch_size: int = Field(16, gt=0)
    _fisher: Scores | None = PrivateAttr(default=None)

    def begin(self, run: Run) -> None:
        """Nothing pulls yet."""
        self._fisher = None

    def tune(self, run: Run, index: int) -> Tuned:
        """Train everything under the pull, then learn what this task needs."""
        elements = run.require(run.infos, index)
        penalty = None if self._fisher is None else ElasticPenalty(run.model, self._fisher, self.weight)
        seconds = run.fit(index, penalty=penalty)
        if index + 1 < len(run.stream):
            batches = islice(run.batches(index, self.fisher_batch_size), self.fisher_batches)
            found = score(run.model, batches, kind="fisher", heads=sorted(run.all_heads))
            earlier = self._fisher
            sums = {n: found[n] + (0 if earlier is None else earlier[n].to(found[n].device)) for n in found.names}
            self._fisher = Scores(found.record, sums)
        return Tuned(elements, seconds)

    def remember(self, run: Run, index: int, folder: Path) -> None:
        """The summed Fisher information."""
        if self._fisher is not None and index + 1 < len(run.stream):
            self._fisher.save(folder / "fisher")

    def recall(self, run: Run, index: int, folder: Path) -> None:
        """The last one holds the sum of all."""
        if (folder / "fisher").is_dir():
            self._fisher = Scores.load(folder / "fisher")
