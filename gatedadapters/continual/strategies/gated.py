"""Merged structures: a gated search finds which paths a task needs, and these are trained and merged."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from gatedadapters.config import Budget, Schedule, SearchSpace
from gatedadapters.config.base import Count
from gatedadapters.continual.stage import Stage, StreamSetup
from gatedadapters.continual.strategies.base import Strategy, TunedStage
from gatedadapters.errors import ConfigError
from gatedadapters.paths import Path as AdapterPath
from gatedadapters.paths import path_class
from gatedadapters.safe_files import write_text
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import get_adapters
from gatedadapters.supernet.attach import detach
from gatedadapters.untrusted import load_json


class Searching(Strategy):
    """The base of strategies that search a structure for each task.

    Attributes:
        space: the search space, or the name or file of one.
        budget: what a task's structure may cost.
        schedule: of the search.
        gate_learning_rate: see `GatedTrainer`.
    """

    space: str | SearchSpace = "lora-all-linear"
    budget: Budget = Budget(fraction=0.125)
    schedule: Schedule = Schedule()
    gate_learning_rate: float | None = Field(None, gt=0)

    def resolved_space(self) -> SearchSpace:
        """The search space itself.

        Raises:
            ConfigError: unknown preset or invalid file.
        """
        return self.space if isinstance(self.space, SearchSpace) else SearchSpace.load(self.space)

    def identity(self) -> dict[str, Any]:
        """The options, with the search space itself in place of its name."""
        return {**super().identity(), "space": self.resolved_space().model_dump(mode="json")}

    def check(self, setup: StreamSetup) -> None:
        """Check that the space can be read.

        Raises:
            ConfigError: unknown preset or invalid file.
        """
        self.resolved_space()

    def search(self, stage: Stage, *, phase: str, steps: int | None = None) -> float:
        """Attach the space and search under the budget. The adapters are left attached, pruned and trained.

        Args:
            stage: whose task is trained.
            phase: see `Stage.fit`.
            steps: optimiser steps; default: the configured number.

        Returns:
            The seconds that it took.
        """
        stage.attach(self.resolved_space(), seed=stage.seed_for("draw"))
        stage.train_heads()
        options = {
            "budget": self.budget,
            "schedule": self.schedule,
            "gate_learning_rate": self.gate_learning_rate,
        }
        return stage.fit(phase=phase, steps=steps, gated=options)


class Gated(Searching):
    """A gated search on the model as it is finds a task's structure. What the search trained is thrown away. Then the
    structure is trained anew and merged into the weights. Structures of several tasks may have paths at the same point.

    Attributes:
        search_steps: optimiser steps of the search; default: those of training.
    """

    kind = "gated"
    search_steps: Count | None = None

    def check(self, setup: StreamSetup) -> None:
        """Check that the paths of the space can be merged.

        Raises:
            ConfigError: naming the kind that cannot.
        """
        offered = {options.kind: path_class(options) for options in self.resolved_space().paths}
        fixed = sorted(kind for kind, path in offered.items() if path.merge_into is AdapterPath.merge_into)
        if fixed:
            raise ConfigError(
                "these paths cannot be merged into the weights",
                expected="lora or scale",
                got=", ".join(fixed),
                where="strategy gated: space",
                fix="choose another space, or the strategy per_task",
            )

    def tune(self, stage: Stage) -> TunedStage:
        """Search, train what stays open, merge."""
        structure, search_seconds = self._structure(stage)
        adapters = stage.attach(structure, seed=stage.seed_for("draw"))
        stage.train_heads()
        seconds = stage.fit()
        elements = sum(p.numel() for p in adapters.weight_parameters())
        adapters.merge_and_detach()
        return TunedStage(elements, seconds, search_seconds, structure=structure, merged=True)

    def _structure(self, stage: Stage) -> tuple[Structure, float]:
        """What the search finds, and the seconds that it took; read where the search was finished before a kill."""
        file = stage.running / "structure.json"
        if file.exists():
            data = load_json(file.read_text(encoding="utf-8"))
            return Structure.from_json(data["structure"]), float(data["seconds"])
        snapshot = stage.snapshot("searched")
        seconds = self.search(stage, phase="search", steps=self.search_steps)
        adapters = get_adapters(stage.model)
        structure = adapters.structure or adapters.discretize(self.budget)
        detach(stage.model)
        snapshot.restore(stage.model)  # the search also trained the task's head
        write_text(file, json.dumps({"structure": structure.to_json(), "seconds": seconds}))
        return structure, seconds
