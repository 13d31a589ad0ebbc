"""The contract of a strategy: how one task is tuned on a model that has learned earlier ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from gatedadapters.config.base import Config
from gatedadapters.continual.core import Core
from gatedadapters.continual.stage import Stage, StreamSetup
from gatedadapters.structure import Structure


@dataclass(frozen=True)
class TunedStage:
    """What a strategy did in one stage.

    Attributes:
        elements: how many values were trained, heads not counted.
        seconds: of training.
        probe_seconds: of finding out what to train.
        core: the core, where one was selected; the runner stores it.
        structure: the structure, where one was searched.
        merged: whether adapters were trained and then merged into the weights. The runner then stores and reports
            which elements of the backbone the merge changed.
    """

    elements: int
    seconds: float
    probe_seconds: float = 0.0
    core: Core | None = None
    structure: Structure | None = None
    merged: bool = False


class Strategy(Config, ABC):
    """A way to tune task after task. The fields of a strategy are its options; `tune` is all that it must define.

    A strategy object holds no state of a stream. Between tasks, state lives in the model and in the folders of finished
    stages: `tune` writes files into `stage.memory`, later stages read them. A stream that was killed can therefore go
    on in another process, and one strategy object can serve several streams.

    To add a strategy, write its file in this folder and name its class in `strategies/__init__.py`. Test it with
    `gatedadapters.testing.StrategyContract`.
    """

    kind: ClassVar[str]

    def identity(self) -> dict[str, Any]:
        """The options as data, with what is in the files they name. Only an equal identity goes on with a stream."""
        return {"kind": self.kind, **self.model_dump(mode="json")}

    def check(self, setup: StreamSetup) -> None:
        """Raise where this strategy does not suit the tasks or the model. Called before anything is computed."""
        return None

    def stages(self, setup: StreamSetup) -> int:
        """How many stages the stream has: one for each task, unless tasks are trained together."""
        return len(setup.tasks)

    def begin(self, stage: Stage) -> None:
        """Prepare the untrained model, or measure something on it, before the first task.

        Called again, with the untrained model, each time a stream that was stopped goes on. It must then do the same.
        """
        return None

    @abstractmethod
    def tune(self, stage: Stage) -> TunedStage:
        """Train the stage's task. Afterwards the model holds what was learned, with nothing attached to it except what
        `begin` attached.
        """

    @contextmanager
    def serving(self, stage: Stage) -> Iterator[None]:
        """Within this context the model answers the stage's task as it would be served. Every task of the stream is
        evaluated in it after every stage, tasks that are not trained yet included.
        """
        yield
