"""Any score, taken at tuned weights: what matters in general once the model has moved."""

from __future__ import annotations

import torch
from torch import Tensor

from gatedadapters.errors import MaskError
from gatedadapters.masking.delta import SparseDelta
from gatedadapters.masking.scores import score_class
from gatedadapters.masking.scores.base import Batch, Loss, Score, ScoringRun
from gatedadapters.runtime.sharding import is_sharded


class Refreshed(Score):
    """Another score at the weights that a sparse delta has tuned. The scores belong to the backbone without the delta.

    The first mask is chosen by what matters at the pretrained weights. Tuning moves the model to where other elements
    may matter, and a mask from scores there protects these. Tune from the pretrained weights again with that mask::

        delta = ga.apply_mask(model, ga.select(ga.score(model, general, kind="fisher"), in_domain))
        ...  # tune for a few steps
        delta.remove()
        again = ga.score(model, general, kind=Refreshed(delta, "fisher"))
        mask = ga.select(again, in_domain)

    Quantity, reduction and sign are those of the other score.

    Args:
        delta: with the tuned values, and in no model.
        score: the other score, or its kind.

    Raises:
        MaskError: the delta is in a model.
    """

    kind = "refreshed"

    def __init__(self, delta: SparseDelta, score: str | Score = "fisher") -> None:
        if delta.applied:
            raise MaskError(
                "this delta is in a model",
                expected="a delta that was removed, which keeps its values",
                got="an applied one",
                where="Refreshed(delta=)",
                fix="delta.remove() first",
            )
        self.delta, self.inner = delta, score_class(score)() if isinstance(score, str) else score
        self._before: dict[str, Tensor] = {}

    def default_loss(self) -> Loss | None:
        """That of the other score."""
        return self.inner.default_loss()

    def begin(self, run: ScoringRun) -> None:
        """Write the tuned values into the weights.

        Raises:
            MaskError: the model is sharded, or has other parameters.
        """
        parameters = dict(run.model.named_parameters())
        fits = all(n in parameters and parameters[n].shape == p.pattern.shape for n, p in self.delta.items())
        if not fits or is_sharded(run.model):
            raise MaskError(
                "the delta does not fit this model",
                expected="the model that the delta was tuned in, without sharding",
                got="a sharded model" if fits else "parameters of other names or shapes",
                where="Refreshed",
                fix="score the model of the delta",
            )
        run.details["refreshed"] = self.inner.kind
        with torch.no_grad():
            for name, part in self.delta.items():
                flat, indices = parameters[name].view(-1), part.pattern.indices().to(parameters[name].device)
                self._before[name] = flat[indices].clone()
                flat[indices] = part.values.to(flat)
        self.inner.begin(run)

    def batch(self, run: ScoringRun, batch: Batch) -> None:
        """A batch of the other score."""
        self.inner.batch(run, batch)

    def finish(self, run: ScoringRun) -> None:
        """The end of the other score."""
        self.inner.finish(run)

    @torch.no_grad()
    def end(self, run: ScoringRun) -> None:
        """Restore every bit of the weights."""
        self.inner.end(run)
        for name, part in self.delta.items():
            if name in self._before:
                flat = run.model.get_parameter(name).view(-1)
                flat[part.pattern.indices().to(flat.device)] = self._before.pop(name)
