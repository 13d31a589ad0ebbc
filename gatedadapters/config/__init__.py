"""Configuration as frozen, validated, versioned data."""

from gatedadapters.config.gates import GateConfig
from gatedadapters.config.penalty import L0, Budget, Penalty, Schedule
from gatedadapters.config.robustness import CorruptionConfig
from gatedadapters.config.search import SearchConfig, TaskConfig, TrainingConfig
from gatedadapters.config.select import CorpusConfig, SelectConfig, SelectionConfig, TuningConfig
from gatedadapters.config.space import PathOptions, SearchSpace, Where
from gatedadapters.config.study import Factor, StudyConfig
from gatedadapters.config.transfer import Ramp, TransferConfig, WeakeningConfig

__all__ = [
    "L0",
    "Budget",
    "CorpusConfig",
    "CorruptionConfig",
    "Factor",
    "GateConfig",
    "PathOptions",
    "Penalty",
    "Ramp",
    "Schedule",
    "SearchConfig",
    "SearchSpace",
    "SelectConfig",
    "SelectionConfig",
    "StudyConfig",
    "TaskConfig",
    "TrainingConfig",
    "TransferConfig",
    "TuningConfig",
    "WeakeningConfig",
    "Where",
]
