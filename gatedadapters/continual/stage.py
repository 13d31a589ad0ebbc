"""What a strategy sees of a stream: the setup, which all stages share, and the stage in which one task is tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gatedadapters.config import ProbeConfig, SearchSpace, StreamTrainingConfig
from gatedadapters.continual.core import Core, load_core
from gatedadapters.continual.fitting import PenaltyTerm, Recipe, fit, phase_seed
from gatedadapters.continual.probing import Probe, probe
from gatedadapters.continual.result import MEMORY, stage_folder
from gatedadapters.continual.states import Snapshot
from gatedadapters.continual.tasks import Task, TaskStream
from gatedadapters.continual.tensors import TensorInfo
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import attach
from gatedadapters.training.devices import on_cpu


@dataclass(frozen=True, eq=False)
class StreamSetup:
    """What is known of a stream before it begins; see `check_stream`, which makes it.

    Attributes:
        model: the model that is tuned in place.
        tasks: the tasks in the order they come.
        training: how long and how fast each task is tuned.
        heads: for each task the names of its head's parameters.
        all_heads: names of the parameters of all heads, also of heads that no task of the stream uses.
        tensors: every parameter tensor of the backbone by name; heads are not part of the backbone.
        sample: one example of the first task as a batch, without its label; the layout is discovered with it.
    """

    model: nn.Module
    tasks: TaskStream
    training: StreamTrainingConfig
    heads: tuple[tuple[str, ...], ...]
    all_heads: frozenset[str]
    tensors: Mapping[str, TensorInfo]
    sample: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Stage(StreamSetup):
    """One stage of a stream: the task that is tuned in it, and what a strategy may do with the model.

    Training draws from seeds that depend on the stream's seed, the task's name and what the draw is for. So a stage
    that was killed ends with the same bits when it is run again.

    Attributes:
        index: position of the stage's task in the stream.
        folder: folder of the whole stream.
        watch: called with a line about what comes next.
    """

    index: int
    folder: Path
    watch: Callable[[str], None]

    @property
    def task(self) -> Task:
        """The task of this stage."""
        found: Task = self.tasks[self.index]
        return found

    @property
    def earlier(self) -> tuple[Self, ...]:
        """The stages before this one, in order."""
        return tuple(self.at(index) for index in range(self.index))

    def at(self, index: int) -> Self:
        """Another stage of the same stream."""
        return replace(self, index=index)

    # -- folders -------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> Path:
        """Folder for checkpoints and other files of the stage under way; it is removed when the stage is finished."""
        return self.folder / "running" / f"{self.index:03d}"

    @property
    def memory(self) -> Path:
        """Folder of what the strategy stores of this stage.

        `tune` writes into it what later stages need; they read it with `stage.at(index).memory`. What a killed stage
        had written is removed before the stage is run again.
        """
        stored = stage_folder(self.folder, self.index) / MEMORY
        return stored if stored.is_dir() else self.running / MEMORY

    def core(self) -> Core:
        """The core of a finished stage.

        Raises:
            ArtifactError: the stage is not finished, or its strategy selects no core.
        """
        return load_core(self.memory)

    # -- seeds and data ------------------------------------------------------------------------------------------------

    def seed_for(self, purpose: str) -> int:
        """The seed of one random draw of this stage. It depends on the purpose and the task's name, not on the strategy
        or on the task's position.
        """
        return phase_seed(self.training.seed, f"{purpose} {self.task.name}")

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """The task's training data once, in shuffled batches of `size` examples."""
        generator = torch.Generator().manual_seed(self.seed_for("batches"))
        task = self.task
        yield from DataLoader(task.train, size, shuffle=True, collate_fn=task.collate, generator=generator)

    # -- the model -----------------------------------------------------------------------------------------------------

    def train_only(self, names: Iterable[str], *, heads_of: Iterable[int] | None = None) -> int:
        """Let the named tensors and the heads of some tasks require gradients, and nothing else.

        Args:
            names: names of parameters.
            heads_of: positions of the tasks whose heads are trained; default: this task alone.

        Returns:
            How many elements the named tensors have; heads are not counted.
        """
        wanted = set(names)
        heads = self._heads_of(heads_of)
        count = 0
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in wanted or name in heads)
            count += parameter.numel() if name in wanted else 0
        return count

    def train_heads(self, heads_of: Iterable[int] | None = None) -> None:
        """Of all heads, let those of some tasks (default: this one) require gradients. The rest of the model is left
        as it is.
        """
        wanted = self._heads_of(heads_of)
        for name in self.all_heads:
            self.model.get_parameter(name).requires_grad_(name in wanted)

    def attach(self, space: SearchSpace | Structure, *, seed: int) -> Adapters:
        """Attach adapters to the model. They serve every batch, whatever task ids it carries for the heads."""
        device = next(self.model.parameters()).device
        sample = {key: value.to(device) for key, value in self.sample.items()}
        adapters = attach(self.model, space, sample, heads=sorted(self.all_heads), seed=seed)
        adapters.follows_ids = False
        return adapters

    def snapshot(self, name: str) -> Snapshot:
        """A copy of the model's state in a file of this stage."""
        return Snapshot(self.running / f"{name}.safetensors", self.model)

    def fit(
        self,
        *,
        data: Any = None,
        penalty: PenaltyTerm | None = None,
        steps: int | None = None,
        phase: str = "task",
        gated: dict[str, Any] | None = None,
    ) -> float:
        """Train what requires gradients; a training that was killed goes on from its last checkpoint.

        Args:
            data: a data set; default: the task's training data.
            penalty: a term that is added to the loss of every step.
            steps: optimiser steps; default: the configured number.
            phase: tells several trainings of one stage apart.
            gated: options of `GatedTrainer`, where gates are searched.

        Returns:
            The seconds that it took.

        Raises:
            TrainingError: the loss is not finite.
        """
        self.watch(f"{self.task.name}: {phase}")
        heads = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return fit(
            self.model,
            self.task.train if data is None else data,
            self.task.collate,
            self.recipe(steps or self.training.steps),
            folder=self.running / phase,
            seed=self.seed_for(phase),
            heads=[name for name in heads if name in self.all_heads],
            penalty=penalty,
            gated=gated,
        )

    def recipe(self, steps: int) -> Recipe:
        """The configured training, for a number of optimiser steps."""
        training = self.training
        return Recipe(
            steps,
            training.batch_size,
            training.learning_rate,
            training.head_learning_rate,
            "linear",
            training.warmup,
            training.weight_decay,
            training.precision == "bf16",
            on_cpu(training.device),
            training.checkpoint_steps,
        )

    # -- probes --------------------------------------------------------------------------------------------------------

    @property
    def probe_folder(self) -> Path:
        """Where the probe of this stage's task is stored."""
        return self.folder / "probes" / f"{self.index:03d}"

    def probe(self, config: ProbeConfig, *, elements: bool) -> Probe:
        """Probe the task from the model as it is; a probe that is finished is read.

        Args:
            config: how long and how fast.
            elements: keep the squared gradient of every element, as selection by element needs.

        Raises:
            ArtifactError: the folder holds a probe of another model or configuration.
        """
        self.watch(f"{self.task.name}: probe")
        return probe(
            self.model,
            self.task,
            self.probe_folder,
            config,
            heads=self.all_heads,
            own_head=frozenset(self.heads[self.index]),
            elements=elements,
            seed=phase_seed(self.training.seed, self.task.name),
            recipe=self.recipe(1),
        )

    def _heads_of(self, indices: Iterable[int] | None) -> set[str]:
        return {name for index in ((self.index,) if indices is None else indices) for name in self.heads[index]}
