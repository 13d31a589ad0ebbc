"""Elastic weight consolidation: full fine-tuning with a pull towards the weights that earlier tasks needed."""

from __future__ import annotations

from itertools import islice

from pydantic import Field

from gatedadapters.config.base import Count
from gatedadapters.continual.stage import Stage
from gatedadapters.continual.strategies.base import Strategy, TunedStage
from gatedadapters.masking import ElasticPenalty, Scores, score

FISHER = "fisher"


class EWC(Strategy):
    """Adds `½ weight Σ F (θ - θ*)²` to the loss. F is the sum of the Fisher informations of all earlier tasks, θ* the
    weights after the last of them: one penalty for all earlier tasks, not one for each.

    Attributes:
        weight: λ.
        fisher_batches, fisher_batch_size: how many batches of each task's training data F is measured on, after the
            task is trained, and how many examples each has.

    References:
        Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3; Huszár 2018, "Note on the quadratic penalties in elastic
        weight consolidation", PNAS 115(11), for the single penalty.
    """

    kind = "ewc"
    weight: float = Field(1e4, gt=0)
    fisher_batches: Count = 16
    fisher_batch_size: Count = 16

    def tune(self, stage: Stage) -> TunedStage:
        """Train everything with the penalty, then store the sum of the Fisher informations up to this task."""
        earlier = Scores.load(stage.earlier[-1].memory / FISHER) if stage.index else None
        elements = stage.train_only(stage.tensors)
        penalty = None if earlier is None else ElasticPenalty(stage.model, earlier, self.weight)
        seconds = stage.fit(penalty=penalty)
        if stage.index + 1 < len(stage.tasks):
            batches = islice(stage.batches(self.fisher_batch_size), self.fisher_batches)
            found = score(stage.model, batches, kind="fisher", heads=sorted(stage.all_heads))
            sums = {n: found[n] + (0 if earlier is None else earlier[n].to(found[n].device)) for n in found.names}
            Scores(found.record, sums).save(stage.memory / FISHER)
        return TunedStage(elements, seconds)
