"""The run `allocate`: a structure of a given budget from a short probe, before any training."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from gatedadapters.allocation import Placement, place, placement_score
from gatedadapters.allocation.allocate import FRONTIER_POINTS
from gatedadapters.config import AllocateConfig, Budget
from gatedadapters.data import AnyTask, MixedTaskDataset, collator
from gatedadapters.errors import ConfigError
from gatedadapters.experiments import outputs
from gatedadapters.experiments.progress import say, silence_transformers
from gatedadapters.experiments.task_models import build_model, load_tasks
from gatedadapters.inspection import save_frontier_png, save_png
from gatedadapters.safe_files import file_errors
from gatedadapters.structure import Structure
from gatedadapters.structure.folder import STRUCTURE
from gatedadapters.training.devices import chosen_device


@dataclass(frozen=True)
class AllocateResult:
    """The result of an allocation. Its text is what `gatedadapters allocate` prints.

    Attributes:
        config: the configuration of the run.
        folder: the output folder.
        structure: what the budget keeps.
        placement: what every candidate is worth; structures of other budgets follow from it.
        seconds: duration of the whole run, loading included.
    """

    config: AllocateConfig
    folder: Path
    structure: Structure
    placement: Placement
    seconds: float

    def table(self) -> str:
        """What kinds of candidates are worth, by sub-layer and role, and how much of them is kept."""
        return self.placement.table(self.structure)

    def __str__(self) -> str:
        contents = {
            STRUCTURE: f"the structure; `structure: {self.folder}` in the file of a search trains it",
            outputs.STRUCTURE_PICTURE: "the structure as a picture",
            outputs.WORTH: "what every unit is worth",
            outputs.METRICS: "sizes and times",
            outputs.ALLOCATE_CONFIG: "the configuration; run it again with gatedadapters allocate",
        }
        placement = self.placement
        parts = [
            f"\nWorth by the score {placement.score}, found in {placement.seconds:.0f} s:\n",
            self.table(),
        ]
        for task, frontier in zip(self.structure.tasks, placement.frontiers, strict=False):
            parts.append(f"\nSize against held-out loss, {task}:\n\n{frontier}")
            contents[outputs.FRONTIER_PICTURE] = "size against held-out loss"
        parts.append(f"\n{self.structure}\n\n{self.seconds:.0f} s in all. In {self.folder}:")
        return "\n".join([*parts, outputs.list_outputs(contents)])


@file_errors("read or write a file of the run", "allocate")
def allocate(
    config: AllocateConfig | str | Path, out: str | Path | None = None, *, overwrite: bool = False
) -> AllocateResult:
    """Choose a structure before any training, as `gatedadapters allocate` does.

    Args:
        config: the configuration, or the path of its YAML file; that of a search will do.
        out: folder of the results. Default: the name of the YAML file, in the current folder.
        overwrite: whether to replace the results of an earlier run in that folder.

    Raises:
        GatedAdaptersError: the configuration, the model, the data, the score or the folder cannot be used; nothing is
            written then.
    """
    config, folder = outputs.config_and_folder(AllocateConfig, config, out)
    budget = _budget(config)
    placement_score(config.score, where="score")
    outputs.check_output_folder(folder, outputs.OF_ALLOCATE, overwrite=overwrite)
    silence_transformers()
    start = time.perf_counter()
    tasks = load_tasks(config)
    model, tokenizer = build_model(config, tasks)
    model.to(chosen_device(config.training.device))
    data = MixedTaskDataset(tasks, tokenizer, "train", config.training.max_length)
    say(f"{config.model}: {config.probe_batches} batches of each of {len(tasks)} task(s)")
    placement = place(
        model,
        config.resolved_space(),
        dict(_batches(config, tasks, data, tokenizer)),
        frontier=FRONTIER_POINTS if budget.within is not None else 0,
        within=budget.within,
        score=config.score,
        probe_batches=config.probe_batches,
        learning_rate=config.training.learning_rate,
        seed=config.training.seed,
    )
    result = AllocateResult(config, folder, placement.structure(budget), placement, time.perf_counter() - start)
    _write(result)
    return result


def _budget(config: AllocateConfig) -> Budget:
    if config.limit is None:
        raise ConfigError(
            "a penalty has no size to allocate",
            expected="a budget",
            got=f"penalty: {config.penalty!r}",
            where="allocate",
            fix="give budget: {params: ...}, {fraction: ...}, {flops: ...} or {within: ...} in place of penalty",
        )
    return config.limit


def _batches(
    config: AllocateConfig, tasks: Sequence[AnyTask], data: MixedTaskDataset, tokenizer: Any
) -> Iterator[tuple[str, DataLoader[Any]]]:
    """The training examples of each task, in a random order that follows from the seed."""
    ends = list(accumulate(data.sizes))
    for task, end, size in zip(tasks, ends, data.sizes, strict=True):
        yield (
            task.name,
            DataLoader(
                Subset(data, range(end - size, end)),
                batch_size=config.training.batch_size,
                shuffle=True,
                generator=torch.Generator().manual_seed(config.training.seed),
                collate_fn=collator(tasks, tokenizer),
            ),
        )


def _write(result: AllocateResult) -> None:
    config, folder, placement = result.config, result.folder, result.placement
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STRUCTURE).write_text(result.structure.to_json(), encoding="utf-8")
    (folder / outputs.ALLOCATE_CONFIG).write_text(config.to_yaml(folder.absolute()), encoding="utf-8")
    worth: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for key, values in placement.worth.items():
        for task, row in zip(placement.candidates.tasks, values.tolist(), strict=True):
            worth[task][key] = row
    (folder / outputs.WORTH).write_text(json.dumps(worth, indent=1) + "\n", encoding="utf-8")
    save_png(result.structure, folder / outputs.STRUCTURE_PICTURE)
    if placement.frontiers:
        save_frontier_png(
            dict(zip(placement.candidates.tasks, placement.frontiers, strict=True)),
            folder / outputs.FRONTIER_PICTURE,
            within=None if config.limit is None else config.limit.within,
        )
    outputs.write_metrics(
        folder,
        {
            "config": config.as_written(),
            "score": placement.score,
            "params": result.structure.params,
            "dense_params": result.structure.dense_params,
            "paths": len(result.structure.paths),
            "probe_seconds": placement.seconds,
            "seconds": result.seconds,
            "frontiers": [frontier.to_data() for frontier in placement.frontiers],
        },
    )
    outputs.write_table(folder, result.table())
