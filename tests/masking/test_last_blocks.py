"""Which parameters the last blocks are."""

from __future__ import annotations

import pytest
import torch
from masked_recipes import snapshot

import gatedadapters as ga
from gatedadapters.errors import LayoutError, MaskError
from gatedadapters.testing import tiny


@pytest.mark.parametrize(
    ("family", "head", "blocks"),
    [
        ("bert", "base", ["encoder.layer.2."]),
        ("gpt2", "lm", ["transformer.h.2."]),
        ("t5", "lm", ["encoder.block.1.", "decoder.block.2."]),  # the last of either stack
    ],
)
def test_nothing_but_the_last_block_of_every_stack_moves(family: str, head: str, blocks: list[str]) -> None:
    model, batch = tiny(family, head=head)
    trained = ga.train_last_blocks(model, 1, sample=batch)
    before = snapshot(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(**batch)[0].square().mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained)
    assert moved == {name for name in before if name.startswith(tuple(blocks))}


def test_task_heads_are_trained_along() -> None:
    model, batch = tiny("bert", head="classification")
    trained = ga.train_last_blocks(model, 2, sample=batch)
    assert "classifier.weight" in trained
    assert not any("embeddings" in name for name in trained)


@pytest.mark.parametrize("count", [0, 4])
def test_a_count_beyond_the_stack_changes_nothing(count: int) -> None:
    model, batch = tiny("bert")
    with pytest.raises(MaskError, match="1 to 3"):
        ga.train_last_blocks(model, count, sample=batch)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(LayoutError):
        ga.train_last_blocks(torch.nn.Linear(2, 2), 1)
