"""Whether a run can be resumed from a checkpoint: all its files are whole, before anything of them is loaded."""

from __future__ import annotations

import os
import zipfile

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from gatedadapters.errors import TrainingError

_LAST = ".metadata"  # of a sharded checkpoint
OPTIMIZER_STEM = "optimizer"
"""How the names begin under which accelerate saves an optimiser trained with FSDP."""


def check_resumable(folder: str, *, sharded: bool = False) -> None:
    """Check that the files beside the weights of a checkpoint are there and whole.

    What torch saved is a zip archive. Its checksums are compared without unpickling anything.

    Args:
        folder: the checkpoint.
        sharded: whether the run that resumes trains with FSDP, which stores the optimiser's state in its own way.

    Raises:
        TrainingError: a file is missing or damaged.
    """
    if not os.path.isfile(os.path.join(folder, SAFE_WEIGHTS_NAME)):
        got = f"no {SAFE_WEIGHTS_NAME} in it" if os.path.isdir(folder) else "no such folder"
        raise _error("there is no checkpoint to resume from", "a folder that a Trainer here wrote", got, folder)
    names = sorted(os.listdir(folder))
    others = [name for name in names if name == f"{OPTIMIZER_STEM}.bin" or name.startswith(f"{OPTIMIZER_STEM}_")]
    if others if not sharded else os.path.isfile(os.path.join(folder, OPTIMIZER_NAME)):
        raise TrainingError(
            "this checkpoint's optimiser cannot be spread over these processes",
            expected="a checkpoint written with FSDP2" if sharded else "a checkpoint written without FSDP",
            got=OPTIMIZER_NAME if sharded else others[0],
            where=folder,
            fix=f"resume {'without' if sharded else 'with'} FSDP, on any number of processes",
        )
    saved = [name for name in (*others, OPTIMIZER_NAME, SCHEDULER_NAME) if name in names]
    if len(saved) == 1:  # a Trainer with save_only_model writes neither
        raise _error("a file of this checkpoint is missing", f"{OPTIMIZER_NAME} and {SCHEDULER_NAME}", saved[0], folder)
    for name in others:
        if os.path.isdir(os.path.join(folder, name)) and not os.path.isfile(os.path.join(folder, name, _LAST)):
            raise _error("a file of this checkpoint is missing", f"{_LAST}, which is written last", "none", name)
    file = os.path.join(folder, TRAINER_STATE_NAME)
    try:
        TrainerState.load_from_json(file)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _error("a file of this checkpoint cannot be read", "the state of a Trainer", str(error), file) from error
    for name in names:
        whole = name in saved and os.path.isfile(os.path.join(folder, name))
        if whole or (name.startswith("rng_state") and name.endswith(".pth")) or name == "scaler.pt":
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
