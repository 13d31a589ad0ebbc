"""Orthogonal subspaces: a new LoRA for each task, held orthogonal to those of earlier tasks, then merged."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from gatedadapters.artefact_files import write_tensors
from gatedadapters.config.base import Units
from gatedadapters.continual.result import read_memory
from gatedadapters.continual.stage import Stage
from gatedadapters.continual.strategies.base import Strategy, TunedStage
from gatedadapters.continual.strategies.lora import uniform_lora
from gatedadapters.paths.lora import LoRA

DIRECTIONS = "directions.safetensors"


class OLoRA(Strategy):
    """Adds `orthogonality Σ_i Σ_jk |A_i A_tᵀ|_jk` to the loss: the rows of a task's A, which read the hidden state, are
    pushed out of the span of earlier tasks' rows. A finished task's LoRA is merged into the weights, and its A is
    stored.

    Attributes:
        rank: of each task's LoRA, at every linear map of the blocks.
        orthogonality: λ₁.

    References:
        Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning", arXiv 2310.14152,
        equation 8 and released code, which takes absolute values where the paper takes squares.
    """

    kind = "o_lora"
    rank: Units = 8
    orthogonality: float = Field(0.5, ge=0)

    def tune(self, stage: Stage) -> TunedStage:
        """Train a new LoRA on the model that earlier ones are merged into, merge it, and store the A of all tasks."""
        earlier = read_memory(stage.earlier[-1].memory, DIRECTIONS) if stage.index else {}
        adapters = stage.attach(uniform_lora(stage, self.rank), seed=stage.seed_for("draw"))
        paths = {key: path for key, path in adapters.typed_paths() if isinstance(path, LoRA)}
        stage.train_heads()

        def penalty() -> Tensor:
            terms = []
            for key, rows in earlier.items():
                own = paths[key].down
                earlier[key] = rows.to(own.device)  # the Trainer has moved the model since the LoRA was attached
                terms.append((earlier[key] @ own.T).abs().sum())
            return self.orthogonality * torch.stack(terms).sum()

        seconds = stage.fit(penalty=penalty if earlier and self.orthogonality else None)
        directions = {}
        for key, path in paths.items():
            own = path.down.detach().cpu().clone()
            directions[key] = torch.cat([earlier[key].cpu(), own]) if key in earlier else own
        write_tensors(stage.memory / DIRECTIONS, directions, metadata={"format": "gatedadapters directions 1"})
        elements = sum(p.numel() for p in adapters.weight_parameters())
        adapters.merge_and_detach()
        return TunedStage(elements, seconds, merged=True)
