"""Candidate paths, one file per kind. To add one, write its file and register its class here: see `base.py`."""

from gatedadapters.config import PathOptions
from gatedadapters.config.deprecation import renamed
from gatedadapters.paths.base import Path
from gatedadapters.paths.bias import Bias
from gatedadapters.paths.bottleneck import Parallel, Serial
from gatedadapters.paths.elements import Elements
from gatedadapters.paths.lora import LoRA
from gatedadapters.paths.norm import Norm
from gatedadapters.paths.rows import Rows
from gatedadapters.paths.scale import Scale
from gatedadapters.paths.site import Point, Site, SkippedSite
from gatedadapters.paths.weight_lora import WeightLoRA

_KINDS: dict[str, type[Path]] = {}


def register(path: type[Path]) -> type[Path]:
    """Register a path kind, so that search spaces and artefacts find it; also a decorator for classes of your own."""
    _KINDS[path.kind] = path
    return path


def path_class(options: PathOptions) -> type[Path]:
    """Return the path class of an options object."""
    return _KINDS[options.kind]


def path_kinds() -> dict[str, type[Path]]:
    """Every registered kind by name."""
    return dict(_KINDS)


for _kind in (LoRA, WeightLoRA, Serial, Parallel, Scale, Norm, Bias, Elements, Rows):
    register(_kind)

__all__ = [
    "Bias",
    "Elements",
    "LoRA",
    "Norm",
    "Parallel",
    "Path",
    "Point",
    "Rows",
    "Scale",
    "Serial",
    "Site",
    "SkippedSite",
    "WeightLoRA",
    "path_class",
    "path_kinds",
    "register",
]

__getattr__ = renamed(__name__, {"Misfit": "SkippedSite"})
