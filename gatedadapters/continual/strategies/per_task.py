"""One adapter per task beside a frozen backbone, chosen by task: nothing is forgotten, storage grows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gatedadapters.artifacts import load_adapters
from gatedadapters.continual.result import ADAPTER
from gatedadapters.continual.stage import Stage
from gatedadapters.continual.strategies.base import TunedStage
from gatedadapters.continual.strategies.gated import Searching
from gatedadapters.supernet.adapters import get_adapters
from gatedadapters.supernet.attach import detach


class PerTask(Searching):
    """Each task is searched under the budget on the untouched backbone and served with its own adapter. A task that is
    not trained yet is answered by the backbone alone. Afterwards the adapters lie in the stream's folder, see
    `StreamResult.shelf`. A stream that is run without a folder returns its scores alone.
    """

    kind = "per_task"

    def tune(self, stage: Stage) -> TunedStage:
        """Search and train an adapter, store it, and detach it."""
        seconds = self.search(stage, phase="task")
        adapters = get_adapters(stage.model)
        structure = adapters.compact(adapters.structure or adapters.discretize(self.budget))
        adapters.save(stage.memory / ADAPTER)
        detach(stage.model)
        return TunedStage(structure.params, seconds, structure=structure)

    @contextmanager
    def serving(self, stage: Stage) -> Iterator[None]:
        """With the task's adapter, once it has one."""
        if not (stage.memory / ADAPTER).is_dir():
            yield
            return
        heads = {name: stage.model.get_parameter(name).detach().clone() for name in stage.all_heads}
        load_adapters(stage.model, stage.memory / ADAPTER).follows_ids = False
        try:
            yield
        finally:
            get_adapters(stage.model).detach()
            with torch.no_grad():  # the file also holds other tasks' heads, as they were then
                for name, value in heads.items():
                    stage.model.get_parameter(name).copy_(value)
