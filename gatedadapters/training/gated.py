"""Gated and selective versions of any Trainer."""

from __future__ import annotations

import copyreg
import threading
from typing import Any, Protocol, TypeVar

from transformers import Trainer

from gatedadapters.allocation import PlacementScore
from gatedadapters.config import Budget, Penalty, Schedule, SelectionConfig
from gatedadapters.errors import TrainingError
from gatedadapters.masking import Mask
from gatedadapters.training.checked import CheckedTrainer
from gatedadapters.training.selective import SelectiveTrainer
from gatedadapters.training.trainer import GatedTrainer

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
AnyTrainer_co = TypeVar("AnyTrainer_co", bound=Trainer, covariant=True)


class GatedClass(Protocol[AnyTrainer_co]):
    """What `gated` returns, to type checkers: a class that makes `AnyTrainer`s and takes `GatedTrainer`'s arguments."""

    __name__: str

    def __call__(
        self,
        *args: Any,
        budget: Budget | None = None,
        penalty: Penalty | None = None,
        schedule: Schedule | None = None,
        prior: str | PlacementScore | None = "gain",
        gate_learning_rate: float | None = None,
        delta_learning_rate: float | None = None,
        task_temperature: float | None = None,
        **kwargs: Any,
    ) -> AnyTrainer_co:
        """Make a trainer."""


class SelectiveClass(Protocol[AnyTrainer_co]):
    """What `selective` returns, to type checkers: as `GatedClass`, with `SelectiveTrainer`'s arguments."""

    __name__: str

    def __call__(
        self,
        *args: Any,
        general_dataset: Any = None,
        general_eval_dataset: Any = None,
        selection: SelectionConfig | None = None,
        mask: Mask | None = None,
        subspace: float | None = None,
        heads: tuple[str, ...] | None = None,
        **kwargs: Any,
    ) -> AnyTrainer_co:
        """Make a trainer."""


def gated(trainer: type[AnyTrainer]) -> GatedClass[AnyTrainer]:
    """A Trainer class with everything that `GatedTrainer` adds: `gated(SFTTrainer)` is a `GatedSFTTrainer`.

    Equal arguments give the same class. It derives from `GatedTrainer` and from `trainer`, and can be pickled. Its
    arguments are those of `trainer`, and the keywords of `GatedTrainer`.

    Args:
        trainer: transformers' `Trainer` or a class derived from it, such as those of TRL.

    Raises:
        TrainingError: this is no Trainer class, or a gated or selective one already.
    """
    return _combined(GatedTrainer, trainer, "Gated")  # type: ignore[return-value]


def selective(trainer: type[AnyTrainer]) -> SelectiveClass[AnyTrainer]:
    """A Trainer class with everything that `SelectiveTrainer` adds: `selective(SFTTrainer)` is a `SelectiveSFTTrainer`.

    Otherwise as `gated`. To select by data, the batches of `trainer` must hold labels, from which the model computes a
    loss. Those of preference trainers do not: give them a `mask`.

    Raises:
        TrainingError: this is no Trainer class, or a gated or selective one already.
    """
    return _combined(SelectiveTrainer, trainer, "Selective")  # type: ignore[return-value]


_CLASSES: dict[tuple[type[CheckedTrainer], type], type] = {
    (GatedTrainer, Trainer): GatedTrainer,
    (SelectiveTrainer, Trainer): SelectiveTrainer,
}
_LOCK = threading.Lock()


def _combined(ours: type[CheckedTrainer], trainer: Any, prefix: str) -> type:
    """The class that derives from `ours` and from `trainer`, made at the first call."""
    if not isinstance(trainer, type) or not issubclass(trainer, Trainer):
        raise TrainingError(
            "this is no Trainer class",
            expected="transformers' Trainer or a class derived from it, such as trl.SFTTrainer",
            got=repr(trainer),
            where=f"ga.{prefix.lower()}",
            fix=f"pass the class of your trainer: ga.{prefix.lower()}(SFTTrainer)(model, args, ...)",
        )
    if issubclass(trainer, CheckedTrainer):
        raise TrainingError(
            "this trainer adds the penalty or the delta already",
            expected="a Trainer as its own library defines it",
            got=trainer.__name__,
            where=f"ga.{prefix.lower()}",
            fix=f"use {trainer.__name__} as it is; a GatedTrainer trains a sparse delta along with the adapters",
        )
    with _LOCK:
        found = _CLASSES.get((ours, trainer))
        if found is None:
            name = f"{prefix}{trainer.__name__}"
            text = f"`{trainer.__name__}` with everything that `{ours.__name__}` adds; see both."
            kind = _importable_kind(trainer)
            found = _CLASSES[ours, trainer] = kind(name, (ours, trainer), {"__module__": __name__, "__doc__": text})
    return found


def _importable_kind(trainer: type) -> type[type]:
    """A metaclass for one combined class, whose pickle is a call of `_combined`: no module holds it under its name."""
    kind = type("_Combined", (type(trainer),), {})
    copyreg.pickle(kind, _reduced)
    return kind


def _reduced(combined: type) -> tuple[Any, ...]:
    ours, trainer = combined.__bases__
    return _combined, (ours, trainer, combined.__name__.removesuffix(trainer.__name__))
