"""Noise and perturbations of texts, conversations and choices: what is asked changes, or what is answered, not both."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tiny_runs import chat_tokenizer

from gatedadapters.data import ChatTask, ChoiceExample, ChoiceTask, Conversation, Message, Passage, PassageTask
from gatedadapters.errors import ConfigError
from gatedadapters.robustness import (
    Case,
    LabelNoise,
    TokenDeletion,
    TokenReplacement,
    Vocabulary,
    corrupt_tasks,
    corrupted_dataset,
)

ANSWERS = ("runs", "sleeps", "barks", "meows")
QUESTIONS = tuple(Passage(f"what does the dog {n}", ANSWERS[n % 4]) for n in range(40))
TALKS = tuple(
    Conversation(
        (Message("user", "the cat"), Message("assistant", "yes"), Message("user", q), Message("assistant", str(a)))
    )
    for q, a in QUESTIONS
)
CHOICES = tuple(ChoiceExample(q, ANSWERS, ANSWERS.index(str(a)), "the dog") for q, a in QUESTIONS)


def task(examples: tuple[Any, ...]) -> Any:
    kind = {Passage: PassageTask, Conversation: ChatTask, ChoiceExample: ChoiceTask}[type(examples[0])]
    return kind("x", examples, examples, examples)


def answer(example: Any) -> Any:
    if isinstance(example, Conversation):
        return example.messages[-1].content
    return example.answer


def noisy(examples: tuple[Any, ...], ratio: float, seed: int = 0) -> tuple[Any, ...]:
    found: tuple[Any, ...] = corrupt_tasks([task(examples)], LabelNoise(ratio, seed=seed), "train")[0].split("train")
    return found


@pytest.mark.parametrize("examples", [QUESTIONS, TALKS, CHOICES], ids=["questions", "talks", "choices"])
def test_label_noise_gives_the_share_of_examples_another_answer(examples: tuple[Any, ...]) -> None:
    assert noisy(examples, 0.0) == examples
    changed = {ratio: noisy(examples, ratio) for ratio in (0.2, 0.5)}
    wrong = {
        ratio: [n for n, (new, old) in enumerate(zip(found, examples, strict=True)) if answer(new) != answer(old)]
        for ratio, found in changed.items()
    }
    assert {ratio: len(places) for ratio, places in wrong.items()} == {0.2: 8, 0.5: 20}
    assert set(wrong[0.2]) < set(wrong[0.5])
    assert noisy(examples, 0.5) == changed[0.5] != noisy(examples, 0.5, seed=1)
    if not isinstance(examples[0], ChoiceExample):  # answers are exchanged: each stays as often as it was
        assert Counter(map(answer, changed[0.5])) == Counter(map(answer, examples))
    if isinstance(examples[0], Conversation):
        assert all(new.messages[:-1] == old.messages[:-1] for new, old in zip(changed[0.5], examples, strict=True))


def test_a_perturbation_of_words_changes_what_is_asked_alone() -> None:
    for examples in (QUESTIONS, TALKS, CHOICES):
        (shouted,) = corrupt_tasks([task(examples)], Case(1.0), "test")
        assert shouted.split("train") == examples
        for new, old in zip(shouted.split("test"), examples, strict=True):
            assert new != old
            assert answer(new) == answer(old)
            if isinstance(new, Conversation):
                assert new.messages[1] == old.messages[1]
                assert new.messages[2] != old.messages[2]
            if isinstance(new, ChoiceExample):
                assert (new.choices, new.question != old.question, new.passage != old.passage) == (
                    old.choices,
                    True,
                    True,
                )


@pytest.mark.parametrize("kind", [TokenReplacement, TokenDeletion])
def test_a_perturbation_of_tokens_leaves_what_is_to_be_predicted(kind: Any) -> None:
    tokenizer = chat_tokenizer()
    for examples in (QUESTIONS, TALKS):
        clean, changed = (
            corrupted_dataset([task(examples)], tokenizer, "test", 90, corruption, Vocabulary.of(tokenizer))
            for corruption in (None, kind(0.5))
        )
        for index in range(5):
            labels = [[label for label in data[index]["labels"] if label != -100] for data in (clean, changed)]
            assert labels[0] == labels[1]
            assert clean[index]["input_ids"] != changed[index]["input_ids"]
            pairs = zip(changed[index]["input_ids"], changed[index]["labels"], strict=True)
            assert all(token == label for token, label in pairs if label != -100)
    story = task(tuple(Passage("the dog runs today") for _ in range(9)))
    (block, *_) = (
        corrupted_dataset([story], tokenizer, "test", 16, TokenReplacement(0.5), Vocabulary.of(tokenizer))[i]
        for i in (0,)
    )
    assert block["input_ids"] != block["labels"]  # of running text what is read changes, and what follows is the same


def test_what_does_not_act_on_running_text_or_on_packed_rows_is_refused() -> None:
    story = task((Passage("the dog runs"), Passage("the cat")))
    with pytest.raises(ConfigError, match=r"(?s)every word is to be predicted.*replacement"):
        corrupt_tasks([story], Case(1.0), "test")
    with pytest.raises(ConfigError, match=r"(?s)no answers to exchange.*running text.*answer column"):
        corrupt_tasks([story], LabelNoise(0.5), "train")
    with pytest.raises(ConfigError, match=r"(?s)no answers to exchange.*one answer"):
        corrupt_tasks([task((Passage("a", "b"), Passage("c", "b")))], LabelNoise(0.5), "train")
    tokenizer = chat_tokenizer()
    packing = ChatTask("x", TALKS, TALKS, TALKS, packing=True)
    with pytest.raises(ConfigError, match=r"(?s)token by token.*packing: false"):
        corrupted_dataset([packing], tokenizer, "train", 90, TokenDeletion(0.1), Vocabulary.of(tokenizer))
