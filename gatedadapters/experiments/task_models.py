"""From a configuration to its tasks, and to a model for them: a classifier with heads, or a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

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
from gatedadapters.data import (
    AnyTask,
    ChatTask,
    ChoiceTask,
    LanguageTask,
    PassageTask,
    TextTask,
    kind_of,
    load_task,
    predicts_tokens,
)
from gatedadapters.data.measures import EXACT_MATCH, measure
from gatedadapters.errors import ConfigError
from gatedadapters.experiments.evaluation import Scores
from gatedadapters.experiments.models import (
    is_causal,
    load_causal_model,
    load_config_and_tokenizer,
    locate_model,
    reading_model,
)
from gatedadapters.structure.origin import Origin, OriginTask, commit_of
from gatedadapters.structure.origin import named as named_model
from gatedadapters.training import MultiTaskClassifier


def load_tasks(config: SearchConfig) -> list[AnyTask]:
    """Every task of a configuration, split and cut to the configured numbers of examples.

    Where a task has no test split, its validation split stands in.

    Raises:
        ConfigError: a bundled task is of another kind than the configuration says, or there is no such measure.
        DataError: a file is missing, empty or malformed, a data package is not installed, or tasks do not mix.
    """
    for task in config.tasks:
        if task.measures and kind_of(task) == "classification":
            raise ConfigError(
                "classification has its own measure",
                expected="no measures: accuracy and loss are reported",
                got=", ".join(task.measures),
                where=f"task {task.title!r}: measures",
                fix="leave measures out",
            )
        for name in set(task.measures) - {EXACT_MATCH}:
            measure(name, where=f"task {task.title!r}: measures")
    tasks = [load_task(task, config.training.seed) for task in config.tasks]
    predicts_tokens(tasks)
    for given, loaded in zip(config.tasks, tasks, strict=True):
        if EXACT_MATCH in given.measures and not _answers_in_words(loaded):
            raise ConfigError(
                "there are no answers to match",
                expected="conversations, or texts with an answer column",
                got=f"{EXACT_MATCH} of {'choices' if isinstance(loaded, ChoiceTask) else 'running text'}",
                where=f"task {loaded.name!r}: measures",
                fix="leave it out: loss and accuracy are always reported",
            )
    return tasks


def load_language_task(task: TaskConfig, seed: int, *, where: str) -> LanguageTask[Any]:
    """One task that a language model answers in tokens, without validation examples.

    Args:
        task: the specification.
        seed: seed of splits and samples.
        where: the key of the configuration, for errors.

    Raises:
        ConfigError: it is a classification task.
        DataError: see `gatedadapters.data.load_task`.
    """
    if kind_of(task) == "classification":
        raise ConfigError(
            "a labelled table is not learned in tokens",
            expected="kind: text, chat or choice",
            got="kind: classification",
            where=f"{where}: task {task.title!r}",
            fix="kind: choice for a labelled table, kind: text for texts, with answer: for their answers",
        )
    loaded = load_task(task, seed, decides=False)
    assert isinstance(loaded, LanguageTask)
    return loaded


def _answers_in_words(task: AnyTask) -> bool:
    """Whether each example ends with an answer of its own words."""
    answered = isinstance(task, PassageTask) and task.test[0].answer is not None
    return answered or isinstance(task, ChatTask)


def build_model(config: SearchConfig, tasks: Sequence[AnyTask]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A pretrained model for tasks, in fp32, and its tokenizer.

    For classification it is a backbone with one head a task, which depend on the seed alone. A single task on a causal
    language model gets transformers' own classification model. Of models like T5 the encoder is used. For tasks of the
    other kinds it is the causal language model.

    Raises:
        ConfigError: the model cannot be loaded, does not run on texts alone, or is no causal language model.
        DataError: the package that carries a bundled model is not installed.
    """
    torch.manual_seed(config.training.seed)
    training = config.training
    model, tokenizer = model_for(
        config.model,
        {task.name: task.classes for task in tasks if isinstance(task, TextTask)},
        generates=predicts_tokens(tasks),
        several=None,
        pooling=training.pooling,
        max_length=training.max_length,
    )
    if any(isinstance(task, ChatTask) and task.packing for task in tasks):
        check_packing(model, config.model)
    return model, tokenizer


def model_for(
    name: str,
    labels: Mapping[str, Sequence[str]],
    *,
    generates: bool,
    several: bool | None,
    pooling: Literal["mean", "first"],
    max_length: int,
    revision: str | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model that `build_model` builds, from what saved adapters say of it, and its tokenizer.

    Args:
        name: a folder, a hub id, or `bundled:NAME`.
        labels: names of the classes by task.
        generates: whether it is a causal language model.
        several: whether it is a `MultiTaskClassifier`; None chooses as `build_model` says.
        pooling: of a `MultiTaskClassifier`.
        max_length: tokens of the longest text that the model is to read.
        revision: commit of the model on the hub; None takes the newest.

    Raises:
        ConfigError: the model cannot be loaded, does not run on texts alone, or is no causal language model.
        DataError: the package that carries a bundled model is not installed.
    """
    model_config, tokenizer = load_config_and_tokenizer(name, max_length, revision)
    if generates:
        check_causal(model_config, name)
        return load_causal_model(name, revision), tokenizer
    if several is None:
        several = len(labels) > 1 or not is_causal(model_config)
    if not several:
        (classes,) = labels.values()
        return _load_classifier(name, model_config, tokenizer, classes, revision), tokenizer
    return MultiTaskClassifier(_load_backbone(name, model_config, revision), labels, pooling=pooling), tokenizer


def origin_of(config: SearchConfig, tasks: Sequence[AnyTask], scores: Scores | None = None) -> Origin:
    """What the adapters of a run say of their base, their tasks, their training, and their scores on test data."""
    training, base = config.training, named_model(config.model)
    return Origin(
        base_model_name_or_path=base,
        revision=commit_of(config.model),
        tokenizer=base,
        task_type="text-generation" if predicts_tokens(tasks) else "text-classification",
        tasks=tuple(
            OriginTask(
                name=task.name,
                kind=kind_of(given),
                labels=_labels(task),
                text=given.text,
                pair=given.pair,
                metrics={} if scores is None else {"loss": scores[task.name].loss, **scores[task.name].measures},
            )
            for given, task in zip(config.tasks, tasks, strict=True)
        ),
        pooling=training.pooling,
        max_length=training.max_length,
        training={
            "steps": training.steps,
            "learning_rate": training.learning_rate,
            "batch_size": training.batch_size,
            "seed": training.seed,
            **{f"examples of {task.name}": len(task.train) for task in tasks},
        },
    )


def _labels(task: AnyTask) -> tuple[str, ...]:
    """Names of the classes; of choices, those that every question has."""
    if isinstance(task, TextTask):
        return task.classes
    if isinstance(task, ChoiceTask):
        offered = {example.choices for example in task.train}
        return offered.pop() if len(offered) == 1 else ()
    return ()


def build_classifier(config: SearchConfig, classes: Sequence[str]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Transformers' own classification model in fp32, and its tokenizer; its head depends on the seed alone.

    Raises:
        ConfigError: the model cannot be loaded.
        DataError: the package that carries a bundled model is not installed.
    """
    torch.manual_seed(config.training.seed)
    model_config, tokenizer = load_config_and_tokenizer(config.model, config.training.max_length)
    return _load_classifier(config.model, model_config, tokenizer, classes), tokenizer


def check_causal(model_config: PreTrainedConfig, name: str) -> None:
    """Check that a model can learn tasks whose answers are text.

    Raises:
        ConfigError: it is no causal language model.
    """
    if not is_causal(model_config):
        raise ConfigError(
            "texts, conversations and choices are for causal language models",
            expected="such a model",
            got=", ".join(model_config.architectures or ["no architecture"]),
            where=f"model: {name}",
            fix="give a decoder; an encoder learns kind: classification",
        )


@torch.no_grad()
def check_packing(model: nn.Module, name: str) -> None:
    """Check that conversations in one row do not see each other: a second one gives the same logits without the first.

    The cache of the model is switched off, because transformers tells conversations apart only without one.

    Raises:
        ConfigError: they do.
    """
    config: Any = model.config
    config.use_cache = False
    ids = torch.arange(4, 12).remainder(config.get_text_config().vocab_size)[None]
    positions = torch.arange(4).repeat(2)[None]
    was_training = model.training
    model.eval()
    try:
        together = model(input_ids=ids, position_ids=positions).logits[:, 4:]
        alone = model(input_ids=ids[:, 4:], position_ids=positions[:, 4:]).logits
        apart = torch.allclose(together, alone, atol=1e-3 * float(alone.abs().max()), rtol=1e-3)
    except TypeError:  # it has no positions
        apart = False
    finally:
        model.train(was_training)
    if not apart:
        raise ConfigError(
            "this model lets packed conversations see each other",
            expected="a model of transformers that tells them apart by position_ids",
            got=type(model).__name__,
            where=f"model: {name}, and packing: true",
            fix="packing: false",
        )


def _load_backbone(name: str, model_config: PreTrainedConfig, revision: str | None = None) -> PreTrainedModel:
    """A model without a head. Of models like T5 it is the encoder, because the decoder would need input of its own."""
    encodes = model_config.is_encoder_decoder and type(model_config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    kind = AutoModelForTextEncoding if encodes else AutoModel
    with reading_model(name):
        backbone: PreTrainedModel = kind.from_pretrained(
            locate_model(name), dtype=torch.float32, revision=revision or "main"
        )
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
    name: str,
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str],
    revision: str | None = None,
) -> nn.Module:
    model_config.id2label = dict(enumerate(classes))
    model_config.label2id = {label: index for index, label in enumerate(classes)}
    model_config.pad_token_id = tokenizer.pad_token_id
    with reading_model(name):
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            locate_model(name), config=model_config, dtype=torch.float32, revision=revision or "main"
        )
    return model
