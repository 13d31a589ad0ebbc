"""Make an existing LoRA smaller on your own data, beside plain truncation to the same size."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from gatedadapters import experiments
from gatedadapters.config import Budget, CompressConfig, CompressTrainingConfig
from gatedadapters.config.tasks import Kind

TASK = ("train", "test", "kind", "text", "pair", "label", "answer", "messages", "choices")
TRAINING = ("steps", "batch_size", "learning_rate", "max_length", "seed")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument(
        "lora",
        type=Path,
        metavar="LORA_DIR",
        help="a LoRA that peft saved, for sequence classification or for a causal language model",
    )
    parser.add_argument(
        "--budget", required=True, help="what stays: a share of its parameters (0.25) or a number (40000)"
    )
    parser.add_argument("--train", required=True, metavar="FILE", help="CSV, TSV, JSON lines, parquet or .txt")
    parser.add_argument("--test", metavar="FILE", help="scored on; split off --train by default")
    parser.add_argument("--model", help="folder, hub id or bundled:NAME (default: the base that the LoRA names)")
    parser.add_argument(
        "--kind", choices=get_args(Kind), help="of the task (text with --answer or a .txt file, else classification)"
    )
    parser.add_argument("--text", default="text", help="column of the text (text)")
    parser.add_argument("--pair", help="column of a second text")
    parser.add_argument("--label", default="label", help="column of the label (label)")
    parser.add_argument("--answer", help="column of the answer, for kinds text and chat")
    parser.add_argument("--messages", help="column of the conversation, for kind chat (messages)")
    parser.add_argument("--choices", help="column of the choices, for kind choice")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="labels in the order of the LoRA's outputs (sorted)"
    )
    parser.add_argument("--out", type=Path, default=Path("compressed"), help="folder for the results (compressed)")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in --out")
    for name in TRAINING:
        default = getattr(CompressTrainingConfig(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default})")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))


def run(options: argparse.Namespace) -> None:
    """Run it and print the result."""
    data = {
        "lora": str(options.lora),
        "budget": Budget.from_number(options.budget, where="--budget"),
        "task": {name: given for name in TASK if (given := getattr(options, name)) is not None},
        "model": options.model,
        "classes": options.classes,
        "training": {name: getattr(options, name) for name in (*TRAINING, "device", "precision")},
    }
    config = CompressConfig.parse(data, where="gatedadapters compress")
    print(experiments.compress(config, options.out, overwrite=options.overwrite))
