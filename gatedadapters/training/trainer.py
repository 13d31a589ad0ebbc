"""A Trainer for gated models."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers import TrainingArguments

from gatedadapters.allocation import Placement, PlacementScore, placement_score
from gatedadapters.artifacts import save_joint
from gatedadapters.config import Budget, Penalty, Schedule
from gatedadapters.data import task_sampler
from gatedadapters.errors import BudgetError, TrainingError
from gatedadapters.gates import Pressure
from gatedadapters.masking.delta import NAME as DELTA_NAME
from gatedadapters.masking.delta import SparseDelta, find_delta
from gatedadapters.safe_files import write_text
from gatedadapters.structure.card import CARD, by_hand
from gatedadapters.structure.hub import card_of, hub_errors
from gatedadapters.structure.origin import Origin
from gatedadapters.structure.publish import published, write_card
from gatedadapters.supernet.adapters import Adapters, get_adapters
from gatedadapters.supernet.supernet import NAME, peft_beside_adapters
from gatedadapters.training.checked import BACKBONE, MASK, CheckedTrainer, check_launch, named_arguments
from gatedadapters.training.multitask import MultiTaskClassifier
from gatedadapters.training.prior import agreed_size, can_be_probed, probe_batches, start_gates
from gatedadapters.training.rates import ConstantFactor, default_gate_rate, rewarmed, rewound, shared_out, split_groups
from gatedadapters.training.reference import reference_by_switching_off

logger = logging.getLogger(__name__)

_OF_SPEED = ("runtime", "_per_second", "model_preparation_time")
"""How the names of an evaluation's logs end that are no scores."""

_LATEST: WeakKeyDictionary[Adapters, ref[GatedTrainer]] = WeakKeyDictionary()
"""The trainer that was made last for each model's adapters."""


class GatedTrainer(CheckedTrainer):
    """A transformers Trainer for a model with gated adapters. `gated` makes one of any other Trainer.

    It adds to the Trainer:

    - The penalty in the loss, once per optimiser step, for any number of micro-batches.
    - A learning rate for the gates, without weight decay, and one for the paths that grows as a budget closes
      candidates (`shared_out`).
    - The schedule (warm-up, ramp, prune), over the number of steps that the Trainer computes.
    - Checkpoints that hold only what is trained. Every folder that it writes also holds what the adapters would be if
      they were made compact now, for `load_adapters` (with a sparse delta: `load_joint`).
    - Temperature sampling across tasks.
    - A reference model without a second copy: a Trainer that compares with a frozen model (DPO, KTO, GRPO, RLOO) calls
      the trained one with its adapters off.

    If the schedule has a prune, only models after it can become the best checkpoint.

    Args:
        *args: arguments of the Trainer, as it takes them: the model with adapters attached, transformers'
            TrainingArguments and so on. For several devices start one process each (torchrun, accelerate launch).
        budget: limit on the cost of the Structure. Give `budget` or `penalty`, or neither if `attach` was given a
            penalty or a Structure. With a sparse delta in the model, a budget in `params` limits both together. One in
            `flops`, or as a fraction of the candidates, limits the adapters, because a delta costs no flops.
        penalty: pressure on the adapters alone.
        schedule: see `Schedule`.
        prior: the placement score from which the gates start, after a probe on the first batches of the training (half
            as many as it has steps, at most 24), in which candidates and heads learn; None for even gates. Without a
            budget, below 32 steps, and in trainers that generate their examples, gates start even.
        gate_learning_rate: default: see `training.rates.default_gate_rate`.
        delta_learning_rate: of the elements that a sparse delta in the model tunes; default: that of the weights.
        task_temperature: sample tasks with probability proportional to n ** (1 / temperature), n the number of their
            examples; needs a data set with `sizes`.
        **kwargs: more arguments of the Trainer.

    Raises:
        AttachError: the model has no adapters.
        AllocationError: there is no such prior.
        BudgetError: the budget does not pay for the cheapest unit, or the delta alone uses it up.
        TrainingError: both a budget and a penalty are given, or the arguments cannot give a correct result.
    """

    def __init__(
        self,
        *args: Any,
        budget: Budget | None = None,
        penalty: Penalty | None = None,
        schedule: Schedule | None = None,
        prior: str | PlacementScore | None = "gain",
        gate_learning_rate: float | None = None,
        delta_learning_rate: float | None = None,
        task_temperature: float | None = None,
        **kwargs: Any,
    ) -> None:
        given = named_arguments(type(self), args, kwargs)
        model, settings = _attached(given, type(self).__name__), given.get("args")
        self.adapters, self.delta = get_adapters(model), find_delta(model)
        if settings is not None:  # else the Trainer makes some, which are checked below
            self._check(model, settings)
        if self.delta is not None:
            earlier = None if self.adapters.pressure is None else self.adapters.pressure.penalty
            if budget is None and penalty is None and isinstance(earlier, Budget) and earlier.params is not None:
                raise TrainingError(
                    "this budget may be for the adapters alone, or for the sparse delta too",
                    expected="a budget or penalty given to the trainer when both are trained",
                    got=f"attach(penalty={earlier!r})",
                    where=type(self).__name__,
                    fix="pass budget= here for both together, or penalty= for the adapters alone",
                )
            if budget is not None and budget.params is not None:
                budget = _what_is_left(budget, self.delta)
        if budget is not None and penalty is not None:
            raise TrainingError(
                "a budget is a penalty",
                expected="budget= or penalty=",
                got="both",
                where=type(self).__name__,
                fix="drop one",
            )
        self._relative: Budget | None = None
        self.prior = placement_score(prior, where=f"{type(self).__name__}(prior=)") if isinstance(prior, str) else prior
        self.placement: Placement | None = None
        chosen = budget if budget is not None else penalty
        if chosen is None and schedule is not None and self.adapters.pressure is not None:
            chosen = self.adapters.pressure.penalty
        if chosen is not None:
            steps = 1 if settings is None else max(1, settings.max_steps)  # until the Trainer has computed them
            if isinstance(chosen, Budget) and chosen.within is not None:
                self._relative = chosen
                chosen = Budget(fraction=1.0)  # until the probe before the training has found the size
            self.adapters.set_penalty(chosen, schedule=schedule, total_steps=steps)
        elif schedule is not None:
            raise TrainingError(
                "a schedule needs something to schedule",
                expected="budget= or penalty= beside schedule=",
                got="neither",
                where=type(self).__name__,
                fix="give one, or drop the schedule",
            )
        self._pressure = self.adapters.pressure
        _LATEST[self.adapters] = ref(self)
        self.gate_learning_rate, self.task_temperature = gate_learning_rate, task_temperature
        self.delta_learning_rate = delta_learning_rate
        self._gate_group: int | None = None
        self._path_groups: list[int] = []
        trained = [(p, p.data) for p in self.adapters.parameters()]
        with reference_by_switching_off(self, model, given):
            super().__init__(**given)
        for parameter, values in trained:
            if parameter.dtype != values.dtype:  # TRL rounds all that is trained beside a quantised backbone to bf16
                parameter.data = values.to(parameter.device)
        self._check(model, self.args)
        _check_head_is_called(self.adapters, model)

    def _check(self, model: nn.Module, settings: TrainingArguments) -> None:
        check_launch(settings)
        _check_model(self.adapters, model, settings, type(self).__name__)
        if settings.ddp_find_unused_parameters is None:
            settings.ddp_find_unused_parameters = True  # closed paths take no part in a step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does.

        Raises:
            TrainingError: a trainer that was made later has replaced the penalty of this one.
        """
        self._check_processes()
        latest = _LATEST[self.adapters]()
        if latest is not None and latest is not self and self.adapters.pressure is not self._pressure:
            raise TrainingError(
                "another gated trainer was made for this model, and its penalty replaced the one of this trainer",
                expected="one trainer of a model at a time",
                got=f"a {type(latest).__name__} that was made after this {type(self).__name__}",
                where="train",
                fix="make each trainer when the one before has trained, or train copies of the model",
            )
        if not (kwargs.get("resume_from_checkpoint") or (args and args[0])):
            self._start_gates()
        elif self._relative is not None:
            raise TrainingError(
                "a run whose budget is relative to a held-out gain cannot resume: its size was found before it began",
                expected="Budget(params=...), the size that the logs of the first run end with as gates/target",
                got=f"{self._relative!r}",
                where="train(resume_from_checkpoint=)",
                fix="give that number of parameters as the budget",
            )
        found = super().train(*args, **kwargs)
        self.describe_training()
        return found

    def _described(self) -> dict[str, object]:
        return super()._described() | self.adapters.described()

    def _start_gates(self) -> None:
        """Let fresh gates start from a probe, and turn a budget that is relative to its result into a size."""
        reason, penalty = self._why_no_probe(), self.adapters.pressure
        if reason is not None or penalty is None:
            if self._relative is not None and self.placement is None:
                raise TrainingError(
                    "a budget that is relative to a held-out gain needs a probe before the training",
                    expected="fresh gates, a prior, and a Trainer that reads its examples from a data set",
                    got=reason,
                    where=f"{type(self).__name__}(budget={self._relative!r})",
                    fix="give a budget in params, such as that of adapters.frontier(batches).within(share)",
                )
            return
        loss_of = super().compute_loss
        placement = start_gates(
            self,
            self.adapters,
            lambda model, inputs: cast(Tensor, loss_of(model, inputs)),
            steps=self._planned_steps(),
            score=cast(PlacementScore, self.prior),
            budget=self._relative,
        )
        self.placement = placement
        if self._relative is not None:
            size = agreed_size(placement, self._relative)
            exact = Budget(params=size, per_task=self._relative.per_task)
            self.adapters.set_penalty(exact, schedule=penalty.schedule, total_steps=penalty.total_steps)
            self._pressure = self.adapters.pressure
            logger.info("the smallest structure within %s of the gain has %d parameters", self._relative.within, size)

    def _probed(self, steps: int) -> int:
        """Number of batches in the probe before a training of `steps`; a resumed training gives the same number."""
        return probe_batches(steps) if self._why_even() is None else 0

    def _planned_steps(self) -> int:
        """Optimiser steps of the training, before the Trainer has computed them."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        each = max(1, len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps)
        return math.ceil(self.args.num_train_epochs * each)

    def _why_no_probe(self) -> str | None:
        """The reason why gates start even; None if they start from a probe."""
        bank = self.adapters.bank
        if bank is None or bank.frozen or int(bank.step) > 0:
            return "gates that have trained already"
        is_short = self._relative is None and probe_batches(self._planned_steps()) == 0
        return self._why_even() or ("a short training" if is_short else None)

    def _why_even(self) -> str | None:
        """The reason why gates start even whatever the length of the training; None if there is no such reason."""
        if self.prior is None:
            return "prior=None"
        if self.adapters.pressure is None or not isinstance(self.adapters.pressure.penalty, Budget):
            return "no budget"  # an L0 weight has no size to fill: what starts closed would stay closed
        return None if can_be_probed(self) else f"a {type(self).__name__}, which generates its examples"

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch. The gates are drawn first: a Trainer may generate its examples before it computes a loss."""
        model.train()
        self.adapters.begin_step()
        return super().training_step(model, *args, **kwargs)

    # -- optimiser and schedule ----------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with parameter groups of their own for gates and for paths.

        Raises:
            TrainingError: the user's optimiser does not hold the gates.
        """
        gates = self.adapters.gate_parameters()
        learning = [gate for gate in gates if gate.requires_grad]
        if self.optimizer is not None:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            if any(id(gate) not in held for gate in learning):
                raise TrainingError(
                    "the optimiser leaves the gates out",
                    expected="a parameter group with adapters.gate_parameters()",
                    got=f"{len(self.optimizer.param_groups)} groups without them",
                    where=f"{type(self).__name__}(optimizers=)",
                    fix='add {"params": adapters.gate_parameters(), "lr": 0.05, "weight_decay": 0.0}',
                )
            return self.optimizer
        apart = list(self.delta.parameters()) if self.delta is not None and self.delta_learning_rate is not None else []
        for parameter in (*learning, *apart):
            parameter.requires_grad_(False)
        try:
            optimizer = super().create_optimizer(*() if model is None else (model,))
        finally:
            for parameter in (*learning, *apart):
                parameter.requires_grad_(True)
        self._path_groups = self._split_by_factor(optimizer)
        if apart:
            rates = {"lr": self.delta_learning_rate, "weight_decay": self.args.weight_decay}
            optimizer.add_param_group({"params": apart, **rates})
        if gates:  # also fixed gates: a run that resumes after the prune needs the groups of its checkpoint
            self._gate_group = len(optimizer.param_groups)
            optimizer.add_param_group({"params": gates, "lr": self.gate_learning_rate or 0.0, "weight_decay": 0.0})
        return optimizer

    def _split_by_factor(self, optimizer: torch.optim.Optimizer) -> list[int]:
        """Give every kind of path its own multiple of the learning rate; returns the groups that hold paths."""
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter, factor in self.adapters.rate_factors().items():
            by_factor.setdefault(factor, []).append(parameter)
        found = []
        for factor, parameters in by_factor.items():
            for index in split_groups(optimizer, parameters):
                optimizer.param_groups[index]["lr"] *= factor
                found.append(index)
        return found

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """The Trainer's schedule, with a constant rate for gates. It also tells the pressure the number of steps."""
        pressure = self.adapters.pressure
        if pressure is not None:
            pressure.total_steps = num_training_steps
        stepped = optimizer if optimizer is not None else self.optimizer
        if self._gate_group is None or self.lr_scheduler is not None or stepped is None:
            return super().create_scheduler(num_training_steps, optimizer)
        rate = self.gate_learning_rate
        if rate is None:
            schedule = pressure.schedule if pressure is not None else Schedule()
            rate = default_gate_rate(schedule, num_training_steps, probed=self._probed(num_training_steps))
        group = stepped.param_groups[self._gate_group]
        group["lr"] = rate
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, LambdaLR):
            if pressure is not None:
                self._follow_pressure(scheduler, pressure, num_training_steps)
            scheduler.lr_lambdas[self._gate_group] = ConstantFactor()
        elif isinstance(scheduler, ReduceLROnPlateau):
            scheduler.min_lrs[self._gate_group] = rate
        group["lr"] = rate
        return scheduler

    def _follow_pressure(self, scheduler: LambdaLR, pressure: Pressure, total: int) -> None:
        """Apply `rewound` to all rates if the structure will be pruned, and `shared_out` to the rates of paths."""
        prune = pressure.prune_step if pressure.schedule.rewind else None
        if prune is not None:
            peak = self.args.get_warmup_steps(total)
            warmup = rewarmed(prune, peak, total) if self._probed(total) else 0
            scheduler.lr_lambdas = [rewound(f, prune, peak, total, warmup=warmup) for f in scheduler.lr_lambdas]
        for index in self._path_groups:
            factor = scheduler.lr_lambdas[index] = shared_out(scheduler.lr_lambdas[index], pressure, total)
            scheduler.optimizer.param_groups[index]["lr"] = scheduler.base_lrs[index] * factor(
                0
            )  # the scheduler has set the first rate already

    # -- loss ----------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task loss; in training it also carries the gradient of the penalty.

        Raises:
            TrainingError: the loss is not finite, or the prune closed every path.
            TaskError: a label is not below the head's number of classes.
        """
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = cast(tuple[Tensor, Any], found if return_outputs else (found, None))
        if model.training:
            if not loss.requires_grad:
                raise TrainingError(
                    "nothing is left to train",
                    expected="a Structure with at least one path, or a model with heads",
                    got="every path closed by the prune",
                    where=f"optimiser step {self.state.global_step}",
                    fix="lower the L0 weight, or give a budget instead",
                )
            if self.adapters.pressure is not None and self.adapters.bank is not None:
                penalty = self.adapters.penalty() / self._micro_batches_to_come(num_items_in_batch)
                # Only the gradient of the penalty is added, so the logged loss is that of the task, as in evaluation.
                loss = loss + (penalty - penalty.detach())
        return (loss, outputs) if return_outputs else loss

    def _micro_batches_to_come(self, num_items_in_batch: Tensor | int | None) -> int:
        """The divisor of the penalty in a micro-batch: the sum over all micro-batches of a step is one penalty.

        If the loss is normalised over the whole accumulated batch, the Trainer only adds up the micro-batches. Else it
        divides each loss by their number afterwards, and the divisor here is 1.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # an attribute of newer releases of transformers
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return int(self.current_gradient_accumulation_steps) if scaled else 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the state of the gates to every training log."""
        if "loss" in logs:
            logs.update(gate_scalars(self.adapters))
        super().log(logs, start_time)

    # -- data ----------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first and self._signature_columns is not None:
            self._signature_columns.append("task_ids")  # the library's forward pre-hook takes them out
            if isinstance(self.model, MultiTaskClassifier):  # it passes other arguments on to its backbone
                self._signature_columns += inspect.signature(self.model.backbone.forward).parameters

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self.task_temperature is None:
            return super()._get_train_sampler(train_dataset)
        sizes = getattr(dataset, "sizes", None)
        if sizes is None:
            raise TrainingError(
                "tasks cannot be sampled from this data set",
                expected="a data set with `sizes` (examples per task)",
                got=type(dataset).__name__,
                where="task_temperature",
                fix="use gatedadapters.data.MixedTaskDataset",
            )
        return task_sampler(
            sizes,
            temperature=self.task_temperature,
            batch_size=self.args.train_batch_size,
            num_samples=sum(sizes),
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _write_artifact(self, folder: str) -> None:
        if self.delta is None:
            self.describe_training()
            self.adapters.compacted().save(folder, beside=True)
        else:
            save_joint(self.adapters.model, folder, beside=True)

    def describe_training(self) -> None:
        """Let the saved adapters say how they were trained."""
        adapters, args = self.adapters, self.args
        origin = adapters.origin or Origin.of(adapters.model, adapters.tasks)
        told: dict[str, str | int | float] = {
            "steps": self.state.global_step,
            "learning_rate": args.learning_rate,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps,
            "seed": args.seed,
        }
        tasks = tuple(
            task.model_copy(update={"metrics": task.metrics | self._metrics_of(task.name)}) for task in origin.tasks
        )
        adapters.origin = origin.model_copy(update={"training": {**origin.training, **told}, "tasks": tasks})

    def _metrics_of(self, task: str) -> dict[str, float]:
        """The scores that the last evaluation logged for a task: all of them if it is the only one, else those that
        begin with its name.
        """
        alone = len(self.adapters.tasks) == 1
        found: dict[str, float] = {}
        for logs in self.state.log_history:
            for key, value in logs.items():
                for start in (f"eval_{task}_", *(["eval_"] if alone else [])):
                    if key.startswith(start):
                        name = key.removeprefix(start)
                        if not name.endswith(_OF_SPEED):
                            found[name] = float(value)
                        break
        return found

    def create_model_card(self, *args: Any, license: str | None = None, **kwargs: Any) -> None:
        """Write the card of the adapters, in place of the Trainer's, which says nothing of them.

        A card in the output folder that somebody wrote or edited stays. With a sparse delta the card is the Trainer's.

        Args:
            *args: what the Trainer's takes besides, which this card has from the adapters.
            license: id of the licence, such as `"apache-2.0"`.
            **kwargs: as `*args`.
        """
        if self.delta is not None:
            super().create_model_card(*args, **{**kwargs, "license": license})
            return
        folder = Path(str(self.args.output_dir))
        card = folder / CARD
        if self.is_world_process_zero() and not (card.is_file() and by_hand(card.read_text(encoding="utf-8"))):
            self.describe_training()
            compact = self.adapters.compacted()
            assert compact.structure is not None
            write_card(folder, compact.structure, compact.origin, repository=self.hub_model_id, license=license)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository that the arguments name, as the Trainer does.

        A card in it that somebody wrote or edited is copied into the output folder, which is pushed: it stays.

        Raises:
            ArtifactError: the hub cannot be reached or refuses, or the adapters name their base by a folder of this
                machine.
        """
        if not self.is_world_process_zero():
            return
        published(
            self.adapters.origin or Origin.of(self.adapters.model, self.adapters.tasks),
            None,
            fix='say how it is called on the hub: model.config.name_or_path = "user/base"',
        )
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        token = token or self.args.hub_token
        with hub_errors("write", name, token=token):
            super().init_hf_repo(token=token, private=private)
        assert self.hub_model_id is not None
        card, place = card_of(self.hub_model_id, revision=self.args.hub_revision, token=token), self.args.output_dir
        if card is not None and by_hand(card) and not (Path(str(place)) / CARD).exists():
            write_text(Path(str(place)) / CARD, card)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push what was trained, with its card; see the Trainer.

        Raises:
            ArtifactError: the hub cannot be reached or refuses.
        """
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        with hub_errors("write", name, token=kwargs.get("token") or self.args.hub_token):
            return super().push_to_hub(*args, **kwargs)

    def _origin(self) -> dict[str, str]:
        mask = {} if self.delta is None else {MASK: self.delta.mask.digest}
        return {BACKBONE: self.adapters.identity.values, **mask}

    def _is_trained(self, key: str) -> bool:
        heads = (*self.adapters.head_names, *(self.delta.head_names if self.delta is not None else ()))
        return key.startswith((f"{NAME}.", f"{DELTA_NAME}.")) or key in heads

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """No model before the prune is the best one: none is within the budget."""
        bank, pressure = self.adapters.bank, self.adapters.pressure
        if bank is not None and not bank.frozen and pressure is not None and pressure.schedule.prune is not None:
            return False
        return super()._determine_best_metric(metrics, trial)


def _what_is_left(budget: Budget, delta: SparseDelta) -> Budget:
    """The part of a joint budget that the adapters may spend."""
    assert budget.params is not None
    if budget.params <= delta.params:
        raise BudgetError(
            "the sparse delta alone uses up the whole budget",
            expected=f"more than the {delta.params:,} elements that are tuned",
            got=f"{budget.params:,}",
            where="budget",
            fix="raise the budget, or select fewer elements",
        )
    return budget.model_copy(update={"params": budget.params - delta.params})


def _attached(given: Mapping[str, Any], trainer: str) -> nn.Module:
    """The model among a Trainer's arguments.

    Raises:
        TrainingError: there is none, or only its name; or peft is to adapt it, too.
    """
    model = given.get("model")
    if not isinstance(model, nn.Module):
        raise TrainingError(
            "this trainer needs a model with adapters",
            expected="the model that ga.attach was called on",
            got=repr(model),
            where=f"{trainer}(model=)",
            fix="load the model, call ga.attach(model, ...), and pass the model",
        )
    if given.get("peft_config") is not None:
        raise peft_beside_adapters(type(given["peft_config"]).__name__, f"{trainer}(peft_config=)")
    return model


def _check_head_is_called(adapters: Any, model: nn.Module) -> None:
    """Check that no candidate sits at an output layer whose weights the Trainer uses without calling the layer.

    Raises:
        TrainingError: one does, and would not be trained.
    """
    if "fused_lm_head" not in inspect.signature(model.forward, follow_wrapped=False).parameters:
        return
    head = cast(Any, model).get_output_embeddings()
    for key, path in adapters.typed_paths():
        if any(model.get_submodule(point.module) is head for point in (path.site.tap, path.site.write)):
            raise TrainingError(
                "this trainer computes log-probabilities from the output layer's weight, so adapters there do not run",
                expected="candidates inside the blocks",
                got=f"path {key}",
                where="the model",
                fix="leave the output layer out of the search space",
            )


def _check_model(adapters: Any, model: nn.Module, args: TrainingArguments, trainer: str) -> None:
    """Check that adapters of this model can be trained with these arguments.

    Raises:
        TrainingError: the adapters are attached to a part of the model, so checkpoints would lose them; or fp16 scales
            the loss, which the penalty is compared with.
    """
    if adapters.model not in (model, getattr(model, "module", None), getattr(model, "_orig_mod", None)):
        raise TrainingError(
            "the adapters are attached to a part of this model, and its checkpoints would lose them",
            expected="the model that ga.attach was called on",
            got=type(model).__name__,
            where=f"{trainer}(model=)",
            fix="attach to the whole model, or train the part",
        )
    if args.fp16 or getattr(args, "mixed_precision", None) == "fp16":  # set by the arguments, or by the launcher
        raise TrainingError(
            "gates cannot learn under loss scaling: the penalty follows the size of the loss's gradients",
            expected="bf16 or fp32",
            got="fp16",
            where="TrainingArguments",
            fix="bf16=True",
        )


@torch.no_grad()
def gate_scalars(adapters: Any) -> Mapping[str, float]:
    """Scalars of the gates for a log; each costs one read from the device."""
    bank, pressure = adapters.bank, adapters.pressure
    if bank is None:
        return {}
    bank.refresh()
    scalars = {
        "gates/expected_params": float(bank.expected_cost()),
        "gates/open_paths": sum(bank.open_paths.values()) / len(bank.open_paths),
    }
    if pressure is not None:
        scalars["gates/penalty"] = float(pressure.term(bank))
        if isinstance(pressure.penalty, Budget):
            scalars["gates/target"] = pressure.target(bank)
            scalars["gates/multiplier"] = float(pressure.multipliers[0])
    return scalars
