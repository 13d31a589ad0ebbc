"""Loading what a run saved, ready to predict, and the run `predict`: answers to texts or to a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gatedadapters.artifacts import load_adapters
from gatedadapters.continual.measures import ChoiceAccuracy, question_once
from gatedadapters.data.files import cell_text, read_table
from gatedadapters.data.language import LanguageCollator, prompt
from gatedadapters.data.tasks import ChoiceExample
from gatedadapters.errors import ArtifactError, ConfigError, DataError, TaskError
from gatedadapters.experiments.evaluation import set_task
from gatedadapters.experiments.models import locate_model, reading_model
from gatedadapters.experiments.progress import silence_transformers
from gatedadapters.experiments.task_models import model_for
from gatedadapters.masking.scores.losses import task_losses
from gatedadapters.reporting.tables import format_table
from gatedadapters.safe_files import file_errors
from gatedadapters.structure.folder import Base, adapter_folder, read_origin
from gatedadapters.structure.origin import Origin, OriginTask
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.training.devices import chosen_device

_BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """The answer of a model to one text.

    Attributes:
        task: name of the task.
        text: the text.
        pair: the second text, of tasks over two.
        probabilities: probability by label, the most probable first; empty where the model answers in words. Where a
            language model chooses among labels, they are weighed by their mean log-probability per token.
        answer: the most probable label, or the words.
    """

    task: str
    text: str
    pair: str | None
    probabilities: dict[str, float]
    answer: str

    @property
    def probability(self) -> float | None:
        """Probability of the answer; None where the model answers in words."""
        return self.probabilities.get(self.answer)

    def to_data(self) -> dict[str, Any]:
        """The prediction as plain data."""
        pair = {} if self.pair is None else {"pair": self.pair}
        if not self.probabilities:
            return {"task": self.task, "text": self.text, **pair, "answer": self.answer}
        return {
            "task": self.task,
            "text": self.text,
            **pair,
            "label": self.answer,
            "probability": self.probability,
            "probabilities": self.probabilities,
        }


@dataclass(frozen=True)
class Predictions:
    """Predictions in the order of the texts, task by task. Their text is the table that the command prints."""

    rows: tuple[Prediction, ...]

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def table(self) -> str:
        """A row per prediction; long texts are cut."""
        known = any(row.probabilities for row in self.rows)
        header = ["task", "text", *(["label", "probability"] if known else ["answer"])]
        cells = []
        for row in self.rows:
            text = row.text if row.pair is None else f"{row.text} | {row.pair}"
            last = [f"{row.probability:.3f}" if row.probability is not None else ""] if known else []
            cells.append([row.task, _short(text), _short(row.answer), *last])
        return format_table(header, cells)

    def to_json_lines(self) -> str:
        """A JSON object per line, with the probabilities of all labels."""
        return "\n".join(json.dumps(row.to_data(), ensure_ascii=False) for row in self.rows)

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True)
class Loaded:
    """A base with its saved adapters, ready to predict.

    Attributes:
        model: the base with the adapters attached, in evaluation mode.
        tokenizer: its tokenizer.
        adapters: the adapters.
        origin: base, tasks and training, as the folder names them.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    adapters: Adapters
    origin: Origin

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(task.name for task in self.origin.tasks)

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Names of the classes by task; empty for a task that is answered in words."""
        return {task.name: task.labels for task in self.origin.tasks}

    def task(self, name: str | None = None) -> OriginTask:
        """One task by its name; without a name the only one.

        Raises:
            TaskError: there is no such task, or there are several and none is named.
        """
        found = [task for task in self.origin.tasks if name in (task.name, None)]
        if len(found) != 1:
            raise TaskError(
                "no such task" if name is not None else "there are several tasks, and none is named",
                expected=f"one of {', '.join(self.tasks)}",
                got=repr(name),
                where="task",
                fix="name one of them",
            )
        return found[0]

    def pipeline(self, task: str | None = None, **options: Any) -> Any:
        """The pipeline of transformers for one task: text classification or text generation.

        The model is set to the task, so that pipelines of two tasks need two loads.

        Args:
            task: name of the task, where there are several.
            **options: of `transformers.pipeline`.

        Raises:
            TaskError: there is no such task, or there are several and none is named.
        """
        name = self.task(task).name
        if len(self.tasks) > 1:
            model: Any = self.model
            (model if hasattr(model, "set_task") else self.adapters).set_task(name)
        if self.origin.task_type == "text-classification" and self.origin.max_length is not None:
            options = {"truncation": True, "max_length": self.origin.max_length} | options
        build: Any = transformers.pipeline
        return build(self.origin.task_type, model=self.model, tokenizer=self.tokenizer, device=self._device, **options)

    def predict(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        task: str | None = None,
        max_new_tokens: int = 64,
    ) -> Predictions:
        """Answer texts for one task, or for every task.

        Args:
            texts: the texts.
            pairs: a second text for each, for tasks over two texts.
            task: name of the task; None answers for all of them.
            max_new_tokens: tokens after which an answer in words is cut.

        Raises:
            TaskError: there is no such task.
            DataError: there are not as many second texts as texts, or a task over two texts gets one.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise DataError(
                "the columns differ in length",
                expected=f"{len(texts)} second texts",
                got=len(pairs),
                where="pairs",
                fix="give one for each text",
            )
        rows: list[Prediction] = []
        for asked in self.origin.tasks if task is None else (self.task(task),):
            if asked.pair is not None and pairs is None:
                raise DataError(
                    "this task is over two texts",
                    expected=f"a text and a second one ({asked.pair})",
                    got="one text",
                    where=f"task {asked.name!r}",
                    fix="give a table with both columns",
                )
            if self.origin.task_type == "text-classification":
                rows += self._classified(asked, texts, pairs)
            elif asked.kind == "choice" and asked.labels:
                rows += self._chosen(asked, texts, pairs)
            else:
                rows += self._answered(asked, texts, pairs, max_new_tokens)
        return Predictions(tuple(rows))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def _classified(self, task: OriginTask, texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[Prediction]:
        several = len(self.tasks) > 1
        for start in range(0, len(texts), _BATCH):
            part = list(texts[start : start + _BATCH])
            others = None if pairs is None else list(pairs[start : start + _BATCH])
            batch = self.tokenizer(
                part, others, truncation=True, max_length=self.origin.max_length, padding=True, return_tensors="pt"
            ).to(self._device)
            ids = torch.full((len(part),), self.tasks.index(task.name), device=self._device)
            logits = self.model(**batch, **({"task_ids": ids} if several else {})).logits
            shares = logits[:, : len(task.labels)].float().softmax(-1).cpu()
            for index, row in enumerate(shares):
                yield _labelled(task, part[index], None if others is None else others[index], row)

    @torch.no_grad()
    def _chosen(self, task: OriginTask, texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[Prediction]:
        """The labels as choices, by their mean log-probability per token, as evaluation goes by."""
        choices = ChoiceAccuracy(self.tokenizer, self.origin.max_length or sys.maxsize)
        collate = LanguageCollator(self.tokenizer)
        for index, text in enumerate(texts):
            pair = None if pairs is None else pairs[index]
            batch = collate(choices.answers(ChoiceExample(text, task.labels, 0, pair or "")))
            batch = {name: value.to(self._device) for name, value in batch.items()}
            with set_task(self.model, task.name):
                losses = task_losses(self.model, question_once(self.model, batch))
            yield _labelled(task, text, pair, (-losses).float().softmax(-1).cpu())

    @torch.no_grad()
    def _answered(
        self, task: OriginTask, texts: Sequence[str], pairs: Sequence[str] | None, limit: int
    ) -> Iterator[Prediction]:
        model: Any = self.model
        for index, text in enumerate(texts):
            pair = None if pairs is None else pairs[index]
            ids = self._question(task, text, pair).to(self._device)
            with set_task(self.model, task.name):
                found = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=limit,
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            answer = str(self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)).strip()
            yield Prediction(task.name, text, pair, {}, answer)

    def _question(self, task: OriginTask, text: str, pair: str | None) -> torch.Tensor:
        """The tokens (1, length) that the model continues, written as they were in training."""
        if task.kind == "chat":
            messages = [{"role": "user", "content": text}]
            written = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            text = str(written)
        elif task.kind == "choice":
            text = prompt(ChoiceExample(text, task.labels, 0, pair or ""))
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])


def _labelled(task: OriginTask, text: str, pair: str | None, shares: torch.Tensor) -> Prediction:
    order = shares.argsort(descending=True).tolist()
    named = {task.labels[label]: float(shares[label]) for label in order}
    return Prediction(task.name, text, pair, named, task.labels[order[0]])


def load(
    folder: str | Path,
    *,
    model: str | None = None,
    base: Base = "same",
    revision: str | None = None,
    device: str = "auto",
    verify: bool = True,
) -> Loaded:
    """Load saved adapters together with the base that they name, ready to predict.

    Args:
        folder: what `Adapters.save` wrote, the output folder of a run that saved an adapter, or the id of a repository
            on the hub.
        model: the base, in place of the one that the folder names: a folder, an id on the hub or `bundled:NAME`.
        base: `"updated"` accepts an update of the base; see `load_adapters`.
        revision: branch, tag or commit of the repository; None takes the newest.
        device: `auto`, `cpu` or `cuda`.
        verify: check the digests of the files.

    Raises:
        ArtifactError: there is no saved adapter, it does not say what it needs, or the base is another one.
        ConfigError: the base cannot be read.
        DataError: the package that carries a bundled base is not installed.
    """
    place = adapter_folder(folder, revision=revision)
    structure, origin = read_origin(place, verify=verify)
    if origin is None or origin.task_type is None or not origin.tasks:
        raise ArtifactError(
            "these adapters do not say what they need to predict",
            expected="a base, tasks and labels beside the structure",
            got="none of them: releases 0.1 and 0.2 wrote none" if origin is None else "a model of no known task",
            where=place,
            fix="build the model yourself and call load_adapters(model, folder); saved again, they say it",
        )
    name = model or origin.base_model_name_or_path
    if name is None:
        raise ArtifactError(
            "these adapters do not name their base",
            expected="base_model_name_or_path",
            got="none",
            where=place,
            fix='name it: load(folder, model="..."), or --model on the command line',
        )
    try:
        built, tokenizer = model_for(
            name,
            {task.name: task.labels for task in origin.tasks},
            generates=origin.task_type == "text-generation",
            several=structure.fingerprint.model_class == "MultiTaskClassifier",
            pooling=origin.pooling or "mean",
            max_length=origin.max_length or 1,
            revision=origin.revision if model is None else None,
        )
    except ConfigError as error:
        if model is not None:
            raise
        raise ConfigError(
            "the base that these adapters name cannot be read",
            expected=error.expected,
            got=error.got,
            where=f"{name}, named by {place}",
            fix='say where it is: load(folder, model="..."), or --model on the command line',
        ) from error
    if origin.tokenizer is not None and model is None and origin.tokenizer != name:
        with reading_model(origin.tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(locate_model(origin.tokenizer))
    adapters = load_adapters(built, place, base=base, verify=verify)
    built.to(chosen_device(device)).eval()
    return Loaded(built, tokenizer, adapters, origin)


@file_errors("read or write a file of the run", "predict")
def predict(
    folder: str | Path,
    texts: Sequence[str] | None = None,
    *,
    table: str | Path | None = None,
    task: str | None = None,
    text: str | None = None,
    pair: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    max_new_tokens: int = 64,
    device: str = "auto",
) -> Predictions:
    """Answer texts or the rows of a table with a saved adapter, as `gatedadapters predict` does.

    Args:
        folder: a saved adapter, the output folder of a run, or the id of a repository on the hub.
        texts: the texts.
        table: a table in their place: CSV, TSV, JSON lines or parquet.
        task: name of the task; None answers for all of them.
        text: column of the text. Default: that of the table which was learned from.
        pair: column of the second text. Default: likewise.
        model: the base, in place of the one that the folder names.
        revision: branch, tag or commit of the repository.
        max_new_tokens: tokens after which an answer in words is cut.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        GatedAdaptersError: the adapter, its base or the table cannot be used, or there is no such task.
    """
    if (texts is None) == (table is None):
        raise ConfigError(
            "it is not clear what to answer",
            expected="either texts or a table",
            got="neither" if texts is None else "both",
            where="predict",
            fix="give --text or --table",
        )
    silence_transformers()
    loaded = load(folder, model=model, revision=revision, device=device)
    if table is None:
        return loaded.predict(list(texts or ()), task=task, max_new_tokens=max_new_tokens)
    rows: list[Prediction] = []
    for asked in loaded.origin.tasks if task is None else (loaded.task(task),):
        first, second = text or asked.text, pair or asked.pair
        records = read_table(table, {"--column, or text": first, "--pair, or pair": second})
        columns = [
            [cell_text(cells[name], f"{where}, column {name!r}") for where, cells in records]
            for name in (first, second)
            if name is not None
        ]
        rows += loaded.predict(*columns, task=asked.name, max_new_tokens=max_new_tokens)
    return Predictions(tuple(rows))


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
