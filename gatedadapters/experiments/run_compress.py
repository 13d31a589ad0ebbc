"""The run `compress`: an existing LoRA, the same truncated, and the same searched under a budget, side by side."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gatedadapters.artifacts import export_peft, import_peft, singular_values
from gatedadapters.artifacts.export_peft import WEIGHTS
from gatedadapters.artifacts.peft_folder import PeftFolder, read_peft
from gatedadapters.artifacts.peft_records import LoraRecord
from gatedadapters.config import CompressConfig, SearchConfig
from gatedadapters.data import AnyTask, Examples, TextTask
from gatedadapters.errors import ArtifactError, ConfigError, DataError
from gatedadapters.experiments import outputs
from gatedadapters.experiments.arms import Arm, ArmRunner
from gatedadapters.experiments.evaluation import TaskScore, majority_accuracy
from gatedadapters.experiments.progress import progress_bar, silence_transformers
from gatedadapters.experiments.task_models import build_classifier, build_model, load_tasks
from gatedadapters.inspection import save_png
from gatedadapters.reporting.tables import format_table
from gatedadapters.safe_files import file_errors

GIVEN, TRUNCATED, COMPRESSED = "as given", "SVD truncation", "compressed"


@dataclass(frozen=True)
class CompressResult:
    """The result of a compression. Its text is what `gatedadapters compress` prints.

    Attributes:
        config: the configuration of the run.
        folder: the output folder.
        task: the task that was trained and tested on.
        given: the LoRA as it was.
        truncated: the LoRA cut to the budget by its singular values, without training.
        compressed: the LoRA searched under the budget.
        bytes: sizes of the weight files of the given and of the compressed LoRA.
        baseline: test accuracy of always naming the most frequent class; None if the task has no classes.
        base: scores of the language model without the LoRA; None for a classifier, whose head is the LoRA's.
    """

    config: CompressConfig
    folder: Path
    task: AnyTask
    given: Arm
    truncated: Arm
    compressed: Arm
    bytes: tuple[int, int]
    baseline: float | None
    base: TaskScore | None = None

    @property
    def arms(self) -> tuple[tuple[Arm, int | None], ...]:
        """(arm, bytes of its weight file) of all arms; the truncated LoRA is not saved."""
        return (self.given, self.bytes[0]), (self.truncated, None), (self.compressed, self.bytes[1])

    def table(self) -> str:
        """Scores on test data, size and training time of each arm."""
        whole, name = self.given.structure.params, self.task.name
        measures = list(self.given.scores[name].measures)
        rows = [
            [
                arm.name,
                *_cells(arm.scores[name], measures),
                f"{arm.structure.params:,}",
                f"{arm.structure.params / whole:.1%}",
                "" if size is None else f"{size:,}",
                f"{arm.seconds:.0f}",
            ]
            for arm, size in self.arms
        ]
        if self.baseline is not None:
            rows.append(["most frequent class", f"{self.baseline:.3f}", "", "0", "", "", "0"])
        if self.base is not None:
            rows.append(["the base model", *_cells(self.base, measures), "0", "", "", "0"])
        header = ["", *(measure.replace("_", " ") for measure in measures), "loss"]
        return format_table([*header, "parameters", "of the LoRA", "bytes", "train s"], rows)

    def __str__(self) -> str:
        steps, n_test = self.config.training.steps, len(self.task.split("test"))
        lines = [f"\nTest data: {n_test:,} examples; {steps} steps, one seed."]
        if isinstance(self.task, TextTask):
            meanings = ", ".join(f"{index} = {name}" for index, name in enumerate(self.task.classes))
            lines.append(
                f"The LoRA's outputs were taken to mean {meanings}; where that is wrong, say so with --classes."
            )
        contents = {
            f"{outputs.PEFT}/": "the smaller LoRA; PeftModel.from_pretrained(model, ...)",
            f"{outputs.ADAPTER}/": "the same for gatedadapters.load_adapters(model, ...)",
            outputs.STRUCTURE_PICTURE: "its structure as a picture",
            f"{outputs.LOGS}/": f"tensorboard --logdir {self.folder / outputs.LOGS}",
            outputs.METRICS: "every number",
        }
        return "\n".join(
            [
                *lines,
                "",
                self.table(),
                f"\n{self.compressed.structure}\n",
                f"In {self.folder}:",
                outputs.list_outputs(contents),
            ]
        )


@file_errors("read or write a file of the run", "compress")
def compress(
    config: CompressConfig | str | Path, out: str | Path | None = None, *, overwrite: bool = False
) -> CompressResult:
    """Search the ranks and modules of an existing LoRA under a budget, as `gatedadapters compress` does.

    Args:
        config: the configuration, or the path of its YAML file.
        out: folder of the results. Default: the name of the YAML file, in the current folder.
        overwrite: whether to replace the results of an earlier run in that folder.

    Raises:
        GatedAdaptersError: the configuration, the LoRA, the model, the data or the folder cannot be used, before
            anything is written; or training failed.
    """
    config, folder = outputs.config_and_folder(CompressConfig, config, out)
    lora = read_peft(config.lora)
    _check_lora(lora)
    search = config.as_search(_base_model(config, lora))
    (task,) = load_tasks(search)
    _check_task_type(config, lora, task)
    if isinstance(task, TextTask):
        task = with_classes_in_order(task, config.classes)
    outputs.check_output_folder(folder, outputs.OF_SEARCH, overwrite=overwrite)
    silence_transformers()
    built = build_classifier(search, task.classes) if isinstance(task, TextTask) else build_model(search, [task])
    shutil.rmtree(folder / outputs.LOGS, ignore_errors=True)
    runner = ArmRunner(search, [task], folder / outputs.LOGS, built)
    model, seed = runner.model, search.training.seed
    base = None if isinstance(task, TextTask) else runner.scores()[task.name]
    with progress_bar(search.training.steps) as progress:
        adapters = import_peft(model, lora.where, tasks=runner.names, seed=seed)
        adapters.compact()
        given = runner.test_and_detach(adapters, GIVEN, 0.0, progress)

        adapters = import_peft(model, lora.where, tasks=runner.names, seed=seed)
        adapters.compact(adapters.discretize(search.budget, scores=singular_values(adapters)))
        truncated = runner.test_and_detach(adapters, TRUNCATED, 0.0, progress)

        adapters = import_peft(model, lora.where, tasks=runner.names, seed=seed)
        seconds = runner.train(adapters, COMPRESSED, progress, searching=True)
        runner.compact(adapters)
        adapters.save(folder / outputs.ADAPTER, overwrite=overwrite)
        export_peft(adapters, folder / outputs.PEFT, overwrite=overwrite)
        compressed = runner.test_and_detach(adapters, COMPRESSED, seconds, progress)
        progress.set_description("done")
    sizes = (lora.where / WEIGHTS).stat().st_size, (folder / outputs.PEFT / WEIGHTS).stat().st_size
    baseline = majority_accuracy([task])[task.name] if isinstance(task, TextTask) else None
    result = CompressResult(config, folder, task, given, truncated, compressed, sizes, baseline, base)
    save_png(compressed.structure, folder / outputs.STRUCTURE_PICTURE)
    _write(result, search)
    return result


def _check_lora(lora: PeftFolder) -> None:
    """Raise where the adapter is none whose ranks can be chosen, and exported again."""
    if not isinstance(lora.record, LoraRecord) or lora.record.use_dora:
        raise ArtifactError(
            "only the ranks of a plain LoRA can be made fewer",
            expected="peft_type LORA, without use_dora",
            got=lora.record.peft_type + (" with use_dora" if isinstance(lora.record, LoraRecord) else ""),
            where=lora.where,
            fix="search among its parts in a script of your own, with gatedadapters.import_peft and a GatedTrainer",
        )


def _base_model(config: CompressConfig, lora: PeftFolder) -> str:
    """The base model that the configuration names, or else the one that the LoRA names.

    Raises:
        ConfigError: neither names a model.
    """
    model = config.model or lora.config.get("base_model_name_or_path")
    if not model:
        expected = "--model, or base_model_name_or_path in the LoRA's configuration"
        raise ConfigError("no base model is named", expected=expected, got="neither", where=lora.where, fix="name it")
    return str(model)


def _check_task_type(config: CompressConfig, lora: PeftFolder, task: AnyTask) -> None:
    """Check that a LoRA was made for tasks like this one.

    Raises:
        ConfigError: it was not, or classes are given and the task has none.
    """
    if config.classes is not None and not isinstance(task, TextTask):
        raise ConfigError(
            "only a classifier has classes",
            expected="kind: classification",
            got=", ".join(config.classes),
            where="classes",
            fix="leave it out",
        )
    wanted, kinds = (
        ("SEQ_CLS", "classification") if isinstance(task, TextTask) else ("CAUSAL_LM", "text, chat or choice")
    )
    if lora.config.get("task_type") not in (wanted, None):
        raise ConfigError(
            "the LoRA is for another kind of task",
            expected=f"a LoRA of task_type {wanted}, for kind: {kinds}",
            got=lora.config.get("task_type"),
            where=lora.where,
            fix="SEQ_CLS: kind: classification; CAUSAL_LM: kind: text, chat or choice; others in a script of your own, "
            "with gatedadapters.import_peft, a GatedTrainer with a budget, and export_peft",
        )


def _cells(score: TaskScore, measures: Sequence[str]) -> list[str]:
    return [*(f"{score.measures[name]:.3f}" for name in measures), f"{score.loss:.4f}"]


def with_classes_in_order(task: TextTask, names: tuple[str, ...] | None) -> TextTask:
    """The task with its classes in the order of `names`; None keeps the sorted order.

    Raises:
        DataError: `names` are not the classes of the task.
    """
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
    new_index = [names.index(name) for name in task.classes]

    def relabelled(examples: Examples) -> Examples:
        return Examples(examples.texts, [new_index[label] for label in examples.labels], examples.pairs)

    test = None if task.test is None else relabelled(task.test)
    return TextTask(task.name, relabelled(task.train), relabelled(task.validation), test, names)


def _write(result: CompressResult, search: SearchConfig) -> None:
    task = result.task
    data = {
        "lora": result.config.as_written()["lora"],
        "config": search.as_written(),
        "classes": task.classes if isinstance(task, TextTask) else None,
        "examples": {"train": len(task.train), "test": len(task.split("test"))},
        "arms": [
            {
                "name": arm.name,
                "loss": arm.loss,
                **arm.scores[task.name].measures,
                "params": arm.structure.params,
                "paths": len(arm.structure.paths),
                "bytes": size,
                "train_seconds": arm.seconds,
            }
            for arm, size in result.arms
        ],
        "most_frequent_class": result.baseline,
        "base": None if result.base is None else {"loss": result.base.loss, **result.base.measures},
    }
    outputs.write_metrics(result.folder, data)
    outputs.write_table(result.folder, result.table())
