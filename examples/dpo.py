"""Let SmolLM2 prefer right answers to wrong ones: DPO on pairs made of a multiple-choice task.

python examples/dpo.py OUT     (a new folder; needs trl and the packages of benchmarks/requirements.txt; some minutes)
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import gatedadapters as ga
from gatedadapters.data.bundled import load_choices, load_smollm2
from gatedadapters.data.tasks import ChoiceExample


def preferences(examples: Iterable[ChoiceExample], seed: int = 0) -> list[dict[str, Any]]:
    """Of each question of OpenBookQA the right answer, preferred to one of the wrong ones, drawn at random."""
    draw = random.Random(seed)
    rows = []
    for example in examples:
        wrong = draw.choice([i for i in range(len(example.choices)) if i != example.answer])
        rows.append(
            {"prompt": [{"role": "user", "content": example.question}]}
            | {
                name: [{"role": "assistant", "content": example.choices[choice]}]
                for name, choice in (("chosen", example.answer), ("rejected", wrong))
            }
        )
    return rows


def main(out: str, steps: int = 40, batch_size: int = 4, held_out: int = 64) -> dict[str, Any]:
    """Returns the structure, and the share of held-out pairs whose right answer is preferred, and the loss."""
    task = load_choices("openbookqa", train=None, validation=0, test=held_out)
    model, tokenizer = load_smollm2()
    adapters = ga.attach(model, "decoder-mixed")
    trainer = ga.gated(DPOTrainer)(  # the reference is the same model with its adapters off: no second copy
        model,
        args=DPOConfig(
            str(Path(out).with_name("checkpoints")),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            max_length=96,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(preferences(task.train)),
        eval_dataset=Dataset.from_list(preferences(task.test)),
        processing_class=tokenizer,
        budget=ga.Budget(params=100_000),
    )
    trainer.train()
    measured = trainer.evaluate()
    structure = adapters.compact()
    adapters.save(out)
    return {
        "structure": structure,
        "preferred": measured["eval_rewards/accuracies"],  # .5 before: the model is its own reference
        "loss": measured["eval_loss"],  # .693 before
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = main(sys.argv[1])
    print(found.pop("structure"))
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
