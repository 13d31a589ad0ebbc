"""An encoder, a labelled table, transformers' Trainer.

python examples/trainer.py MODEL TABLE.csv OUT     (a folder or hub id; columns text and label; a new folder)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, TrainingArguments

import gatedadapters as ga
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset, read_task


def main(name: str, table: str, out: str, steps: int = 300) -> ga.Structure:
    """Search within an eighth of the candidates' parameters, prune, train on, save, load."""
    task, tokenizer = read_task(table), AutoTokenizer.from_pretrained(name)
    model = ga.MultiTaskClassifier(AutoModel.from_pretrained(name), {task.name: task.n_classes})
    adapters = ga.attach(model, "encoder-mixed")  # frozen backbone, gated candidates; heads are trained along
    trainer = ga.GatedTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(Path(out).with_name("checkpoints")),
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=MixedTaskDataset([task], tokenizer),
        data_collator=MixedTaskCollator(tokenizer),
        budget=ga.Budget(fraction=1 / 8),
    )
    trainer.train()  # at a tenth of the steps the structure is fixed; the rest trains what stays
    structure = adapters.compact()
    adapters.save(out)

    fresh = ga.MultiTaskClassifier(AutoModel.from_pretrained(name), {task.name: task.n_classes})
    ga.load_adapters(fresh, out)  # the same outputs, bit for bit
    return structure


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    print(main(*sys.argv[1:]))
