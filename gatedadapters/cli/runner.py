"""One search and its rivals, on the same data for the same number of steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from gatedadapters.adapters import Adapters
from gatedadapters.attachment import attach, detach
from gatedadapters.cli.setup import build_model, on_cpu, training_arguments, use_bf16
from gatedadapters.config import Budget, SearchConfig, SearchSpace
from gatedadapters.config.search import Rival
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset, TextTask
from gatedadapters.inspection import TensorBoardInspector, TensorBoardWriter
from gatedadapters.structure import Structure
from gatedadapters.training import GatedTrainer

SEARCHED = "searched"
ACCURACY = "test/accuracy"  # the tag that arms are compared by
RIVALS: Mapping[Rival, str] = {"uniform": "uniform LoRA", "random": "random structure"}


@dataclass(frozen=True)
class Arm:
    """What one way of spending the budget came to.

    Attributes:
        name: which way.
        accuracy: on test data, by task.
        structure: what is stored.
        seconds: of training.
    """

    name: str
    accuracy: dict[str, float]
    structure: Structure
    seconds: float

    @property
    def mean(self) -> float:
        """Over tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)


class Experiment:
    """A model, its tasks and their data; each arm starts from the same weights and leaves the model as it was.

    Args:
        config: what to do.
        tasks: with a test split each.
        logs: folder of TensorBoard runs, one per arm.
        built: the model and its tokenizer, where they are not those of `build_model`.
    """

    def __init__(
        self,
        config: SearchConfig,
        tasks: list[TextTask],
        logs: Path,
        built: tuple[nn.Module, PreTrainedTokenizerBase] | None = None,
    ) -> None:
        self.config, self.tasks, self.logs = config, tasks, logs
        self.names = tuple(task.name for task in tasks)
        self.model, self.tokenizer = built or build_model(config, tasks)
        self.train = MixedTaskDataset(tasks, self.tokenizer, "train", config.training.max_length)
        self.bf16 = use_bf16(config)
        self.trained: dict[str, Tensor] = {}  # the heads' first values

    def search(self, progress: tqdm[Any], artefact: Path, *, overwrite: bool) -> Arm:
        """Train gates and weights under the budget, prune, train on, compact, save, evaluate."""
        config = self.config
        adapters = self._attach(config.resolved_space())
        seconds = self.fit(adapters, SEARCHED, progress, searching=True)
        adapters.compact(adapters.structure or adapters.discretize(config.budget))
        adapters.save(artefact, overwrite=overwrite)
        return self.finish(adapters, SEARCHED, seconds, progress)

    def rival(self, kind: Rival, size: int, progress: tqdm[Any]) -> Arm:
        """Train a structure that nobody searched, of at most `size` parameters."""
        space = uniform_space(self.model, size) if kind == "uniform" else self.config.resolved_space()
        gated = self._attach(space)
        scores = rank_scores(gated) if kind == "uniform" else random_scores(gated, self.config.training.seed)
        structure = gated.discretize(Budget(params=size), scores=scores)
        detach(self.model)
        adapters = self._attach(structure)
        seconds = self.fit(adapters, RIVALS[kind], progress, searching=False)
        return self.finish(adapters, RIVALS[kind], seconds, progress)

    def adapted(self, space: SearchSpace | Structure, progress: tqdm[Any], *, searching: bool) -> Adapters:
        """Adapters trained from scratch, compact and still attached."""
        adapters = self._attach(space)
        self.fit(adapters, SEARCHED if searching else "adapter", progress, searching=searching)
        if adapters.bank is not None:
            adapters.compact(adapters.structure or adapters.discretize(self.config.budget))
        return adapters

    def everything(self) -> Structure:
        """The structure that keeps every candidate of the search space."""
        gated = self._attach(self.config.resolved_space())
        assert gated.bank is not None
        structure = gated.discretize(scores=torch.ones_like(gated.bank.kept))
        detach(self.model)
        return structure

    def _attach(self, space: SearchSpace | Structure) -> Adapters:
        adapters = attach(self.model, space, tasks=self.names, seed=self.config.training.seed)
        with torch.no_grad():
            for name, head in zip(adapters.head_names, adapters.head_parameters(), strict=True):
                head.copy_(self.trained.setdefault(name, head.detach().clone()))
        return adapters

    def fit(self, adapters: Adapters, name: str, progress: tqdm[Any], *, searching: bool) -> float:
        """Train what is attached, under the budget where gates are to be searched; seconds it took."""
        training = self.config.training
        progress.set_description(name)
        with tempfile.TemporaryDirectory(prefix="gatedadapters-") as scratch:
            args = training_arguments(training, scratch, bf16=self.bf16, use_cpu=on_cpu(self.config), logs=60)
            trainer = GatedTrainer(
                model=self.model,
                args=args,
                train_dataset=self.train,
                data_collator=MixedTaskCollator(self.tokenizer),
                budget=self.config.budget if searching else None,
                schedule=self.config.schedule if searching else None,
                gate_learning_rate=training.gate_learning_rate,
                task_temperature=training.task_temperature,
                callbacks=[
                    TensorBoardInspector(
                        self._log(name),
                        hparams={"arm": name, **self.config.model_dump(mode="json")},
                        metrics=[ACCURACY],
                    ),
                    Progress(progress, adapters),
                ],
            )
            trainer.remove_callback(PrinterCallback)
            start = time.perf_counter()
            trainer.train()
            return time.perf_counter() - start

    def finish(self, adapters: Adapters, name: str, seconds: float, progress: tqdm[Any]) -> Arm:
        """Score compact adapters on test data and take them out of the model."""
        progress.set_description(f"{name}: test data")
        accuracy = evaluate(self.model, self.tasks, self.tokenizer, self.config.training.max_length, bf16=self.bf16)
        structure = cast(Structure, adapters.structure)
        detach(self.model)
        arm = Arm(name, accuracy, structure, seconds)
        with TensorBoardWriter(self._log(name)) as writer:
            by_task = {f"{ACCURACY} {task}": value for task, value in accuracy.items()}
            writer.scalars({ACCURACY: arm.mean, **by_task}, self.config.training.steps)
        return arm

    def _log(self, name: str) -> Path:
        return self.logs / name.replace(" ", "-")


class Progress(TrainerCallback):
    """Moves a bar that several runs share, and shows the loss and how many paths are open."""

    def __init__(self, bar: tqdm[Any], adapters: Adapters) -> None:
        self.bar, self.adapters = bar, adapters

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One step further."""
        self.bar.update()

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """New values to show."""
        if logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"}
            if "gates/open_paths" in logs:
                shown["open paths"] = f"{logs['gates/open_paths']:.0%}"
            self.bar.set_postfix(shown, refresh=False)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tasks: Sequence[TextTask],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    split: str = "test",
    batch_size: int = 64,
    bf16: bool = False,
) -> dict[str, float]:
    """Accuracy by task, in evaluation mode. Batches hold texts of like length, which saves padding."""
    data, collate = MixedTaskDataset(tasks, tokenizer, split, max_length), MixedTaskCollator(tokenizer)
    device = next(model.parameters()).device
    order = sorted(range(len(data)), key=lambda index: len(data[index]["input_ids"]))
    right = torch.zeros(len(tasks), dtype=torch.long)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = collate([data[index] for index in order[start : start + batch_size]])
            labels = batch.pop("labels")
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(**{key: value.to(device) for key, value in batch.items()}).logits
            right.index_add_(0, batch["task_ids"], (logits.argmax(-1).cpu() == labels).long())
    finally:
        model.train(was_training)
    return {task.name: int(hits) / size for task, hits, size in zip(tasks, right, data.sizes, strict=True)}


def majority(tasks: Sequence[TextTask]) -> dict[str, float]:
    """Test accuracy of always naming the most frequent class of the training data."""
    result = {}
    for task in tasks:
        frequent = max(set(task.train.labels), key=task.train.labels.count)
        labels = task.split("test").labels
        result[task.name] = labels.count(frequent) / len(labels)
    return result


def uniform_space(model: nn.Module, size: int) -> SearchSpace:
    """LoRA at every linear map, with enough ranks to spend `size` parameters evenly."""
    probe = attach(model, SearchSpace.parse({"paths": [{"kind": "lora", "rank": 1}]}, where="uniform"))
    assert probe.bank is not None
    rank = int(size // probe.bank.dense_cost()) + 1
    detach(model)
    return SearchSpace.parse({"name": "uniform", "paths": [{"kind": "lora", "rank": rank}]}, where="uniform")


def rank_scores(adapters: Adapters) -> Tensor:
    """(tasks, units) scores that give every path its first rank before any gets its second."""
    assert adapters.bank is not None
    bank = adapters.bank
    scores = torch.zeros(bank.n_units)
    for where in bank.slices.values():
        scores[where] = -torch.arange(where.stop - where.start, dtype=torch.float32)
    tie_breaks = torch.rand(bank.n_units, generator=torch.Generator().manual_seed(0))
    return (scores + 0.5 * tie_breaks).expand(bank.tasks, -1)


def random_scores(adapters: Adapters, seed: int) -> Tensor:
    """(tasks, units) scores by chance, the same for all tasks: they share what is stored."""
    assert adapters.bank is not None
    bank = adapters.bank
    return torch.rand(bank.n_units, generator=torch.Generator().manual_seed(seed)).expand(bank.tasks, -1)
