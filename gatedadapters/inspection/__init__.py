"""Looking at gates, structures, masks and base updates: pictures and TensorBoard."""

from gatedadapters.inspection.callback import TensorBoardInspector
from gatedadapters.inspection.matrix import matrix_picture
from gatedadapters.inspection.picture import picture, save_png
from gatedadapters.inspection.shift import save_shift_png, shift_picture
from gatedadapters.inspection.tensorboard import TensorBoardWriter

__all__ = [
    "TensorBoardInspector",
    "TensorBoardWriter",
    "matrix_picture",
    "picture",
    "save_png",
    "save_shift_png",
    "shift_picture",
]
