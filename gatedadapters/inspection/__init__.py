"""Looking at gates and structures: pictures and TensorBoard."""

from gatedadapters.inspection.picture import picture, save_png
from gatedadapters.inspection.tensorboard import GateWriter, TensorBoardInspector

__all__ = ["GateWriter", "TensorBoardInspector", "picture", "save_png"]
