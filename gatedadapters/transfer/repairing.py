"""A short training of adapters that were carried to an update of their base, with labels or without."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gatedadapters.backbone.sample import device_of
from gatedadapters.errors import AttachError, DataError, TrainingError
from gatedadapters.masking.delta import find_delta
from gatedadapters.masking.scores import Batch
from gatedadapters.masking.scores.losses import logits_of
from gatedadapters.supernet.adapters import Adapters, get_adapters
from gatedadapters.supernet.supernet import NAME
from gatedadapters.training.checked import check_finite_loss, check_vocabulary
from gatedadapters.transfer.distance import distance, padding_mask
from gatedadapters.transfer.shift import vocabulary_size

logger = logging.getLogger(__name__)

Teacher = nn.Module | Sequence[Tensor]
"""The old base with its adapters, or what `teacher_outputs` computed with it."""

WARM_UP = 0.1  # share of the steps in which the rate rises


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair did.

    Attributes:
        losses: the training loss of each step.
        labelled: number of steps whose batch had labels.
        distilled: number of steps that followed a teacher.
    """

    losses: tuple[float, ...]
    labelled: int
    distilled: int

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return len(self.losses)

    def __str__(self) -> str:
        few = max(1, self.steps // 4)
        first, last = fmean(self.losses[:few]), fmean(self.losses[-few:])
        return (
            f"{self.steps} steps, {self.labelled} with labels and {self.distilled} with a teacher: "
            f"training loss {first:.3f} -> {last:.3f}"
        )

    def to_data(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def repair(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    teacher: Teacher | None = None,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> Repair:
    """Train carried adapters and their heads for a few steps, in place; their structure stays as it is.

    After `load_adapters(model, folder, base="updated")`, a tenth of the steps of the first training is a good start:

        ga.repair(model, labelled, steps=30)                          # with labels
        ga.repair(model, texts, steps=30, teacher=old_model)          # without: the old base with its adapters

    With labels, the loss is the model's own. With a teacher, it is how far the model's outputs are from the teacher's
    on the same batch (`distance`); for a batch that has labels as well it is the sum of both. A teacher means that two
    models are in memory; where there is no room for both, `teacher_outputs` computes its outputs beforehand.

    AdamW without weight decay takes one step per batch, at the rate of each kind of path. The rate rises in the first
    tenth of the steps, then falls linearly to 0. Gates are held at their test-time values. To train in bf16, call it
    under `torch.autocast`.

    Args:
        model: the updated base with the adapters attached, compact or with gates.
        batches: dictionaries of tensors, such as a DataLoader yields. They are read again where there are fewer than
            `steps`.
        steps: optimiser steps.
        teacher: the old base with its adapters attached, which is left as it is; or `teacher_outputs` for `batches`,
            which is then a list.
        learning_rate: the common rate of all kinds of path and of heads, see `Adapters.parameter_groups`. It is a tenth
            of the rate of a whole training: few steps at that rate did harm to what an adapter had learnt.
        seed: of dropout.
        progress: show a progress bar on a terminal.

    Raises:
        AttachError: the model has no adapters, or a sparse delta as well.
        DataError: there are no batches, a batch has neither labels nor a teacher, or the teacher reads another
            vocabulary or answers in another shape.
        TrainingError: there are no steps to take, a token id lies outside the vocabulary, the loss is not finite, or it
            depends on no adapter.

    If anything fails, the model and the adapters are as they were before.
    """
    adapters = _carried(model)
    given: Any = steps
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise TrainingError(
            "a repair takes steps",
            expected="a whole number of at least 1",
            got=repr(given),
            where="repair(steps=)",
            fix="a tenth of the steps of the first training is a good start",
        )
    if isinstance(teacher, nn.Module):
        _check_teacher(teacher, model)
    learned = [p for p in (*adapters.weight_parameters(), *adapters.head_parameters()) if p.requires_grad]
    losses, labelled, distilled = list[float](), 0, 0
    with _restored_on_error(model, learned, seed), _held_gates(adapters):
        optimizer = torch.optim.AdamW(adapters.parameter_groups(learning_rate), weight_decay=0.0)
        warm_up = max(1, round(WARM_UP * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
        )
        model.train()
        bar = tqdm(
            _pairs(batches, steps, teacher),
            "repair",
            total=steps,
            unit="step",
            leave=False,
            disable=None if progress else True,
        )
        for batch, target in bar:
            optimizer.zero_grad()
            loss = _loss(model, batch, target, len(losses))
            loss.backward()
            check_finite_loss(nn.utils.clip_grad_norm_(learned, 1.0), len(losses))
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            labelled += batch.get("labels") is not None
            distilled += target is not None
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        optimizer.zero_grad()
    return Repair(tuple(losses), labelled, distilled)


def teacher_outputs(model: nn.Module, batches: Iterable[Batch]) -> list[Tensor]:
    """What `repair(teacher=)` needs of the old base with its adapters, so that only one model is in memory at a time.

    A language model gives one number for each token and each word of the vocabulary: 100 MB for 1,024 tokens and 25,000
    words in fp32.

    Args:
        model: the old base with its adapters attached; it is left as it is.
        batches: a list of the batches of the repair.

    Returns:
        The outputs for each batch, on the CPU.

    Raises:
        TrainingError: a token id lies outside the vocabulary.
    """
    return [_output_of(model, batch).cpu() for batch in batches]


def _carried(model: nn.Module) -> Adapters:
    """The adapters of a model that can be repaired.

    Raises:
        AttachError: there are none, or there is a sparse delta.
    """
    try:
        adapters = get_adapters(model)
    except AttachError as error:
        raise AttachError(
            "there are no adapters to repair",
            expected="an updated base with the adapters of the old one",
            got=f"a {type(model).__name__} without adapters",
            where="repair",
            fix='ga.load_adapters(model, folder, base="updated") first',
        ) from error
    if find_delta(model) is not None:
        raise AttachError(
            "a sparse delta cannot be carried over an update: its values replace those of the old base",
            expected="adapters alone",
            got="adapters and a sparse delta",
            where=f"repair({type(model).__name__})",
            fix="delta.remove() and repair the adapters alone, or train both anew",
        )
    return adapters


def _check_teacher(teacher: nn.Module, model: nn.Module) -> None:
    """Check that a teacher is another model that reads the same tokens.

    Raises:
        DataError: it is not.
    """
    if teacher is model:
        raise DataError(
            "a model is not its own teacher",
            expected="the old base with its adapters",
            got="the model to repair",
            where="repair(teacher=)",
            fix="load the old base and its adapters, or give teacher_outputs that were computed before the update",
        )
    words = vocabulary_size(model), vocabulary_size(teacher)
    if words[0] != words[1]:
        raise DataError(
            "the teacher reads the tokens of another tokenizer",
            expected=f"a vocabulary of {words[0]:,} tokens",
            got=f"{words[1]:,}",
            where="repair(teacher=)",
            fix="give the old version of this base; if its tokenizer changed, repair with labels instead",
        )
    if not hasattr(teacher, NAME):
        logger.warning("the teacher has no adapters: attach those of the old base, unless they are merged into it")


def _pairs(batches: Iterable[Batch], steps: int, teacher: Teacher | None) -> Iterator[tuple[Batch, Tensor | None]]:
    """`steps` batches, read again where they are fewer, each with the teacher's output.

    Raises:
        DataError: there are none, one has neither labels nor a teacher, or there is not one output for each.
    """
    if teacher is not None and not isinstance(teacher, nn.Module):
        count = len(batches) if isinstance(batches, Sequence) else None
        if count != len(teacher):
            raise DataError(
                "there is not one output of the teacher for each batch",
                expected=f"a list of {len(teacher):,} batches, in the order of the outputs",
                got=f"{count:,} batches" if count is not None else type(batches).__name__,
                where="repair(batches=, teacher=)",
                fix="batches = list(batches); teacher = teacher_outputs(old_model, batches)",
            )
    source = list(islice(batches, steps)) if isinstance(batches, Iterator) else batches
    done = 0
    while done < steps:
        begun = done
        for index, batch in enumerate(islice(source, steps - done)):
            if batch.get("labels") is None and teacher is None:
                raise DataError(
                    "a batch has neither labels nor a teacher",
                    expected="labels in every batch, or teacher=",
                    got=", ".join(batch),
                    where=f"repair(batches=), batch {index}",
                    fix="add labels (of running text: labels = input_ids), or pass teacher=, the old base with its "
                    "adapters",
                )
            if teacher is None:
                yield batch, None
            else:
                yield batch, _output_of(teacher, batch) if isinstance(teacher, nn.Module) else teacher[index]
            done += 1
        if done == begun:
            raise DataError(
                "there is nothing to repair with",
                expected="at least one batch",
                got="none",
                where="repair(batches=)",
                fix="pass a DataLoader or a list of batches; a generator is used up after one pass",
            )


def _loss(model: nn.Module, batch: Batch, target: Tensor | None, step: int) -> Tensor:
    """The model's loss, the distance to the teacher, or their sum.

    Raises:
        TrainingError: a token id lies outside the vocabulary, or the loss is not finite or depends on no adapter.
        DataError: see `distance`.
    """
    moved = _moved(model, batch)
    check_vocabulary(model, moved, step)
    output = model(**moved)
    parts = []
    if moved.get("labels") is not None:
        own = getattr(output, "loss", None)
        if not isinstance(own, Tensor):
            raise TrainingError(
                "this model returns no loss for its labels",
                expected="a model with a head, whose output has a loss",
                got=type(output).__name__,
                where=f"repair({type(model).__name__})",
                fix="put the backbone under its head, or leave the labels out and pass teacher=",
            )
        parts.append(own)
    if target is not None:
        hidden = getattr(output, "logits", None) is None
        parts.append(distance(logits_of(output), target, padding_mask(moved), hidden=hidden))
    loss = torch.stack(parts).sum()
    if not loss.requires_grad:
        raise TrainingError(
            "the loss depends on no adapter",
            expected="adapters that run and learn",
            got="a loss without a gradient",
            where=f"repair({type(model).__name__})",
            fix="leave adapters.disabled() and torch.no_grad(), and let the adapters require gradients",
        )
    check_finite_loss(loss, step)
    return loss


def _output_of(model: nn.Module, batch: Batch) -> Tensor:
    """What a teacher answers, in evaluation mode and without gradients; the model is left as it is."""
    moved = _moved(model, batch)
    check_vocabulary(model, moved, 0)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return logits_of(model(**moved))
    finally:
        for module, mode in modes:
            module.training = mode


def _moved(model: nn.Module, batch: Batch) -> dict[str, Any]:
    device = device_of(model)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@contextmanager
def _held_gates(adapters: Adapters) -> Iterator[None]:
    """Within this context gates are their test-time values, and neither learn nor are pruned."""
    bank = adapters.bank
    with nullcontext() if bank is None else bank.held(bank.deterministic()):
        yield


@contextmanager
def _restored_on_error(model: nn.Module, learned: Sequence[nn.Parameter], seed: int) -> Iterator[None]:
    """A context that restores modes and random states; and after an error also what was learned, and all buffers."""
    state = [(tensor, tensor.detach().clone()) for tensor in (*learned, *model.buffers())]
    gradients = [(parameter, parameter.grad) for parameter in learned]
    modes = [(module, module.training) for module in model.modules()]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in state:
                tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        raise
    finally:
        for module, mode in modes:
            module.training = mode
