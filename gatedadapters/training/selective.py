"""transformers' Trainer for importance-masked tuning: score, select, tune, report."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from gatedadapters import html
from gatedadapters.config import SelectionConfig
from gatedadapters.errors import TrainingError
from gatedadapters.masking import Mask, SparseDelta, apply_mask, get_delta, score, select
from gatedadapters.masking.delta import find_delta
from gatedadapters.masking.scores import score_class
from gatedadapters.structure import format_table
from gatedadapters.training.checked import CheckedTrainer
from gatedadapters.training.trainer import MASK, check_launch, fits_mask, read_header

_HEADER = ("held-out", "loss before", "after", "change", "perplexity before", "after")


@dataclass(frozen=True)
class Report:
    """Losses on held-out domain and general data, before and after; `None` where there is no such data."""

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
    """Tunes only what matters little in general: everything of transformers' Trainer applies.

    `train()` scores the model on general and on domain data, selects a mask, applies it, evaluates, trains on the
    domain data, and evaluates again; `report()` shows both. A model that has a delta already is trained as it is.
    Checkpoints hold only what is trained; a run resumes where selection gives the same mask, which it does for equal
    data and seed.

    Args:
        model: a causal language model, a classifier, or whatever computes a loss from a batch with labels.
        args: transformers' TrainingArguments.
        train_dataset: the domain's data.
        general_dataset: data that says what the model must not lose; needed unless `mask` is given.
        eval_dataset: held-out data of the domain.
        general_eval_dataset: held-out general data.
        selection: how to score and select.
        mask: a mask to use as it is.
        heads: see `apply_mask`.
        **kwargs: transformers' Trainer's.

    Raises:
        TrainingError: neither general data nor a mask, or arguments that cannot give a correct result.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Any = None,
        general_dataset: Any = None,
        eval_dataset: Any = None,
        general_eval_dataset: Any = None,
        selection: SelectionConfig | None = None,
        mask: Mask | None = None,
        heads: tuple[str, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        check_launch(args)
        self.selection, self.mask, self.heads = selection or SelectionConfig(), mask, heads
        self.general_dataset = general_dataset
        self.measured: list[dict[str, float]] = []
        if mask is None and general_dataset is None and find_delta(model) is None and self._needs_data:
            raise TrainingError(
                "nothing says what the model must not lose", expected="general_dataset=, or mask=", got="neither",
                where="SelectiveTrainer", fix="pass data that represents what the model is to keep",
            )  # fmt: skip
        held_out = {"domain": eval_dataset, "general": general_eval_dataset}
        self.held_out = {part: data for part, data in held_out.items() if data is not None}
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = (
                True  # a tensor may take no part in a step, as experts that are not chosen
            )
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=self.held_out or None, **kwargs
        )

    @property
    def _needs_data(self) -> bool:
        return score_class(self.selection.kind).needs_data

    @property
    def module(self) -> nn.Module:
        """The model."""
        return cast(nn.Module, self.model)

    @property
    def delta(self) -> SparseDelta:
        """What is being trained.

        Raises:
            AttachError: nothing was selected yet.
        """
        return get_delta(self.module)

    def select(self) -> Mask:
        """Score general and domain data, and select. Every process scores the same batches and selects the same."""
        chosen, scores = self.selection, []
        for data in (self.general_dataset, self.train_dataset):
            batches = islice(self._batches(data), chosen.batches) if self._needs_data else None
            scores.append(score(self.module, batches, kind=chosen.kind, heads=self.heads, seed=chosen.seed))
        return select(
            *scores, core=chosen.core, contrast=chosen.contrast if self._needs_data else 0.0, scope=chosen.scope,
            include=chosen.include, exclude=chosen.exclude,
        )  # fmt: skip

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Score, select and apply where that is not done yet, evaluate, train, evaluate."""
        if find_delta(self.module) is None:
            if self.mask is None:
                self.mask = self.select()
            apply_mask(self.module, self.mask, heads=self.heads)
        self.measured = [self._held_out_losses()]
        result = super().train(*args, **kwargs)
        self.measured.append(self._held_out_losses())
        return result

    def report(self) -> Report:
        """Domain and general losses side by side.

        Raises:
            TrainingError: `train` has not run.
        """
        if len(self.measured) < 2:
            raise TrainingError("there is nothing to report yet", expected="train() first", where="report")
        delta = self.delta
        own = {id(p) for p in delta.parameters()}
        params = sum(p.numel() for p in self.module.parameters() if id(p) not in own)
        return Report(self.measured[0], self.measured[1], delta.params, params)

    def _held_out_losses(self) -> dict[str, float]:
        metrics = self.evaluate() if self.held_out else {}
        return {part: float(metrics[f"eval_{part}_loss"]) for part in self.held_out}

    def _batches(self, data: Any) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.selection.seed)
        loader: DataLoader[Any] = DataLoader(
            self._removed(data), batch_size=self.selection.batch_size, shuffle=True, generator=generator,
            collate_fn=self.data_collator,
        )  # fmt: skip
        for batch in loader:
            yield dict(batch)

    def _removed(self, data: Any) -> Any:
        return self._remove_unused_columns(data, "scoring") if hasattr(data, "column_names") else data

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Only what is trained; the backbone is the user's."""
        if not self.args.should_save:
            return
        folder = str(output_dir if output_dir is not None else self.args.output_dir)
        os.makedirs(folder, exist_ok=True)
        state = state_dict if state_dict is not None else self.accelerator.unwrap_model(self.model).state_dict()
        trained = {
            key: value.detach().contiguous().cpu()
            for key, value in state.items()
            if "sparse_delta." in key or key in self.delta.head_names
        }
        part = os.path.join(folder, f"{SAFE_WEIGHTS_NAME}.part")
        save_file(trained, part, metadata={"format": "pt", MASK: self.delta.mask.digest})
        os.replace(part, os.path.join(folder, SAFE_WEIGHTS_NAME))
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _check_checkpoint(self, folder: str) -> None:
        """Refuse, before anything is changed, values that belong to other elements."""
        file = os.path.join(folder, SAFE_WEIGHTS_NAME)
        if os.path.isfile(file) and not fits_mask(read_header(file)[1], self.delta):
            raise _another_mask("the elements that this run selected", "values of other elements", file)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The backbone's keys are absent by design; anything else is refused."""
        missing = [key for key in load_result.missing_keys if "sparse_delta." in key]
        if missing or load_result.unexpected_keys:
            expected, got = ", ".join(missing[:2]), ", ".join(load_result.unexpected_keys[:2])
            raise _another_mask(expected or "the delta's values", got or "nothing of it", "resume")


def _another_mask(expected: str, got: str, where: str) -> TrainingError:
    return TrainingError(
        "this checkpoint is of another mask", expected=expected, got=got, where=where,
        fix="resume with the same data, selection and seed",
    )  # fmt: skip


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
