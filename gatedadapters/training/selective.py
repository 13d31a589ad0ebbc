"""A Trainer for importance-masked tuning: it scores, selects, tunes and reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gatedadapters.config import SelectionConfig
from gatedadapters.errors import TrainingError
from gatedadapters.masking import (
    Mask,
    SparseDelta,
    SubspaceDelta,
    TuningTrial,
    apply_mask,
    apply_subspace,
    get_delta,
    score,
    select,
)
from gatedadapters.masking.delta import NAME, find_delta
from gatedadapters.masking.scores import score_class
from gatedadapters.masking.scores.losses import task_losses
from gatedadapters.reporting import html
from gatedadapters.reporting.tables import format_table
from gatedadapters.supernet.supernet import NAME as ADAPTERS
from gatedadapters.training.checked import BACKBONE, MASK, CheckedTrainer, check_launch, named_arguments

_SCORED = "scored"  # name of the general data among the Trainer's held-out sets, while it is prepared
_HEADER = ("held-out", "loss before", "after", "change", "perplexity before", "after")


@dataclass(frozen=True)
class Report:
    """Losses on held-out data before and after training.

    Attributes:
        before: mean loss per held-out set, `domain` and `general`; sets that were not given are left out.
        after: the same after training.
        free: number of elements that were tuned.
        params: number of parameters of the model.
    """

    before: dict[str, float]
    after: dict[str, float]
    free: int
    params: int

    def _rows(self) -> list[list[str]]:
        rows = []
        for part in self.before:
            old, new = self.before[part], self.after[part]
            rows.append([part, f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}", f"{_exp(old):.2f}", f"{_exp(new):.2f}"])
        return rows

    def _title(self) -> str:
        return f"{self.free:,} of {self.params:,} elements tuned ({self.free / self.params:.2%})"

    def __str__(self) -> str:
        return self._title() + "\n" + format_table(_HEADER, self._rows())

    def _repr_html_(self) -> str:
        return html.table(_HEADER, self._rows(), title=self._title())


class SelectiveTrainer(CheckedTrainer):
    """A transformers Trainer that tunes only elements which matter little on general data; see `selective` for others.

    `train()` scores the model on general and on domain data, selects a mask, applies it, evaluates, trains on the
    domain data, and evaluates again; `report()` shows both evaluations. If the model has a delta already, that one is
    trained. Checkpoints hold only what is trained; each folder that it writes also holds the delta, for `load_delta`. A
    run resumes only with the mask of its checkpoint; selection gives the same mask again for equal data and seed.

    With `subspace`, whole matrices are trained in their small singular directions instead (`apply_subspace`); nothing
    is scored or selected then.

    Args:
        *args: arguments of the Trainer, as it takes them: a model that computes a loss from a batch with labels,
            transformers' TrainingArguments, the train_dataset of the domain and so on. `eval_dataset` is held-out data
            of the domain.
        general_dataset: data that represents what the model must keep; needed unless `mask` is given.
        general_eval_dataset: held-out general data.
        selection: how to score and select.
        mask: a mask to apply instead of selecting one.
        subspace: share of the singular directions of each matrix that is protected, in place of a mask.
        heads: see `apply_mask`.
        **kwargs: more arguments of the Trainer.

    Raises:
        TrainingError: there is neither general data nor a mask nor a subspace, a target for general text is given but
            no held-out general data, the model has adapters, or the arguments cannot give a correct result.
    """

    def __init__(
        self,
        *args: Any,
        general_dataset: Any = None,
        general_eval_dataset: Any = None,
        selection: SelectionConfig | None = None,
        mask: Mask | None = None,
        subspace: float | None = None,
        heads: tuple[str, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        given = named_arguments(type(self), args, kwargs)
        model, settings = given.get("model"), given.get("args")
        if not isinstance(model, nn.Module) or given.get("peft_config") is not None:
            raise TrainingError(
                "a sparse delta tunes a model's own weights, and nothing beside them",
                expected="a model, and no peft_config",
                got=repr(model) if not isinstance(model, nn.Module) else type(given["peft_config"]).__name__,
                where=type(self).__name__,
                fix="load the model and pass it, without peft_config",
            )
        if settings is not None:
            check_launch(settings)
        self.selection, self.mask, self.heads = selection or SelectionConfig(), mask, heads
        self.subspace: SubspaceDelta | None = None
        self._protected_directions = subspace
        self.measured: list[dict[str, float]] = []
        selects = mask is None and subspace is None and find_delta(model) is None
        if subspace is not None and (mask is not None or find_delta(model) is not None):
            raise TrainingError(
                "a subspace takes the place of a mask",
                expected="subspace= or a mask",
                got="both",
                where=type(self).__name__,
                fix="drop one",
            )
        if selects and self.selection.keep_general is not None and general_eval_dataset is None:
            raise TrainingError(
                "there is no held-out general data, so nobody can tell what is kept",
                expected="general_eval_dataset=, because of selection.keep_general",
                got="none",
                where=type(self).__name__,
                fix="hold some general data out, or give selection.protect instead",
            )
        if selects and general_dataset is None and self._needs_data:
            raise TrainingError(
                "there is no general data, so importance in general is unknown",
                expected="general_dataset=, mask= or subspace=",
                got="none of them",
                where=type(self).__name__,
                fix="pass data that represents what the model is to keep",
            )
        if hasattr(model, ADAPTERS):
            raise TrainingError(
                "this model has adapters, which SelectiveTrainer neither trains nor keeps",
                expected="a model without adapters, or with a sparse delta beside them in a GatedTrainer",
                got=f"model.{ADAPTERS}",
                where=f"{type(self).__name__}(model=)",
                fix="detach or merge them first, or apply_mask and train both with GatedTrainer",
            )
        held_out = {"domain": given.pop("eval_dataset", None), "general": general_eval_dataset}
        self.held_out = {part: data for part, data in held_out.items() if data is not None}
        if self.held_out and settings is not None and (settings.bf16_full_eval or settings.fp16_full_eval):
            raise TrainingError(
                "evaluation before training would round the weights that are trained",
                expected="evaluation in the type that is trained in",
                got="bf16_full_eval or fp16_full_eval",
                where="TrainingArguments",
                fix="leave it out; bf16=True is as fast",
            )
        if settings is not None and settings.ddp_find_unused_parameters is None:
            settings.ddp_find_unused_parameters = True  # experts that are not chosen take no part in a step
        # The Trainer prepares data that it evaluates on as it prepares training data (TRL tokenizes it): both alike.
        scored = {} if general_dataset is None else {_SCORED: general_dataset}
        super().__init__(**given, eval_dataset=self.held_out | scored or None)
        check_launch(self.args)
        prepared = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        self.general_dataset = prepared.pop(_SCORED, None)
        self.held_out = prepared
        self.eval_dataset = prepared or None

    @property
    def _needs_data(self) -> bool:
        return score_class(self.selection.kind).needs_data

    @property
    def module(self) -> nn.Module:
        """The model."""
        return cast(nn.Module, self.model)

    @property
    def delta(self) -> SparseDelta:
        """The sparse delta that is trained.

        Raises:
            AttachError: no mask was applied yet.
        """
        return get_delta(self.module)

    def select(self) -> Mask:
        """Score general and domain data and select a mask. All processes score; the mask of the first is used."""
        chosen, scores = self.selection, []
        for data in (self.general_dataset, self.train_dataset):
            batches = islice(self._batches(data), chosen.batches) if self._needs_data else None
            scores.append(score(self.module, batches, kind=chosen.kind, heads=self.heads, seed=chosen.seed))
        found = select(
            *scores,
            protect=chosen.protect if chosen.keep_general is None else None,
            keep_general=chosen.keep_general,
            trial=None if chosen.keep_general is None else self._tuning_trial(),
            contrast=chosen.contrast if self._needs_data else 0.0,
            scope=chosen.scope,
            include=chosen.include,
            exclude=chosen.exclude,
        )
        return _of_the_first(found)

    def _tuning_trial(self) -> TuningTrial:
        """The training to come, to be tried out; under the precision and on the batches of a process."""
        steps = self.args.max_steps
        if steps <= 0:
            per_epoch = len(cast(Sized, self.train_dataset)) / (
                self.args.train_batch_size * self.args.gradient_accumulation_steps
            )
            steps = max(1, math.ceil(self.args.num_train_epochs * per_epoch / self.args.world_size))
        train = list(islice(self._batches(self.train_dataset, self.args.train_batch_size), steps))
        return TuningTrial(
            self.module,
            train,
            islice(self._batches(self.held_out["general"]), self.selection.batches),
            steps=steps,
            learning_rate=self.args.learning_rate,
            try_steps=self.selection.try_steps,
            tries=self.selection.tries,
            loss=self._loss_of_trial,
            heads=self.heads,
            progress=not self.args.disable_tqdm,
        )

    def _loss_of_trial(self, model: nn.Module, batch: Any) -> Tensor:
        with self.accelerator.autocast():
            return task_losses(model, batch)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Select and apply a mask unless the model has a delta; then evaluate, train and evaluate again."""
        self._check_processes()
        if self._protected_directions is not None:
            if self.subspace is None or not self.subspace.applied:
                self.subspace = apply_subspace(self.module, protect=self._protected_directions, heads=self.heads)
        elif find_delta(self.module) is None:
            if self.mask is None:
                self.mask = self.select()
            apply_mask(self.module, self.mask, heads=self.heads)
        self.measured = [self._held_out_losses()]
        result = super().train(*args, **kwargs)
        self.measured.append(self._held_out_losses())
        return result

    def report(self) -> Report:
        """Domain and general losses before and after training.

        Raises:
            TrainingError: `train` has not run.
        """
        if len(self.measured) < 2:
            raise TrainingError(
                "there is nothing to report yet",
                expected="train() first",
                where="report",
                fix="call train() before report()",
            )
        own = set() if self.subspace is not None else {id(p) for p in self.delta.parameters()}
        params = sum(p.numel() for p in self.module.parameters() if id(p) not in own)
        return Report(self.measured[0], self.measured[1], (self.subspace or self.delta).params, params)

    def _held_out_losses(self) -> dict[str, float]:
        metrics = self.evaluate() if self.held_out else {}
        return {part: float(metrics[f"eval_{part}_loss"]) for part in self.held_out}

    def _batches(self, data: Any, size: int | None = None) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.selection.seed)
        loader: DataLoader[Any] = DataLoader(
            self._removed(data),
            batch_size=size or self.selection.batch_size,
            shuffle=True,
            generator=generator,
            collate_fn=self.data_collator,
        )
        for batch in loader:
            yield dict(batch)

    def _removed(self, data: Any) -> Any:
        return self._remove_unused_columns(data, "scoring") if hasattr(data, "column_names") else data

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _is_trained(self, key: str) -> bool:
        if self.subspace is not None:
            return key in self.subspace.names or key in self.subspace.head_names
        return key.startswith(f"{NAME}.") or key in self.delta.head_names

    def _write_artifact(self, folder: str) -> None:
        (self.subspace or self.delta).save(folder, beside=True)

    def _origin(self) -> dict[str, str]:
        if self.subspace is not None:
            return {BACKBONE: self.subspace.identity.values, MASK: self.subspace.digest}
        return {BACKBONE: self.delta.mask.identity.values, MASK: self.delta.mask.digest}


def _of_the_first(mask: Mask) -> Mask:
    """The mask of the first process. On GPUs gradients may differ in their last bits, and with them the mask."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return mask
    held = [mask]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
