"""Scores of a model by task: the loss, the accuracy and other measures; and baselines without a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from gatedadapters.continual.measures import ChoiceAccuracy, batches_by_length, choice_scores, token_scores
from gatedadapters.data import AnyTask, ChoiceTask, LanguageCollator, LanguageTask, MixedTaskCollator, TextTask
from gatedadapters.data.measures import EXACT_MATCH, measure
from gatedadapters.robustness import (
    Corruption,
    TextPerturbation,
    TokenPerturbation,
    Vocabulary,
    corrupt_tasks,
    corrupted_dataset,
)
from gatedadapters.supernet.supernet import NAME

ACCURACY = "accuracy"


@dataclass(frozen=True)
class TaskScore:
    """The scores of a model on one task.

    Attributes:
        loss: mean cross-entropy: of an example's class, or of a labelled token.
        measures: other scores by name: `accuracy` of classification and of multiple choice, and what the task asks for.
    """

    loss: float
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """The share of right answers; None for running text, answers in words, and conversations."""
        return self.measures.get(ACCURACY)


Scores = dict[str, TaskScore]
"""The scores of a model by task."""


def mean_loss(scores: Scores) -> float:
    """The mean loss over tasks."""
    return fmean(score.loss for score in scores.values())


def accuracies(scores: Scores) -> dict[str, float]:
    """The accuracy by task, of the tasks that have one."""
    return {name: score.accuracy for name, score in scores.items() if score.accuracy is not None}


def score_tasks(
    model: nn.Module,
    tasks: Sequence[AnyTask],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    split: str = "test",
    bf16: bool = False,
    perturbation: Corruption | None = None,
    vocabulary: Vocabulary | None = None,
    measures: Mapping[str, Sequence[str]] | None = None,
) -> Scores:
    """Scores by task, in evaluation mode. The model's mode is then as before.

    Args:
        model: a classifier that takes a batch with `task_ids`, or a causal language model, with adapters or without.
        tasks: the tasks, in the order of their ids.
        tokenizer: the tokenizer of the model.
        max_length: tokens after which a text is cut.
        split: the split of every task to evaluate on.
        bf16: whether to run under bf16 autocast.
        perturbation: a perturbation of the texts; None leaves them as they are.
        vocabulary: the words that a perturbation draws from. Default: those of the tokenizer.
        measures: names of what is measured beside loss and accuracy, by task.

    Raises:
        DataError: a task lacks the split, or has nothing to predict.
        ConfigError: there is no such measure, or the perturbation does not act on tasks of this kind.
    """
    vocabulary = vocabulary or Vocabulary.of(tokenizer)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            labelled = [task for task in tasks if isinstance(task, TextTask)]
            if labelled:
                return _classification(model, labelled, tokenizer, max_length, split, perturbation, vocabulary)
            found = {}
            for task in tasks:
                assert isinstance(task, LanguageTask)
                asked = (measures or {}).get(task.name, ())
                with set_task(model, task.name):
                    found[task.name] = _language(
                        model, task, tokenizer, max_length, split, perturbation, vocabulary, asked
                    )
            return found
    finally:
        model.train(was_training)


def _classification(
    model: nn.Module,
    tasks: Sequence[TextTask],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    split: str,
    perturbation: Corruption | None,
    vocabulary: Vocabulary,
) -> Scores:
    data = corrupted_dataset(tasks, tokenizer, split, max_length, perturbation, vocabulary)
    right, loss = torch.zeros(len(tasks), dtype=torch.long), torch.zeros(len(tasks), dtype=torch.float64)
    for batch in batches_by_length(model, data, MixedTaskCollator(tokenizer)):  # type: ignore[arg-type]  # has len
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        task_ids = batch["task_ids"].cpu()
        right.index_add_(0, task_ids, (logits.argmax(-1) == labels).long().cpu())
        loss.index_add_(0, task_ids, F.cross_entropy(logits, labels, reduction="none").double().cpu())
    return {
        task.name: TaskScore(float(total) / size, {ACCURACY: int(hits) / size})
        for task, hits, total, size in zip(tasks, right, loss, data.sizes, strict=True)
    }


def _language(
    model: nn.Module,
    task: LanguageTask[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    split: str,
    perturbation: Corruption | None,
    vocabulary: Vocabulary,
    asked: Sequence[str],
) -> TaskScore:
    if isinstance(perturbation, TextPerturbation):
        (task,) = corrupt_tasks([task], perturbation, split)
    examples = task.split(split)
    if isinstance(task, ChoiceTask):
        questions = [ChoiceAccuracy(tokenizer, max_length).answers(example) for example in examples]
        if isinstance(perturbation, TokenPerturbation):  # all choices of a question are read after the same words
            questions = [
                [perturbation.feature(item, vocabulary, key) for item in items] for key, items in enumerate(questions)
            ]
        loss, hits = choice_scores(model, questions, [example.answer for example in examples], tokenizer)
        found = {ACCURACY: hits}
    else:
        data = corrupted_dataset([task], tokenizer, split, max_length, perturbation, vocabulary)
        items = [{k: v for k, v in data[i].items() if k != "task_ids"} for i in range(len(data))]
        loss, exact = token_scores(model, items, LanguageCollator(tokenizer))
        found = {EXACT_MATCH: exact} if EXACT_MATCH in asked else {}
    for name in asked:
        if name not in found:
            found[name] = float(measure(name)(model, tokenizer, examples))
    return TaskScore(loss, found)


@contextmanager
def set_task(model: nn.Module, name: str) -> Iterator[None]:
    """A context in which adapters of several tasks open the gates of one: choices share a cache across calls, and a
    user's measure generates.
    """
    adapters: Any = getattr(model, NAME, None)
    if adapters is None or len(adapters.tasks) == 1:
        yield
        return
    adapters.set_task(name)
    try:
        yield
    finally:
        adapters.set_task(None)


def majority_accuracy(tasks: Sequence[TextTask]) -> dict[str, float]:
    """Accuracy on test data, by task, of always naming the most frequent class of the training data."""
    result = {}
    for task in tasks:
        frequent = max(set(task.train.labels), key=task.train.labels.count)
        labels = task.split("test").labels
        result[task.name] = labels.count(frequent) / len(labels)
    return result
