"""The run `select`: choose the elements that matter little in general, tune them alone, and keep the delta."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PrinterCallback

from gatedadapters.config import CorpusConfig, SelectConfig
from gatedadapters.data.bundled import load_corpus
from gatedadapters.data.language import (
    LanguageCollator,
    LanguageDataset,
    Passage,
    read_passages,
    sample_passages,
    split_passages,
)
from gatedadapters.errors import ConfigError
from gatedadapters.experiments import outputs
from gatedadapters.experiments.models import is_causal, load_causal_model, load_config_and_tokenizer
from gatedadapters.experiments.progress import silence_transformers
from gatedadapters.experiments.training import training_arguments
from gatedadapters.inspection import TensorBoardInspector
from gatedadapters.masking import Mask
from gatedadapters.safe_files import file_errors
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
    if not is_causal(model_config):
        raise ConfigError(
            "selection from the command line is for causal language models",
            expected="such a model",
            got=", ".join(model_config.architectures or ["no architecture"]),
            where=f"model: {config.model}",
            fix="other models: gatedadapters.SelectiveTrainer",
        )
    model = load_causal_model(config.model)
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
            callbacks=[TensorBoardInspector(folder / outputs.LOGS, hparams=config)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.delta.save(folder / outputs.DELTA, overwrite=overwrite)
    result = SelectResult(config, folder, trainer.report(), trainer.delta.mask)
    _write(result)
    return result


def _datasets(
    name: str, corpus: CorpusConfig, tokenizer: PreTrainedTokenizerBase, config: SelectConfig
) -> tuple[LanguageDataset, LanguageDataset]:
    """The data sets (to learn from, held out) of one corpus. Their sizes are printed."""
    train, held_out = (
        LanguageDataset(passages, tokenizer, config.training.max_length)
        for passages in load_passages(corpus, config.training.seed)
    )
    print(f"{name}: {len(train):,} items to learn from, {len(held_out):,} held out")
    return train, held_out


def load_passages(corpus: CorpusConfig, seed: int) -> tuple[list[Passage], list[Passage]]:
    """The passages (to learn from, held out) of a corpus, cut to the configured number and split by `seed`.

    Raises:
        DataError: the file is missing, empty or malformed, or holds too little text to split; or the package of a
            bundled corpus is not installed.
    """
    if corpus.bundled is not None:
        passages = [Passage(text) for text in load_corpus(corpus.bundled)]
    else:
        assert corpus.file is not None
        passages = read_passages(corpus.file, text=corpus.text, answer=corpus.answer)
    chosen = sample_passages(passages, corpus.max_texts, seed=seed)
    return split_passages(chosen, corpus.held_out, seed=seed, where=corpus.file or corpus.bundled)


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
