"""Progress of a run, on the standard error output; results alone go to the standard output."""

from __future__ import annotations

import sys
from typing import Any

import transformers
from tqdm.auto import tqdm
from transformers import TrainerCallback


def say(text: str) -> None:
    """Print a line on the standard error output."""
    print(text, file=sys.stderr)


def progress_bar(steps: int) -> tqdm[Any]:
    """A bar over the optimiser steps of a whole run, on the standard error output."""
    return tqdm(total=steps, unit="step", dynamic_ncols=True, file=sys.stderr)


def silence_transformers() -> None:
    """Let transformers show errors only: its own bars and warnings would break the bar of the run."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


class StepProgress(TrainerCallback):
    """Moves a bar by one a step, and shows the loss and the share of open paths. Several trainings may share a bar."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Move the bar by one."""
        self.bar.update()

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show what the Trainer has just logged."""
        if logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"}
            if "gates/open_paths" in logs:
                shown["open paths"] = f"{logs['gates/open_paths']:.0%}"
            self.bar.set_postfix(shown, refresh=False)
