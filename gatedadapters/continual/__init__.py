"""Continual tuning: one model learns task after task, and a strategy limits what each task may change."""

from gatedadapters.continual.carry import carry_core
from gatedadapters.continual.check import check_stream
from gatedadapters.continual.core import Core, random_core, select_core
from gatedadapters.continual.metrics import Metrics, intervals, metrics_table
from gatedadapters.continual.probing import Probe, probe
from gatedadapters.continual.result import StageRecord, StreamResult
from gatedadapters.continual.runner import run_stream
from gatedadapters.continual.stage import Stage, StreamSetup
from gatedadapters.continual.strategies import Strategy, TunedStage, register, strategy_kinds
from gatedadapters.continual.tasks import (
    Task,
    TaskStream,
    answer_task,
    choice_tasks,
    classification_tasks,
    language_tasks,
)
from gatedadapters.continual.tensors import TensorInfo, tensors_of

__all__ = [
    "Core",
    "Metrics",
    "Probe",
    "Stage",
    "StageRecord",
    "Strategy",
    "StreamResult",
    "StreamSetup",
    "Task",
    "TaskStream",
    "TensorInfo",
    "TunedStage",
    "answer_task",
    "carry_core",
    "check_stream",
    "choice_tasks",
    "classification_tasks",
    "intervals",
    "language_tasks",
    "metrics_table",
    "probe",
    "random_core",
    "register",
    "run_stream",
    "select_core",
    "strategy_kinds",
    "tensors_of",
]
