"""What a saved adapter consists of, and writing it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gatedadapters.errors import ArtifactError
from gatedadapters.safe_files import DTYPES, whole_folder, write_tensors

if TYPE_CHECKING:
    from gatedadapters.supernet.adapters import Adapters

STRUCTURE, WEIGHTS = "structure.json", "adapters.safetensors"
FILES = frozenset({STRUCTURE, WEIGHTS})


def save(adapters: Adapters, folder: str | Path, *, dtype: torch.dtype, overwrite: bool) -> None:
    """See `Adapters.save`."""
    if adapters.bank is not None or adapters.structure is None:
        raise ArtifactError(
            "only compact adapters are saved",
            expected="adapters whose gates are folded into their weights",
            got=f"gates over {len(adapters.paths)} candidate paths",
            where="Adapters.save",
            fix="call adapters.compact() first; a Trainer's checkpoints keep gates for resuming",
        )
    if dtype not in DTYPES.values():
        raise ArtifactError(
            expected="torch.float32 or torch.bfloat16",
            got=str(dtype),
            where="Adapters.save(dtype=)",
            fix="choose one of them",
        )
    tensors = {name: value.to(dtype) for name, value in state(adapters).items()}
    with whole_folder(folder, files=FILES, overwrite=overwrite) as new:
        (new / STRUCTURE).write_text(adapters.structure.to_json(), encoding="utf-8")
        write_tensors(new / WEIGHTS, tensors, metadata={"format": "gatedadapters 1"})


def state(adapters: Adapters) -> dict[str, Tensor]:
    """What was learned: `paths.<key>.<parameter>` (routing included), `heads.<parameter of the model>`."""
    paths = {f"paths.{name}": value for name, value in adapters.paths.state_dict().items()}
    heads = {
        f"heads.{name}": value for name, value in zip(adapters.head_names, adapters.head_parameters(), strict=True)
    }
    return paths | heads
