"""A Trainer callback that sends pictures of the structure to where the Trainer reports its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gatedadapters.inspection.callback import adapters_or_none
from gatedadapters.structure import Structure
from gatedadapters.structure.picture import picture, pixels

Image = NDArray[np.uint8]  # (height, width, 3)


def _to_mlflow(tag: str, image: Image, step: int) -> None:
    import_module("mlflow").log_image(image, key=tag, step=step)


def _to_run(tracker: str) -> Callable[[str, Image, int], None]:
    """W&B and trackio take images alike; transformers logs the step as a value of its own in both."""

    def send(tag: str, image: Image, step: int) -> None:
        module = import_module(tracker)
        module.log({tag: module.Image(image), "train/global_step": step})

    return send


_SENDERS: Mapping[str, Callable[[str, Image, int], None]] = {
    "mlflow": _to_mlflow,
    "trackio": _to_run("trackio"),
    "wandb": _to_run("wandb"),
}


class StructureReporter(TrainerCallback):
    """Sends a picture of the structure to W&B, MLflow and trackio, whichever `report_to` names.

    Scalars of the gates need no callback: a gated trainer adds them to its logs, which every integration of
    transformers takes. Pictures are sent when the structure is fixed, and at the end of the training if it differs by
    then. For TensorBoard see `TensorBoardInspector`.
    """

    def __init__(self) -> None:
        self._shown: Structure | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Send the structure when it is new; the integrations close their runs before `on_train_end` comes here."""
        if not state.is_world_process_zero:
            return
        adapters = adapters_or_none(kwargs["model"])
        last = control.should_training_stop
        if adapters is None or adapters.bank is None or not (adapters.bank.frozen or last):
            return
        if adapters.structure is not None and adapters.structure is self._shown:
            return
        structure = adapters.structure or adapters.discretize()
        if self._shown is None or structure.diff(self._shown):
            image = pixels(picture(structure))
            for name in args.report_to or ():
                if name in _SENDERS:
                    _SENDERS[name]("structure/kept", image, state.global_step)
        self._shown = structure
