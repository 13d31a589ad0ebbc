"""Running a selection from start to finish, and what it leaves in the output folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PrinterCallback

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
from gatedadapters.experiments.models import is_causal, located, reading, shape_and_tokenizer
from gatedadapters.experiments.search import check_free
from gatedadapters.experiments.setup import training_arguments
from gatedadapters.inspection import TensorBoardInspector
from gatedadapters.reporting.versions import versions
from gatedadapters.training.devices import on_cpu
from gatedadapters.training.selective import Report, SelectiveTrainer

DELTA, METRICS, TABLE, LOGS = "delta", "metrics.json", "report.txt", "tensorboard"
OUTPUTS = frozenset({DELTA, METRICS, TABLE, LOGS})


def run(config: SelectConfig, folder: Path, *, overwrite: bool = False) -> Report:
    """Score, select, tune, and write the delta and the report into `folder`.

    Raises:
        GatedAdaptersError: whatever is wrong with the configuration, the data or the folder.
    """
    check_free(folder, OUTPUTS, overwrite=overwrite)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    training = config.training
    shape, tokenizer = shape_and_tokenizer(config.model, training.max_length)
    if not is_causal(shape):
        raise ConfigError(
            "selection from the command line is for causal language models",
            expected="such a model",
            got=", ".join(shape.architectures or ["no architecture"]),
            where=f"model: {config.model}",
            fix="other models: gatedadapters.SelectiveTrainer",
        )
    with reading(config.model):
        model = AutoModelForCausalLM.from_pretrained(located(config.model), dtype=torch.float32)
    data = {}
    for part, corpus in (("general", config.general), ("domain", config.domain)):
        for split, passages in zip(("train", "held_out"), _passages(corpus, training.seed), strict=True):
            data[part, split] = LanguageDataset(passages, tokenizer, training.max_length)
        print(f"{part}: {len(data[part, 'train']):,} items to learn from, {len(data[part, 'held_out']):,} held out")
    shutil.rmtree(folder / LOGS, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="gatedadapters-") as scratch:
        args = training_arguments(
            training,
            scratch,
            bf16=training.precision == "bf16",
            logs=20,
            use_cpu=on_cpu(training.device),
        )
        trainer = SelectiveTrainer(
            model=model,
            args=args,
            train_dataset=data["domain", "train"],
            general_dataset=data["general", "train"],
            eval_dataset=data["domain", "held_out"],
            general_eval_dataset=data["general", "held_out"],
            selection=config.selection,
            data_collator=LanguageCollator(tokenizer),
            callbacks=[TensorBoardInspector(folder / LOGS, hparams=config)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    report = trainer.report()
    trainer.delta.save(folder / DELTA, overwrite=overwrite)
    metrics = {
        "versions": versions(),
        "config": config.as_written(),
        "before": report.before,
        "after": report.after,
        "free": report.free,
        "params": report.params,
    }
    (folder / METRICS).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(f"{report}\n\n{trainer.delta.mask}\n", encoding="utf-8")
    return report


def _passages(corpus: CorpusConfig, seed: int) -> tuple[list[Passage], list[Passage]]:
    if corpus.bundled is not None:
        passages = [Passage(text) for text in load_corpus(corpus.bundled)]
    else:
        assert corpus.file is not None
        passages = read_passages(corpus.file, text=corpus.text, answer=corpus.answer)
    chosen = sample_passages(passages, corpus.max_texts, seed=seed)
    return split_passages(chosen, corpus.held_out, seed=seed, where=corpus.file or corpus.bundled)
