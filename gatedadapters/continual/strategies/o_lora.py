"""Orthogonal subspaces: a new LoRA for each task, held orthogonal to those of earlier ones, then merged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from gatedadapters.continual.strategies.base import Strategy, Tuned
from gatedadapters.continual.strategies.lora import uniform_lora
from gatedadapters.paths.lora import LoRA
from gatedadapters.safe_files import read_all, write_tensors

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run

DIRECTIONS = "directions.safetensors"


class OLoRA(Strategy):
    """`loss + orthogonality Σ_i Σ_jk |A_i A_tᵀ|_jk`: the rows that a task's maps read by are pushed out of the span of
    earlier tasks'. A finished task's maps are merged into the weights; of it the A are kept.

    Attributes:
        rank: of each task's maps, at every linear map of the blocks.
        orthogonality: λ₁.

    References:
        Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning", arXiv 2310.14152,
        equation 8 and released code, which takes absolute values where the paper takes squares.
    """

    kind = "o_lora"
    rank: int = Field(8, gt=0)
    orthogonality: float = Field(0.5, ge=0)
    _earlier: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    def begin(self, run: Run) -> None:
        """No directions are taken yet."""
        self._earlier = {}

    def tune(self, run: Run, index: int) -> Tuned:
        """Train new maps beside what is merged, and merge them."""
        adapters = run.attach(uniform_lora(run, self.rank), seed=run.phase_seed(index))
        paths = {key: path for key, path in adapters.typed_paths() if isinstance(path, LoRA)}
        run.require_heads(index)
        earlier = dict(self._earlier)

        def penalty() -> Tensor:
            terms = []
            for key, taken in earlier.items():
                own = paths[key].down
                earlier[key] = taken.to(own.device)  # the Trainer has moved the model since it was attached
                terms.append((earlier[key] @ own.T).abs().sum())
            return self.orthogonality * torch.stack(terms).sum()

        seconds = run.fit(index, penalty=penalty if earlier and self.orthogonality else None)
        for key, path in paths.items():
            own = path.down.detach().cpu().clone()
            self._earlier[key] = torch.cat([self._earlier[key], own]) if key in self._earlier else own
        elements = sum(p.numel() for p in adapters.weight_parameters())
        adapters.merge_and_detach()
        return Tuned(elements, seconds, merged=True)

    def remember(self, run: Run, index: int, folder: Path) -> None:
        """All directions taken."""
        write_tensors(folder / DIRECTIONS, self._earlier, metadata={"format": "gatedadapters directions 1"})

    def recall(self, run: Run, index: int, folder: Path) -> None:
        """The last one holds those of all."""
        self._earlier = read_all(folder / DIRECTIONS)[0]
