"""One search and its rivals, on the same data for the same number of steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from gatedadapters.config import Budget, CorruptionConfig, SearchConfig, SearchSpace
from gatedadapters.config.search import Rival
from gatedadapters.config.study import StudySide
from gatedadapters.data import MixedTaskCollator, TextTask, task_sampler
from gatedadapters.errors import BudgetError
from gatedadapters.experiments.setup import build_model, training_arguments, use_bf16
from gatedadapters.inspection import TensorBoardInspector, TensorBoardWriter
from gatedadapters.robustness import (
    Corruption,
    EmbeddingNoise,
    GradientNoise,
    NearestEmbedding,
    NoiseCallback,
    Perturbation,
    Vocabulary,
    corrupted_dataset,
    corruption,
)
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import attach, detach
from gatedadapters.training import GatedTrainer
from gatedadapters.training.devices import on_cpu

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
        perturbed: accuracy on perturbed test data, by task, where that was asked for.
    """

    name: str
    accuracy: dict[str, float]
    structure: Structure
    seconds: float
    perturbed: dict[str, float] | None = None

    @property
    def mean(self) -> float:
        """Over tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True)
class Trained:
    """What training a model came to.

    Attributes:
        params: what is stored: of adapters, or of the whole backbone; heads are not counted.
        structure: of adapters.
        seconds: of training.
    """

    params: int
    structure: Structure | None
    seconds: float


class Experiment:
    """A model, its tasks and their data; each arm starts from the same weights and leaves the model as it was.

    Args:
        config: what to do.
        tasks: with a test split each.
        logs: folder of TensorBoard runs, one per arm; None writes none.
        built: the model and its tokenizer, where they are not those of `build_model`.
        perturbations: those that it will be tested under; default: the configuration's.
        callbacks: further ones of every training.

    Raises:
        ConfigError: the noise or a perturbation is of no known kind.
    """

    def __init__(
        self,
        config: SearchConfig,
        tasks: list[TextTask],
        logs: Path | None,
        built: tuple[nn.Module, PreTrainedTokenizerBase] | None = None,
        *,
        perturbations: Sequence[CorruptionConfig] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.config, self.tasks, self.logs, self.callbacks = config, tasks, logs, callbacks
        self.names = tuple(task.name for task in tasks)
        if perturbations is None:
            perturbations = () if config.perturbation is None else (config.perturbation,)
        self.noise = None if config.noise is None else corruption(config.noise, where="noise: kind")
        self.perturbations = [corruption(p, only=Perturbation, where="perturbation: kind") for p in perturbations]
        self.model, self.tokenizer = built or build_model(config, tasks)
        alike = any(isinstance(c, NearestEmbedding) for c in (self.noise, *self.perturbations))
        self.vocabulary = Vocabulary.of(self.tokenizer, self.model if alike else None)
        length = config.training.max_length
        self.train = corrupted_dataset(tasks, self.tokenizer, "train", length, self.noise, self.vocabulary)
        self.bf16 = use_bf16(config)
        self.heads: dict[str, Tensor] = {}  # their first values

    def search(self, progress: tqdm[Any], artefact: Path, *, overwrite: bool) -> Arm:
        """Train gates and weights under the budget, prune, train on, compact, save, evaluate."""
        config = self.config
        adapters = self._attach(config.resolved_space())
        seconds = self.fit(adapters, SEARCHED, progress, searching=True)
        adapters.compact(adapters.structure or adapters.discretize(config.limit))
        adapters.save(artefact, overwrite=overwrite)
        return self.finish(adapters, SEARCHED, seconds, progress)

    def rival(self, kind: Rival, size: int, progress: tqdm[Any]) -> Arm:
        """Train a structure that nobody searched, of at most `size` parameters.

        Raises:
            BudgetError: no such structure is so small; the model is what it was.
        """
        if size < 1:
            raise BudgetError(
                "nothing is as small as an empty structure",
                expected="a searched structure that keeps something",
                got="0 parameters",
                where=RIVALS[kind],
                fix="a larger budget, or a smaller penalty",
            )
        if kind == "uniform":
            structure = self._evenly_spread(size)
        else:
            gated = self._attach(self.config.resolved_space())
            try:
                scores = random_scores(gated, self.config.training.seed)
                structure = gated.discretize(Budget(params=size), scores=scores)
            finally:
                detach(self.model)
        adapters = self._attach(structure)
        seconds = self.fit(adapters, RIVALS[kind], progress, searching=False)
        return self.finish(adapters, RIVALS[kind], seconds, progress)

    def adapted(self, space: SearchSpace | Structure, progress: tqdm[Any], *, searching: bool) -> Adapters:
        """Adapters trained from scratch, compact and still attached."""
        adapters = self._attach(space)
        self.fit(adapters, SEARCHED if searching else "adapter", progress, searching=searching)
        if adapters.bank is not None:
            adapters.compact(adapters.structure or adapters.discretize(self.config.limit))
        return adapters

    @contextmanager
    def fitted(self, side: StudySide, progress: tqdm[Any]) -> Iterator[Trained]:
        """Within this context the model is what training made of it, pruned and compact; then it is what it was.

        Args:
            side: `gated`: searched under the budget or the penalty; `uniform`: LoRA ranks of the budget's size, the
                same everywhere; `full`: every weight of the model is trained.
            progress: a bar that moves by a step at a time.

        Raises:
            BudgetError: uniform LoRA without a budget in parameters.
        """
        if side == "full":
            with self._fully_trained(progress) as done:
                yield done
            return
        adapters = self._attach(self.config.resolved_space())
        try:
            if side == "uniform":
                size = self._size(adapters)
                detach(self.model)
                adapters = self._attach(self._evenly_spread(size))
            seconds = self.fit(adapters, side, progress, searching=side == "gated")
            if adapters.bank is not None:
                adapters.compact(adapters.structure or adapters.discretize(self.config.limit))
            structure = cast(Structure, adapters.structure)
            yield Trained(structure.params, structure, seconds)
        finally:
            detach(self.model)

    @contextmanager
    def _fully_trained(self, progress: tqdm[Any]) -> Iterator[Trained]:
        with torch.no_grad():
            for name, value in self.heads.items():
                self.model.get_parameter(name).copy_(value)
        before = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        required = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        try:
            self.model.requires_grad_(True)
            seconds = self.fit(None, "full", progress, searching=False)
            backbone = getattr(self.model, getattr(self.model, "base_model_prefix", ""), self.model)
            yield Trained(sum(p.numel() for p in backbone.parameters()), None, seconds)
        finally:
            self.model.load_state_dict(before)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(required[name])
                parameter.grad = None

    def _size(self, adapters: Adapters) -> int:
        limit = self.config.limit
        if limit is None or limit.unit != "params":
            raise BudgetError(
                "uniform LoRA has the size of the budget",
                expected="a budget in parameters",
                got="a penalty" if limit is None else limit.unit,
                where="uniform",
                fix="give params or fraction, or leave uniform LoRA out",
            )
        assert adapters.bank is not None
        return int(limit.resolve(adapters.bank.dense_cost()))

    def _evenly_spread(self, size: int) -> Structure:
        """LoRA of at most `size` parameters, its ranks as even as they get."""
        gated = self._attach(uniform_space(self.model, size))
        try:
            return gated.discretize(Budget(params=size), scores=rank_scores(gated))
        finally:
            detach(self.model)

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
                head.copy_(self.heads.setdefault(name, head.detach().clone()))
        return adapters

    def fit(self, adapters: Adapters | None, name: str, progress: tqdm[Any], *, searching: bool) -> float:
        """Train what is attached (the whole model where nothing is), under the budget or the penalty where gates are to
        be searched; seconds it took.
        """
        training = self.config.training
        callbacks = [*self.callbacks, Progress(progress)]
        if self.logs is not None and adapters is not None:
            hparams = {"arm": name, **self.config.model_dump(mode="json")}
            callbacks.insert(0, TensorBoardInspector(self._log(self.logs, name), hparams=hparams, metrics=[ACCURACY]))
        noise = None
        if isinstance(self.noise, (EmbeddingNoise, GradientNoise)):
            noise = NoiseCallback(self.noise, self.vocabulary.special)
            callbacks.append(noise)
        progress.set_description(name)
        with tempfile.TemporaryDirectory(prefix="gatedadapters-") as scratch:
            args = training_arguments(training, scratch, bf16=self.bf16, use_cpu=on_cpu(training.device), logs=60)
            common: dict[str, Any] = {
                "model": self.model,
                "args": args,
                "train_dataset": self.train,
                "data_collator": MixedTaskCollator(self.tokenizer),
                "task_temperature": training.task_temperature,
                "callbacks": callbacks,
            }
            trainer: Trainer
            if adapters is None:
                trainer = MixedTaskTrainer(**common)
            else:
                trainer = GatedTrainer(
                    **common,
                    budget=self.config.limit if searching else None,
                    penalty=self.config.penalty if searching else None,
                    schedule=self.config.schedule if searching else None,
                    gate_learning_rate=training.gate_learning_rate,
                )
            trainer.remove_callback(PrinterCallback)
            start = time.perf_counter()
            try:
                trainer.train()
            finally:
                if noise is not None:
                    noise.remove()
            return time.perf_counter() - start

    def score(self, split: str = "test", perturbation: Corruption | None = None) -> dict[str, float]:
        """Accuracy of the model as it is now, by task."""
        return evaluate(
            self.model,
            self.tasks,
            self.tokenizer,
            self.config.training.max_length,
            split=split,
            bf16=self.bf16,
            perturbation=perturbation,
            vocabulary=self.vocabulary,
        )

    def finish(self, adapters: Adapters, name: str, seconds: float, progress: tqdm[Any]) -> Arm:
        """Score compact adapters on test data and take them out of the model."""
        progress.set_description(f"{name}: test data")
        accuracy = self.score()
        perturbed = self.score(perturbation=self.perturbations[0]) if self.perturbations else None
        structure = cast(Structure, adapters.structure)
        detach(self.model)
        arm = Arm(name, accuracy, structure, seconds, perturbed)
        if self.logs is not None:
            with TensorBoardWriter(self._log(self.logs, name)) as writer:
                by_task = {f"{ACCURACY} {task}": value for task, value in accuracy.items()}
                writer.scalars({ACCURACY: arm.mean, **by_task}, self.config.training.steps)
        return arm

    @staticmethod
    def _log(logs: Path, name: str) -> Path:
        return logs / name.replace(" ", "-")


class MixedTaskTrainer(Trainer):
    """transformers' Trainer with temperature sampling across tasks, for models without adapters."""

    def __init__(self, *args: Any, task_temperature: float, **kwargs: Any) -> None:
        self.task_temperature = task_temperature
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sizes = (train_dataset if train_dataset is not None else cast(Any, self.train_dataset)).sizes
        return task_sampler(
            sizes,
            temperature=self.task_temperature,
            batch_size=self.args.train_batch_size,
            num_samples=sum(sizes),
            seed=self.args.seed,
        )


class Progress(TrainerCallback):
    """Moves a bar that several runs share, and shows the loss and how many paths are open."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar

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
    perturbation: Corruption | None = None,
    vocabulary: Vocabulary | None = None,
) -> dict[str, float]:
    """Accuracy by task, in evaluation mode. Batches hold texts of like length, which saves padding."""
    vocabulary = vocabulary or Vocabulary.of(tokenizer)
    data = corrupted_dataset(tasks, tokenizer, split, max_length, perturbation, vocabulary)
    collate = MixedTaskCollator(tokenizer)
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
