"""A short search whose steps are shared out in several ways, for `test_loss_scale.py` and its two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from recipes import SOON, SPACE, Watch, arguments, labelled, with_dropout

import gatedadapters as ga
from gatedadapters.testing import tiny

MODELS: dict[str, tuple[str, str]] = {
    "BertForSequenceClassification": ("bert", "classification"),
    "LlamaForSequenceClassification": ("llama", "classification"),
    "LlamaForCausalLM": ("llama", "lm"),
    "BartForConditionalGeneration": ("bart", "lm"),
}
"""By class: the family and the head of a tiny model. All take `**kwargs`; the causal one alone divides by the count."""


def examples(head: str) -> list[dict[str, Any]]:
    """32 examples, each with a label or with equally many of them."""
    rows = labelled([32])
    return rows if head == "classification" else [row | {"labels": row["input_ids"]} for row in rows]


def search(name: str, folder: Path, *, batch: int, pieces: int, processes: int = 1) -> dict[str, Any]:
    """Four steps of 8 examples each, however many micro-batches and processes share them.

    Returns:
        The gradients of each step by parameter, and the structure at the end.
    """
    family, head = MODELS[name]
    model, _ = tiny(family, head=head, pad_token_id=0, dropout=0.0, attention_dropout=0.0)
    adapters = ga.attach(with_dropout(model, 0.0), SPACE)
    assert batch * pieces * processes == 8

    def gradients(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
        found = {key: p.grad for key, p in adapters.model.named_parameters() if p.grad is not None}
        return {key: gradient.clone() for key, gradient in found.items()}

    watch = Watch(gradients)
    args = arguments(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=pieces,
        max_steps=4,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
    )
    options = {"budget": ga.Budget(fraction=0.3), "schedule": SOON, "gate_learning_rate": 1.0}
    ga.GatedTrainer(model, args, train_dataset=examples(head), callbacks=[watch], **options).train()
    assert adapters.structure is not None
    return {"gradients": watch.seen, "structure": adapters.structure.to_json()}
