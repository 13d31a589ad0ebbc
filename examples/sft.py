"""Teach SmolLM2 to answer questions in a chat: search, keep what the budget allows, and chat with the result.

python examples/sft.py OUT     (a new folder; needs trl and the packages of benchmarks/requirements.txt; some minutes)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
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


def main(out: str, steps: int = 60, batch_size: int = 8, held_out: int = 64) -> dict[str, Any]:
    """Returns the structure, held-out loss before and after, and how many held-out questions are answered right."""
    task = load_choices("commonsenseqa", train=None, validation=0, test=held_out)
    train, test = ([conversation(example) for example in part] for part in (task.train, task.test))
    model, tokenizer = load_smollm2()
    adapters = ga.attach(model, "decoder-mixed")  # a frozen backbone with gated candidates
    trainer = ga.gated(SFTTrainer)(
        model,
        SFTConfig(
            str(Path(out).with_name("checkpoints")),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=2e-3,
            max_length=128,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(test),
        processing_class=tokenizer,
        budget=ga.Budget(params=100_000),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    structure = adapters.compact()  # in place: only what stays, gates folded into the weights
    adapters.save(out)

    model, tokenizer = load_smollm2()
    ga.load_adapters(model, out)
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    right = 0
    for example, row in zip(task.test, test, strict=True):
        made = chat(row["prompt"], max_new_tokens=12, max_length=None, do_sample=False)[0]["generated_text"][-1][
            "content"
        ]
        right += made.strip().casefold() == example.choices[example.answer].casefold()
    return {"structure": structure, "before": before, "after": after, "right": right, "asked": len(test)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = main(sys.argv[1])
    print(found.pop("structure"))
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
