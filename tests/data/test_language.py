"""Text for language models: what counts, and where it is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import save_tokenizer
from transformers import AutoTokenizer

from gatedadapters.data.language import LanguageDataset, Passage
from gatedadapters.errors import DataError


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
