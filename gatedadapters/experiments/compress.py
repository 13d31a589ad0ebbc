"""An existing LoRA, the same truncated, and the same searched under the budget: scored side by side."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import transformers
from tqdm.auto import tqdm

from gatedadapters.artifacts import export_peft, import_peft, singular_values
from gatedadapters.artifacts.export_peft import WEIGHTS
from gatedadapters.artifacts.peft_folder import PeftFolder
from gatedadapters.cli.show import ADAPTER
from gatedadapters.config import SearchConfig
from gatedadapters.data import TextTask
from gatedadapters.experiments.arms import Arm, Experiment, majority
from gatedadapters.experiments.search import LOGS, METRICS, OUTPUTS, PEFT, PICTURE, TABLE, check_free
from gatedadapters.experiments.setup import build_classifier
from gatedadapters.inspection import save_png
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

GIVEN, TRUNCATED, COMPRESSED = "as given", "SVD truncation", "compressed"


def compress(lora: PeftFolder, config: SearchConfig, task: TextTask, folder: Path, *, overwrite: bool = False) -> str:
    """Search the LoRA's ranks and modules under the budget, and write the result into `folder`; returns a report.

    Raises:
        GatedAdaptersError: whatever is wrong with the LoRA, the model, the data or the folder.
    """
    check_free(folder, OUTPUTS, overwrite=overwrite)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    built = build_classifier(config, task.n_classes)
    shutil.rmtree(folder / LOGS, ignore_errors=True)
    experiment = Experiment(config, [task], folder / LOGS, built)
    model, seed = experiment.model, config.training.seed
    with tqdm(total=config.training.steps, unit="step", dynamic_ncols=True, file=sys.stderr) as progress:
        adapters = import_peft(model, lora.where, tasks=experiment.names, seed=seed)
        adapters.compact()
        arms = [experiment.finish(adapters, GIVEN, 0.0, progress)]

        adapters = import_peft(model, lora.where, tasks=experiment.names, seed=seed)
        adapters.compact(adapters.discretize(config.budget, scores=singular_values(adapters)))
        arms.append(experiment.finish(adapters, TRUNCATED, 0.0, progress))

        adapters = import_peft(model, lora.where, tasks=experiment.names, seed=seed)
        seconds = experiment.fit(adapters, COMPRESSED, progress, searching=True)
        adapters.compact(adapters.structure or adapters.discretize(config.budget))
        adapters.save(folder / ADAPTER, overwrite=overwrite)
        export_peft(adapters, folder / PEFT, overwrite=overwrite)
        arms.append(experiment.finish(adapters, COMPRESSED, seconds, progress))
        progress.set_description("done")
    baseline = majority([task])[task.name]
    sizes = {GIVEN: (lora.where / WEIGHTS).stat().st_size, COMPRESSED: (folder / PEFT / WEIGHTS).stat().st_size}
    table = _table(arms, sizes, baseline)
    save_png(arms[-1].structure, folder / PICTURE)
    (folder / METRICS).write_text(_metrics(lora, config, task, arms, sizes, baseline), encoding="utf-8")
    (folder / TABLE).write_text(table + "\n", encoding="utf-8")
    return _report(task, config, arms, table, folder)


def _table(arms: list[Arm], sizes: dict[str, int], baseline: float) -> str:
    whole = arms[0].structure.params
    rows = [
        [
            arm.name,
            f"{arm.mean:.3f}",
            f"{arm.structure.params:,}",
            f"{arm.structure.params / whole:.1%}",
            f"{sizes[arm.name]:,}" if arm.name in sizes else "",
            f"{arm.seconds:.0f}",
        ]
        for arm in arms
    ]
    rows.append(["most frequent class", f"{baseline:.3f}", "0", "", "", "0"])
    return format_table(["", "accuracy", "parameters", "of the LoRA", "bytes", "train s"], rows)


def _metrics(
    lora: PeftFolder, config: SearchConfig, task: TextTask, arms: list[Arm], sizes: dict[str, int], baseline: float
) -> str:
    data = {
        "versions": versions(),
        "lora": str(lora.where),
        "config": config.as_written(),
        "classes": task.classes,
        "examples": {"train": len(task.train), "test": len(task.split("test"))},
        "arms": [
            {
                "name": arm.name,
                "accuracy": arm.mean,
                "params": arm.structure.params,
                "paths": len(arm.structure.paths),
                "bytes": sizes.get(arm.name),
                "train_seconds": arm.seconds,
            }
            for arm in arms
        ],
        "most_frequent_class": baseline,
    }
    return json.dumps(data, indent=1) + "\n"


def _report(task: TextTask, config: SearchConfig, arms: list[Arm], table: str, folder: Path) -> str:
    outputs = ", ".join(f"{index} = {name}" for index, name in enumerate(task.classes))
    lines = [
        f"\nAccuracy on {len(task.split('test')):,} test examples, {config.training.steps} steps, one seed.",
        f"The LoRA's outputs were taken to mean {outputs}; where that is wrong, say so with --classes.\n",
        table,
        f"\n{arms[-1].structure}\n",
        f"In {folder}:",
    ]
    for name, what in {
        f"{PEFT}/": "the smaller LoRA; PeftModel.from_pretrained(model, ...)",
        f"{ADAPTER}/": "the same for gatedadapters.load_adapters(model, ...)",
        PICTURE: "its structure as a picture",
        f"{LOGS}/": f"tensorboard --logdir {folder / LOGS}",
        METRICS: "every number",
    }.items():
        lines.append(f"  {name:<15} {what}")
    return "\n".join(lines)
