"""The base of all importance scores. A score adds up, batch by batch, a number of at least 0 for every element."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gatedadapters.errors import MaskError
from gatedadapters.runtime.sharding import first_alike, is_shard, local, reshard

Batch = Mapping[str, Any]
"""A batch: tensors and other values by name, as `model(**batch)` takes them."""
Loss = Callable[[nn.Module, Batch], Tensor]
"""A function from a model and a batch to one loss per example, (examples,)."""


@dataclass
class ScoringRun:
    """The state of one call of `score`: the model, and what has been added up so far.

    Attributes:
        model: the model, in evaluation mode. Only `parameters` require gradients.
        parameters: the parameters to score, by name.
        totals: a tensor of each parameter's shape, by name. It starts at zero, and the score fills it in place. Of a
            sharded parameter, parameter and total are what this process holds, see `runtime.sharding.local`.
        loss: see `Loss`.
        seed: seed of scores that draw random numbers.
        batches: number of batches so far.
        examples: number of examples so far.
        details: plain data that the score stores beside its result.
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
            MaskError: the loss has another shape, or does not depend on the scored parameters.
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
    """A kind of importance score. The docstring of a subclass names its quantity, reduction, sign and source.

    `score` calls `begin`, then `batch` for each batch, then `finish`. `batch` adds to `run.totals`, and `finish` turns
    the sums into the score. Beside the totals, a score may hold one more tensor at a time.

    Attributes:
        kind: the name of the score.
        needs_data: whether the score reads batches. A score that reads weights alone gets one empty batch.
    """

    kind: ClassVar[str]
    needs_data: ClassVar[bool] = True

    def default_loss(self) -> Loss | None:
        """The loss to use if the caller gives none; None stands for the task's loss, `losses.task_losses`."""
        return None

    def begin(self, run: ScoringRun) -> None:
        """Called once, before the first batch."""
        return None

    @abstractmethod
    def batch(self, run: ScoringRun, batch: Batch) -> None:
        """Add the contribution of one batch to the totals."""

    def finish(self, run: ScoringRun) -> None:
        """Turn the totals into the score."""
        return None

    def end(self, run: ScoringRun) -> None:
        """Undo every change of the model. Called in any case, also after a failure."""
        return None


class BatchScore(Score):
    """The mean over batches of a function of each batch's gradient, that of its mean loss."""

    def batch(self, run: ScoringRun, batch: Batch) -> None:
        """One backward pass."""
        losses = run.losses(batch)
        with gradients(run, lambda name, grad: self._add(run, name, grad)):
            losses.mean().backward()

    def _add(self, run: ScoringRun, name: str, grad: Tensor) -> None:
        total = run.totals[name]
        total += self.value(grad, local(run.parameters[name])).to(total)

    @abstractmethod
    def value(self, grad: Tensor, parameter: Tensor) -> Tensor:
        """The value to average, computed from a batch's gradient. The result may overwrite `grad`."""

    def finish(self, run: ScoringRun) -> None:
        """Mean over batches."""
        for total in run.totals.values():
            total /= run.batches


@contextmanager
def gradients(
    run: ScoringRun, use: Callable[[str, Tensor], None], names: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """A context in which a backward pass passes each parameter's gradient to `use` and frees it.

    Args:
        run: the parameters and their model.
        use: called with the name of a parameter and its gradient.
        names: the parameters to do this for; default: all of `run.parameters`.

    Raises:
        MaskError: a gradient is not finite, or a parameter's gradient comes in several parts.
    """
    chosen = {name: p for name, p in run.parameters.items() if names is None or name in names}
    if any(is_shard(p) for p in chosen.values()):
        yield
        # When the backward pass has ended, every process has its shard of the mean over the processes.
        reshard(run.model)
        found = {name: local(p.grad) for name, p in chosen.items() if p.grad is not None}
        for parameter in chosen.values():
            parameter.grad = None
        for name in first_alike([n for n, grad in found.items() if not bool(torch.isfinite(grad).all())], run.model):
            raise _not_finite(name, run)
        for name, grad in found.items():
            use(name, grad)
        return
    seen: set[str] = set()

    def hook(name: str) -> Callable[[Tensor], None]:
        def pass_on(parameter: Tensor) -> None:
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

        return pass_on

    handles = [parameter.register_post_accumulate_grad_hook(hook(name)) for name, parameter in chosen.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_finite(name: str, grad: Tensor, run: ScoringRun) -> None:
    """Check that a gradient is finite.

    Raises:
        MaskError: it is not. The error names the parameter and the batch.
    """
    if not bool(torch.isfinite(grad).all()):
        raise _not_finite(name, run)


def _not_finite(name: str, run: ScoringRun) -> MaskError:
    return MaskError(
        "a gradient is not finite",
        expected="finite gradients",
        got="inf or nan",
        where=f"{name}, batch {run.batches}",
        fix="score in fp32 or bf16; look for broken examples in this batch",
    )
