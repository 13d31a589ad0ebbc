"""Configuration as frozen, validated, versioned data: one file a concern."""

from gatedadapters.config.allocate import AllocateConfig
from gatedadapters.config.compress import CompressConfig, CompressTrainingConfig
from gatedadapters.config.continual import ContinualConfig, CoreConfig, ProbeConfig, StreamTrainingConfig
from gatedadapters.config.deprecation import renamed
from gatedadapters.config.gates import GateConfig
from gatedadapters.config.penalty import L0, Budget, Penalty, Schedule
from gatedadapters.config.quickstart import QUICKSTART_TASKS, quickstart_config
from gatedadapters.config.robustness import CorruptionConfig
from gatedadapters.config.search import SearchConfig, TrainingConfig
from gatedadapters.config.select import SelectConfig, SelectionConfig, SelectTrainingConfig, TuningConfig
from gatedadapters.config.space import PathOptions, SearchSpace, Where
from gatedadapters.config.study import Factor, StudyConfig
from gatedadapters.config.tasks import TaskConfig
from gatedadapters.config.transfer import Ramp, TransferConfig, WeakeningConfig

__all__ = [
    "L0",
    "QUICKSTART_TASKS",
    "AllocateConfig",
    "Budget",
    "CompressConfig",
    "CompressTrainingConfig",
    "ContinualConfig",
    "CoreConfig",
    "CorruptionConfig",
    "Factor",
    "GateConfig",
    "PathOptions",
    "Penalty",
    "ProbeConfig",
    "Ramp",
    "Schedule",
    "SearchConfig",
    "SearchSpace",
    "SelectConfig",
    "SelectTrainingConfig",
    "SelectionConfig",
    "StreamTrainingConfig",
    "StudyConfig",
    "TaskConfig",
    "TrainingConfig",
    "TransferConfig",
    "TuningConfig",
    "WeakeningConfig",
    "Where",
    "quickstart_config",
]

__getattr__ = renamed(__name__, {"CorpusConfig": "TaskConfig", "StreamTaskConfig": "TaskConfig"})
