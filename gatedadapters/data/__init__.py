"""Data: tables and texts of the user's, bundled real tasks and models, and batches that mix tasks."""

from gatedadapters.data.collate import MixedTaskCollator, MixedTaskDataset, TaskSampler, task_sampler
from gatedadapters.data.files import read_task
from gatedadapters.data.tasks import ChoiceExample, ChoiceTask, Examples, TextTask

__all__ = [
    "ChoiceExample",
    "ChoiceTask",
    "Examples",
    "MixedTaskCollator",
    "MixedTaskDataset",
    "TaskSampler",
    "TextTask",
    "read_task",
    "task_sampler",
]
