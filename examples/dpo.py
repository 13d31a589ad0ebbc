"""Let SmolLM2 prefer right answers to wrong ones: DPO on pairs made of a multiple-choice task.

python examples/dpo.py OUT     (a new folder; needs trl and the packages of benchmarks/requirements.txt; some minutes)
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import smollm2
from trl import DPOConfig, DPOTrainer

from gatedadapters.data.bundled import load_choices
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


def main(
    out: str, steps: int = 40, batch_size: int = 4, held_out: int = 64, learning_rate: float = 1e-3
) -> dict[str, Any]:
    """Returns the structure, and the share of held-out pairs whose right answer is preferred, and the loss."""
    task = load_choices("openbookqa", train=None, validation=0, test=held_out)
    train, test = preferences(task.train), preferences(task.test)
    settings = {"max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate}
    # The reference is the same model with its adapters off: no second copy.
    trainer = smollm2.gated_trainer(DPOTrainer, DPOConfig, train, test, out, **settings)
    trainer.train()
    measured = trainer.evaluate()
    structure = trainer.adapters.compact()
    trainer.adapters.save(out)
    return {
        "structure": structure,
        "preferred": measured["eval_rewards/accuracies"],  # .5 before: the model is its own reference
        "loss": measured["eval_loss"],  # .693 before
    }


if __name__ == "__main__":
    smollm2.run(main, __doc__)
