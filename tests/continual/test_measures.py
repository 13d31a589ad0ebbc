"""Scores of held-out data, against what the model says of each row alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import classifier, tasks
from transformers import AutoTokenizer
from words import save_tokenizer

from gatedadapters.continual import choice_tasks
from gatedadapters.continual.measures import nearest_class, question_once
from gatedadapters.continual.tasks import Task
from gatedadapters.data import ChoiceExample, ChoiceTask
from gatedadapters.data.language import prompt
from gatedadapters.masking.scores.losses import task_losses, token_losses
from gatedadapters.testing import tiny

CHOICES = ("good", "bad today", "long", "dog runs today")
QUESTIONS = [ChoiceExample(text, CHOICES, 0) for text in ("the film was", "the dog", "today the cat sleeps", "film")]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    save_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def question_batch(tokenizer: Any, question: ChoiceExample) -> dict[str, torch.Tensor]:
    found: Task = choice_tasks(
        [ChoiceTask("choice", tuple(replace(question, answer=i) for i in range(4)), (), ())], tokenizer, max_length=32
    )[0]
    return found.collate([found.train[i] for i in range(4)])


def mean_log_probability(model: Any, tokenizer: Any, question: ChoiceExample, choice: str) -> float:
    """Of the answer's tokens, one row without padding or cache."""
    ids, answer = (tokenizer(text)["input_ids"] for text in (prompt(question), f" {choice}"))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(ids) + i - 1, token]) for i, token in enumerate(answer)) / len(answer)


def test_the_likeliest_choice_counts(tokenizer: Any) -> None:
    model, _ = tiny("llama", head="lm")
    best = []
    for question in QUESTIONS:
        found = [mean_log_probability(model, tokenizer, question, choice) for choice in CHOICES]
        best.append(found.index(max(found)))
    for shift, expected in ((0, 1.0), (1, 0.0)):
        asked = [replace(q, answer=(b + shift) % 4) for q, b in zip(QUESTIONS, best, strict=True)]
        (task,) = choice_tasks([ChoiceTask("choice", tuple(asked), (), tuple(asked))], tokenizer, max_length=32)
        assert task.score(model) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neox", "mistral", "gemma2", "mamba"])
def test_running_the_question_once_changes_no_loss(family: str, tokenizer: Any) -> None:
    model, _ = tiny(family, head="lm")
    model.eval()
    batch = question_batch(tokenizer, QUESTIONS[2])
    with torch.no_grad():
        whole, once = task_losses(model, batch), question_once(model, batch)
        torch.testing.assert_close(task_losses(model, once), whole, rtol=1e-5, atol=1e-5)
    shared = "past_key_values" in once
    assert shared == (family not in ("mistral", "gemma2", "mamba"))
    if shared:  # the question's last token predicts the first of the answer
        assert once["input_ids"].shape[1] == 1 + max(len(c.split()) for c in CHOICES)


def test_a_mean_over_tokens_is_that_of_the_batch(tokenizer: Any) -> None:
    model, _ = tiny("llama", head="lm")
    batch = question_batch(tokenizer, QUESTIONS[0])
    with torch.no_grad():
        torch.testing.assert_close(token_losses(model, batch).mean(), model(**batch).loss)
        assert not torch.isclose(task_losses(model, batch).mean(), model(**batch).loss)


def test_texts_count_where_their_class_has_the_nearest_mean() -> None:
    model = classifier().eval()
    task = tasks()[0]
    with torch.no_grad():
        inputs = ("input_ids", "attention_mask")
        train, held_out = (
            [model.pooled(**{name: task.collate([row])[name] for name in inputs})[0] for row in part]
            for part in (task.train, task.held_out)
        )
    labels = [int(task.collate([x])["labels"]) for x in task.train]
    means = {c: torch.stack([f for f, own in zip(train, labels, strict=True) if own == c]).mean(0) for c in set(labels)}
    nearest = [max(means, key=lambda c: float(torch.cosine_similarity(f, means[c], dim=0))) for f in held_out]
    wanted = [int(task.collate([x])["labels"]) for x in task.held_out]
    expected = sum(a == b for a, b in zip(nearest, wanted, strict=True)) / len(wanted)
    assert nearest_class(model, task) == pytest.approx(expected)
    assert len(set(nearest)) > 1
