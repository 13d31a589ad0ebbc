"""Rewriting a LoRA so that readers which ignore rank_pattern and alpha_pattern compute what peft computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from gatedadapters.artefact_files import check_finite, tensors_digest, write_tensors
from gatedadapters.artifacts.export_peft import (
    BACKBONE,
    COMPUTED,
    CONFIG,
    PREFIX,
    TENSORS,
    WEIGHTS,
    config_digest,
    lora_config,
)
from gatedadapters.artifacts.peft_folder import Matrices, PeftFolder, read_peft
from gatedadapters.artifacts.peft_records import LoraRecord
from gatedadapters.errors import ArtifactError
from gatedadapters.safe_files import whole_folder


@dataclass(frozen=True)
class Normalised:
    """What `normalise` wrote. Its text is what the command prints.

    Attributes:
        folder: the new folder.
        rank: the rank of all modules.
        ranks: those that they had, by module.
        scales: what was folded into B, by module.
    """

    folder: FilePath
    rank: int
    ranks: dict[str, int]
    scales: dict[str, float]

    def __str__(self) -> str:
        padded = sum(rank != self.rank for rank in self.ranks.values())
        scales = sorted(set(self.scales.values()))
        spread = " to ".join(f"{scale:g}" for scale in dict.fromkeys((scales[0], scales[-1])))
        return (
            f"{self.folder}: rank {self.rank} at {len(self.ranks)} modules, {padded} of them padded with zeros; "
            f"scales of {spread} folded into B, so that every reader finds a scale of 1"
        )


def normalise(
    folder: str | FilePath, out: str | FilePath, *, overwrite: bool = False, verify: bool = True
) -> Normalised:
    """Rewrite a LoRA that peft saved so that a reader of `r` and `lora_alpha` alone computes the same.

    Some readers, vLLM's among them, take the scale of all modules from `lora_alpha / r` and know no `rank_pattern` and
    no `alpha_pattern`. Here every module's scale (also alpha / sqrt(r) of a rank-stabilised LoRA) is folded into its B,
    all A and B are padded with zeros to one rank, and `lora_alpha = r`. Weights are written in float32, because B times
    a scale is no bfloat16. Trained heads and tokens are taken over; neither they nor DoRA are known to such readers.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        out: a new or an empty folder.
        overwrite: replace an adapter that `out` holds, in one step.
        verify: check the digests that `export_peft` stored; folders that peft wrote have none.

    Raises:
        ArtifactError: see `import_peft`; or the adapter is no LoRA, has magnitudes (DoRA), or patterns beside LoRA at
            parameters; or `out` is not free. Nothing is written.
    """
    read = read_peft(folder, verify=verify)
    record = read.record
    if not isinstance(record, LoraRecord) or record.use_dora:
        raise _refused("only a plain LoRA has a scale to fold", "LORA, without use_dora", read)
    if read.parameters and (record.rank_pattern or record.alpha_pattern):
        raise _refused("which pattern counts for a parameter depends on the model", "no patterns", read)
    maps = read.maps | read.tables
    ranks = {name: len(matrices.down) for name, matrices in maps.items()}
    scales = {name: read.scale_of(name, rank) for name, rank in ranks.items()}
    ranks |= dict.fromkeys(read.parameters, record.r)
    scales |= {name: read.scale_of(name, record.r) for name in read.parameters}
    rank = max(ranks.values(), default=record.r)
    tensors = _tensors(read, rank, scales)
    check_finite(tensors, where=read.where, fix="train again with a lower rate")
    config = read.config | _fields(read, rank)
    metadata = {"format": "pt", TENSORS: tensors_digest(tensors), COMPUTED: config_digest(config)}
    if read.backbone is not None:
        metadata[BACKBONE] = read.backbone
    with whole_folder(out, files={CONFIG, WEIGHTS}, overwrite=overwrite) as new:
        (new / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        write_tensors(new / WEIGHTS, tensors, metadata=metadata)
    return Normalised(FilePath(out), rank, ranks, scales)


def _fields(read: PeftFolder, rank: int) -> dict[str, Any]:
    """The fields of the configuration that change."""
    tokens = {name: tokens for name, (tokens, _) in read.rows.items()}  # rows are sorted by token
    return lora_config({}, rank) | ({"trainable_token_indices": tokens} if tokens else {})


def _tensors(read: PeftFolder, rank: int, scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Everything that the folder holds, with one rank and a scale of 1."""
    found: dict[str, Tensor] = {}
    for part, ends in (
        (read.maps, ("lora_A.weight", "lora_B.weight")),
        (read.tables, ("lora_embedding_A", "lora_embedding_B")),
    ):
        for name, matrices in part.items():
            down, up = _padded(matrices, rank)
            found[f"{name}.{ends[0]}"], found[f"{name}.{ends[1]}"] = down, up
    for name, stacks in read.parameters.items():  # no patterns, hence all of one rank
        for depth, stack in enumerate(stacks):
            inner = f"{name}{'.base_layer' * depth}"
            found[f"{inner}.lora_A.weight"] = stack.down
            found[f"{inner}.lora_B.weight"] = stack.up * scales[name]
    for name, (_, rows) in read.rows.items():
        found[f"{name}.token_adapter.trainable_tokens_delta"] = rows
    found |= {f"{name.removesuffix('.weight')}.base_layer.weight": value for name, value in read.base.items()}
    return {PREFIX + name: value.float() for name, value in (found | read.heads).items()}


def _padded(matrices: Matrices, rank: int) -> tuple[Tensor, Tensor]:
    spare = rank - len(matrices.down)
    return F.pad(matrices.down, (0, 0, 0, spare)), F.pad(matrices.up, (0, spare))


def _refused(message: str, expected: str, read: PeftFolder) -> ArtifactError:
    record = read.record
    got = f"{record.peft_type}" + (" with use_dora" if getattr(record, "use_dora", False) else "")
    if read.parameters:
        got = f"{got} at parameters of {next(iter(read.parameters))}, with patterns"
    return ArtifactError(
        message,
        expected=expected,
        got=got,
        where=read.where,
        fix="load it with import_peft on its model, compact, and write it with export_peft, which names what cannot be",
    )
