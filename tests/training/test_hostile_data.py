"""Data that cannot be trained on is refused in words, at the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipes import arguments, gated_classifier, labelled

import gatedadapters as ga
from gatedadapters.errors import FileAccessError, TrainingError


class Changed:
    """A data set of examples that differ from those of another one."""

    def __init__(self, data: Any, **changes: Any) -> None:
        self.data, self.changes = data, changes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.data[index]) | self.changes


def trainer(folder: Path, data: Any, **kwargs: Any) -> ga.GatedTrainer:
    return ga.GatedTrainer(
        gated_classifier({"a": 3}), arguments(folder), train_dataset=data, budget=ga.Budget(fraction=0.3), **kwargs
    )


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"(?s)nothing to train.*train_dataset.*fix:"):
        trainer(tmp_path, []).train()
    with pytest.raises(TrainingError, match=r"(?s)nothing to train.*eval_dataset.*fix:"):
        trainer(tmp_path, labelled([8], [3]), eval_dataset=[]).evaluate()


def test_labels_that_are_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"(?s)a label is text.*'happy'.*'labels'.*fix:"):
        trainer(tmp_path, Changed(labelled([8], [3]), labels="happy")).train()


@pytest.mark.parametrize("token", [10_000, -5])
def test_token_ids_outside_the_vocabulary_are_refused(token: int, tmp_path: Path) -> None:
    data = labelled([8], [3])
    ids = data[0]["input_ids"]
    wrong = [token] * len(ids)
    with pytest.raises(TrainingError, match=rf"(?s)outside the model's vocabulary.*got: +{token}.*optimiser step 0"):
        trainer(
            tmp_path, Changed(data, input_ids=ids.new_tensor(wrong) if hasattr(ids, "new_tensor") else wrong)
        ).train()


def test_a_checkpoint_on_a_full_disk_says_so(tmp_path: Path, full_disk: Any) -> None:
    run = ga.GatedTrainer(
        gated_classifier({"a": 3}),
        arguments(tmp_path, save_strategy="steps", save_steps=1),
        train_dataset=labelled([8], [3]),
        budget=ga.Budget(fraction=0.3),
    )
    with full_disk(2000), pytest.raises(FileAccessError, match=r"(?s)cannot write.*where:.*fix:"):
        run.train()
