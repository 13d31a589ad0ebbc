"""One structure per task beside a frozen backbone, chosen by task id: nothing is forgotten, storage grows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gatedadapters.artifacts import load_adapters
from gatedadapters.continual.result import ADAPTER
from gatedadapters.continual.strategies.base import Tuned
from gatedadapters.continual.strategies.gated import Searching
from gatedadapters.supernet.adapters import get_adapters
from gatedadapters.supernet.attach import detach

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class PerTask(Searching):
    """Each task is searched under the budget on the untouched backbone and served with its own adapter. A task that is
    not trained yet is answered by the backbone alone. Afterwards the adapters lie in the stream's folder, see
    `StreamResult.shelf`; run without one, the stream leaves its scores alone.
    """

    kind = "per_task"

    def tune(self, run: Run, index: int) -> Tuned:
        """Search and train, put the adapter aside."""
        seconds = self.searched(run, index, phase="task")
        adapters = run.adapters()
        structure = adapters.compact(adapters.structure or adapters.discretize(self.budget))
        adapters.save(run.running / ADAPTER, overwrite=True)
        detach(run.model)
        return Tuned(structure.params, seconds, structure=structure)

    def remember(self, run: Run, index: int, folder: Path) -> None:
        """The adapter."""
        shutil.copytree(run.running / ADAPTER, folder / ADAPTER)

    @contextmanager
    def serving(self, run: Run, index: int) -> Iterator[None]:
        """With the task's adapter, where it has one."""
        places = [run.memory(index) / ADAPTER, *([run.running / ADAPTER] if index == run.now else [])]
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            yield
            return
        heads = {name: run.model.get_parameter(name).detach().clone() for name in run.all_heads}
        load_adapters(run.model, found).follows_ids = False
        try:
            yield
        finally:
            get_adapters(run.model).detach()
            run.put(heads)  # the file also holds other tasks' heads, as they were then
