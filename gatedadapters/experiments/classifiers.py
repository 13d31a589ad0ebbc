"""From a configuration to its labelled tasks, and to a classifier with a head for each of them."""

from __future__ import annotations

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
)

from gatedadapters.backbone.layout import undisturbed
from gatedadapters.backbone.sample import default_sample
from gatedadapters.config import SearchConfig, TaskConfig
from gatedadapters.data import TextTask, read_task
from gatedadapters.data.bundled import load_task
from gatedadapters.errors import ConfigError
from gatedadapters.experiments.models import is_causal, load_config_and_tokenizer, locate_model, reading_model
from gatedadapters.training import MultiTaskClassifier


def load_tasks(config: SearchConfig) -> list[TextTask]:
    """Every task of a configuration, split and cut to the configured numbers of examples.

    Where a task has no test split, its validation split stands in.

    Raises:
        DataError: a table is missing, empty or malformed, or a data package is not installed.
    """
    return [_load_task(task, config.training.seed) for task in config.tasks]


def _load_task(task: TaskConfig, seed: int) -> TextTask:
    if task.bundled is not None:
        train, test = task.max_train or 1500, task.max_test or 500
        loaded = load_task(task.bundled, train=train, validation=min(train, 500), test=test, seed=seed)
    else:
        assert task.train is not None
        loaded = read_task(
            task.train, task.validation, task.test, text=task.text, pair=task.pair, label=task.label, seed=seed
        )
    held_out = loaded.validation if loaded.test is None else loaded.test
    # A random sample and not the first rows, because tables may be sorted by label.
    cut = loaded.train.sample(task.max_train, seed), held_out.sample(task.max_test, seed)
    return TextTask(task.title, cut[0], loaded.validation, cut[1], loaded.classes)


def build_model(config: SearchConfig, tasks: list[TextTask]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A pretrained backbone with one head a task, in fp32, and its tokenizer; the heads depend on the seed alone.

    A single task on a causal language model gets transformers' own classification model. Of models like T5 the encoder
    is used.

    Raises:
        ConfigError: the model cannot be loaded, or does not run on texts alone.
        DataError: the package that carries a bundled model is not installed.
    """
    torch.manual_seed(config.training.seed)
    model_config, tokenizer = load_config_and_tokenizer(config.model, config.training.max_length)
    if len(tasks) == 1 and is_causal(model_config):
        return _load_classifier(config.model, model_config, tokenizer, tasks[0].n_classes), tokenizer
    backbone = _load_backbone(config.model, model_config)
    classes = {task.name: task.n_classes for task in tasks}
    return MultiTaskClassifier(backbone, classes, pooling=config.training.pooling), tokenizer


def build_classifier(config: SearchConfig, n_classes: int) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Transformers' own classification model in fp32, and its tokenizer; its head depends on the seed alone.

    Raises:
        ConfigError: the model cannot be loaded.
        DataError: the package that carries a bundled model is not installed.
    """
    torch.manual_seed(config.training.seed)
    model_config, tokenizer = load_config_and_tokenizer(config.model, config.training.max_length)
    return _load_classifier(config.model, model_config, tokenizer, n_classes), tokenizer


def _load_backbone(name: str, model_config: PreTrainedConfig) -> PreTrainedModel:
    """A model without a head. Of models like T5 it is the encoder, because the decoder would need input of its own."""
    encodes = model_config.is_encoder_decoder and type(model_config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    kind = AutoModelForTextEncoding if encodes else AutoModel
    with reading_model(name):
        backbone: PreTrainedModel = kind.from_pretrained(locate_model(name), dtype=torch.float32)
    if model_config.is_encoder_decoder and not encodes:
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


def _load_classifier(
    name: str, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, n_classes: int
) -> nn.Module:
    model_config.num_labels, model_config.pad_token_id = n_classes, tokenizer.pad_token_id
    with reading_model(name):
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            locate_model(name), config=model_config, dtype=torch.float32
        )
    return model
