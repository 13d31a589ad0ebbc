"""The contribution of each element to the fall of the loss, over a short run of gradient descent."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from torch import Tensor

from gatedadapters.artefact_files import write_tensors
from gatedadapters.masking.scores.base import Batch, Score, ScoringRun, gradients
from gatedadapters.runtime.sharding import local


class Synaptic(Score):
    """`max(0, Σ_b -g_b Δθ_b) / (Δθ² + 0.1)`, over one step of gradient descent for each batch b.

    Quantity: the fall of the loss that an element caused, divided by the square of its displacement Δθ. Reduction: sum
    over batches. Sign: negative contributions are clamped to 0; large means important. The weights are restored
    afterwards. Meanwhile their values at the start lie on disk, so that memory holds no second copy.

    Args:
        learning_rate: step size of gradient descent. With small steps Δθ² is far below 0.1, and the score orders
            elements as squared batch gradients do.

    References:
        Zenke, Poole, Ganguli 2017, "Continual Learning Through Synaptic Intelligence", arXiv 1703.04200, equations 3
        and 5, with their damping 0.1.
    """

    kind = "synaptic"
    damping = 0.1

    def __init__(self, learning_rate: float = 1e-3) -> None:
        self.learning_rate = learning_rate
        self._folder: TemporaryDirectory[str] | None = None

    def begin(self, run: ScoringRun) -> None:
        """Write the weights to disk."""
        run.details["learning_rate"] = self.learning_rate
        self._folder = TemporaryDirectory(prefix="gatedadapters-")
        for index, parameter in enumerate(run.parameters.values()):
            write_tensors(self._file(index), {"start": local(parameter)}, metadata={})

    def batch(self, run: ScoringRun, batch: Batch) -> None:
        """One step of gradient descent. The backward pass updates each tensor as soon as it has the gradient."""
        losses = run.losses(batch)
        with gradients(run, lambda name, grad: self._step(run, name, grad)):
            losses.mean().backward()

    @torch.no_grad()
    def _step(self, run: ScoringRun, name: str, grad: Tensor) -> None:
        parameter, total = local(run.parameters[name]), run.totals[name]
        before = parameter.detach().clone()
        parameter.sub_(grad, alpha=self.learning_rate)
        total -= (before.sub_(parameter).neg_() * grad).to(total)  # the step taken, rounding included

    @torch.no_grad()
    def finish(self, run: ScoringRun) -> None:
        """Divide by the squared displacement of each element, plus the damping."""
        for index, (name, total) in enumerate(run.totals.items()):
            parameter = local(run.parameters[name]).detach()
            displacement = parameter - self._start(index).to(parameter)
            total.clamp_(min=0).div_(displacement.square().to(total) + self.damping)

    @torch.no_grad()
    def end(self, run: ScoringRun) -> None:
        """Restore every bit of the weights."""
        if self._folder is not None:
            for index, parameter in enumerate(run.parameters.values()):
                if self._file(index).exists():
                    local(parameter).copy_(self._start(index))
            self._folder.cleanup()
            self._folder = None

    def _file(self, index: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{index}.safetensors"

    def _start(self, index: int) -> Tensor:
        with safe_open(self._file(index), framework="pt") as file:
            start: Tensor = file.get_tensor("start")
        return start
