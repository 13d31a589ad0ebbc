"""Whether a run can be resumed from a checkpoint: all its files are whole, before anything of them is loaded."""

from __future__ import annotations

import os
import zipfile

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from gatedadapters.errors import TrainingError


def check_resumable(folder: str) -> None:
    """Check that the files beside the weights of a checkpoint are there and whole.

    What torch saved is a zip archive. Its checksums are compared without unpickling anything.

    Raises:
        TrainingError: a file is missing or damaged.
    """
    if not os.path.isfile(os.path.join(folder, SAFE_WEIGHTS_NAME)):
        got = f"no {SAFE_WEIGHTS_NAME} in it" if os.path.isdir(folder) else "no such folder"
        raise _error("there is no checkpoint to resume from", "a folder that a Trainer here wrote", got, folder)
    saved = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if os.path.isfile(os.path.join(folder, name))]
    if len(saved) == 1:  # a Trainer with save_only_model writes neither
        raise _error("a file of this checkpoint is missing", f"{OPTIMIZER_NAME} and {SCHEDULER_NAME}", saved[0], folder)
    file = os.path.join(folder, TRAINER_STATE_NAME)
    try:
        TrainerState.load_from_json(file)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _error("a file of this checkpoint cannot be read", "the state of a Trainer", str(error), file) from error
    for name in sorted(os.listdir(folder)):
        if name in saved or (name.startswith("rng_state") and name.endswith(".pth")) or name == "scaler.pt":
            _check_archive(os.path.join(folder, name))


def _check_archive(file: str) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise _error("a file of this checkpoint cannot be read", "what torch.save writes", str(error), file) from error
    if damaged is not None:
        raise _error("a file of this checkpoint is damaged", "the checksums in it", f"{damaged} has another", file)


def _error(message: str, expected: str, got: str, where: str) -> TrainingError:
    return TrainingError(
        message, expected=expected, got=got, where=where, fix="copy the checkpoint again, or resume from an earlier one"
    )
