"""Placement scores, one file each: a Structure of any budget before any training. To add one, see `base.py`."""

from gatedadapters.allocation.allocate import allocate, place
from gatedadapters.allocation.base import PlacementScore
from gatedadapters.allocation.placement import Placement
from gatedadapters.allocation.probe import Probe
from gatedadapters.allocation.registry import placement_score, register, score_kinds

__all__ = [
    "Placement",
    "PlacementScore",
    "Probe",
    "allocate",
    "place",
    "placement_score",
    "register",
    "score_kinds",
]
