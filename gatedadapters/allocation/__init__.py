"""Placement scores, one file each: a Structure of any budget before any training. None is here yet."""
