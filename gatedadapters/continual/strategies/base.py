"""What a strategy owes: how one task is tuned on a model that has earlier ones behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gatedadapters.config.base import Config
from gatedadapters.continual.core import Core
from gatedadapters.structure import Structure

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


@dataclass(frozen=True)
class Tuned:
    """What tuning one task took.

    Attributes:
        elements: values trained, heads not counted.
        seconds: of training.
        probe_seconds: of finding out what to train.
        core: what was selected, where something was.
        structure: what was searched, where something was.
        merged: what was trained beside the backbone is part of it now; which of its tensors that changed is reported.
    """

    elements: int
    seconds: float
    probe_seconds: float = 0.0
    core: Core | None = None
    structure: Structure | None = None
    merged: bool = False


class Strategy(Config, ABC):
    """A way to tune task after task; its fields are its options. To add one: write its file, name its class in
    `strategies/__init__.py`.

    Whatever a strategy carries from task to task beside the model itself lives in private attributes that `begin` sets
    up; `remember` writes them into a stage's folder and `recall` reads them back, so that a killed stream goes on.
    """

    kind: ClassVar[str]

    def identity(self) -> dict[str, Any]:
        """Its options as data, with what is in the files that they name: a stream that goes on must find the same."""
        return {"kind": self.kind, **self.model_dump(mode="json")}

    def check(self, run: Run) -> None:
        """Before any compute: raise where this strategy and these tasks do not go together."""
        return None

    def begin(self, run: Run) -> None:
        """Called with the untrained model, once for a new stream and again where one goes on; must do the same."""
        return None

    def stages(self, run: Run) -> int:
        """How many times something is trained and everything evaluated."""
        return len(run.stream)

    @abstractmethod
    def tune(self, run: Run, index: int) -> Tuned:
        """Train task `index`; afterwards the model alone (nothing attached that `begin` did not attach) holds it."""

    def remember(self, run: Run, index: int, folder: Path) -> None:
        """Write what later tasks need to know into an existing folder, after task `index`."""
        return None

    def recall(self, run: Run, index: int, folder: Path) -> None:
        """Inverse of `remember`, called for each finished task in order; the model is in the last one's state."""
        return None

    @contextmanager
    def serving(self, run: Run, index: int) -> Iterator[None]:
        """Within this context the model answers task `index` as it would be served."""
        yield
