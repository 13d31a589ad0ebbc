"""Noise and perturbations on tasks, data sets, batches and a Trainer; and adding one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import gatedadapters as ga
from gatedadapters import robustness
from gatedadapters.config import CorruptionConfig
from gatedadapters.data import Examples, TextTask
from gatedadapters.errors import ConfigError
from gatedadapters.robustness import (
    Case,
    CorruptedDataset,
    EmbeddingNoise,
    GradientNoise,
    LabelNoise,
    NearestEmbedding,
    NoiseCallback,
    Perturbation,
    TextPerturbation,
    TokenDeletion,
    TokenMasking,
    TokenReplacement,
    Typos,
    Vocabulary,
)
from gatedadapters.robustness.base import Ids
from gatedadapters.testing import CorruptionContract, tiny

WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett"]


class Reversed(TextPerturbation):
    """A perturbation of an outsider: spells words backwards."""

    kind = "reversed"

    def eligible(self, words: Sequence[str]) -> Sequence[int]:
        return [index for index, word in enumerate(words) if word[::-1] != word]

    def touch(self, words: list[str], chosen: Ids, draw: np.random.Generator) -> list[str]:
        for index in chosen:
            words[index] = words[index][::-1]
        return words


class TestOutsidersPerturbation(CorruptionContract):
    corruptions = Reversed


def task(n: int = 40) -> TextTask:
    examples = Examples([" ".join(WORDS) for _ in range(n)], [index % 2 for index in range(n)])
    return TextTask("t", examples, examples, examples, ("no", "yes"))


def features(n: int = 12) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 90, (9,), generator=generator).tolist() for _ in range(n)]
    return [{"input_ids": [1, *row, 2], "attention_mask": [1] * 11, "labels": i % 2} for i, row in enumerate(rows)]


def test_a_larger_ratio_touches_what_a_smaller_one_does_and_more() -> None:
    text = " ".join(WORDS)
    few, many = (Case(ratio, seed=4).text(text).split() for ratio in (0.3, 0.7))
    touched = [{i for i, word in enumerate(found) if word != WORDS[i]} for found in (few, many)]
    assert touched[0] < touched[1]


def test_typos_keep_the_letters_of_each_word() -> None:
    found = Typos(1.0).text(" ".join(WORDS)).split()
    assert [sorted(word) for word in found] == [sorted(word) for word in WORDS]
    assert all(a != b for a, b in zip(found, WORDS, strict=True))


def test_label_noise_draws_every_wrong_class_alike() -> None:
    noisy = torch.tensor(LabelNoise(1.0).labels([2] * 6000, 4))
    assert torch.bincount(noisy, minlength=4).tolist() == pytest.approx([2000, 2000, 0, 2000], abs=150)


def test_replaced_tokens_are_spread_over_all_ordinary_ones() -> None:
    vocabulary = Vocabulary(10, frozenset({0, 1}))
    ids = {"input_ids": [5] * 7000}
    changed = torch.tensor(TokenReplacement(1.0).feature(ids, vocabulary)["input_ids"])
    assert torch.bincount(changed, minlength=10).tolist() == pytest.approx([0, 0, *[1000] * 3, 0, *[1000] * 4], abs=120)


def test_nearest_embedding_is_that_of_the_cosine() -> None:
    table = torch.randn(30, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    vocabulary = Vocabulary(30, frozenset({0}), embedding=table.float())
    found = NearestEmbedding(1.0).feature({"input_ids": list(range(1, 30))}, vocabulary)["input_ids"]
    cosine = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=-1)
    cosine[:, 0] = -1
    cosine.fill_diagonal_(-1)
    assert found == cosine[1:].argmax(-1).tolist()


def test_each_item_of_a_data_set_is_always_changed_in_the_same_way() -> None:
    data = CorruptedDataset(features(), TokenReplacement(0.4), Vocabulary(90, frozenset({0, 1, 2})))
    forwards = [data[i] for i in range(len(data))]
    assert [data[i] for i in reversed(range(len(data)))] == forwards[::-1]
    positions = {
        tuple(a != b for a, b in zip(new["input_ids"], old["input_ids"], strict=True))
        for new, old in zip(forwards, features(), strict=True)
    }
    assert len(positions) > 3  # not the same places in every example


def test_tasks_lose_texts_or_labels_of_one_split_only() -> None:
    (typed,) = robustness.corrupt_tasks([task()], Typos(0.5), "test")
    assert typed.train == task().train
    assert typed.test is not None
    assert typed.test.labels == task().train.labels
    assert typed.test.texts != task().train.texts
    (noisy,) = robustness.corrupt_tasks([task()], LabelNoise(0.25), "train")
    assert sum(a != b for a, b in zip(noisy.train.labels, task().train.labels, strict=True)) == 10
    assert noisy.train.texts == task().train.texts
    assert noisy.test == task().test


def test_padding_of_a_batch_stays_what_it_was() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
    vocabulary = Vocabulary(30, frozenset({0}))
    same = robustness.corrupt_batch(batch, TokenReplacement(0.0), vocabulary)
    assert all(torch.equal(same[name], batch[name]) for name in batch)
    fewer = robustness.corrupt_batch(batch, TokenDeletion(0.4), vocabulary)
    rows = [fewer["labels"][row][fewer["attention_mask"][row] == 0].tolist() for row in range(2)]
    assert fewer["input_ids"].shape[1] < 5
    assert set(rows[0] + rows[1]) == {-100}


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_every_column_follows_its_tokens_whatever_holds_it(kind: Any) -> None:
    feature = {
        "input_ids": kind([5, 6, 7, 8, 9, 10]),
        "labels": kind([0, 1, 2, 3, 4, 5]),
        "weight": 0.5,
        "text": "abcdef",
    }
    found = TokenDeletion(0.5).feature(feature, Vocabulary(30, frozenset({0})))
    assert len(found["input_ids"]) == 3
    assert [int(token) - 5 for token in found["input_ids"]] == [int(label) for label in found["labels"]]
    assert type(found["input_ids"]) is type(found["labels"]) is type(feature["input_ids"])
    assert (found["weight"], found["text"]) == (0.5, "abcdef")


def test_a_resumed_run_meets_the_same_noise_although_its_epochs_end_within_a_step(tmp_path: Path) -> None:
    rows = [{name: torch.tensor(value) for name, value in feature.items()} for feature in features(10)]

    def run(checkpoint: Path | None) -> torch.Tensor:
        model, _ = tiny("bert", head="classification")
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=3,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            learning_rate=0.01,
            seed=1,
        )
        Trainer(model, args, train_dataset=rows, callbacks=[NoiseCallback(EmbeddingNoise(0.5))]).train(
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = run(None)
    assert torch.equal(run(tmp_path / "checkpoint-3"), whole)


def trained(tmp_path: Path, noise: NoiseCallback | None) -> dict[str, torch.Tensor]:
    model, _ = tiny("bert", head="classification")
    adapters = ga.attach(model, "lora-all-linear")
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=0.01,
        dataloader_pin_memory=False,
    )
    hooks = len(model.get_input_embeddings()._forward_hooks)
    callbacks = [noise] if noise is not None else []
    rows = [{name: torch.tensor(value) for name, value in feature.items()} for feature in features()]
    ga.GatedTrainer(model, args, train_dataset=rows, callbacks=callbacks, penalty=ga.L0(weight=0.1)).train()
    assert len(model.get_input_embeddings()._forward_hooks) == hooks
    return {name: value.clone() for name, value in adapters.state_dict().items()}


def test_a_trainer_meets_noise_on_embeddings_and_gradients(tmp_path: Path) -> None:
    clean = trained(tmp_path, None)
    for kind in (EmbeddingNoise, GradientNoise):
        none, some, again = (trained(tmp_path, NoiseCallback(kind(ratio))) for ratio in (0.0, 0.5, 0.5))
        assert all(torch.equal(none[name], clean[name]) for name in clean), kind
        assert any(not torch.equal(some[name], clean[name]) for name in clean), kind
        assert all(torch.equal(some[name], again[name]) for name in clean), kind


def test_what_acts_elsewhere_is_refused_with_the_way_to_go() -> None:
    vocabulary = Vocabulary(90, frozenset({0, 1, 2}))
    with pytest.raises(ConfigError, match="corrupt_tasks"):
        CorruptedDataset(features(), Typos(0.1), vocabulary)
    with pytest.raises(ConfigError, match="CorruptedDataset"):
        robustness.corrupt_tasks([task()], TokenReplacement(0.1), "test")
    with pytest.raises(ConfigError, match="CorruptedDataset"):
        NoiseCallback(LabelNoise(0.1))
    with pytest.raises(ConfigError, match="mask token"):
        TokenMasking(0.5).feature(features()[0], vocabulary)
    with pytest.raises(ConfigError, match="embedding"):
        NearestEmbedding(0.5).feature(features()[0], vocabulary)
    with pytest.raises(ConfigError, match="2 classes"):
        LabelNoise(0.5).labels([0, 0], 1)


def test_configuration_names_kinds_and_keeps_training_noise_out_of_evaluation() -> None:
    found = robustness.corruption(CorruptionConfig(kind="typos", ratio=0.2, seed=3))
    assert (type(found), found.ratio, found.seed) == (Typos, 0.2, 3)
    with pytest.raises(ConfigError, match=r"label.*typos(.|\n)*nonsense"):
        robustness.corruption(CorruptionConfig(kind="nonsense", ratio=0))
    with pytest.raises(ConfigError, match="training only"):
        robustness.corruption(CorruptionConfig(kind="label", ratio=0), only=Perturbation)
    with pytest.raises(ConfigError, match="ratio"):
        CorruptionConfig.parse({"kind": "label", "ratio": 1.2}, where="test")


def test_a_registered_kind_is_known_to_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "_KINDS", robustness.corruption_kinds())
    robustness.register(Reversed)
    assert isinstance(robustness.corruption(CorruptionConfig(kind="reversed", ratio=0.1)), Reversed)
