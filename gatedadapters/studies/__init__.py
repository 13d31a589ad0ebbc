"""Studies: how scores depend on the sparsity weight, on noise, on perturbed data, or on any field of a search."""

from gatedadapters.studies.measured import Measure, Measured
from gatedadapters.studies.results import Curve, Point
from gatedadapters.studies.storage import open_storage
from gatedadapters.studies.study import Study

__all__ = ["Curve", "Measure", "Measured", "Point", "Study", "open_storage"]
