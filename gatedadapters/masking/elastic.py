"""Elastic weight consolidation, the alternative that pulls instead of freezing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatedadapters.backbone.fingerprint import fingerprint
from gatedadapters.errors import MaskError
from gatedadapters.masking.mask import check_backbone
from gatedadapters.masking.scores import Scores


class ElasticPenalty:
    """`½ weight Σ F (θ - θ*)²`: a pull of every scored element towards where it is now, as strong as it is important.

    Holds a copy of the weights; the scores are used as they are. Add it to the loss of full fine-tuning. Both follow
    the model to the device where it is when the penalty is asked for: a Trainer moves it after this is built.

    Args:
        model: with the weights to be pulled to, and trained later.
        importance: `score(model, general_batches, kind="fisher")`.
        weight: λ.

    Raises:
        MaskError: scores of another backbone, or a weight that is no number above 0.

    References:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", arXiv 1612.00796, equation 3.
    """

    def __init__(self, model: nn.Module, importance: Scores, weight: float) -> None:
        if not weight > 0:
            raise MaskError(expected="a weight above 0", got=weight, where="ElasticPenalty(weight=)")
        heads = frozenset(importance.identity.heads)
        check_backbone(importance.identity, fingerprint(model, skip=heads), where="ElasticPenalty")
        parameters = dict(model.named_parameters())
        self.weight = weight
        self._model = model
        self._pulls = {name: (parameters[name].detach().clone(), importance[name]) for name in importance.names}

    def __call__(self) -> Tensor:
        """The penalty, a differentiable scalar."""
        terms = []
        for name, pulls in self._pulls.items():
            now = self._model.get_parameter(name)
            start, pull = self._pulls[name] = pulls[0].to(now.device), pulls[1].to(now.device)
            terms.append((pull * (now - start).square()).sum())
        return 0.5 * self.weight * torch.stack(terms).sum()
