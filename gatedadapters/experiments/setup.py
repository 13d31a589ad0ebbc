"""From a configuration to what is trained: tasks, model, tokenizer, number format."""

from __future__ import annotations

import time

import torch
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from gatedadapters.backbone.layout import undisturbed
from gatedadapters.backbone.sample import default_sample
from gatedadapters.config import SearchConfig, TaskConfig
from gatedadapters.config.search import TrainingConfig
from gatedadapters.config.select import TuningConfig
from gatedadapters.data import TextTask, read_task
from gatedadapters.data.bundled import load_task
from gatedadapters.errors import ConfigError
from gatedadapters.experiments.models import is_causal, located, reading, shape_and_tokenizer
from gatedadapters.training import MultiTaskClassifier
from gatedadapters.training.devices import on_cpu


def load_tasks(config: SearchConfig) -> list[TextTask]:
    """Every task, split and cut to size.

    Raises:
        DataError: a table is missing, empty or malformed, or a data package is not installed.
    """
    return [_load(task, config.training.seed) for task in config.tasks]


def _load(task: TaskConfig, seed: int) -> TextTask:
    if task.bundled is not None:
        train, test = task.max_train or 1500, task.max_test or 500
        loaded = load_task(task.bundled, train=train, validation=min(train, 500), test=test, seed=seed)
    else:
        assert task.train is not None
        loaded = read_task(
            task.train, task.validation, task.test, text=task.text, pair=task.pair, label=task.label, seed=seed
        )
    held_out = loaded.validation if loaded.test is None else loaded.test
    cut = loaded.train.sample(task.max_train, seed), held_out.sample(task.max_test, seed)  # tables may be sorted
    return TextTask(task.title, cut[0], loaded.validation, cut[1], loaded.classes)


def build_model(config: SearchConfig, tasks: list[TextTask]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A pretrained backbone under one head per task, in fp32; heads depend on the seed alone.

    A single task on a causal language model gets transformers' own classification model; of T5 the encoder is taken.

    Raises:
        ConfigError: the model cannot be loaded, or does not run on texts alone.
        DataError: the package that carries a bundled model is not installed.
    """
    torch.manual_seed(config.training.seed)
    shape, tokenizer = shape_and_tokenizer(config.model, config.training.max_length)
    if len(tasks) == 1 and is_causal(shape):
        return _classifier(config, shape, tokenizer, tasks[0].n_classes), tokenizer
    backbone = _backbone(config.model, shape)
    classes = {task.name: task.n_classes for task in tasks}
    return MultiTaskClassifier(backbone, classes, pooling=config.training.pooling), tokenizer


def _backbone(name: str, shape: PreTrainedConfig) -> PreTrainedModel:
    """What heads can read: of T5 and the like the encoder alone, whose decoder would want input of its own."""
    encodes = shape.is_encoder_decoder and type(shape) in MODEL_FOR_TEXT_ENCODING_MAPPING
    kind = AutoModelForTextEncoding if encodes else AutoModel
    with reading(name):
        backbone: PreTrainedModel = kind.from_pretrained(located(name), dtype=torch.float32)
    if shape.is_encoder_decoder and not encodes:
        sample = default_sample(backbone)
        sample.pop("decoder_input_ids", None)
        try:
            with undisturbed(backbone):
                backbone(**sample)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                "this encoder-decoder does not run on texts alone",
                expected="an encoder, a causal language model, or a model like T5 or BART",
                got=str(error),
                where=f"model: {name}",
                fix="give another model",
            ) from error
    return backbone


def build_classifier(config: SearchConfig, n_classes: int) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Transformers' own classification model on a pretrained backbone, in fp32; its head depends on the seed alone.

    Raises:
        ConfigError: the model cannot be loaded.
        DataError: the package that carries a bundled model is not installed.
    """
    torch.manual_seed(config.training.seed)
    shape, tokenizer = shape_and_tokenizer(config.model, config.training.max_length)
    return _classifier(config, shape, tokenizer, n_classes), tokenizer


def _classifier(
    config: SearchConfig, shape: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, n_classes: int
) -> nn.Module:
    shape.num_labels, shape.pad_token_id = n_classes, tokenizer.pad_token_id
    with reading(config.model):
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            located(config.model), config=shape, dtype=torch.float32
        )
    return model


def training_arguments(
    training: TrainingConfig | TuningConfig, scratch: str, *, bf16: bool, use_cpu: bool, logs: int
) -> TrainingArguments:
    """The Trainer's arguments for one run of a command: no checkpoints, `logs` log entries, nothing printed."""
    return TrainingArguments(
        output_dir=scratch,
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(training.warmup * training.steps),
        weight_decay=training.weight_decay,
        bf16=bf16,
        use_cpu=use_cpu,
        seed=training.seed,
        logging_steps=max(1, training.steps // logs),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def use_bf16(config: SearchConfig) -> bool:
    """Whether to train under bf16 autocast; `auto` tries on the CPU which is faster, in some milliseconds."""
    training = config.training
    if training.precision != "auto":
        return training.precision == "bf16"
    if on_cpu(training.device):
        return 1.3 * _seconds(torch.bfloat16) < _seconds(torch.float32)
    return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported())


def _seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(512, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x @ weight
        times.append(time.perf_counter() - start)
    return min(times)
