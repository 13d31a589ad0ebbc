"""Pictures and TensorBoard logs of gates, structures, frontiers, masks, base updates and streams of tasks."""

from gatedadapters.inspection.callback import TensorBoardInspector
from gatedadapters.inspection.continual import core_picture, save_core_png, save_stream_png, stream_picture
from gatedadapters.inspection.frontier import frontier_picture, save_frontier_png
from gatedadapters.inspection.matrix import matrix_picture
from gatedadapters.inspection.report import StructureReporter
from gatedadapters.inspection.shift import save_shift_png, shift_picture
from gatedadapters.inspection.tensorboard import TensorBoardWriter
from gatedadapters.structure.picture import picture, save_png

__all__ = [
    "StructureReporter",
    "TensorBoardInspector",
    "TensorBoardWriter",
    "core_picture",
    "frontier_picture",
    "matrix_picture",
    "picture",
    "save_core_png",
    "save_frontier_png",
    "save_png",
    "save_shift_png",
    "save_stream_png",
    "shift_picture",
    "stream_picture",
]
