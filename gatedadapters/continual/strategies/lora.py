"""One LoRA at every linear map, trained on task after task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from gatedadapters.config import SearchSpace
from gatedadapters.continual.result import Attached
from gatedadapters.continual.strategies.base import Strategy, Tuned
from gatedadapters.structure import Structure
from gatedadapters.supernet.attach import detach

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class SequentialLoRA(Strategy):
    """The same low-rank maps learn every task; the model ends with them attached.

    Attributes:
        rank: at every linear map of the blocks.

    References:
        Hu et al. 2021, arXiv 2106.09685.
    """

    kind = "lora"
    rank: int = Field(8, gt=0)

    def begin(self, run: Run) -> None:
        """Attach it, by seed."""
        run.attach(uniform_lora(run, self.rank), seed=run.seed)

    def tune(self, run: Run, index: int) -> Tuned:
        """Train the maps."""
        adapters = run.adapters()
        run.require_heads(index)
        return Tuned(sum(p.numel() for p in adapters.weight_parameters()), run.fit(index))

    def remember(self, run: Run, index: int, folder: Path) -> None:
        """What is attached, so that a state can be restored into the plain model."""
        structure = run.adapters().structure
        assert structure is not None
        Attached(structure=structure.to_json(), heads=sorted(run.all_heads), seed=run.seed).write(folder)


def uniform_lora(run: Run, rank: int) -> Structure:
    """The structure of LoRA of one rank at every linear map of the blocks; `run.model` is left as it was."""
    space = SearchSpace.parse({"name": "uniform", "paths": [{"kind": "lora", "rank": rank}]}, where="uniform_lora")
    adapters = run.attach(space, seed=0)
    assert adapters.bank is not None
    structure = adapters.discretize(scores=adapters.bank.kept.new_ones(adapters.bank.kept.shape).float())
    detach(run.model)
    return structure
