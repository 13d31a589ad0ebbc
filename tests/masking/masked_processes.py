"""What each of two processes runs for `test_selective_trainer.py`.

RANK=... WORLD_SIZE=2 ... python masked_processes.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

import gatedadapters as ga
from gatedadapters.testing import tiny
from gatedadapters.testing.backbones import VOCABULARY


def examples(size: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of equal length in which a token says what the next one is."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(size):
        start = int(torch.randint(3, VOCABULARY, (), generator=generator))
        ids = [3 + (start + (seed + 2) * i) % (VOCABULARY - 3) for i in range(8)]
        rows.append({"input_ids": ids, "attention_mask": [1] * 8, "labels": ids})
    return rows


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Quick, quiet steps on the CPU."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "weight_decay": 0.1,
    }
    return TrainingArguments(**(settings | changes))


def trained(folder: Path, *, processes: int) -> dict[str, Tensor]:
    """The weights after steps of four examples, however many processes share them; clipped."""
    model, _ = tiny("llama", head="lm")
    args = arguments(
        folder, per_device_train_batch_size=4 // processes, optim="sgd", learning_rate=0.5, max_grad_norm=0.5
    )
    data = {"train_dataset": examples(16), "general_dataset": examples(16, seed=1)}
    trainer = ga.SelectiveTrainer(model, args, **data)
    trainer.train()
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def chosen(folder: Path, rank: int) -> str:
    """The mask of a process whose scores came out otherwise than the first one's."""
    model, _ = tiny("llama", head="lm")
    selection = ga.SelectionConfig(kind="random", seed=rank)
    trainer = ga.SelectiveTrainer(model, arguments(folder), train_dataset=examples(16), selection=selection)
    return trainer.select().digest


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    state: dict[str, Any] = trained(folder / "shared", processes=2)
    state["mask"] = chosen(folder / "chosen", torch.distributed.get_rank())
    torch.save(state, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
