"""Training and testing one arm after another on the same model, tasks and data.

An arm is one way of spending the parameter budget: a searched structure, or a rival of the same size that nobody
searched. Arms are comparable because each starts from the same weights and heads, sees the same data for the same
number of steps, and leaves the model as it was.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from gatedadapters.config import Budget, CorruptionConfig, SearchConfig, SearchSpace
from gatedadapters.config.search import Ability, Rival
from gatedadapters.data import AnyTask, ChoiceTask, MixedTaskDataset, TextTask, collator, predicts_tokens
from gatedadapters.data.measures import EXACT_MATCH
from gatedadapters.errors import BudgetError, ConfigError
from gatedadapters.experiments.evaluation import Scores, accuracies, mean_loss, score_tasks
from gatedadapters.experiments.progress import StepProgress
from gatedadapters.experiments.rivals import RIVAL_NAMES, random_scores, uniform_scores, uniform_space
from gatedadapters.experiments.task_models import build_model, origin_of
from gatedadapters.experiments.training import MixedTaskTrainer, training_arguments, use_bf16
from gatedadapters.inspection import TensorBoardInspector, TensorBoardWriter
from gatedadapters.paths import Path as AdapterPath
from gatedadapters.paths.peft_kinds import peft_has
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
from gatedadapters.training.devices import chosen_device

SEARCHED = "searched"
GIVEN = "given structure"
ACCURACY, LOSS = "test/accuracy", "test/loss"  # the TensorBoard tags that arms are compared by


@dataclass(frozen=True)
class Arm:
    """The result of one arm.

    Attributes:
        name: name of the arm in tables and logs.
        scores: loss, accuracy and other measures on test data, by task.
        structure: the structure of its adapters.
        seconds: duration of training.
        perturbed_scores: the same on perturbed test data; None if no perturbation is configured.
    """

    name: str
    scores: Scores
    structure: Structure
    seconds: float
    perturbed_scores: Scores | None = None

    @property
    def accuracy(self) -> dict[str, float]:
        """Accuracy on test data by task, of the tasks that have one."""
        return accuracies(self.scores)

    @property
    def perturbed(self) -> dict[str, float] | None:
        """Accuracy on perturbed test data, likewise; None if no perturbation is configured."""
        return None if self.perturbed_scores is None else accuracies(self.perturbed_scores)

    @property
    def mean(self) -> float:
        """Mean accuracy over the tasks that have one; nan if none has."""
        found = self.accuracy.values()
        return sum(found) / len(found) if found else math.nan

    @property
    def loss(self) -> float:
        """Mean loss over tasks."""
        return mean_loss(self.scores)


class ArmRunner:
    """Trains and tests arms. Each starts from the same weights and leaves the model as it was.

    Args:
        config: the configuration of all arms.
        tasks: the tasks, each with a test split.
        logs: folder of TensorBoard runs, one an arm; None writes no logs.
        built: a model and its tokenizer, in place of those of `build_model`.
        perturbations: perturbations of test data, in place of that of the configuration.
        callbacks: callbacks of every training.

    Raises:
        ArtifactError: the configured structure cannot be read.
        ConfigError: the model cannot be loaded, or the kind of a noise or a perturbation is unknown.
    """

    def __init__(
        self,
        config: SearchConfig,
        tasks: Sequence[AnyTask],
        logs: Path | None,
        built: tuple[nn.Module, PreTrainedTokenizerBase] | None = None,
        *,
        perturbations: Sequence[CorruptionConfig] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.config, self.tasks, self.logs, self.callbacks = config, tasks, logs, callbacks
        self.names = tuple(task.name for task in tasks)
        self.given = None if config.structure is None else Structure.load(config.structure)
        self.measures = {task.title: task.measures for task in config.tasks}
        if perturbations is None:
            perturbations = () if config.perturbation is None else (config.perturbation,)
        self.noise = None if config.noise is None else corruption(config.noise, where="noise: kind")
        self.perturbations = [corruption(p, only=Perturbation, where="perturbation: kind") for p in perturbations]
        self.model, self.tokenizer = built or build_model(config, tasks)
        needs_embeddings = any(isinstance(c, NearestEmbedding) for c in (self.noise, *self.perturbations))
        self.vocabulary = Vocabulary.of(self.tokenizer, self.model if needs_embeddings else None)
        length = config.training.max_length
        self.train_data = corrupted_dataset(tasks, self.tokenizer, "train", length, self.noise, self.vocabulary)
        if predicts_tokens(tasks):  # what cannot be scored after a training is refused before it
            for split in ("validation", "test"):
                MixedTaskDataset(tasks, self.tokenizer, split, length)
        self.bf16 = use_bf16(config)
        self.model.to(chosen_device(config.training.device))  # a model is also scored before any Trainer has it
        self.first_heads: dict[str, Tensor] = {}  # by name: the values that every arm's heads start from

    # -- arms ----------------------------------------------------------------------------------------------------------

    def run_search(self, progress: tqdm[Any], folder: Path, *, overwrite: bool) -> Arm:
        """Search, or train the structure that is configured; compact, save to `folder`, and test.

        Raises:
            ConfigError: the candidates cannot do what the configuration requires of the result.
        """
        name = SEARCHED if self.given is None else GIVEN
        adapters = self.attach(self.given or self.config.resolved_space())
        check_required(self.config.requires, adapters)
        seconds = self.train(adapters, name, progress, searching=self.given is None)
        self.compact(adapters)
        adapters.origin = origin_of(self.config, self.tasks)
        adapters.save(folder, overwrite=overwrite)
        return self.test_and_detach(adapters, name, seconds, progress, folder)

    def run_rival(self, kind: Rival, size: int, progress: tqdm[Any]) -> Arm:
        """Train and test a structure that nobody searched, of at most `size` parameters.

        Raises:
            BudgetError: there is no structure of this kind that is so small. The model is then as it was.
        """
        name = RIVAL_NAMES[kind]
        if size < 1:
            raise BudgetError(
                "nothing is as small as an empty structure",
                expected="a searched structure that keeps something",
                got="0 parameters",
                where=name,
                fix="a larger budget, or a smaller penalty",
            )
        adapters = self.attach(self.uniform_structure(size) if kind == "uniform" else self._random_structure(size))
        seconds = self.train(adapters, name, progress, searching=False)
        return self.test_and_detach(adapters, name, seconds, progress)

    def test_and_detach(
        self, adapters: Adapters, name: str, seconds: float, progress: tqdm[Any], folder: Path | None = None
    ) -> Arm:
        """Test compact adapters, detach them, and log the scores.

        Args:
            adapters: the adapters.
            name: name of the arm.
            seconds: the duration of their training.
            progress: a bar.
            folder: where they are saved; they are saved once more, with their scores.
        """
        progress.set_description(f"{name}: test data")
        scores = self.scores()
        perturbed = self.scores(perturbation=self.perturbations[0]) if self.perturbations else None
        structure = cast(Structure, adapters.structure)
        if folder is not None:
            adapters.origin = origin_of(self.config, self.tasks, scores)
            adapters.save(folder, overwrite=True)
        detach(self.model)
        arm = Arm(name, scores, structure, seconds, perturbed)
        if self.logs is not None:
            scalars = {LOSS: arm.loss, **{f"{LOSS} {task}": score.loss for task, score in scores.items()}}
            if arm.accuracy:
                scalars |= {ACCURACY: arm.mean, **{f"{ACCURACY} {task}": v for task, v in arm.accuracy.items()}}
            with TensorBoardWriter(self._log_folder(self.logs, name)) as writer:
                writer.scalars(scalars, self.config.training.steps)
        return arm

    # -- structures that nobody searched -------------------------------------------------------------------------------

    def uniform_structure(self, size: int) -> Structure:
        """LoRA at every linear map, of at most `size` parameters, with ranks as even as possible.

        Raises:
            BudgetError: `size` is below the cost of one rank. The model is then as it was.
        """
        adapters = self.attach(uniform_space(self.model, size))
        try:
            return adapters.discretize(Budget(params=size), scores=uniform_scores(adapters))
        finally:
            detach(self.model)

    def _random_structure(self, size: int) -> Structure:
        """Random units of the configured space, of at most `size` parameters."""
        adapters = self.attach(self.config.resolved_space())
        try:
            scores = random_scores(adapters, self.config.training.seed)
            return adapters.discretize(Budget(params=size), scores=scores)
        finally:
            detach(self.model)

    def whole_structure(self) -> Structure:
        """The structure that keeps every candidate of the configured space."""
        adapters = self.attach(self.config.resolved_space())
        assert adapters.bank is not None
        structure = adapters.discretize(scores=torch.ones_like(adapters.bank.kept))
        detach(self.model)
        return structure

    # -- the steps of an arm -------------------------------------------------------------------------------------------

    def attach(self, space: SearchSpace | Structure) -> Adapters:
        """Attach adapters for the tasks, with the configured seed, and reset the heads to their first values."""
        adapters = attach(self.model, space, tasks=self.names, seed=self.config.training.seed)
        with torch.no_grad():
            for name, head in zip(adapters.head_names, adapters.head_parameters(), strict=True):
                head.copy_(self.first_heads.setdefault(name, head.detach().clone()))
        return adapters

    def train(self, adapters: Adapters | None, name: str, progress: tqdm[Any], *, searching: bool) -> float:
        """Train once, for the configured number of steps.

        Args:
            adapters: the attached adapters; None trains the whole model.
            name: name of the arm, for the bar and the logs.
            progress: a bar, which moves by one a step.
            searching: whether the budget or the penalty acts on the gates.

        Returns:
            The duration in seconds.

        Raises:
            TrainingError: the loss is not finite.
        """
        callbacks = [*self.callbacks, StepProgress(progress)]
        if self.logs is not None and adapters is not None:
            hparams = {"arm": name, **self.config.model_dump(mode="json")}
            folder = self._log_folder(self.logs, name)
            callbacks.insert(0, TensorBoardInspector(folder, hparams=hparams, metrics=self._compared()))
        noise = None
        if isinstance(self.noise, (EmbeddingNoise, GradientNoise)):
            noise = NoiseCallback(self.noise, self.vocabulary.special)
            callbacks.append(noise)
        progress.set_description(name)
        with tempfile.TemporaryDirectory(prefix="gatedadapters-") as scratch:
            trainer = self._trainer(adapters, scratch, callbacks, searching=searching)
            trainer.remove_callback(PrinterCallback)
            start = time.perf_counter()
            try:
                trainer.train()
            finally:
                if noise is not None:
                    noise.remove()
            return time.perf_counter() - start

    def _trainer(
        self, adapters: Adapters | None, scratch: str, callbacks: list[TrainerCallback], *, searching: bool
    ) -> Trainer:
        config, training = self.config, self.config.training
        common: dict[str, Any] = {
            "model": self.model,
            "args": training_arguments(training, scratch, bf16=self.bf16, logs=60),
            "train_dataset": self.train_data,
            "data_collator": collator(self.tasks, self.tokenizer),
            "task_temperature": training.task_temperature,
            "callbacks": callbacks,
        }
        if adapters is None:
            return MixedTaskTrainer(**common)
        return GatedTrainer(
            **common,
            budget=config.limit if searching else None,
            penalty=config.penalty if searching else None,
            schedule=config.schedule if searching else None,
            prior=config.prior if searching else None,
            gate_learning_rate=training.gate_learning_rate,
        )

    def scores(self, split: str = "test", perturbation: Corruption | None = None) -> Scores:
        """Scores of the model as it is now, by task. A user's measures are taken without a perturbation."""
        measures = self.measures
        if perturbation is not None:
            measures = {name: tuple({EXACT_MATCH} & set(asked)) for name, asked in measures.items()}
        return score_tasks(
            self.model,
            self.tasks,
            self.tokenizer,
            self.config.training.max_length,
            split=split,
            bf16=self.bf16,
            perturbation=perturbation,
            vocabulary=self.vocabulary,
            measures=measures,
        )

    def _compared(self) -> list[str]:
        """The TensorBoard tags that arms are compared by."""
        scored = any(isinstance(task, (TextTask, ChoiceTask)) for task in self.tasks)
        return [ACCURACY, LOSS] if scored else [LOSS]

    def compact(self, adapters: Adapters) -> None:
        """Compact to the structure that the schedule fixed, or else to what the gates say now; without gates, nothing.

        Structures that nobody searched have no gates: they are compact already.
        """
        if adapters.bank is not None:
            adapters.compact()

    @staticmethod
    def _log_folder(logs: Path, name: str) -> Path:
        return logs / name.replace(" ", "-")


def check_required(requires: Sequence[Ability], adapters: Adapters) -> None:
    """Check that every kind of candidate can do what is required of the result of a search.

    Only kinds that this model has places for count: `weight_lora`, say, is offered at experts alone.

    Raises:
        ConfigError: some kinds cannot; they are named.
    """
    kinds = {path.kind: type(path) for _, path in adapters.typed_paths()}
    lasting = sorted(kind for kind, path in kinds.items() if path.merge_into is AdapterPath.merge_into)
    if "merge" in requires and lasting:
        raise ConfigError(
            "the search space holds kinds of path that cannot be merged into weights",
            expected="kinds that are linear maps, such as lora, scale and norm",
            got=", ".join(lasting),
            where="requires: merge, and space",
            fix="leave these kinds out of the space, or merge out of requires",
        )
    if "peft" in requires and not peft_has(kinds.values()):
        raise ConfigError(
            "the search space holds kinds of path that no peft adapter holds together",
            expected="lora with norm and rows, scale with norm, norm alone, or rows alone",
            got=", ".join(sorted(kinds)),
            where="requires: peft, and space",
            fix="leave the other kinds out of the space, or peft out of requires",
        )
