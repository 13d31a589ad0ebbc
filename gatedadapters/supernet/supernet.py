"""What hooks call while a model with gated candidates runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gatedadapters.backbone import Layout
from gatedadapters.backbone.fingerprint import Fingerprint
from gatedadapters.config import SearchSpace
from gatedadapters.errors import AttachError, TaskError, TrainingError
from gatedadapters.gates import GateBank, Pressure
from gatedadapters.paths import Path, SkippedSite
from gatedadapters.runtime.call import Call, begin, current, end, is_switched_off, new_serial
from gatedadapters.runtime.sharding import (
    EndOfBackward,
    average,
    check_alike,
    check_layout_of_weights,
    digest,
    groups_of,
    home_of,
    in_a_group,
    is_sharded,
    replicate,
    replicated,
    without_mark,
)
from gatedadapters.runtime.steps import CLOCK, StepListener, Turn
from gatedadapters.structure import Structure
from gatedadapters.supernet.merging import Merged
from gatedadapters.supernet.reach import Reach
from gatedadapters.supernet.routing import checked_ids

NAME = "gated_adapters"


class Supernet(nn.Module, StepListener):
    """Candidate paths and their gates, registered in a model as `gated_adapters`; hooks reach both through it.

    Users call `Adapters`, which derives from it.

    Attributes:
        paths: the paths by key, `module/name:kind`.
        bank: the gates; None once compact.
        pressure: what holds the gates closed; None without a penalty.
        tasks: task names; task ids are positions in it.
        skipped_sites: selected places where a candidate could not go, and why.
        structure: the discrete result, once there is one.
        head_names: parameters of the model's own task heads, trained and saved along.
        merged: what a merge changed, None while the paths run beside the backbone.
        follows_ids: whether `task_ids` of a call say which task is meant; False where they are the model's own alone.
    """

    turn: ClassVar[Turn] = Turn.PRUNE
    follows_ids = True
    paths: nn.ModuleDict
    tasks: tuple[str, ...]
    bank: GateBank | None
    pressure: Pressure | None

    def __init__(
        self, paths: Mapping[str, Path], *, tasks: Sequence[str], space: SearchSpace, identity: Fingerprint, seed: int
    ) -> None:
        super().__init__()
        self.paths = nn.ModuleDict(paths)
        self.bank = None
        self.pressure = None
        self.tasks, self.space, self.identity, self.seed = tuple(tasks), space, identity, seed
        self.skipped_sites: tuple[SkippedSite, ...] = ()
        self.layout: Layout | None = None
        self.reach: Reach | None = None
        self.structure: Structure | None = None
        self.head_names: tuple[str, ...] = ()
        self.merged: Merged | None = None
        self.on_shelf = 0  # the number that a shelf gave them; 0 where they are on none
        self.heads = nn.ParameterList()  # on a shelf: their own values of the model's task heads
        self._task: int | None = 0 if len(self.tasks) == 1 else None
        self._model: list[nn.Module] = []  # a list, so that the backbone is not registered as a child of its own child
        self._handles: list[Any] = []
        self._forwards: list[Any] = []
        self._required_grad: frozenset[str] = frozenset()
        self._trained_in: threading.Thread | None = None
        self._enabled = True
        self._averaging: EndOfBackward | None = None
        self.serial = new_serial(self)
        replicate(self)

    # -- one forward call ----------------------------------------------------------------------------------------------

    def begin_forward(self, task_ids: Tensor | None, batch: int | None = None) -> None:
        """Called before each forward of the model: begin a step if the gates have moved, then a `Call`.

        Args:
            task_ids: (batch,), as they were given; None where they were not.
            batch: number of examples, as far as the call's arguments tell.

        Raises:
            TaskError: the ids fit neither the tasks nor the batch.
            TrainingError: another thread is training this model.
        """
        call = self.call_for(task_ids, batch)
        if self._averaging is None:
            self._follow_sharding()
        self.begin_step()
        if self.bank is not None:
            self.bank.refresh()  # compiled code takes what it finds
        begin(self, call)

    def call_for(self, task_ids: Tensor | None, batch: int | None = None) -> Call:
        """The call that these arguments ask for; raises as `begin_forward` does."""
        given = task_ids if self.follows_ids else None
        task = self._default_task() if given is None else checked_ids(self._model, self.tasks, given, batch)
        if self.merged is not None:
            self._check_merged(self.merged, task)
        return Call(runs=self._runs(), task=task)

    def call_outside(self) -> Call:
        """What holds for a part of the model that is called by itself: the task that is set."""
        return Call(runs=self._runs(), task=self._default_task())

    def _default_task(self) -> int | None:
        """The task of a call without task ids: what is set here, or in a classifier before these were attached."""
        named = self._classifier() if self._task is None else None
        return self.tasks.index(named.task) if named is not None and named.task in self.tasks else self._task

    def end_forward(self) -> None:
        """Called after each forward of the model, also where it raised."""
        end(self)

    def begin_step(self) -> None:
        """In a forward that trains: draw this step's gates and let the pressure ascend, once after each optimiser step.

        Raises:
            TrainingError: another thread is training this model.
        """
        if not self.training or not torch.is_grad_enabled():
            return
        self._claim_training()
        self._check_learning()
        bank = self.bank
        if bank is None or not bank.step_is_new():
            return
        bank.draw()
        if self.pressure is not None:
            self.pressure.ascend(bank)

    def gate(self, key: str, call: Call) -> tuple[bool, Tensor | None]:
        """(whether path `key` is open, its gate for the batch of `call`: None, (g,) or (batch, g)).

        Raises:
            TaskError: there are several tasks, and the call does not say which is meant.
        """
        per_task = self.bank.gate_for(key) if self.bank is not None else cast(Path, self.paths[key]).routing
        if per_task is None:
            return self.bank is None, None
        if len(self.tasks) == 1:
            return True, per_task[0]
        task = call.task
        if task is None:
            raise TaskError(
                "this model holds several tasks, and the call does not say which",
                expected=f"task_ids among 0..{len(self.tasks) - 1} ({', '.join(self.tasks)})",
                got="none",
                where="forward",
                fix="pass task_ids=LongTensor (batch,), or call adapters.set_task(name)",
            )
        return True, per_task[task] if isinstance(task, int) else per_task[task.to(per_task.device)]

    def call(self) -> Call:
        """The call under way in this thread."""
        return cast(Call, current(self))

    def checkpointing(self) -> bool:
        """Whether the model checkpoints activations while training."""
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())

    def _check_merged(self, merged: Merged, task: int | Tensor | None) -> None:
        """Raise where a merged model would not give what a call asks for: another task, or learning."""
        index = self.tasks.index(merged.task)
        if task is not None and bool((torch.as_tensor(task) != index).any()):
            raise TaskError(
                "one task's adapters are merged into the weights, and the batch holds another's",
                expected=f"task ids of {merged.task!r} ({index}) alone",
                got=task,
                where="forward",
                fix="call adapters.unmerge() first",
            )
        if self.training and torch.is_grad_enabled() and self.weight_parameters():
            raise TrainingError(
                "merged adapters do not learn: their paths do not run",
                expected="unmerged adapters, or evaluation",
                got="a forward pass in training mode, with gradients",
                where="forward",
                fix="call adapters.unmerge() to train on, or model.eval()",
            )

    # -- several processes ---------------------------------------------------------------------------------------------

    @property
    def averaging(self) -> EndOfBackward | None:
        """What averages the gradients over the processes of a sharded model; None for any other model."""
        return self._averaging

    def _follow_sharding(self) -> None:
        """In the first forward of a sharded model: check that all processes hold the same adapters, and move these to
        where the model computes.

        Raises:
            AttachError: the weights are spread in a way that adapters cannot follow.
            TrainingError: the processes differ.
        """
        model = self.model
        if not in_a_group():
            return
        check_layout_of_weights(model, attached=True)
        if not is_sharded(model):
            return
        check_alike(self.described(), where="the first forward of a sharded model")
        home = home_of(model)
        for parameter in replicated(model):
            parameter.data = parameter.data.to(home)
        self.to(home)
        groups = groups_of(model)
        self._averaging = EndOfBackward(groups, lambda: average(self._learning_now(), groups))

    def described(self) -> dict[str, object]:
        """What has to be the same on all processes, by what it is."""
        penalty = None if self.pressure is None else (self.pressure.penalty, self.pressure.schedule)
        return {
            "the tasks": self.tasks,
            "the search space": self.space.model_dump_json(),
            "the seed": self.seed,
            "the candidate paths": digest(list(self.paths)),
            "the penalty and its schedule": penalty,
            "the heads": self.head_names,
            "the values of the adapters": digest(dict(self.named_parameters())),
        }

    def _learning_now(self) -> list[nn.Parameter]:
        """What may have a gradient in this step. Paths whose gates are drawn as 0 have none, on no process."""
        bank = self.bank
        opened = None if bank is None else bank.open_paths
        weights = [p for key, path in self.paths.items() if opened is None or opened[key] for p in path.parameters()]
        whole = {id(parameter) for parameter in replicated(self.model)}
        heads = [p for p in self.head_parameters() if id(p) in whole]
        return [p for p in (*self.gate_parameters(), *weights, *heads) if p.requires_grad]

    # -- one training at a time ----------------------------------------------------------------------------------------

    def _claim_training(self) -> None:
        """Note that this thread trains the model, until its optimiser has stepped.

        Gates are drawn once a step for the whole model and gradients add up in its parameters, so that two trainings at
        once would each spoil the other's without a sign of it.
        """
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpointed model runs again in backward, on autograd's thread
        here, other = threading.current_thread(), self._trained_in
        if other is not None and other is not here and other.is_alive():
            raise TrainingError(
                "two threads train this model at once",
                expected="one training at a time",
                got=f"a forward with gradients in {here.name!r}, while {other.name!r} is in the middle of a step",
                where="forward",
                fix="train a copy.deepcopy(model) in one of them, or let the other thread end its step first",
            )
        if other is None:
            CLOCK.add(self)  # to hear of the step's end
        self._trained_in = here

    def _check_learning(self) -> None:
        """Raise if peft has put adapters of its own into the model, and with that frozen these.

        Raises:
            TrainingError: it has.
        """
        if any(parameter.requires_grad for parameter in self.parameters()):
            return
        for module in self.model.modules():
            if type(module).__module__.startswith("peft."):
                raise peft_beside_adapters(type(module).__name__, "forward")

    # -- what the clock of optimiser steps calls -----------------------------------------------------------------------

    def watched(self) -> list[nn.Parameter]:
        """The gates and what the paths learn; see `StepListener`."""
        return [*self.gate_parameters(), *self.weight_parameters()]

    def training_begins(self, optimizer: Optimizer) -> None:
        """Prune at once if that is due: release 0.1 saved its checkpoints before it pruned, not after."""
        self.prune_if_due()

    def before_step(self, optimizer: Optimizer) -> None:
        """Check that the penalty was part of the loss; see `Pressure.check_asked_for`."""
        if self.pressure is not None and self.bank is not None and not self.bank.step_is_new():
            self.pressure.check_asked_for(self.bank)

    def after_step(self, optimizer: Optimizer | None) -> None:
        """Let another thread train the model now, and prune if this step completed the schedule's share of training."""
        self._trained_in = None
        if optimizer is None and self.pressure is not None and self.bank is not None:
            self.pressure.check_asked_for(self.bank)
        self.prune_if_due()

    def prune_if_due(self) -> None:
        """Fix the Structure that the penalty asks for, if the schedule says so; `Adapters` does it."""

    # -- settings ------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model these adapters are attached to.

        Raises:
            AttachError: they are detached.
        """
        if not self._model:
            raise AttachError(
                "these adapters are detached", fix="attach again, or load a saved structure", where="adapters"
            )
        return self._model[0]

    @property
    def enabled(self) -> bool:
        """Whether the paths run; False leaves the backbone. Setting it holds for all threads, `disabled` for one."""
        return self._enabled and not is_switched_off(self)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value

    def _runs(self) -> bool:
        return self.merged is None and self.enabled

    def set_task(self, task: str | int | None) -> None:
        """Use one task for every example of a call that carries no `task_ids`.

        Raises:
            TaskError: unknown task.
        """
        number = self.tasks.index(task) if task in self.tasks else task
        if number is not None and number not in range(len(self.tasks)):
            raise TaskError(
                "no such task",
                expected=f"one of {', '.join(self.tasks)}, or 0..{len(self.tasks) - 1}",
                got=repr(task),
                where="set_task",
                fix="name a task",
            )
        self._task = cast("int | None", number)
        name, classifier = None if number is None else self.tasks[cast(int, number)], self._classifier()
        if classifier is not None and (name is None or name in classifier.tasks):
            classifier.task = name

    def _classifier(self) -> Any:
        """The model, if it has a head per task and a task that is set, as a `MultiTaskClassifier` has; else None."""
        model: Any = self._model[0] if self._model else None
        return model if isinstance(getattr(model, "tasks", None), tuple) and hasattr(model, "task") else None

    # -- what is trained -----------------------------------------------------------------------------------------------

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gates: a learning rate of their own, no weight decay."""
        return [] if self.bank is None else [self.bank.log_alpha]

    def weight_parameters(self) -> list[nn.Parameter]:
        """What the paths learn."""
        return [p for p in self.paths.parameters() if p.requires_grad]

    def rate_factors(self) -> dict[nn.Parameter, float]:
        """The factor on the common learning rate for every parameter of the paths that is trained."""
        share = 1.0 if self.pressure is None else self.pressure.kept_share(0.0)
        found = {}
        for _, path in self.typed_paths():
            factor = path.rate_factor(max(1.0, share * path.units))
            found.update({parameter: factor for parameter in path.parameters() if parameter.requires_grad})
        return found

    def parameter_groups(
        self, learning_rate: float, *, gate_learning_rate: float = 0.05, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser of your own; `GatedTrainer` makes them itself.

        Args:
            learning_rate: the common rate of all kinds of path and of heads, about 1e-2 for Adam; each kind gets its
                factor of it (`Path.rate_factor`).
            gate_learning_rate: of the gates, which have no weight decay.
            weight_decay: of paths and heads.
        """
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter, factor in self.rate_factors().items():
            by_factor.setdefault(factor, []).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": parameters, "lr": factor * learning_rate, "weight_decay": weight_decay}
            for factor, parameters in by_factor.items()
        ]
        heads = self.head_parameters()
        if heads:
            groups.append({"params": heads, "lr": learning_rate, "weight_decay": weight_decay})
        gates = [gate for gate in self.gate_parameters() if gate.requires_grad]
        if gates:
            groups.append({"params": gates, "lr": gate_learning_rate, "weight_decay": 0.0})
        return groups

    def head_parameters(self) -> list[nn.Parameter]:
        """Task heads that are trained and saved along: the model's own, on a shelf these adapters' values of them."""
        if self.on_shelf:
            return list(self.heads)
        return [self.model.get_parameter(name) for name in self.head_names]

    def typed_paths(self) -> Iterator[tuple[str, Path]]:
        """The paths by key."""
        for key, path in self.paths.items():
            yield key, cast(Path, path)

    # -- copies --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**without_mark(self.__dict__), "_trained_in": None, "_averaging": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self.serial = new_serial(self)
        replicate(self)
        if self.bank is not None and self._handles:
            CLOCK.add(self)


def peft_beside_adapters(found: str, where: str) -> TrainingError:
    """The error for a model that peft is to adapt as well.

    Args:
        found: the class of peft's that was found.
        where: where it was found.
    """
    return TrainingError(
        "peft's adapters would be trained alone: it freezes everything else, gated adapters included",
        expected="adapters of one library in a model",
        got=found,
        where=where,
        fix="leave peft_config out, or ga.detach the gated adapters before peft gets the model",
    )
