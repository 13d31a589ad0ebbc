"""Cores by gated search: the paths that stay open are what a task may move."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import Field

from gatedadapters.config import Budget, Schedule, SearchSpace
from gatedadapters.continual.strategies.base import Strategy, Tuned
from gatedadapters.errors import ConfigError
from gatedadapters.paths import Path as AdapterPath
from gatedadapters.paths import path_class
from gatedadapters.structure import Structure
from gatedadapters.supernet.attach import detach

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class Searching(Strategy):
    """What strategies share that search a structure for each task.

    Attributes:
        space: what is offered.
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
        """With the search space itself in place of its name."""
        return {**super().identity(), "space": self.resolved_space().model_dump(mode="json")}

    def check(self, run: Run) -> None:
        """See that the space can be read."""
        self.resolved_space()

    def searched(self, run: Run, index: int, *, phase: str, steps: int | None = None) -> float:
        """Attach the space and search under the budget; adapters are left attached, pruned and trained. Seconds."""
        run.attach(self.resolved_space(), seed=run.phase_seed(index))
        run.require_heads(index)
        options = {
            "budget": self.budget,
            "schedule": self.schedule,
            "gate_learning_rate": self.gate_learning_rate,
        }
        return run.fit(index, phase=phase, steps=steps, gated=options)


class Gated(Searching):
    """A gated search on the model as it is finds a task's structure; what it learned is thrown away, the structure is
    trained from its start, and merged into the weights. Paths of several tasks may stand at one place.

    Attributes:
        search_steps: of the search; default: those of training.
    """

    kind = "gated"
    search_steps: int | None = Field(None, gt=0)

    def check(self, run: Run) -> None:
        """See that the paths can be merged.

        Raises:
            ConfigError: naming the kind that cannot.
        """
        offered = {options.kind: path_class(options) for options in self.resolved_space().paths}
        fixed = sorted(kind for kind, path in offered.items() if path.merge_into is AdapterPath.merge_into)
        if fixed:
            raise ConfigError(
                "these paths cannot become part of the weights",
                expected="lora or scale",
                got=", ".join(fixed),
                where="strategy gated: space",
                fix="choose another space, or the strategy per_task",
            )

    def tune(self, run: Run, index: int) -> Tuned:
        """Search, train what stays open, merge."""
        structure_file = run.running / "structure.json"
        if structure_file.exists():  # the search was finished before this run was stopped
            data = json.loads(structure_file.read_text(encoding="utf-8"))
            structure, probed = Structure.from_json(data["structure"]), float(data["seconds"])
        else:
            snapshot = run.snapshot("searched")
            probed = self.searched(run, index, phase="search", steps=self.search_steps)
            adapters = run.adapters()
            structure = adapters.structure or adapters.discretize(self.budget)
            detach(run.model)
            snapshot.restore(run.model)  # the head, which the search trained along
            run.write(structure_file, json.dumps({"structure": structure.to_json(), "seconds": probed}))
        adapters = run.attach(structure, seed=run.phase_seed(index))
        run.require_heads(index)
        seconds = run.fit(index)
        elements = sum(p.numel() for p in adapters.weight_parameters())
        adapters.merge_and_detach()
        return Tuned(elements, seconds, probed, structure=structure, merged=True)
