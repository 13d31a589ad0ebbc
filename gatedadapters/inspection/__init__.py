"""Looking at gates, structures and base updates: pictures and TensorBoard."""

from gatedadapters.inspection.picture import picture, save_png
from gatedadapters.inspection.shift import save_shift_png, shift_picture
from gatedadapters.inspection.tensorboard import GateWriter, TensorBoardInspector

__all__ = ["GateWriter", "TensorBoardInspector", "picture", "save_png", "save_shift_png", "shift_picture"]
