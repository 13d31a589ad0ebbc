"""Data: tables, texts and chats of the user's, bundled real tasks and models, and batches that mix tasks."""

from gatedadapters.config.rows import Rows
from gatedadapters.data.collate import (
    MixedTaskCollator,
    MixedTaskDataset,
    TaskSampler,
    collator,
    predicts_tokens,
    task_sampler,
)
from gatedadapters.data.files import read_task
from gatedadapters.data.language import LanguageCollator, LanguageDataset
from gatedadapters.data.measures import Measure, register_measure
from gatedadapters.data.sources import kind_of, load_task
from gatedadapters.data.tasks import (
    AnyTask,
    ChatTask,
    ChoiceExample,
    ChoiceTask,
    Conversation,
    Examples,
    LanguageExample,
    LanguageTask,
    Message,
    Passage,
    PassageTask,
    TextTask,
)

__all__ = [
    "AnyTask",
    "ChatTask",
    "ChoiceExample",
    "ChoiceTask",
    "Conversation",
    "Examples",
    "LanguageCollator",
    "LanguageDataset",
    "LanguageExample",
    "LanguageTask",
    "Measure",
    "Message",
    "MixedTaskCollator",
    "MixedTaskDataset",
    "Passage",
    "PassageTask",
    "Rows",
    "TaskSampler",
    "TextTask",
    "collator",
    "kind_of",
    "load_task",
    "predicts_tokens",
    "read_task",
    "register_measure",
    "task_sampler",
]
