"""The discrete result of a search: the Structure as data, how gates become one, and the folder it is saved in."""

from gatedadapters.structure.structure import KeptPath, Offer, SiteRecord, Structure, column

__all__ = ["KeptPath", "Offer", "SiteRecord", "Structure", "column"]
