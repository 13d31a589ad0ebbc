"""Make an existing LoRA of a classifier smaller on your own table, beside plain truncation to the same size."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatedadapters.config import Budget, SearchConfig
from gatedadapters.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gatedadapters.data import TextTask

TRAINING = {"steps": 200, "batch_size": 16, "learning_rate": 1e-3, "max_length": 128, "seed": 0}


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "lora", type=Path, metavar="LORA_DIR", help="a LoRA that peft saved for sequence classification"
    )
    parser.add_argument(
        "--budget", required=True, help="what stays: a share of its parameters (0.25) or a number (40000)"
    )
    parser.add_argument("--train", required=True, metavar="FILE", help="CSV, TSV, JSON lines or parquet")
    parser.add_argument("--test", metavar="FILE", help="scored on; split off --train by default")
    parser.add_argument("--model", help="folder, hub id or bundled:NAME (default: the base that the LoRA names)")
    parser.add_argument("--text", default="text", help="column of the text (text)")
    parser.add_argument("--pair", help="column of a second text")
    parser.add_argument("--label", default="label", help="column of the label (label)")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="labels in the order of the LoRA's outputs (sorted)"
    )
    parser.add_argument("--out", type=Path, default=Path("compressed"), help="folder for the results (compressed)")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in --out")
    for name, default in TRAINING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default})")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))


def run(options: argparse.Namespace) -> None:
    """Do it."""
    from gatedadapters.artifacts.peft_folder import read_peft
    from gatedadapters.experiments.compress import compress  # training takes seconds to import
    from gatedadapters.experiments.setup import load_tasks

    lora = read_peft(options.lora)
    config = configuration(options, lora.config)
    task = ordered(load_tasks(config)[0], options.classes)
    print(compress(lora, config, task, options.out, overwrite=options.overwrite))


def configuration(options: argparse.Namespace, lora: Mapping[str, Any]) -> SearchConfig:
    """The options as what the other commands read from a file.

    Raises:
        ConfigError: an option is out of range, the LoRA is not for classification, or no base model is named.
    """
    if lora.get("task_type") not in ("SEQ_CLS", None):
        raise ConfigError(
            "this command scores classifiers",
            expected="a LoRA of task_type SEQ_CLS",
            got=lora.get("task_type"),
            where=options.lora,
            fix="in a script of your own: gatedadapters.import_peft, a GatedTrainer with a budget, export_peft",
        )
    model = options.model or lora.get("base_model_name_or_path")
    if not model:
        expected = "--model, or base_model_name_or_path in the LoRA's configuration"
        raise ConfigError("no base model is named", expected=expected, got="neither", where=options.lora, fix="name it")
    task = {name: getattr(options, name) for name in ("train", "test", "text", "pair", "label")}
    training = {name: getattr(options, name) for name in (*TRAINING, "device", "precision")}
    budget = parsed_budget(options.budget).model_dump(exclude_none=True)
    data = {"model": model, "tasks": [task], "budget": budget, "training": training, "schedule": {"warmup": 0.0}}
    return SearchConfig.parse(data, where="gatedadapters compress")


def parsed_budget(text: str) -> Budget:
    """`0.25` is a share, `40000` a number of parameters.

    Raises:
        ConfigError: it is neither.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    given: dict[str, Any] = {"fraction": value} if value <= 1 else {"params": value}
    return Budget.parse(given, where=f"--budget {text}")


def ordered(task: TextTask, names: Sequence[str] | None) -> TextTask:
    """The task with its classes in the order that the LoRA's outputs have.

    Raises:
        DataError: these are not its classes.
    """
    from gatedadapters.data import Examples, TextTask

    if names is None:
        return task
    if sorted(names) != sorted(task.classes):
        raise DataError(
            "these are not the classes of the table",
            expected=", ".join(task.classes),
            got=", ".join(names),
            where="--classes",
            fix="name each label of the table once",
        )
    place = [names.index(name) for name in task.classes]

    def turned(examples: Examples) -> Examples:
        return Examples(examples.texts, [place[label] for label in examples.labels], examples.pairs)

    test = None if task.test is None else turned(task.test)
    return TextTask(task.name, turned(task.train), turned(task.validation), test, tuple(names))
