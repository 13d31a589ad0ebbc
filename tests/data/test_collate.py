from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from gatedadapters.data import Examples, MixedTaskCollator, MixedTaskDataset, TextTask, task_sampler
from gatedadapters.errors import DataError


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[SEP]", "[UNK]", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B:1 [SEP]:1", special_tokens=[("[SEP]", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def task(name: str, texts: Sequence[str], pairs: list[str] | None = None) -> TextTask:
    examples = Examples(list(texts), [index % 2 for index in range(len(texts))], pairs)
    return TextTask(name, examples, examples.sample(1, seed=0), None, ("no", "yes"))


@pytest.fixture
def tasks() -> list[TextTask]:
    return [task("one", ["a b c", "d"]), task("two", ["e", "f", "g"], ["h", "a", "b"])]


def test_items_carry_tokens_label_and_task(tokenizer: Any, tasks: list[TextTask]) -> None:
    data = MixedTaskDataset(tasks, tokenizer, "train", max_length=4)
    assert len(data) == 5
    assert data.sizes == [2, 3]
    assert data[0] == {
        "input_ids": [3, 4, 5, 1],
        "token_type_ids": [0] * 4,
        "attention_mask": [1] * 4,
        "labels": 0,
        "task_ids": 0,
    }
    assert data[3]["task_ids"] == 1
    assert data[3]["token_type_ids"] == [0, 0, 1, 1]
    assert len(MixedTaskDataset(tasks, tokenizer, "validation")) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_to_their_longest(tokenizer: Any, tasks: list[TextTask], side: str) -> None:
    tokenizer.padding_side = side
    data = MixedTaskDataset(tasks, tokenizer)
    batch = MixedTaskCollator(tokenizer)([data[0], data[1], data[2]])
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(batch, torch.long)
    assert batch["task_ids"].tolist() == [0, 0, 1]
    assert batch["labels"].tolist() == [0, 1, 0]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 4)
    row = [6, 1, 0, 0] if side == "right" else [0, 0, 6, 1]
    assert batch["input_ids"][1].tolist() == row
    assert batch["attention_mask"][1].tolist() == [int(token > 0) for token in row]
    expected = tokenizer.pad(
        [{key: data[i][key] for key in ("input_ids", "token_type_ids", "attention_mask")} for i in range(3)],
        return_tensors="pt",
    )
    assert all(torch.equal(batch[key], value) for key, value in expected.items())


def test_collator_cuts_long_examples(tokenizer: Any, tasks: list[TextTask]) -> None:
    data = MixedTaskDataset(tasks, tokenizer)
    assert MixedTaskCollator(tokenizer, max_length=2)([data[0]])["input_ids"].tolist() == [[3, 4]]


def test_what_cannot_be_collated_is_refused(tokenizer: Any, tasks: list[TextTask]) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        MixedTaskCollator(SimpleNamespace(pad_token_id=None, eos_token="</s>"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"a token that it knows"):
        MixedTaskCollator(SimpleNamespace(pad_token_id=None, eos_token=None))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the same keys"):
        MixedTaskCollator(tokenizer)([{"input_ids": [1]}, {"input_ids": [1], "labels": 0}])
    with pytest.raises(DataError, match="an empty batch"):
        MixedTaskCollator(tokenizer)([])
    with pytest.raises(DataError, match="at least one task"):
        MixedTaskDataset([], tokenizer)
    with pytest.raises(DataError, match="no test split"):
        MixedTaskDataset(tasks, tokenizer, "test")


SIZES = [900, 90, 10]


def task_of(index: int) -> int:
    return 0 if index < 900 else 1 if index < 990 else 2


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, float("inf")])
def test_tasks_come_with_their_tempered_share(temperature: float) -> None:
    sampler = task_sampler(SIZES, temperature=temperature, batch_size=16, num_samples=4000)
    counts = Counter(task_of(index) for index in sampler)
    shares = torch.tensor(SIZES, dtype=torch.float64) ** (1 / temperature)
    shares /= shares.sum()
    assert len(sampler) == sum(counts.values()) == 4000
    for position, share in enumerate(shares.tolist()):
        assert counts[position] / 4000 == pytest.approx(share, abs=0.02)


def test_every_batch_mixes_the_tasks() -> None:
    order = list(task_sampler(SIZES, temperature=float("inf"), batch_size=16, num_samples=320))
    for start in range(0, 320, 16):
        counts = Counter(task_of(index) for index in order[start : start + 16])
        assert set(counts.values()) <= {5, 6}


def test_a_task_is_seen_whole_before_anything_is_seen_twice() -> None:
    order = list(task_sampler([3, 5], temperature=float("inf"), batch_size=4, num_samples=20))
    small = [index for index in order if index < 3]
    assert all(sorted(small[start : start + 3]) == [0, 1, 2] for start in range(0, 9, 3))


def test_sampling_is_deterministic_by_seed_and_epoch() -> None:
    first, second = (task_sampler(SIZES, temperature=2.0, batch_size=16, num_samples=100, seed=7) for _ in range(2))
    assert list(first) == list(second) == list(first)
    second.set_epoch(1)
    assert list(first) != list(second)
    assert list(first) != list(task_sampler(SIZES, temperature=2.0, batch_size=16, num_samples=100, seed=8))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0.0}, {"batch_size": 0}, {"num_samples": -1}, {"sizes": [3, 0]}, {"sizes": []}],
)
def test_impossible_samplers_are_refused(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "sizes": [3, 4],
        "temperature": 1.0,
        "batch_size": 2,
        "num_samples": 4,
    } | wrong
    with pytest.raises(DataError, match=f"{next(iter(wrong))}.* > 0"):
        task_sampler(**arguments)


def test_dataset_sampler_and_collator_work_in_a_loader(tokenizer: Any, tasks: list[TextTask]) -> None:
    data = MixedTaskDataset(tasks, tokenizer)
    sampler = task_sampler(data.sizes, temperature=float("inf"), batch_size=2, num_samples=6)
    loader = DataLoader(data, batch_size=2, sampler=sampler, collate_fn=MixedTaskCollator(tokenizer))
    batches = list(loader)
    assert len(batches) == 3
    assert all(sorted(batch["task_ids"].tolist()) == [0, 1] for batch in batches)
