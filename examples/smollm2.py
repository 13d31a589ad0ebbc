"""What sft.py and dpo.py share: SmolLM2 with gated candidates in a trainer of TRL, and the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

import gatedadapters as ga
from gatedadapters.data.bundled import load_smollm2

Rows = list[dict[str, Any]]


def gated_trainer(kind: Any, config: Any, train: Rows, test: Rows, out: str, **settings: Any) -> Any:
    """A gated trainer that looks for at most 100,000 parameters.

    Args:
        kind: a trainer class of TRL.
        config: the class of its arguments.
        train: what it learns.
        test: what `evaluate` measures.
        out: the folder of the result. The trainer's own folder lies beside it.
        **settings: of `config`.
    """
    model, tokenizer = load_smollm2()
    ga.attach(model, "lora-scale")  # a frozen backbone with the candidates that bear batches of few tokens
    return ga.gated(kind)(
        model,
        args=config(
            str(Path(out).with_name("checkpoints")),
            max_length=128,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            **settings,
        ),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(test),
        processing_class=tokenizer,
        budget=ga.Budget(params=100_000),
    )


def run(main: Callable[[str], dict[str, Any]], usage: str | None) -> None:
    """Call `main` with the folder that the command line names, and print what it found, the structure first."""
    if len(sys.argv) != 2:
        sys.exit(usage)
    found = main(sys.argv[1])
    print(found.pop("structure"))
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
