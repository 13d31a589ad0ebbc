"""Elastic weight consolidation: a penalty that pulls important elements back, instead of freezing them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatedadapters.backbone.fingerprint import fingerprint
from gatedadapters.errors import MaskError
from gatedadapters.masking.mask import check_backbone
from gatedadapters.masking.scores import Scores


class ElasticPenalty:
    """`½ weight Σ F (θ - θ*)²`: pulls every element θ towards its present value θ*, in proportion to its score F.

    Add the penalty to the loss of full fine-tuning. It holds a copy of the scored weights. At each call, the copy and
    the scores move to the device of the model, because a Trainer moves the model after the penalty was made.

    Args:
        model: the model to train. Its present weights are θ*.
        importance: F, from `score(model, general_batches, kind="fisher")`.
        weight: λ, above 0.

    Raises:
        MaskError: the scores belong to another backbone, or the weight is not above 0.

    References:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", arXiv 1612.00796, equation 3.
    """

    def __init__(self, model: nn.Module, importance: Scores, weight: float) -> None:
        if not weight > 0:
            raise MaskError(
                expected="a weight above 0",
                got=weight,
                where="ElasticPenalty(weight=)",
                fix="raise it, or train without the penalty",
            )
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
