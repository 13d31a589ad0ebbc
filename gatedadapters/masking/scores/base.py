"""What a score owes: numbers of at least 0 for every element, added up batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gatedadapters.errors import MaskError

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
"""From a model and a batch to one loss per example, (examples,)."""


@dataclass
class Run:
    """What a score works on.

    Attributes:
        model: in evaluation mode; only `parameters` require gradients.
        parameters: those to score, by name.
        totals: zeros of their shapes, to be filled in place.
        loss: see `Loss`.
        seed: of scores that draw.
        batches, examples: how many have been seen.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    totals: Mapping[str, Tensor]
    loss: Loss
    seed: int = 0
    batches: int = 0
    examples: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    def losses(self, batch: Batch) -> Tensor:
        """One loss per example of a batch, (examples,).

        Raises:
            MaskError: the loss has another shape, or does not depend on what is scored.
        """
        losses: Any = self.loss(self.model, batch)
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.requires_grad:
            got = f"{losses.dtype} {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise MaskError(
                "this is no loss to score by",
                expected="a differentiable tensor (examples,), one loss per example",
                got=got + ("" if not isinstance(losses, Tensor) or losses.requires_grad else " without a gradient"),
                where=f"loss of batch {self.batches}",
                fix="return losses before averaging over examples",
            )
        found: Tensor = losses
        return found


class Score(ABC):
    """A kind of importance. Subclasses say in their docstring which quantity, reduction, sign and source it is.

    `batch` is called for each batch and adds to `run.totals`; `finish` then turns sums into the score. Memory: beside
    the totals at most one more tensor at a time.
    """

    kind: ClassVar[str]
    needs_data: ClassVar[bool] = True

    def default_loss(self) -> Loss | None:
        """What is used where the caller names no loss; None: the task's, `losses.task_losses`."""
        return None

    def begin(self, run: Run) -> None:
        """Called once, before the first batch."""
        return None

    @abstractmethod
    def batch(self, run: Run, batch: Batch) -> None:
        """Add what a batch says to the totals. A score that needs no data gets one empty batch."""

    def finish(self, run: Run) -> None:
        """Turn the totals into the score."""
        return None

    def end(self, run: Run) -> None:
        """Called in any case, also after a failure: put back what was changed."""
        return None


class BatchScore(Score):
    """A mean over batches of some function of the gradient of a batch's mean loss."""

    def batch(self, run: Run, batch: Batch) -> None:
        """One backward pass."""
        losses = run.losses(batch)
        with gradients(run, lambda name, grad: self._add(run, name, grad)):
            losses.mean().backward()

    def _add(self, run: Run, name: str, grad: Tensor) -> None:
        total = run.totals[name]
        total += self.value(grad, run.parameters[name].detach()).to(total)

    @abstractmethod
    def value(self, grad: Tensor, parameter: Tensor) -> Tensor:
        """What is averaged; may be computed in `grad`."""

    def finish(self, run: Run) -> None:
        """Mean over batches."""
        for total in run.totals.values():
            total /= run.batches


@contextmanager
def gradients(run: Run, use: Callable[[str, Tensor], None], names: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Within this context a backward pass hands each parameter's gradient to `use`, and frees it.

    Raises:
        MaskError: a gradient is not finite; a parameter's gradient comes in several parts.
    """
    seen: set[str] = set()

    def hook(name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            assert grad is not None
            check_finite(name, grad, run)
            if name in seen:
                raise MaskError(
                    "a gradient came in several parts",
                    expected="one per backward pass",
                    got="a second one",
                    where=name,
                    fix="switch off re-entrant checkpointing while scoring",
                )
            seen.add(name)
            use(name, grad)

        return take

    handles = [
        parameter.register_post_accumulate_grad_hook(hook(name))
        for name, parameter in run.parameters.items()
        if names is None or name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_finite(name: str, grad: Tensor, run: Run) -> None:
    """Refuse a gradient that is not finite.

    Raises:
        MaskError: naming the parameter and the batch.
    """
    if not bool(torch.isfinite(grad).all()):
        raise MaskError(
            "a gradient is not finite",
            expected="finite gradients",
            got="inf or nan",
            where=f"{name}, batch {run.batches}",
            fix="score in fp32 or bf16; look for broken examples in this batch",
        )
