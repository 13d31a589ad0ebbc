"""Looking at gates, structures, base updates and streams of tasks: pictures and TensorBoard."""

from gatedadapters.inspection.continual import core_picture, matrix_picture, save_core_png, save_matrix_png
from gatedadapters.inspection.picture import picture, save_png
from gatedadapters.inspection.shift import save_shift_png, shift_picture
from gatedadapters.inspection.tensorboard import GateWriter, TensorBoardInspector

__all__ = [
    "GateWriter",
    "TensorBoardInspector",
    "core_picture",
    "matrix_picture",
    "picture",
    "save_core_png",
    "save_matrix_png",
    "save_png",
    "save_shift_png",
    "shift_picture",
]
