"""Importance scores of elements, masks of the elements that may be tuned, and their trainable values."""

from gatedadapters.masking.delta import SparseDelta, apply_mask, get_delta, load_delta
from gatedadapters.masking.elastic import ElasticPenalty
from gatedadapters.masking.keeping import TuningTrial
from gatedadapters.masking.last_blocks import train_last_blocks
from gatedadapters.masking.mask import Mask, Overlap
from gatedadapters.masking.scores import Score, Scores
from gatedadapters.masking.scoring import score
from gatedadapters.masking.selection import select
from gatedadapters.masking.subspace import SubspaceDelta, apply_subspace, load_subspace

__all__ = [
    "ElasticPenalty",
    "Mask",
    "Overlap",
    "Score",
    "Scores",
    "SparseDelta",
    "SubspaceDelta",
    "TuningTrial",
    "apply_mask",
    "apply_subspace",
    "get_delta",
    "load_delta",
    "load_subspace",
    "score",
    "select",
    "train_last_blocks",
]
