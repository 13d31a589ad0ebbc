"""One LoRA at every linear map, trained on task after task."""

from __future__ import annotations

from gatedadapters.config import SearchSpace
from gatedadapters.config.base import Units
from gatedadapters.continual.result import AttachedAdapters
from gatedadapters.continual.stage import Stage
from gatedadapters.continual.strategies.base import Strategy, TunedStage
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import get_adapters
from gatedadapters.supernet.attach import detach


class SequentialLoRA(Strategy):
    """The same low-rank matrices learn every task; the model ends with them attached.

    Attributes:
        rank: of the LoRA at every linear map of the blocks.

    References:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """

    kind = "lora"
    rank: Units = 8

    def begin(self, stage: Stage) -> None:
        """Attach the LoRA to the untrained model."""
        stage.attach(uniform_lora(stage, self.rank), seed=stage.training.seed)

    def tune(self, stage: Stage) -> TunedStage:
        """Train the LoRA, and store what is attached, so that a state can be restored into the plain model."""
        adapters = get_adapters(stage.model)
        stage.train_heads()
        seconds = stage.fit()
        assert adapters.structure is not None
        AttachedAdapters(
            structure=adapters.structure.to_json(), heads=sorted(stage.all_heads), seed=stage.training.seed
        ).write(stage.memory)
        return TunedStage(sum(p.numel() for p in adapters.weight_parameters()), seconds)


def uniform_lora(stage: Stage, rank: int) -> Structure:
    """The structure of LoRA of one rank at every linear map of the blocks; `stage.model` is left as it was."""
    space = SearchSpace.parse({"name": "uniform", "paths": [{"kind": "lora", "rank": rank}]}, where="uniform_lora")
    adapters = stage.attach(space, seed=0)
    assert adapters.bank is not None
    structure = adapters.discretize(scores=adapters.bank.kept.new_ones(adapters.bank.kept.shape).float())
    detach(stage.model)
    return structure
