"""The run `select`: choose the elements that matter little in general, tune them alone, and keep the delta."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PrinterCallback

from gatedadapters.config import SelectConfig, TaskConfig
from gatedadapters.data import ChatTask, LanguageCollator, LanguageDataset
from gatedadapters.experiments import outputs
from gatedadapters.experiments.models import load_causal_model, load_config_and_tokenizer
from gatedadapters.experiments.progress import silence_transformers
from gatedadapters.experiments.task_models import check_causal, check_packing, load_language_task
from gatedadapters.experiments.training import training_arguments
from gatedadapters.inspection import TensorBoardInspector
from gatedadapters.masking import Mask
from gatedadapters.safe_files import file_errors
from gatedadapters.training import TokenAdaptiveLoss
from gatedadapters.training.selective import Report, SelectiveTrainer


@dataclass(frozen=True)
class SelectResult:
    """The result of a selection. Its text is what `gatedadapters select` prints.

    Attributes:
        config: the configuration of the run.
        folder: the output folder.
        report: losses on held-out general and domain text before and after tuning, and the number of tuned elements.
        mask: the tuned elements.
    """

    config: SelectConfig
    folder: Path
    report: Report
    mask: Mask

    def table(self) -> str:
        """Losses and perplexities before and after."""
        return str(self.report)

    def __str__(self) -> str:
        return self.table()


@file_errors("read or write a file of the run", "select")
def select(
    config: SelectConfig | str | Path, out: str | Path | None = None, *, overwrite: bool = False
) -> SelectResult:
    """Tune a causal language model on domain text while protecting general ability, as `gatedadapters select` does.

    Args:
        config: the configuration, or the path of its YAML file.
        out: folder of the results. Default: the name of the YAML file, in the current folder.
        overwrite: whether to replace the results of an earlier run in that folder.

    Raises:
        GatedAdaptersError: the configuration, the model, the data or the folder cannot be used, before anything is
            written; or training failed.
    """
    config, folder = outputs.config_and_folder(SelectConfig, config, out)
    outputs.check_output_folder(folder, outputs.OF_SELECT, overwrite=overwrite)
    silence_transformers()
    training = config.training
    model_config, tokenizer = load_config_and_tokenizer(config.model, training.max_length)
    check_causal(model_config, config.model)
    model = load_causal_model(config.model)
    if config.general.packing or config.domain.packing:
        check_packing(model, config.model)
    general = _datasets("general", config.general, tokenizer, config)
    domain = _datasets("domain", config.domain, tokenizer, config)
    shutil.rmtree(folder / outputs.LOGS, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="gatedadapters-") as scratch:
        trainer = SelectiveTrainer(
            model=model,
            args=training_arguments(training, scratch, bf16=training.precision == "bf16", logs=20),
            train_dataset=domain[0],
            general_dataset=general[0],
            eval_dataset=domain[1],
            general_eval_dataset=general[1],
            selection=config.selection,
            data_collator=LanguageCollator(tokenizer),
            compute_loss_func=TokenAdaptiveLoss() if training.token_adaptive else None,
            callbacks=[TensorBoardInspector(folder / outputs.LOGS, hparams=config)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.delta.save(folder / outputs.DELTA, overwrite=overwrite)
    result = SelectResult(config, folder, trainer.report(), trainer.delta.mask)
    _write(result)
    return result


def _datasets(
    part: str, task: TaskConfig, tokenizer: PreTrainedTokenizerBase, config: SelectConfig
) -> tuple[LanguageDataset, LanguageDataset]:
    """The data sets (to learn from, held out) of one task. Their sizes are printed."""
    loaded = load_language_task(task, config.training.seed, where=part)
    length, packing = config.training.max_length, isinstance(loaded, ChatTask) and loaded.packing
    train = LanguageDataset(loaded.train, tokenizer, length, packing=packing)
    held_out = LanguageDataset(loaded.test, tokenizer, length)
    print(f"{part}: {len(train):,} items to learn from, {len(held_out):,} held out")
    return train, held_out


def _write(result: SelectResult) -> None:
    report = result.report
    data = {
        "config": result.config.as_written(),
        "before": report.before,
        "after": report.after,
        "free": report.free,
        "params": report.params,
    }
    outputs.write_metrics(result.folder, data)
    text = f"{result.table()}\n\n{result.mask}\n"
    (result.folder / outputs.REPORT).write_text(text, encoding="utf-8")
