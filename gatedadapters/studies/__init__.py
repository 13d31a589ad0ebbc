"""Studies: how the scores of a search depend on the sparsity weight, noise, perturbed data or any other field."""

from gatedadapters.config.deprecation import renamed
from gatedadapters.studies.measured import Measure, Measured
from gatedadapters.studies.results import Curve, CurvePoint
from gatedadapters.studies.storage import open_storage
from gatedadapters.studies.study import Study

__all__ = ["Curve", "CurvePoint", "Measure", "Measured", "Study", "open_storage"]

__getattr__ = renamed(__name__, {"Point": "CurvePoint"})
