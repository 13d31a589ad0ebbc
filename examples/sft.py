"""Teach SmolLM2 to answer questions in a chat: search, keep what the budget allows, and chat with the result.

python examples/sft.py OUT     (a new folder; needs trl and the packages of benchmarks/requirements.txt; some minutes)
"""

from __future__ import annotations

from typing import Any

import smollm2
from transformers import pipeline
from trl import SFTConfig, SFTTrainer

import gatedadapters as ga
from gatedadapters.data.bundled import load_choices, load_smollm2
from gatedadapters.data.tasks import ChoiceExample


def conversation(example: ChoiceExample) -> dict[str, Any]:
    """A question of CommonsenseQA, asked and answered; TRL learns the completion alone."""
    question = f"{example.question}\nChoose from: {', '.join(example.choices)}."
    answer = example.choices[example.answer]
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def main(
    out: str, steps: int = 40, batch_size: int = 4, held_out: int = 64, learning_rate: float = 3e-3
) -> dict[str, Any]:
    """Returns the structure, held-out loss before and after, and how many held-out questions are answered right."""
    task = load_choices("commonsenseqa", train=None, validation=0, test=held_out)
    train, test = ([conversation(example) for example in part] for part in (task.train, task.test))
    settings = {"max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate}
    trainer = smollm2.gated_trainer(SFTTrainer, SFTConfig, train, test, out, **settings)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    structure = trainer.adapters.compact()  # in place: only what stays, gates folded into the weights
    trainer.adapters.save(out)

    model, tokenizer = load_smollm2()
    ga.load_adapters(model, out)
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    right = 0
    for example, row in zip(task.test, test, strict=True):
        chatted = chat(row["prompt"], max_new_tokens=12, max_length=None, do_sample=False)[0]["generated_text"]
        right += chatted[-1]["content"].strip().casefold() == example.choices[example.answer].casefold()
    return {"structure": structure, "before": before, "after": after, "right": right, "asked": len(test)}


if __name__ == "__main__":
    smollm2.run(main, __doc__)
