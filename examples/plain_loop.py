"""A training loop of your own, with accelerate: all it takes is `loss + adapters.penalty()`.

python examples/plain_loop.py OUT     (a new folder; a tiny random encoder learns whether a word occurs)
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import gatedadapters as ga

WORD = 7


def sentences(count: int, seed: int) -> TensorDataset:
    """Token ids (count, 12) and whether `WORD` is among them (count,), in half of the rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORD + 1, 40, (count, 12), generator=generator)
    labels = torch.arange(count) % 2
    places = torch.randint(0, 12, (count,), generator=generator)
    ids[labels == 1, places[labels == 1]] = WORD
    return TensorDataset(ids, labels)


def main(out: str, steps: int = 300, accumulate: int = 2) -> tuple[ga.Structure, float]:
    """Returns what was found, and the accuracy on new sentences."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
    )
    model = BertForSequenceClassification(config)
    accelerator = Accelerator(gradient_accumulation_steps=accumulate)

    adapters = ga.attach(model, "encoder-mixed")
    adapters.set_penalty(ga.Budget(fraction=1 / 8), total_steps=steps)  # optimiser steps, not micro-batches
    optimizer = torch.optim.AdamW(
        [
            {"params": [*adapters.weight_parameters(), *adapters.head_parameters()], "lr": 5e-3},
            {"params": adapters.gate_parameters(), "lr": 0.1, "weight_decay": 0.0},
        ]
    )
    batches = DataLoader(sentences(1024, seed=0), batch_size=16, shuffle=True)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    model.train()
    done = 0
    while done < steps:
        for ids, labels in batches:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=labels).loss
                accelerator.backward(loss + adapters.penalty())
                optimizer.step()
                optimizer.zero_grad()
            done += accelerator.sync_gradients
            if done == steps:
                break

    structure = adapters.compact()
    if accelerator.is_main_process:
        adapters.save(out)
    return structure, accuracy(model, sentences(500, seed=1))


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: TensorDataset) -> float:
    """Share of right answers."""
    model.eval()
    ids, labels = data.tensors
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids.to(device)).logits
    return float((logits.argmax(-1).cpu() == labels).float().mean())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found, right = main(sys.argv[1])
    print(f"{found}\n\naccuracy on new sentences: {right:.3f}")
