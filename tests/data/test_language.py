"""Text for language models: what counts, and where it is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import chat_tokenizer, save_tokenizer
from transformers import AutoTokenizer

from gatedadapters.data import (
    ChatTask,
    ChoiceExample,
    ChoiceTask,
    Conversation,
    Examples,
    LanguageCollator,
    LanguageDataset,
    Message,
    MixedTaskDataset,
    Passage,
    PassageTask,
    TextTask,
    collator,
)
from gatedadapters.data.language import packed
from gatedadapters.errors import DataError
from gatedadapters.testing import tiny


def test_answers_alone_count_and_running_text_is_cut_into_blocks(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (item,) = LanguageDataset([Passage("the film was", "very good")], tokenizer, 16)
    assert item["labels"][:3] == [-100] * 3
    assert item["labels"][3:] == item["input_ids"][3:]
    (cut,) = LanguageDataset([Passage("the film was " * 9, "very good")], tokenizer, 6)
    assert len(cut["input_ids"]) == 6
    assert sum(label >= 0 for label in cut["labels"]) == 2
    blocks = LanguageDataset([Passage("the film was good")] * 5, tokenizer, 6)
    assert [len(block["input_ids"]) for block in blocks] == [6, 6, 6, 2]
    with pytest.raises(DataError, match="nothing to predict"):
        LanguageDataset([Passage("the")], tokenizer, 6)


def talks(count: int) -> tuple[Conversation, ...]:
    return tuple(
        Conversation((Message("user", f"what does the dog {n}"), Message("assistant", "runs " * (1 + n % 3))))
        for n in range(count)
    )


def test_packed_conversations_lose_no_answer_and_see_no_other_conversation() -> None:
    """The loss of a packed batch is that of the same conversations, one a row: an oracle that knows no packing."""
    tokenizer, collate = chat_tokenizer(), LanguageCollator(chat_tokenizer())
    model, _ = tiny("llama", head="lm")
    model.resize_token_embeddings(len(tokenizer))
    model.eval()
    apart, together = (LanguageDataset(talks(7), tokenizer, 90, packing=packing) for packing in (False, True))
    assert len(together) < len(apart) == 7
    assert max(len(together[i]["input_ids"]) for i in range(len(together))) <= 90
    batches = [collate([data[i] for i in range(len(data))]) for data in (apart, together)]
    assert batches[1].keys() == {"input_ids", "position_ids", "labels"}
    assert len({int((batch["labels"] != -100).sum()) for batch in batches}) == 1
    with torch.no_grad():
        alone, packed = (model(**batch, use_cache=False).loss for batch in batches)
    torch.testing.assert_close(packed, alone)


def test_no_token_of_a_packed_row_is_predicted_from_another_text() -> None:
    tokenizer = chat_tokenizer()
    row = LanguageDataset([Passage("the dog runs today")] * 9, tokenizer, 8, packing=True)[0]
    assert row["labels"][0] == -100
    both = packed([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}], 8)
    assert both == [
        {"input_ids": [7, 8, 9, 5, 6], "position_ids": [0, 1, 2, 0, 1], "labels": [-100, 8, 9, -100, 6]},
    ]


def test_tasks_of_a_language_model_share_a_batch_and_classification_does_not_mix_with_them() -> None:
    tokenizer = chat_tokenizer()
    chat = ChatTask("chat", talks(5), talks(1), talks(1), packing=True)
    facts = PassageTask("facts", (Passage("the dog", "runs"), Passage("the cat", "sleeps")), (), ())
    quiz = ChoiceTask("quiz", (ChoiceExample("the dog", ("runs", "sleeps"), 0),), (), ())
    data = MixedTaskDataset([chat, facts, quiz], tokenizer, "train", 90)
    assert data.sizes[1:] == [2, 1]
    assert data.sizes[0] < 5
    batch = collator([chat, facts, quiz], tokenizer)([data[i] for i in range(len(data))])
    assert batch["task_ids"].tolist() == [0] * data.sizes[0] + [1, 1, 2]
    assert batch.keys() == {"input_ids", "position_ids", "labels", "task_ids"}
    for row, item in zip(batch["labels"].tolist(), range(len(data)), strict=True):
        assert row[: len(data[item]["labels"])] == data[item]["labels"]
        assert set(row[len(data[item]["labels"]) :]) <= {-100}
    mood = TextTask("mood", Examples(["good"], [0]), Examples(["good"], [0]), None, ("good", "bad"))
    with pytest.raises(DataError, match=r"(?s)do not share a batch.*mood \(classification\) and facts.*kind: choice"):
        MixedTaskDataset([mood, facts], tokenizer)
