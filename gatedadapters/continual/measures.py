"""Measures: how a model is scored on a task's held-out data. Every score is a share in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from gatedadapters.data.chat import IGNORED
from gatedadapters.data.language import Item, LanguageCollator, LanguageDataset
from gatedadapters.data.tasks import ChoiceExample
from gatedadapters.masking.scores.losses import task_losses
from gatedadapters.training import MultiTaskClassifier

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]
"""From a list of examples to a batch."""

BATCH_SIZE = 64
"""The most examples that are evaluated at once."""

MOST_LOGITS = 2**26
"""The most logits of a language model that are computed at once: 256 MiB in fp32."""


class MeasuredTask(Protocol):
    """What a measure reads of a `Task`; see there."""

    @property
    def train(self) -> Any:
        """Examples to learn from."""

    @property
    def held_out(self) -> Any:
        """Examples to score on."""

    @property
    def collate(self) -> Collate:
        """From a list of examples to a batch."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""


@torch.no_grad()
def accuracy(model: nn.Module, task: MeasuredTask) -> float:
    """Share of examples whose class has the largest logit, among the task's own classes where it names them."""
    right, total = 0, 0
    for batch in batches_by_length(model, task.held_out, task.collate):
        labels = batch.pop("labels")
        logits: Tensor = model(**batch).logits
        logits = logits[:, : len(task.classes)] if task.classes else logits
        right += int((logits.argmax(-1) == labels).sum())
        total += len(labels)
    return right / total


def exact_match(model: nn.Module, task: MeasuredTask) -> float:
    """Share of examples whose labelled tokens greedy decoding would reproduce without an error.

    A token counts as reproduced if it is the likeliest one after the true tokens before it. An example without labelled
    tokens counts as wrong.
    """
    return token_scores(model, task.held_out, task.collate)[1]


def likelihood(model: nn.Module, task: MeasuredTask) -> float:
    """The geometric mean of the probabilities of the labelled tokens: exp(-loss per token), one over the perplexity."""
    return math.exp(-token_scores(model, task.held_out, task.collate)[0])


@torch.no_grad()
def token_scores(model: nn.Module, data: Sequence[Any], collate: Collate) -> tuple[float, float]:
    """Scores of a causal language model on items with one label per token, which is -100 where nothing is predicted.

    Args:
        model: the model, in evaluation mode.
        data: items with `input_ids` and `labels`.
        collate: from a list of items to a batch.

    Returns:
        (mean loss over all labelled tokens, share of items whose labelled tokens greedy decoding would reproduce)
    """
    loss, tokens, exact = 0.0, 0, 0
    for batch in batches_by_length(model, data, collate):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, reduction="sum", ignore_index=IGNORED
        )
        labelled = labels != IGNORED
        loss, tokens = loss + float(losses), tokens + int(labelled.sum())
        exact += int((((logits.argmax(-1) == labels) | ~labelled).all(1) & labelled.any(1)).sum())
    return loss / max(tokens, 1), exact / len(data)


class ChoiceAccuracy:
    """Share of multiple-choice questions whose right choice has the highest mean log-probability per token.

    Args:
        tokenizer: of the model.
        max_length: tokens after which question and choice are cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, model: nn.Module, task: MeasuredTask) -> float:
        """Score a model on `task.held_out`, a sequence of `ChoiceExample`."""
        questions = [self.answers(example) for example in task.held_out]
        return choice_scores(model, questions, [example.answer for example in task.held_out], self.tokenizer)[1]

    def answers(self, example: ChoiceExample) -> list[Item]:
        """The tokenised items of a question: one for each choice."""
        answers = [replace(example, answer=choice) for choice in range(len(example.choices))]
        items = LanguageDataset(answers, self.tokenizer, self.max_length)
        return [items[i] for i in range(len(items))]


@torch.no_grad()
def choice_scores(
    model: nn.Module, questions: Sequence[Sequence[Item]], right: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[float, float]:
    """Scores of a causal language model on multiple-choice questions.

    Args:
        model: the model, in evaluation mode.
        questions: for each question the items of all its choices.
        right: for each question the position of the right choice.
        tokenizer: of the model.

    Returns:
        (mean loss over all tokens of the right choices, share of questions whose right choice has the highest mean
        log-probability per token)
    """
    collate, device = LanguageCollator(tokenizer), _device(model)
    loss, tokens, hits = 0.0, 0, 0
    for items, answer in zip(questions, right, strict=True):
        batch = {k: v.to(device) for k, v in collate(items).items()}
        losses = task_losses(model, question_once(model, batch))
        count = int((batch["labels"][answer, 1:] != IGNORED).sum())
        loss, tokens = loss + float(losses[answer]) * count, tokens + count
        hits += int(losses.argmin()) == answer
    return loss / max(tokens, 1), hits / len(questions)


def question_once(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Run the tokens that all rows of a batch begin with only once, and put them into a cache.

    The choices of a question share the question's tokens. The returned batch holds the cache and the remaining tokens;
    its losses are those of the whole batch. The batch is returned as it is if fewer than two tokens are shared, or if
    the model's cache is not a plain one.

    Args:
        model: a causal language model.
        batch: `input_ids`, `attention_mask` and `labels` (rows, length).
    """
    ids, labels = batch["input_ids"], batch["labels"]
    shared = (ids == ids[:1]).all(0) & (labels == IGNORED).all(0)
    length = int(shared.long().cumprod(0).sum()) - 1  # the last shared token is not cached: it predicts the first label
    if length < 1 or not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return batch
    cache = getattr(model.base_model(input_ids=ids[:1, :length], use_cache=True), "past_key_values", None)
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return batch  # windows and recurrent states cannot be repeated for several rows
    cache.batch_repeat_interleave(len(ids))
    return {
        "input_ids": ids[:, length:],
        "attention_mask": batch["attention_mask"],
        "labels": labels[:, length:],
        "past_key_values": cache,
    }


@torch.no_grad()
def nearest_class(model: nn.Module, task: MeasuredTask) -> float:
    """Share of held-out examples that are nearest to the training mean of their own class.

    Nearness is the cosine of pooled hidden states (float32). No trained head takes part: the score says which classes
    the backbone of a classifier tells apart.
    """
    features, labels = _pooled(model, task.train, task)
    held_out, wanted = _pooled(model, task.held_out, task)
    present = labels.unique()
    means = torch.stack([features[labels == label].mean(0) for label in present])
    cosines = nn.functional.normalize(held_out, dim=1) @ nn.functional.normalize(means, dim=1).T
    return float((present[cosines.argmax(1)] == wanted).float().mean())


def _pooled(model: nn.Module, data: Sequence[Any], task: MeasuredTask) -> tuple[Tensor, Tensor]:
    """Pooled hidden states (examples, width) and labels (examples,)."""
    assert isinstance(model, MultiTaskClassifier), "nearest_class reads the hidden states of a MultiTaskClassifier"
    features, labels = [], []
    for batch in batches_by_length(model, data, task.collate):
        labels.append(batch.pop("labels"))
        batch.pop("task_ids", None)
        features.append(model.pooled(**batch).float())
    return torch.cat(features), torch.cat(labels)


def batches_by_length(model: nn.Module, data: Sequence[Any], collate: Collate) -> Iterator[dict[str, Tensor]]:
    """Batches of all examples on the model's device. Examples of similar length share a batch, which saves padding.

    A batch has at most `BATCH_SIZE` examples, and fewer where the logits of a language model would take much memory.
    """
    device = _device(model)
    order = sorted(range(len(data)), key=lambda index: len(data[index]["input_ids"]))
    vocabulary = _vocabulary(model)
    start = 0
    while start < len(order):
        lengths = [len(data[index]["input_ids"]) for index in order[start : start + BATCH_SIZE]]
        count = next((n for n in range(len(lengths), 1, -1) if n * lengths[n - 1] * vocabulary <= MOST_LOGITS), 1)
        batch = collate([data[index] for index in order[start : start + count]])
        start += count
        yield {key: value.to(device) for key, value in batch.items()}


def _vocabulary(model: nn.Module) -> int:
    """The number of logits per token; 1 for a model without a language-model head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return len(head.weight) if head is not None else 1


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
